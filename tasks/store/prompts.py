"""Prompts into the workspace: validated whole, duplicates dropped and counted, held-out rows picked."""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from tasks.config.base import resolve_location
from tasks.errors import PreflowError
from tasks.store.forms import no_such_file
from tasks.store.records import PromptRow, read_rows
from tasks.store.workspace import MANIFEST, DigestWriter, Manifest, Origin, PromptsRef, Workspace, digest, stage_key

VERSION = 4
logger = logging.getLogger(__name__)


def import_prompts(source: str, workspace: str, limit: int | None = None, exclude: str | None = None) -> PromptsRef:
    """Check every row of a prompts file and keep its prompts in the workspace.

    Args:
        source: prompts or SFT rows in any form of `tasks.store.forms`; a path or gs:// address.
        workspace: where to keep them.
        limit: keep at most this many, the first in file order.
        exclude: address of training pairs; rows that share an id or a group with one are left out.

    Raises:
        PreflowError: a row is wrong (file, line, field), or no row is left.
    """
    source, store = resolve_location(source), Workspace(workspace)
    upstream = [Origin(kind="file", uri=source, sha256=source_digest(source))]
    if exclude:
        upstream.append(Origin(kind="preferences", uri=exclude, sha256=store.sha256(exclude)))
    content, trained = upstream[0].sha256, upstream[1].sha256 if exclude else None
    key = stage_key("prompts", VERSION, source=content, limit=limit, exclude=trained)

    def copy(out: DigestWriter) -> dict[str, int]:
        rows = read_rows(PromptRow, source, Workspace.holding(source))
        counts = _copy_prompts(rows, out, _read_trained(store, exclude), limit)
        if not out.rows:
            raise PreflowError(
                f"{source}: no prompt is left to evaluate on: all {counts['read']} occur in training pairs. Give "
                "held-out prompts with `eval_prompts`, or raise judging.val_ratio."
            )
        if counts.pop("groups") == 1 and out.rows > 1 and limit is None and exclude is None:
            raise PreflowError(
                f"{source}: all {out.rows} rows have the same `group`, so that none can be held out of the others' "
                "training. Take the field out, or give the rows groups that differ."
            )
        logger.info("%s: %d prompts; of the rows %s", source, out.rows, counts)
        return counts

    return _find_or_make(store, key, upstream, copy)


def _find_or_make(
    store: Workspace, key: str, upstream: Sequence[Origin], write: Callable[[DigestWriter], dict[str, int]]
) -> PromptsRef:
    """Return the prompts that lie under a key; where there are none `write` makes them, and counts the rows."""
    folder = store.uri("prompts", key)
    if known := store.find_finished(f"{folder}/{MANIFEST}", PromptsRef):
        return known
    with store.writing(f"{folder}/prompts.jsonl") as out:
        counts = write(out)
    artifact = PromptsRef(uri=f"{folder}/prompts.jsonl", manifest=f"{folder}/{MANIFEST}", **out.facts())
    store.write_manifest(
        Manifest(
            artifact=artifact, stage="prompts", version=VERSION, key=key, upstream=tuple(upstream),
            files={"prompts.jsonl": out.file}, counts=counts,
        )
    )  # fmt: skip
    return artifact


def count_shared(prompts: str, others: str, store: Workspace) -> int:
    """Return how many rows of one artifact share an id or a group with a row of another: prompts, samples or pairs."""
    ids, groups = _read_trained(store, others)
    return sum(bytes.fromhex(row["id"]) in ids or row.get("group") in groups for row in store.read_rows(prompts))


def split_prompts(prompts: PromptsRef, workspace: str, most: int, seed: int) -> tuple[PromptsRef, PromptsRef]:
    """Divide prompts into a part of at most `most`, drawn at random, and the rest; a group is never divided.

    Raises:
        PreflowError: no group is that small.
    """
    store = Workspace(workspace)
    sizes = Counter(row.get("group") or row["id"] for row in store.read_rows(prompts.uri))
    drawn, left = set[str](), most
    for cluster in sorted(sizes, key=lambda name: digest([seed, name])):
        if sizes[cluster] <= left:
            drawn.add(cluster)
            left -= sizes[cluster]
    if not drawn:
        raise PreflowError(
            f"{prompts.rows} held-out prompts, the smallest group of {min(sizes.values())}: at most {most} of them may "
            "choose among evaluation.checkpoints, and a group is not divided. Give more held-out prompts or smaller "
            "groups, or set evaluation.checkpoints to 0."
        )

    def write_part(is_drawn: bool) -> PromptsRef:
        def copy(out: DigestWriter) -> dict[str, int]:
            for row in store.read_rows(prompts.uri):
                if ((row.get("group") or row["id"]) in drawn) == is_drawn:
                    out.write_row(row)
            return {"read": prompts.rows, "duplicates": 0, "in_training": 0}

        key = stage_key("prompts", VERSION, source=prompts.sha256, drawn=sorted(drawn), is_drawn=is_drawn)
        return _find_or_make(store, key, [Origin(kind="file", uri=prompts.uri, sha256=prompts.sha256)], copy)

    return write_part(True), write_part(False)


def source_digest(source: str) -> str:
    """Return the digest of a file of rows, or of the data files of a folder that `datasets` saved.

    Raises:
        PreflowError: there is neither.
    """
    origin = Workspace.holding(source)
    if origin.exists(source):
        return origin.sha256(source)
    if shards := origin.digests(source, (".arrow", ".parquet")):
        return digest(shards)
    raise no_such_file(source)


def _copy_prompts(
    prompts: Iterable[PromptRow], out: DigestWriter, left_out: tuple[set[bytes], set[str]], limit: int | None
) -> dict[str, int]:
    """Write each prompt once, except those whose id or group is left out; all rows are read, to the last."""
    counts = {"read": 0, "duplicates": 0, "in_training": 0}
    seen: set[bytes] = set()
    # Of rows without a group each is one of its own.
    found_groups: set[str | bytes] = set()
    ids, groups = left_out
    for prompt in prompts:
        identity = bytes.fromhex(prompt.id)
        counts["read"] += 1
        if identity in ids or (prompt.group is not None and prompt.group in groups):
            counts["in_training"] += 1
        elif identity in seen:
            counts["duplicates"] += 1
        elif limit is None or out.rows < limit:
            seen.add(identity)
            found_groups.add(prompt.group if prompt.group is not None else identity)
            out.write_row(prompt.model_dump(exclude_none=True))
    return {**counts, "groups": len(found_groups)}


def _read_trained(store: Workspace, pairs: str | None) -> tuple[set[bytes], set[str]]:
    """Return the ids and the groups that occur in training pairs."""
    ids: set[bytes] = set()
    groups: set[str] = set()
    for row in store.read_rows(pairs) if pairs else ():
        ids.add(bytes.fromhex(row["id"]))
        if row.get("group") is not None:
            groups.add(row["group"])
    return ids, groups
