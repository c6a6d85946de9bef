"""The workspace: a local folder or gs://bucket/prefix, where a file is either absent or whole."""

import errno
import hashlib
import json
import logging
import posixpath
import random
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from pydantic import BaseModel, ValidationError

from tasks.config.base import resolve_location
from tasks.errors import DiskFullError, PreflowError
from tasks.store.local import LocalStorage
from tasks.store.refs import (  # others take them from here
    MANIFEST,
    AdapterRef,
    Artifact,
    ChoiceRef,
    CompletionsRef,
    Cost,
    EvaluationRef,
    FileFacts,
    Manifest,
    Origin,
    PipelineResult,
    PreferencesRef,
    PromotionRef,
    PromptsRef,
    Reference,
    RefT,
    VerdictsRef,
    digest,
)
from tasks.store.storage import DigestWriter, Stat, Storage

CHUNK = 1 << 20
PARALLEL_TRANSFERS = 16
UPDATE_ATTEMPTS = 30
PROBED_SECONDS = 300.0
COMMITTED = "COMMITTED.json"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
logger = logging.getLogger(__name__)
ModelT = TypeVar("ModelT", bound=BaseModel)
# A row of a JSONL file as it stands there.
Row: TypeAlias = dict[str, Any]
_writable_until: dict[str, float] = {}
# What files have been read for, so that a base model of gigabytes is read once a process.
_digests: dict[Stat, str] = {}


