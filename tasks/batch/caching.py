"""The one place that makes cache keys and result settings.

A task result is a small JSON reference, kept under `<workspace>/cache/<task>-<key>`. The key holds the stage, an
explicit version and content digests. A record is believed only if it was written by our serializer and the artifact it
names is intact; otherwise Prefect finds nothing under the key and runs the task again.
"""

import asyncio
import json
import logging
import posixpath
from typing import ParamSpec, TypeVar

from prefect import Task
from prefect.context import AsyncClientContext
from prefect.filesystems import WritableFileSystem
from prefect.serializers import JSONSerializer

from tasks.errors import PreflowError
from tasks.store.workspace import Origin, Reference, Workspace, digest

P = ParamSpec("P")
R = TypeVar("R")
logger = logging.getLogger(__name__)

# Neither pickle nor Prefect's own "json" is safe to read from a bucket: both build objects that the file names.
SERIALIZER = JSONSerializer(object_encoder=None, object_decoder=None)


class WorkspaceResults(WritableFileSystem):
    """Prefect result storage in a preflow workspace: atomic, JSON only, and never a reference to a damaged artifact."""

    _block_type_name = "Preflow workspace results"
    _block_type_slug = "preflow-workspace-results"

    root: str

    # Prefect's synchronous engine calls the first two with _sync=True; its asynchronous one takes those with the `a`.
    def write_path(self, path: str, content: bytes, _sync: bool = True) -> None:  # type: ignore[override]
        """Write one record, whole or not at all."""
        store = Workspace(self.root)
        store.write_bytes(store.uri("cache", path), content)

    def read_path(self, path: str, _sync: bool = True) -> bytes:  # type: ignore[override]
        """Return one record.

        Raises:
            PreflowError: the record is not ours, or its artifact is missing or damaged: the task must run again.
        """
        store = Workspace(self.root)
        content = store.read_bytes(store.uri("cache", path))
        if problem := _find_problem(store, content):
            logger.warning("cache record %s is not used: %s; the task runs again", path, problem)
            raise PreflowError(f"cache record {path}: {problem}")
        return content

    async def awrite_path(self, path: str, content: bytes) -> None:
        """Write one record, in a thread."""
        await asyncio.to_thread(self.write_path, path, content)

    async def aread_path(self, path: str) -> bytes:
        """Return one record; see `read_path`."""
        return await asyncio.to_thread(self.read_path, path)


def _find_problem(store: Workspace, content: bytes) -> str | None:
    try:
        record = json.loads(content)
        serializer = record["metadata"]["serializer"]
        trusted = {name: serializer.get(name) for name in ("type", "object_encoder", "object_decoder", "jsonlib")}
        if trusted != SERIALIZER.model_dump(include=set(trusted)):
            return f"it wants to be read with the serializer {serializer.get('type')!r}, which could run code"
        if serializer.get("dumps_kwargs") or serializer.get("loads_kwargs"):
            return "its serializer has options that preflow never writes"
        reference = Reference.model_validate(json.loads(record["result"]), extra="ignore")  # of any kind
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "it is not a whole record of preflow"
    return None if store.is_intact(reference) else f"{reference.uri} is missing or differs from its digest"


async def open_results(workspace: str) -> WorkspaceResults:
    """Return the saved result-storage block of a workspace; Prefect takes only saved ones."""
    root = Workspace(workspace).root
    block = WorkspaceResults(root=root)
    async with AsyncClientContext.get_or_create():
        await block.save(name=f"preflow-{digest(root)[:16]}", overwrite=True)
    return block


RefT = TypeVar("RefT", bound=Reference)
# Written next to an artifact when a training begins on it: from then on nothing of it may change.
USED = "used.json"


def find_finished(store: Workspace, folder: str, kind: type[RefT]) -> RefT | None:
    """Return a finished stage's artifact.

    One with failures that may pass is not finished: they are asked for again, unless a training has begun on what there
    is.
    """
    found = store.find_manifest(f"{folder}/manifest.json")
    if found is None or not isinstance(found.artifact, kind):
        return None
    # One count of each kind, or one for each judge.
    passing = sum(count for name, count in found.counts.items() if name.startswith("passing"))
    if passing and not store.exists(f"{folder}/{USED}"):
        logger.info("%s: %d requests failed for a reason that may pass, and are asked again", folder, passing)
        return None
    return found.artifact


def mark_used(reference: Reference, workspace: str) -> None:
    """Note on the completions and verdicts behind `reference` that a training begins: they are finished as they are.

    Asking for failed rows again would change them, and a training that is under way would have to start from scratch.
    """
    store, waiting = Workspace(workspace), [Origin.model_validate(reference.model_dump())]
    while waiting:
        source = waiting.pop()
        if source.manifest is None or not store.exists(source.manifest):
            continue
        if source.kind in ("completions", "verdicts"):
            store.write_json(f"{posixpath.dirname(source.manifest)}/{USED}", {"by": reference.uri})
        waiting += store.read_manifest(source).upstream


def cached(task: Task[P, R], key: str, results: WorkspaceResults, refresh: bool = False) -> Task[P, R]:
    """Return `task` with its result kept under `key` in the workspace; with `refresh` it runs whatever is kept.

    The task must return a reference's `model_dump(mode="json")`: Prefect completes a task whose result it cannot
    serialise, and caches nothing, without a word.
    """
    return task.with_options(
        cache_key_fn=lambda *_: f"{task.name}-{key}",
        refresh_cache=refresh,
        result_storage=results,
        result_serializer=SERIALIZER,
        persist_result=True,
        cache_result_in_memory=False,
    )
