"""Completions and preference pairs that something else made, as artifacts of the workspace: a start for a run."""

import logging
from collections import Counter

from tasks.config import JudgingConfig, resolve_location
from tasks.errors import PreflowError
from tasks.judge.pairs import check_spread, finish_pairs, is_validation
from tasks.judge.quality.audit import measure_pairs
from tasks.store.prompts import source_digest
from tasks.store.records import CompletionsRow, PairRow, number_rows, prompt_id
from tasks.store.workspace import CompletionsRef, Manifest, Origin, PreferencesRef, Workspace, stage_key

VERSION = 4
logger = logging.getLogger(__name__)


def import_completions(source: str, workspace: str) -> CompletionsRef:
    """Keep completions that something else sampled, to be judged; a prompt that comes again is left out and counted.

    `source` is a file in a form of `tasks.store.forms`: a path or gs:// address.

    Raises `PreflowError`: a row is wrong (file, line, field), or there is none.
    """
    source = resolve_location(source)
    origin, store = Workspace.holding(source), Workspace(workspace)
    file = Origin(kind="file", uri=source, sha256=source_digest(source))
    key = stage_key("completions-elsewhere", VERSION, source=file.sha256)
    folder, forms = store.uri("completions", key), Counter[str]()
    if known := store.find_finished(f"{folder}/manifest.json", CompletionsRef):
        return known
    seen: set[str] = set()
    counts: Counter[str] = Counter()
    with store.writing(f"{folder}/completions.jsonl") as out:
        for _, row in number_rows(CompletionsRow, source, origin, forms):
            identity = prompt_id([message.model_dump() for message in row.prompt])
            counts["duplicates" if identity in seen else "prompts"] += 1
            if identity not in seen:
                seen.add(identity)
                out.write_row({**_source_id(row.id, identity), **row.model_dump(exclude_none=True), "id": identity})
    if not out.rows:
        raise PreflowError(f"{source}: has no rows. Give completions, each row with its prompt.")
    logger.info("%s: %s; its rows were %s", source, _listed(counts), _listed(forms))
    artifact = CompletionsRef(uri=f"{folder}/completions.jsonl", manifest=f"{folder}/manifest.json", **out.facts())
    store.write_manifest(
        Manifest(
            artifact=artifact, stage="generation", version=VERSION, key=key, upstream=(file,),
            files={"completions.jsonl": out.file}, counts=dict(counts),
        )
    )  # fmt: skip
    return artifact


def import_preferences(source: str, workspace: str, judging: JudgingConfig) -> PreferencesRef:
    """Keep pairs that something else made, split into train and validation by prompt or group, and measure them.

    `source` is a file in a form of `tasks.store.forms`; val_ratio and seed of `judging` decide the split.

    Raises `PreflowError`: a row is wrong (file, line, field), or there is none to train on.
    """
    source = resolve_location(source)
    origin, store = Workspace.holding(source), Workspace(workspace)
    file = Origin(kind="file", uri=source, sha256=source_digest(source))
    key = stage_key(
        "preferences-elsewhere", VERSION, source=file.sha256, val_ratio=judging.val_ratio, seed=judging.seed
    )
    folder, forms, groups = store.uri("preferences", key), Counter[str](), set[str]()
    if known := store.find_finished(f"{folder}/manifest.json", PreferencesRef):
        return known
    with store.writing(f"{folder}/train.jsonl") as train, store.writing(f"{folder}/val.jsonl") as val:
        for _, row in number_rows(PairRow, source, origin, forms):
            identity, group = prompt_id([message.model_dump() for message in row.prompt]), getattr(row, "group", None)
            given = _source_id(getattr(row, "id", None), identity)
            pair = {**given, **row.model_dump(exclude_none=True), "id": identity}
            held_out = is_validation(identity, group, judging.seed, judging.val_ratio)
            if not (held_out and row.sft_only):
                (val if held_out else train).write_row(pair)
            if len(groups) < 2:
                groups.add(group or identity)
        check_spread(source, train.rows + val.rows, groups, judging)
    if not train.rows:
        raise PreflowError(f"{source}: no pair to train on ({val.rows} are held out). Give more, or lower val_ratio.")
    logger.info("%s: its rows were %s", source, _listed(forms))
    quality = measure_pairs(f"{folder}/train.jsonl", f"{folder}/val.jsonl" if val.rows else None)
    written = {"train.jsonl": train, "val.jsonl": val}
    return finish_pairs(store, folder, written, quality, version=VERSION, key=key, upstream=(file,))


def _source_id(given: object, identity: str) -> dict[str, object]:
    """Return the id that a row had, under the name that prompts keep theirs."""
    return {} if given in (None, "", identity) else {"source_id": given}


def _listed(counts: dict[str, int] | Counter[str]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.items())