class Workspace:
    """A folder of artifacts, on a disk or in a bucket: where a file is either absent or whole.

    Every method takes a full uri; relative names are joined to the root with `uri()`.

    Args:
        address: a folder (relative, with `~` or file://, as a person writes it), or gs://bucket/prefix.
        guard: called before a file appears, changes or goes; it raises when this process may no longer write.

    Raises:
        PreflowError: the address is of no kind that there is.
    """

    def __init__(self, address: str | Path, guard: Callable[[], object] = lambda: None) -> None:
        self.root = resolve_location(str(address))
        self.is_local = "://" not in self.root
        self._guard = guard
        self.storage: Storage
        if self.is_local:
            self.storage = LocalStorage()
        elif re.match("gs://([^/@]+@)?[^/@]+(/|$)", self.root):
            from tasks.store.gcs import GcsStorage  # Google's client takes a second, and most have no use for it

            self.storage = GcsStorage(self.root)
        else:
            raise PreflowError(f"workspace {self.root!r}: only a local folder or gs://bucket/prefix can be a workspace")

    @classmethod
    def holding(cls, uri: str) -> "Workspace":
        """Return a workspace through which the single file or folder at `uri` can be read."""
        location = resolve_location(uri)
        return cls(location if "://" in location else posixpath.dirname(location))

    def uri(self, *parts: str) -> str:
        """Join `parts` to the root."""
        return posixpath.join(self.root, *parts)

    def check_writable(self) -> None:
        """Write, read back and delete a probe file; a bucket that was found writable is asked again after minutes only.

        Raises:
            PreflowError: with the workspace, the system's reason and the remedy.
        """
        if time.monotonic() < _writable_until.get(self.root, 0.0):
            return
        probe = self.uri("cache", f".probe-{uuid.uuid4().hex}")  # all pods have the same process ids
        try:
            self.write_bytes(probe, b"preflow")
            if self.read_bytes(probe) != b"preflow":
                raise OSError("what was written was not read back")
            self.delete(probe)
            if not self.is_local:
                _writable_until[self.root] = time.monotonic() + PROBED_SECONDS
        except Exception as error:
            raise PreflowError(
                f"workspace {self.root}: cannot be written ({error}). Choose another folder with `workspace`, or give "
                "this user the right to write there; nothing was spent."
            ) from error

    def exists(self, uri: str) -> bool:
        """Tell whether there is a file at `uri`."""
        return self.storage.stat(uri) is not None

    def _known(self, uri: str) -> Stat:
        """Return what is known of a file that must be there."""
        stat = self.storage.stat(uri)
        if stat is None:
            raise FileNotFoundError(errno.ENOENT, "no such file", uri)
        return stat

    def size(self, uri: str) -> int:
        """Return a file's size in bytes."""
        return self._known(uri).size

    def read_bytes(self, uri: str, start: int = 0, end: int | None = None) -> bytes:
        """Return the bytes from `start` up to `end`, or the whole file; less where the file ends before."""
        with self.storage.open(uri, start, end) as file:
            return file.read()

    def read_json(self, uri: str) -> Any:
        """Return a JSON file's value.

        Raises:
            FileNotFoundError: there is no such file.
            PreflowError: the file does not hold JSON.
        """
        return _parse_json(uri, self.read_bytes(uri))

    def read_kept(self, uri: str, kind: type[ModelT]) -> ModelT | None:
        """Return what was kept in a JSON file; None where there is none, or one of another version."""
        if not self.exists(uri):
            return None
        try:
            return kind.model_validate(self.read_json(uri))
        except ValidationError:
            logger.warning("%s was written by another version of preflow: what it names is looked up again", uri)
            return None

    def write_bytes(self, uri: str, content: bytes) -> None:
        """Write a whole file, or leave what was there untouched."""
        with self.writing(uri) as out:
            out.write(content)

    def write_json(self, uri: str, value: object) -> None:
        """Write `value` as indented JSON with a newline at its end."""
        self.write_bytes(uri, indented_json(value))

    def update_json(self, uri: str, change: Callable[[Any], Any]) -> Any:
        """Replace a JSON file's value by what `change` makes of it (None where there is none), losing no one's update.

        On a bucket an update whose answer is lost, and which another writer's follows before it is tried again, is made
        twice.

        Args:
            uri: the file.
            change: called again if another writer came first; None leaves the file as it is.

        Returns:
            The value that now stands.

        Raises:
            PreflowError: the file does not hold JSON, or others replaced it each time.
        """
        for attempt in range(UPDATE_ATTEMPTS):
            content, version = self.storage.read_versioned(uri)
            value = None if content is None else _parse_json(uri, content)
            changed = change(value)
            if changed is None:
                return value
            if self.swap(uri, indented_json(changed), version) is not None:
                return changed
            time.sleep(random.uniform(0, min(1.0, 0.02 * 2**attempt)))
        raise PreflowError(f"{uri}: others replaced it {UPDATE_ATTEMPTS} times in a row; run again when they are done")

    def swap(self, uri: str, content: bytes, version: object) -> object | None:
        """Replace a file if it still has `version`, whoever else writes; return the new version, or None if not."""
        self._guard()
        return self.storage.swap(uri, content, version)

    @contextmanager
    def writing(self, uri: str) -> Iterator[DigestWriter]:
        """Stream a file: it appears under `uri` when the block ends without an error, and not at all otherwise."""
        try:
            with self.storage.writing(uri) as out:
                yield out
                self._guard()
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            raise DiskFullError(
                f"{uri}: the disk is full ({error.strerror}). What was there is untouched and what was finished is "
                "kept: make room, or choose another workspace, and run again."
            ) from error

    def lines(self, uri: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """Yield a file's lines with their newline, from byte `start` up to byte `end`, without holding the file."""
        with self.storage.open(uri, start, end) as file:
            yield from file

    def list(self, uri: str) -> list[str]:
        """Return the uris of the files directly below `uri`, sorted; an absent folder has none."""
        return sorted(stat.uri for stat in self.storage.scan(uri)[0].values())

    def folders(self, uri: str) -> Sequence[str]:
        """Return the names of the folders directly below a folder, sorted; an absent one has none."""
        return sorted(self.storage.scan(uri)[1])

    def delete(self, uri: str) -> None:
        """Delete a file if it is there."""
        self._guard()
        self.storage.remove(uri)

    def delete_folder(self, uri: str) -> None:
        """Delete a folder and all below it, if it is there; first what says that it is whole."""
        self._guard()
        self.storage.remove(posixpath.join(uri, COMMITTED))
        self.storage.remove_tree(uri)

    def sha256(self, uri: str) -> str:
        """Return the sha256 (hex) of a file's content; what preflow wrote to a bucket need not be read for it."""
        return self._sha256_of(self._known(uri))

    def _sha256_of(self, stat: Stat) -> str:
        """Return the sha256 of a file, read at most once for each of its versions."""
        if known := stat.sha256 or _digests.get(stat):
            return known
        with self.storage.open(stat.uri) as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
        if stat.version is not None:
            _digests[stat] = found
        return found

    def digests(self, uri: str, endings: tuple[str, ...]) -> dict[str, str]:
        """Return name and sha256 of the files directly below `uri` whose names end with one of `endings`."""
        files, _ = self.storage.scan(uri)
        return {name: self._sha256_of(stat) for name, stat in files.items() if name.endswith(endings)}

    def commit_folder(self, local: Path, uri: str, extra: Mapping[str, object] | None = None) -> str:
        """Copy a local folder to `uri`: the files first, `COMMITTED.json` (sizes, sha256, and what is `extra`) last.

        Returns:
            The sha256 of `COMMITTED.json`, which identifies the folder's content.
        """

        def put(name: str) -> dict[str, object]:
            with self.writing(posixpath.join(uri, name)) as out, (local / name).open("rb") as file:
                shutil.copyfileobj(file, out, CHUNK)
            return out.file.model_dump()

        names = sorted(str(p.relative_to(local)) for p in local.rglob("*") if p.is_file() and p.name != COMMITTED)
        with ThreadPoolExecutor(PARALLEL_TRANSFERS) as pool:
            marker = indented_json({"files": dict(zip(names, pool.map(put, names), strict=True)), **(extra or {})})
        self.write_bytes(posixpath.join(uri, COMMITTED), marker)
        return hashlib.sha256(marker).hexdigest()

    def fetch_folder(self, uri: str, local: Path) -> Path:
        """Return a local folder with the committed files of `uri`, verified; a local `uri` is returned as it is.

        Raises:
            PreflowError: the folder is not committed, or a file is missing or differs from its digest.
        """
        if self.is_local:
            self.verify_folder(uri)
            return Path(uri)
        committed = self.committed_files(uri)
        self._fetch(uri, committed, local)
        for name, facts in committed.items():
            if file_sha256(local / name) != facts.sha256:
                raise PreflowError(_not_as_committed(f"{uri}/{name}: damaged"))
        return local

    def fetch_files(self, uri: str, local: Path) -> Path:
        """Copy the files directly below `uri` into a local folder, committed or not, and return that."""
        return self._fetch(uri, map(posixpath.basename, self.list(uri)), local)

    def _fetch(self, uri: str, names: Iterable[str], local: Path) -> Path:
        def get(name: str) -> None:
            target, source = local / name, posixpath.join(uri, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                with self.storage.open(source) as file, target.open("wb") as out:
                    shutil.copyfileobj(file, out, CHUNK)
            except FileNotFoundError as error:
                raise PreflowError(_not_as_committed(f"{source}: missing")) from error

        local.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(PARALLEL_TRANSFERS) as pool:
            list(pool.map(get, names))
        return local

    def verify_folder(self, uri: str) -> dict[str, FileFacts]:
        """Check a committed folder against its `COMMITTED.json`, and return its files as `committed_files` does.

        On a bucket the digests are those that the objects carry, so that nothing is read.

        Raises:
            PreflowError: naming the first file that is missing, cut or changed.
        """
        committed = self.committed_files(uri)
        for problem in self._problems(uri, committed):
            raise PreflowError(_not_as_committed(problem))
        return committed

    def _problems(self, uri: str, files: Mapping[str, FileFacts]) -> Iterator[str]:
        """Yield which of a folder's files are not as they should be."""
        there, _ = self.storage.scan(uri, deep=True)
        for name, facts in files.items():
            if name not in there:
                yield f"{uri}/{name}: missing"
            elif not self._is_as(there[name], facts):
                yield f"{uri}/{name}: damaged"

    def committed_files(self, uri: str) -> dict[str, FileFacts]:
        """Return size and sha256 of the files of a committed folder, `COMMITTED.json` itself among them."""
        marker = posixpath.join(uri, COMMITTED)
        try:
            content = self.read_bytes(marker)
        except (FileNotFoundError, NotADirectoryError) as error:
            message = f"{uri}: has no {COMMITTED}, so it was never finished; run the stage that makes it"
            raise PreflowError(message) from error
        try:
            files = _Committed.model_validate(_parse_json(marker, content)).files
        except ValidationError as error:
            raise PreflowError(_not_as_committed(f"{marker}: damaged")) from error
        return {**files, COMMITTED: FileFacts(size=len(content), sha256=hashlib.sha256(content).hexdigest())}

    def write_manifest(self, manifest: Manifest) -> None:
        """Write an artifact's manifest, which makes it a finished one: the last thing that a stage does."""
        if manifest.artifact.manifest is None:
            raise ValueError(f"{manifest.artifact.uri}: a finished artifact names its manifest")
        self.write_json(manifest.artifact.manifest, manifest.model_dump(mode="json"))

    def read_manifest(self, of: Origin | str) -> Manifest:
        """Return the manifest of an artifact, given that or the manifest's uri.

        Raises:
            PreflowError: it is missing or damaged.
        """
        uri = of if isinstance(of, str) else of.manifest
        try:
            if uri is not None:
                return Manifest.model_validate(self.read_json(uri)).found_at(uri, self.root)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise PreflowError(f"{uri}: missing; run the stage that makes it") from error
        except ValidationError as error:
            where = ".".join(map(str, error.errors()[0]["loc"])) or "all of it"
            raise PreflowError(
                f"{uri}: damaged, or of another version of preflow ({where}: {error.errors()[0]['msg']}); run the "
                "stage that makes it again"
            ) from error
        raise PreflowError(f"{of}: names no manifest, so nothing tells what it was made from")

    def read_rows(self, uri: str) -> Iterator[Row]:
        """Yield the rows of a JSONL file that preflow wrote, one at a time."""
        return (json.loads(line) for line in self.lines(uri))

    def is_intact(self, reference: Reference) -> bool:
        """Tell whether the artifact that `reference` names is there as it was, with all files of its manifest."""
        if reference.manifest is None:
            stat = self.storage.stat(reference.uri)
            return stat is not None and self._is_as(stat, FileFacts(size=reference.size, sha256=reference.sha256))
        manifest = self.find_manifest(reference.manifest)
        return manifest is not None and manifest.artifact.sha256 == reference.sha256

    def _is_as(self, stat: Stat, facts: FileFacts) -> bool:
        return stat.size == facts.size and self._sha256_of(stat) == facts.sha256

    def find_finished(self, manifest: str, kind: type[RefT]) -> RefT | None:
        """Return the artifact of a manifest if that was written, which happens last, and all its files are intact."""
        found = self.find_manifest(manifest)
        return found.artifact if found is not None and isinstance(found.artifact, kind) else None

    def find_manifest(self, uri: str) -> Manifest | None:
        """Return a manifest if it was written, which happens last, and all its files are as it says."""
        try:
            manifest = self.read_manifest(uri)
        except PreflowError as error:
            if not isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
                logger.warning("%s; its artifact is put together again", error)
            return None
        for problem in self._problems(posixpath.dirname(uri), manifest.files):
            logger.warning("%s, not as %s has it: it is put together again", problem, uri)
            return None
        return manifest


def indented_json(value: object) -> bytes:
    """Encode `value` as JSON for people: indented, sorted, with a newline at its end."""
    return (json.dumps(value, ensure_ascii=False, indent=2, sort_keys=True) + "\n").encode()


def _parse_json(uri: str, content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise PreflowError(
            f"{uri}: damaged, not JSON ({error}); delete it and run again, it will be made again"
        ) from error


class _Committed(BaseModel):
    """What `COMMITTED.json` says of a folder."""

    files: dict[str, FileFacts]


def _not_as_committed(problem: str) -> str:
    return f"{problem}, not as {COMMITTED} has it; delete the folder and run again"


def file_sha256(path: Path) -> str:
    """Return the sha256 (hex) of a local file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_digest(uri: str) -> str:
    """Return one digest for an adapter or model folder: of the names and contents of its weights and configuration.

    Raises:
        PreflowError: the folder is missing or holds no weights.
    """
    uri = resolve_location(uri)
    store = Workspace.holding(uri)
    files = store.digests(uri, (".safetensors", "config.json"))
    if not any(name.endswith(".safetensors") for name in files):
        found = ", ".join(sorted(posixpath.basename(file) for file in store.list(uri))) or "nothing"
        raise PreflowError(
            f"{uri}: holds no .safetensors weights (found: {found}). Give the folder that save_pretrained() wrote; "
            "pickled .bin weights are not read, save them again with safe_serialization=True."
        )
    return digest(files)


def server_path(uri: str, workspace: str, adapter_root: str | None) -> str:
    """Return the path under which the vLLM server sees `uri`.

    Raises:
        PreflowError: the workspace is on GCS and `adapter_root` does not say where the server mounts it.
    """
    store = Workspace(workspace)
    if adapter_root is not None:
        # The name of a block of credentials (gs://BLOCK@bucket) is part of an address, not of a path.
        place, root = (re.sub("^gs://[^/@]*@", "gs://", address) for address in (uri, store.root))
        return posixpath.join(adapter_root, posixpath.relpath(place, root))
    if not store.is_local:
        raise PreflowError(
            f"vLLM cannot read {uri}: mount the bucket there (Cloud Storage FUSE) and give the folder as adapter_root"
        )
    return uri


def stage_key(stage: str, version: int, **content: Any) -> str:
    """Return the key of what `stage` makes from `content` (digests and settings): 32 hex digits."""
    return digest({"stage": stage, "version": version, **content})[:32]
