"""The workspace: a local folder or gs://bucket/prefix, where a file is either absent or whole."""

import errno
import hashlib
import json
import logging
import os
import posixpath
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, Self, TypeVar
from urllib.parse import unquote, urlparse

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tasks.errors import DiskFullError, PreflowError
from tasks.titles import field_title

CHUNK = 1 << 20
PARALLEL_TRANSFERS = 8
COMMITTED = "COMMITTED.json"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
logger = logging.getLogger(__name__)


class Reference(BaseModel):
    """What stages hand each other: where an artifact is and what it must contain, never the data itself."""

    model_config = ConfigDict(frozen=True, extra="forbid", field_title_generator=field_title)

    kind: str = Field(description="What the artifact is.")
    uri: str = Field(description="Where it is: a path or gs:// address, of a file or (an adapter) a folder.")
    sha256: str = Field(description="Digest of its content; an adapter's is that of its COMMITTED.json.")
    size: int = Field(description="Size of the file, in bytes.")
    rows: int = Field(description="Rows that the file holds.")
    manifest: str | None = Field(None, description="Where its manifest.json is, which says what it was made from.")


RefT = TypeVar("RefT", bound=Reference)


class PromptsRef(Reference):
    """Validated, de-duplicated prompts: `prompts.jsonl`."""

    kind: Literal["prompts"] = Field("prompts", description="What the artifact is.")


class CompletionsRef(Reference):
    """One row of N completions per prompt: `completions.jsonl`."""

    kind: Literal["completions"] = Field("completions", description="What the artifact is.")


class VerdictsRef(Reference):
    """The completions with every vote on them: `verdicts.jsonl`."""

    kind: Literal["verdicts"] = Field("verdicts", description="What the artifact is.")


class PreferencesRef(Reference):
    """The training pairs, `train.jsonl`; `val.jsonl`, `judged.jsonl` and `quality.json` lie beside it."""

    kind: Literal["preferences"] = Field("preferences", description="What the artifact is.")
    val_rows: int = Field(0, description="Pairs in val.jsonl beside it, held out of the training.")


class AdapterRef(Reference):
    """A finished adapter: `uri` is its folder, `sha256` the digest of its `COMMITTED.json`."""

    kind: Literal["adapter"] = Field("adapter", description="What the artifact is.")


class EvaluationRef(Reference):
    """A win rate with its interval: `win_rate.json`; `comparisons.jsonl` lies beside it."""

    kind: Literal["evaluation"] = Field("evaluation", description="What the artifact is.")
    adapter_sha256: str = Field(description="Digest of the adapter that was evaluated.")
    win_rate: float = Field(description="Share of the samples it won against the SFT adapter's, ties as halves.")
    lower: float = Field(description="Lower bound of the win rate's interval; the gate looks at this one.")
    upper: float = Field(description="Upper bound of the win rate's interval.")

    def beats(self, bar: float) -> bool:
        """Tell whether the interval's lower bound is over `bar`."""
        return self.lower > bar


class PromotionRef(Reference):
    """The pointer `CURRENT.json` as it stood after the promotion."""

    kind: Literal["promotion"] = Field("promotion", description="What the artifact is.")
    name: str = Field(description="Name under which clients know the adapter.")
    adapter_sha256: str = Field(description="Digest of the adapter that is served.")


