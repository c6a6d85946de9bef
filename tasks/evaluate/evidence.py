"""One file with all that a verdict rests on, and the recomputation of every figure from it: no run, no network."""

import hashlib
import io
import json
import math
import posixpath
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError, field_validator

from tasks.config import EvaluationConfig, GenerationConfig, JudgingConfig, PromotionConfig, StageConfig, TrainingConfig
from tasks.errors import PreflowError
from tasks.evaluate.comparisons import read_comparison
from tasks.evaluate.labels import labelling_judges, measure_agreement, read_labels, record_agreement
from tasks.evaluate.win_rate import judge_adapter
from tasks.store.measures import Choice, Evaluation, read_choice, read_evaluation
from tasks.store.records import VerdictsRow
from tasks.store.workspace import DigestWriter, EvaluationRef, Manifest, Origin, Workspace, digest

# The settings of these stages decide results, and are handed on without addresses, secrets' names and folders.
SETTINGS: dict[str, type[StageConfig]] = {
    "generation": GenerationConfig, "judging": JudgingConfig, "preferences": JudgingConfig,
    "training": TrainingConfig, "evaluation": EvaluationConfig,
}  # fmt: skip
MOST_SHOWN = 5


class Made(BaseModel):
    """One artifact of the run: its digest, what it was made from, by which versions, with which settings."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: str
    version: int
    key: str
    kind: str
    sha256: str
    rows: int
    upstream: tuple[tuple[str, str], ...]
    files: dict[str, str]
    packages: dict[str, str]
    counts: dict[str, int]
    settings: dict[str, JsonValue]

    @classmethod
    def of(cls, manifest: Manifest) -> "Made":
        """Return what a manifest says, without where anything is."""
        artifact, kind = manifest.artifact, SETTINGS.get(manifest.stage)
        return cls(
            **manifest.model_dump(include={"stage", "version", "key", "packages", "counts"}),
            **artifact.model_dump(include={"kind", "sha256", "rows"}),
            upstream=tuple((origin.kind, origin.sha256) for origin in manifest.upstream),
            files={name: facts.sha256 for name, facts in manifest.files.items()},
            # What was given, as completions or pairs, has none: the defaults made nothing of it.
            settings=public_settings(manifest.settings(kind)) if kind and manifest.config else {},
        )


class Judged(BaseModel):
    """A comparison as the judges left it, and the digest by which a change to it is noticed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: str
    row: dict[str, JsonValue]

    @field_validator("row")
    @classmethod
    def _check(cls, row: dict[str, JsonValue]) -> dict[str, JsonValue]:
        """Refuse what is no comparison; the row itself stays as it is, to the order of its fields."""
        read = VerdictsRow.model_validate(row)
        if len(read.completions) != 2 or not isinstance(row.get("prompt_id"), str):
            raise ValueError("not two samples of one prompt")
        if any(vote.best not in (0, 1) and vote.error is None for vote in read.votes):
            raise ValueError("a vote without a best")
        return row


class Evidence(BaseModel):
    """`evidence.json`: the verdict, the gate, and everything that both are computed from.

    Attributes:
        format: of this file.
        verdict: what was found, figure by figure.
        min_win_rate: the bar; likewise `min_agreement`.
        passes: whether the adapter passes them.
        rubric: what the judge was told.
        labels: what comparisons were worth to the new adapter in a person's eyes, by their ids.
        made: every artifact, each after those of what it was made from; the evaluation last.
        comparisons: of the new adapter with the SFT adapter, with every vote.
        null: the same of two draws of the SFT adapter; None if that was not tested.
        choice: how the adapter was chosen among the checkpoints of its training; None if it is the last.
        seal: digest of all else.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["preflow evidence 1"] = "preflow evidence 1"
    verdict: Evaluation
    min_win_rate: float
    min_agreement: float
    passes: bool
    rubric: str
    labels: dict[str, float]
    made: tuple[Made, ...]
    comparisons: tuple[Judged, ...]
    null: tuple[Judged, ...] | None
    choice: Choice | None = None
    seal: str = ""

    def contents(self) -> str:
        """Return the digest of all but the seal."""
        return digest({name: value for name, value in self._fields().items() if name != "seal"})

    def text(self) -> bytes:
        """Return the file; equal runs give equal bytes."""
        return (json.dumps(self._fields(), ensure_ascii=False, indent=1) + "\n").encode()

    def _fields(self) -> dict[str, Any]:
        """Return the file's fields; without a choice there is none, so that older files keep their seal."""
        return self.model_dump(mode="json", exclude=None if self.choice else {"choice"})


def public_settings(settings: StageConfig) -> dict[str, Any]:
    """Return the settings that decide results, of files and folders the name only."""
    found = settings.identity()
    for name, value in settings:
        if name in found and isinstance(value, StageConfig):
            found[name] = public_settings(value)
        elif name in found and isinstance(value, str) and value.startswith(("/", "gs://")):
            found[name] = posixpath.basename(value)
    return found


def collect_evidence(evaluation: EvaluationRef, promotion: PromotionConfig) -> Evidence:
    """Gather what the verdict on an adapter rests on, with the labels there are by now.

    Raises:
        PreflowError: something of it is no longer in the workspace.
    """
    from tasks.report.run import gather_manifests  # with its pictures and pages, which a verification does not need

    store = Workspace.holding(evaluation.uri)
    try:
        record_agreement(evaluation)
        found, manifest = read_evaluation(evaluation), store.read_manifest(evaluation)
        verdicts, *null = [origin for origin in manifest.upstream if origin.kind == "verdicts"]
        evidence = Evidence(
            verdict=found,
            min_win_rate=promotion.min_win_rate,
            min_agreement=promotion.min_agreement,
            passes=found.refusal(promotion.min_win_rate, promotion.min_agreement) is None,
            rubric=store.read_bytes(posixpath.join(posixpath.dirname(verdicts.uri), "rubric.md")).decode(),
            labels=read_labels(evaluation),
            made=tuple(map(Made.of, gather_manifests(store, evaluation))),
            comparisons=_rows(store, verdicts),
            null=_rows(store, null[0]) if null else None,
            choice=read_choice(evaluation),
        )
        return evidence.model_copy(update={"seal": evidence.contents()})
    except (FileNotFoundError, ValueError) as error:
        raise PreflowError(
            f"{evaluation.folder}: not all that its verdict rests on is there any more ({error}); run the pipeline "
            "again with the same settings: what was paid for is kept, and found"
        ) from error