def canonical_json(value: object) -> bytes:
    """Encode `value` so that equal values give equal bytes (sorted keys, no spaces, UTF-8)."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()


def digest(value: object) -> str:
    """Return the sha256 (hex) of `value`'s canonical JSON."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def package_versions() -> dict[str, str]:
    """Return the installed versions of the packages that decide results, for a manifest."""
    found = {}
    for name in ("preflow", "prefect", "torch", "transformers", "peft", "trl", "bitsandbytes", "openai"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


class Workspace:
    """A folder of artifacts, local or on Google Cloud Storage, with atomic writes.

    Locally a file is written beside its place and renamed; on GCS it is one object upload. Relative names are
    joined to the root with `uri()`; every method takes the full uri.

    Raises:
        PreflowError: the root cannot be used (`check_writable`), or a file is missing or unreadable.
    """

    def __init__(self, root: str | Path) -> None:
        text = str(root)
        if text.startswith("file://"):
            text = unquote(urlparse(text).path)
        self.is_local = "://" not in text
        if not self.is_local and not text.startswith("gs://"):
            raise PreflowError(f"workspace {text!r}: only a local folder or gs://bucket/prefix can be a workspace")
        self.root = str(Path(text).expanduser().absolute()) if self.is_local else text.rstrip("/")

    @cached_property
    def _fs(self) -> Any:
        """The fsspec file system; gcsfs is imported only when a gs:// address is used."""
        if self.is_local:
            from fsspec.implementations.local import LocalFileSystem

            return LocalFileSystem()
        # Otherwise every call first asks for the bucket's layout, which takes a right that is needed for nothing else.
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        import gcsfs

        return gcsfs.GCSFileSystem(use_listings_cache=False, endpoint_url=os.environ.get("STORAGE_EMULATOR_HOST"))

    def uri(self, *parts: str) -> str:
        """Join `parts` to the root."""
        return posixpath.join(self.root, *parts)

    def check_writable(self) -> None:
        """Write, read back and delete a probe file.

        Raises:
            PreflowError: with the workspace, the system's reason and the remedy.
        """
        probe = self.uri("cache", f".probe-{os.getpid()}")
        try:
            self.write_bytes(probe, b"preflow")
            if self.read_bytes(probe) != b"preflow":
                raise OSError("what was written was not read back")
            self.delete(probe)
        except Exception as error:
            raise PreflowError(
                f"workspace {self.root}: cannot be written ({error}). Choose another folder with `workspace`, or give "
                "this user the right to write there; nothing was spent."
            ) from error

    def exists(self, uri: str) -> bool:
        """Tell whether there is a file at `uri`."""
        return bool(self._fs.isfile(uri))

    def size(self, uri: str) -> int:
        """Return a file's size in bytes."""
        return int(self._fs.size(uri))

    def read_bytes(self, uri: str) -> bytes:
        """Return a file's content.

        Raises:
            FileNotFoundError: there is no such file.
        """
        return bytes(self._fs.cat_file(uri))

    def read_json(self, uri: str) -> Any:
        """Return a JSON file's value.

        Raises:
            PreflowError: the file does not hold JSON.
        """
        try:
            return json.loads(self.read_bytes(uri))
        except (ValueError, RecursionError) as error:
            raise PreflowError(
                f"{uri}: damaged, not JSON ({error}); delete it and run again, it will be made anew"
            ) from error

    def write_bytes(self, uri: str, content: bytes) -> None:
        """Write a whole file, or leave what was there untouched."""
        with self.writing(uri) as out:
            out.write(content)

    def write_json(self, uri: str, value: object) -> None:
        """Write `value` as indented JSON with a newline at its end."""
        self.write_bytes(uri, (json.dumps(value, ensure_ascii=False, indent=2, sort_keys=True) + "\n").encode())

    @contextmanager
    def writing(self, uri: str) -> Iterator["DigestWriter"]:
        """Stream a file: it appears under `uri` when the block ends without an error, and not at all otherwise."""
        folder = Path(posixpath.dirname(uri)) if self.is_local else None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=folder, prefix=".writing-")
        try:
            with os.fdopen(handle, "wb") as raw:
                yield DigestWriter(raw)
                raw.flush()
                os.fsync(raw.fileno())
            if self.is_local:
                os.chmod(name, 0o644)
                os.replace(name, uri)
            else:
                self._fs.put_file(name, uri)
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            raise DiskFullError(
                f"{uri}: the disk is full ({error.strerror}). What was there is untouched and what was finished is "
                "kept: make room, or choose another workspace, and run again."
            ) from error
        finally:
            Path(name).unlink(missing_ok=True)

    def lines(self, uri: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """Yield a file's lines with their newline, from byte `start` up to byte `end`, without holding the file."""
        position = start
        with self._fs.open(uri, "rb") as file:
            file.seek(start)
            for line in file:
                if end is not None and position >= end:
                    return
                position += len(line)
                yield line

    def read_ranges(self, uri: str, ranges: Iterable[tuple[int, int]]) -> Iterator[bytes]:
        """Yield the bytes from start up to end of each range, opening the file once; in ascending order it is fast."""
        with self._fs.open(uri, "rb") as file:
            for start, end in ranges:
                file.seek(start)
                yield file.read(end - start)

    def list(self, uri: str) -> list[str]:
        """Return the uris of the files directly below `uri`, sorted; an absent folder has none."""
        try:
            entries = self._fs.ls(uri, detail=True)
        except FileNotFoundError:
            return []
        prefix = "" if self.is_local else "gs://"
        return sorted(prefix + entry["name"] for entry in entries if entry["type"] == "file")

    def folders(self, uri: str) -> Sequence[str]:
        """Return the names of the folders directly below `uri`, sorted; an absent folder has none."""
        try:
            entries = self._fs.ls(uri, detail=True)
        except FileNotFoundError:
            return []
        return sorted(
            posixpath.basename(entry["name"].rstrip("/")) for entry in entries if entry["type"] == "directory"
        )

    def delete(self, uri: str) -> None:
        """Delete a file if it is there."""
        if self.exists(uri):
            self._fs.rm_file(uri)

    def delete_folder(self, uri: str) -> None:
        """Delete a folder and all below it, if it is there."""
        if self._fs.exists(uri):
            self._fs.rm(uri, recursive=True)

    def sha256(self, uri: str) -> str:
        """Return the sha256 (hex) of a file's content."""
        if self.is_local:
            with open(uri, "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        total = hashlib.sha256()
        with self._fs.open(uri, "rb") as file:
            while chunk := file.read(CHUNK):
                total.update(chunk)
        return total.hexdigest()

    def commit_folder(self, local: Path, uri: str, extra: dict[str, Any] | None = None) -> str:
        """Copy a local folder to `uri`: the files first, `COMMITTED.json` (sizes, sha256) last.

        Returns:
            The sha256 of `COMMITTED.json`, which identifies the folder's content.
        """
        names = sorted(str(p.relative_to(local)) for p in local.rglob("*") if p.is_file() and p.name != COMMITTED)
        with ThreadPoolExecutor(PARALLEL_TRANSFERS) as pool:
            list(pool.map(lambda name: self._put(local / name, posixpath.join(uri, name)), names))
        files = {name: {"size": (local / name).stat().st_size, "sha256": file_sha256(local / name)} for name in names}
        manifest = {"files": files, **(extra or {})}
        self.write_json(posixpath.join(uri, COMMITTED), manifest)
        return self.sha256(posixpath.join(uri, COMMITTED))

    def fetch_folder(self, uri: str, local: Path) -> Path:
        """Return a local folder with the committed files of `uri`, verified; a local `uri` is returned as it is.

        Raises:
            PreflowError: the folder is not committed, or a file is missing or differs from its digest.
        """
        self.verify_folder(uri, deep=self.is_local)
        if self.is_local:
            return Path(uri)
        committed = self.read_json(posixpath.join(uri, COMMITTED))
        local.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(PARALLEL_TRANSFERS) as pool:
            list(pool.map(lambda name: self._get(posixpath.join(uri, name), local / name), committed["files"]))
        (local / COMMITTED).write_bytes(self.read_bytes(posixpath.join(uri, COMMITTED)))
        Workspace(local).verify_folder(str(local))
        return local

    def verify_folder(self, uri: str, deep: bool = True) -> dict[str, Any]:
        """Check a committed folder against its `COMMITTED.json` and return that.

        Args:
            uri: the folder.
            deep: compare sha256 too, not only presence and size.

        Raises:
            PreflowError: naming the first file that is missing, cut or changed.
        """
        marker = posixpath.join(uri, COMMITTED)
        if not self.exists(marker):
            raise PreflowError(f"{uri}: has no {COMMITTED}, so it was never finished; run the stage that makes it")
        committed: dict[str, Any] = self.read_json(marker)
        for name, expected in committed["files"].items():
            file = posixpath.join(uri, name)
            if not self.exists(file):
                raise PreflowError(f"{file}: missing, though {COMMITTED} lists it; delete the folder and run again")
            if self.size(file) != expected["size"] or (deep and self.sha256(file) != expected["sha256"]):
                raise PreflowError(f"{file}: damaged, differs from {COMMITTED}; delete the folder and run again")
        return committed

    def is_intact(self, reference: Reference) -> bool:
        """Tell whether the artifact that `reference` names is there as it was (on GCS: there, with its size)."""
        if isinstance(reference, AdapterRef) or reference.kind == "adapter":
            try:
                self.verify_folder(reference.uri, deep=self.is_local)
            except PreflowError:
                return False
            return self.sha256(posixpath.join(reference.uri, COMMITTED)) == reference.sha256
        if not self.exists(reference.uri) or self.size(reference.uri) != reference.size:
            return False
        return not self.is_local or self.sha256(reference.uri) == reference.sha256

    def find_finished(self, manifest: str, kind: type[RefT]) -> RefT | None:
        """Return the artifact of a manifest if that was written, which happens last, and all its files are intact."""
        if not self.exists(manifest):
            return None
        try:
            value = self.read_json(manifest)
            artifact = kind.model_validate(value["artifact"])
            files = [
                Reference(kind="file", uri=posixpath.join(posixpath.dirname(manifest), name), **facts)
                for name, facts in value.get("files", {}).items()
            ]
        except (PreflowError, ValidationError, KeyError, TypeError) as error:
            logger.warning("%s is damaged (%s): its artifact is put together again", manifest, type(error).__name__)
            return None
        parts: list[Reference] = [artifact, *files]
        for file in parts:
            if not self.is_intact(file):
                logger.warning("%s is missing or differs from its digest: it is put together again", file.uri)
                return None
        return artifact

    def _put(self, local: Path, uri: str) -> None:
        with self.writing(uri) as out, local.open("rb") as file:
            while chunk := file.read(CHUNK):
                out.write(chunk)

    def _get(self, uri: str, local: Path) -> None:
        local.parent.mkdir(parents=True, exist_ok=True)
        self._fs.get_file(uri, str(local))

    @classmethod
    def holding(cls, uri: str) -> Self:
        """Return a workspace through which the single file or folder at `uri` can be read."""
        return cls(uri if "://" in uri else posixpath.dirname(str(Path(uri).expanduser().absolute())))


class DigestWriter:
    """A binary file that counts lines and bytes and keeps the sha256 of what is written."""

    def __init__(self, raw: Any) -> None:
        self._raw = raw
        self._sha256 = hashlib.sha256()
        self.size = 0
        self.rows = 0

    def write(self, content: bytes) -> None:
        """Append `content`."""
        self._raw.write(content)
        self._sha256.update(content)
        self.size += len(content)
        self.rows += content.count(b"\n")

    def write_row(self, row: dict[str, Any]) -> None:
        """Append one JSON row."""
        self.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")

    @property
    def sha256(self) -> str:
        """The digest of everything written so far."""
        return self._sha256.hexdigest()

    def facts(self) -> dict[str, Any]:
        """Return sha256, size (bytes) and rows, as a reference wants them."""
        return {"sha256": self.sha256, "size": self.size, "rows": self.rows}


def file_sha256(path: Path) -> str:
    """Return the sha256 (hex) of a local file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_digest(uri: str) -> str:
    """Return one digest for an adapter or model folder: of the names and contents of its weights and configuration.

    Raises:
        PreflowError: the folder is missing or holds no weights.
    """
    store = Workspace.holding(uri)
    files = {posixpath.basename(file): file for file in store.list(uri)}
    wanted = {name: file for name, file in files.items() if name.endswith((".safetensors", "config.json"))}
    if not any(name.endswith(".safetensors") for name in wanted):
        found = ", ".join(sorted(files)) or "nothing"
        raise PreflowError(
            f"{uri}: holds no .safetensors weights (found: {found}). Give the folder that save_pretrained() wrote; "
            "pickled .bin weights are not read, save them again with safe_serialization=True."
        )
    return digest({name: store.sha256(file) for name, file in wanted.items()})


def server_path(uri: str, workspace: str, adapter_root: str | None) -> str:
    """Return the path under which the vLLM server sees `uri`.

    Raises:
        PreflowError: the workspace is on GCS and `adapter_root` does not say where the server mounts it.
    """
    store = Workspace(workspace)
    if adapter_root is not None:
        return posixpath.join(adapter_root, posixpath.relpath(uri, store.root))
    if not store.is_local:
        raise PreflowError(
            f"vLLM cannot read {uri}: mount the bucket there (Cloud Storage FUSE) and give the folder as adapter_root"
        )
    return uri