def _rows(store: Workspace, verdicts: Origin) -> tuple[Judged, ...]:
    return tuple(Judged(sha256=digest(row)[:16], row=row) for row in store.read_rows(verdicts.uri))


def read_evidence(path: Path) -> Evidence:
    """Read a file of evidence.

    Raises:
        PreflowError: there is none, or it is not one.
    """
    try:
        return Evidence.model_validate_json(path.read_bytes())
    except OSError as error:
        raise PreflowError(f"{path}: cannot be read: {error.strerror}; `preflow evidence` writes it") from error
    except ValidationError as error:
        wrong = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(map(str, wrong["loc"])) or "the file"
        raise PreflowError(f"{path}: not evidence of a run, or damaged: {where}: {wrong['msg']}") from error


def find_differences(evidence: Evidence) -> Iterator[str]:
    """Recompute every figure and digest of the evidence, and yield what does not agree."""
    made = evidence.made[-1] if evidence.made else None
    if made is None or made.stage != "evaluation":
        yield "made: does not end with the evaluation"
        return
    verdicts, given = [sha256 for kind, sha256 in made.upstream if kind == "verdicts"], []
    for name, rows in (("comparisons", evidence.comparisons), ("null", evidence.null)):
        if rows is not None:
            yield from _changed(name, rows)
            as_written = DigestWriter(io.BytesIO())
            for judged in rows:
                as_written.write_row(judged.row)
            given.append(as_written.sha256)
    if given != verdicts:
        names = (" and ".join(sha256[:16] for sha256 in digests) for digests in (given, verdicts))
        yield "comparisons, null: {}, and the verdicts that were evaluated are {}".format(*names)
    judging = next((made for made in evidence.made if made.sha256 in verdicts[:1]), None)
    rubric = hashlib.sha256(evidence.rubric.encode()).hexdigest()
    if judging is None or judging.files.get("rubric.md") != rubric:
        yield f"rubric: not the one that the judge was told (its digest is {rubric[:16]})"
    if evidence.contents() != evidence.seal:
        yield f"seal: something was changed after the file was written (its digest was {evidence.seal[:16]})"
    if (choice := evidence.choice) is not None:
        if choice.best.adapter_sha256 != evidence.verdict.adapter_sha256:
            yield f"choice: step {choice.best.step} has the highest lower bound, and another adapter was evaluated"
        if shared := {str(judged.row["prompt_id"]) for judged in evidence.comparisons} & set(choice.prompts):
            yield f"choice: {len(shared):,} prompts of the comparisons chose the checkpoint too"
    found = recompute(evidence)
    yield from _differing("verdict", evidence.verdict.model_dump(mode="json"), found.model_dump(mode="json"))
    yield from _differing(
        "passes", evidence.passes, found.refusal(evidence.min_win_rate, evidence.min_agreement) is None
    )


def recompute(evidence: Evidence) -> Evaluation:
    """Return the verdict that the comparisons, votes and labels of the evidence give.

    Raises:
        PreflowError: the settings are no settings, or no comparison can be read.
    """
    try:
        settings = EvaluationConfig.model_validate(evidence.made[-1].settings, extra="ignore")
    except ValidationError as error:
        raise PreflowError(f"made: the settings of the evaluation are none: {error.errors()[0]['msg']}") from error
    rows = [judged.row for judged in evidence.comparisons]
    others = {judge.model for judge in settings.judges}
    null = None if evidence.null is None else [read_comparison(judged.row) for judged in evidence.null]
    found = judge_adapter(
        dict(evidence.made[-1].upstream).get("adapter", ""),
        [read_comparison(row, labelling_judges(settings)) for row in rows],
        [read_comparison(row, others) for row in rows] if others else [],
        null,
        settings,
    )
    return found.model_copy(update={"agreement": measure_agreement(rows, evidence.labels, settings)})


def _changed(name: str, rows: Sequence[Judged]) -> Iterator[str]:
    changed: list[Any] = [judged.row for judged in rows if digest(judged.row)[:16] != judged.sha256]
    for row in changed[:MOST_SHOWN]:
        votes = [f"{vote['judge']} {vote.get('best', 'unreadable')}" for vote in row["votes"]]
        yield f"{name}: {row['id']} was changed after the judges left it: its votes are {', '.join(votes) or 'none'}"
    if len(changed) > MOST_SHOWN:
        yield f"{name}: {len(changed) - MOST_SHOWN:,} more rows were changed"


def _differing(name: str, stated: Any, found: Any) -> Iterator[str]:
    if isinstance(stated, dict) and isinstance(found, dict):
        for field in dict.fromkeys((*stated, *found)):
            yield from _differing(f"{name}.{field}", stated.get(field), found.get(field))
    elif isinstance(stated, float) and isinstance(found, float):
        if not math.isclose(stated, found, rel_tol=1e-9, abs_tol=1e-9):
            yield f"{name}: {found:.12g} by the comparisons, {stated:.12g} in the file"
    elif stated != found:
        yield f"{name}: {found} by the comparisons, {stated} in the file"
