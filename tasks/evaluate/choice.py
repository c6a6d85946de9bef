"""The best checkpoint of a training, by the judge, on a part of the held-out prompts that decides nothing else."""

import logging
from collections.abc import Sequence

from tasks.config import EvaluationConfig, PipelineConfig, TrainingConfig
from tasks.errors import PreflowError
from tasks.evaluate.comparisons import Comparison, length_controlled, read_comparison, win_rate
from tasks.store.measures import Choice, Tried
from tasks.store.prompts import import_prompts, split_prompts
from tasks.store.workspace import (
    MANIFEST,
    AdapterRef,
    ChoiceRef,
    EvaluationRef,
    Manifest,
    VerdictsRef,
    Workspace,
    indented_json,
    stage_key,
)

VERSION = 1
logger = logging.getLogger(__name__)


def check_choice(config: PipelineConfig) -> None:
    """See, before anything is spent, that there are held-out prompts enough to choose a checkpoint with a part of them.

    Raises:
        PreflowError: there are not.
    """
    evaluation, workspace = config.evaluation, config.workspace
    if not evaluation.checkpoints:
        return
    if config.eval_prompts is not None:
        held_out = import_prompts(config.eval_prompts, workspace, evaluation.max_prompts)
        split_prompts(held_out, workspace, evaluation.parts(held_out.rows)[0], evaluation.seed)
        return
    expected = round(import_prompts(config.prompts, workspace).rows * config.judging.val_ratio)
    if not evaluation.parts(expected)[0]:
        raise PreflowError(
            f"evaluation.checkpoints {evaluation.checkpoints}: about {expected} prompts will be held out, too few to "
            "choose with a part of them. Give eval_prompts, raise judging.val_ratio, or set it to 0."
        )


def kept_adapters(adapter: AdapterRef) -> list[AdapterRef]:
    """Return the adapters that a training has kept, in the order of their steps, `adapter`, the last, among them."""
    if adapter.manifest is None:
        return [adapter]
    store = Workspace.holding(adapter.manifest)
    earlier = sorted(name for name in store.read_manifest(adapter).files if name.endswith(f"/{MANIFEST}"))
    found = [store.read_manifest(adapter.sibling(name)).artifact for name in earlier]
    return [*(AdapterRef.model_validate(one.model_dump()) for one in found), adapter]


def find_checkpoints(adapter: AdapterRef, evaluation: EvaluationConfig) -> list[AdapterRef]:
    """Return the checkpoints to choose among.

    Raises:
        PreflowError: the training has kept another number of them.
    """
    kept = 0
    if adapter.manifest is not None:
        kept = Workspace.holding(adapter.uri).read_manifest(adapter).settings(TrainingConfig).checkpoints
    if kept != evaluation.checkpoints:
        raise PreflowError(
            f"evaluation.checkpoints {evaluation.checkpoints}: the training of {adapter.uri} ran with "
            f"training.checkpoints {kept}. Set evaluation.checkpoints to {kept}, or train with training.checkpoints "
            f"{evaluation.checkpoints}."
        )
    return kept_adapters(adapter)


def evaluated_adapter(adapter: AdapterRef, evaluation: EvaluationRef) -> AdapterRef:
    """Return the adapter that an evaluation is of: that of a training, or the checkpoint of it that was chosen."""
    return next(one for one in kept_adapters(adapter) if one.sha256 == evaluation.adapter_sha256)


def record_choice(
    judged: Sequence[tuple[AdapterRef, VerdictsRef]], workspace: str, evaluation: EvaluationConfig
) -> ChoiceRef:
    """Write `choice.json`, and return which checkpoint is the best by the verdicts on each."""
    store, upstream = Workspace(workspace), tuple(ref for pair in judged for ref in pair)
    key = stage_key(
        "choice", VERSION, judged=[reference.sha256 for reference in upstream], confidence=evaluation.confidence
    )
    folder = store.uri("choices", key)
    tried, prompts = list[Tried](), dict[str, None]()
    for adapter, verdicts in judged:
        comparisons = [read_comparison(row) for row in store.read_rows(verdicts.uri)]
        prompts |= dict.fromkeys(one.prompt for one in comparisons)
        step = store.read_manifest(adapter).counts["steps"]
        tried.append(try_checkpoint(step, adapter.sha256, comparisons, evaluation.confidence))
    choice = Choice(tried=tuple(tried), prompts=tuple(prompts))
    best = next(adapter for adapter, _ in judged if adapter.sha256 == choice.best.adapter_sha256)
    with store.writing(f"{folder}/choice.json") as out:
        out.write(indented_json(choice.model_dump(mode="json", exclude_none=True)))
    artifact = ChoiceRef(
        uri=f"{folder}/choice.json", manifest=f"{folder}/{MANIFEST}", adapter=best,
        **{**out.facts(), "rows": len(judged)},
    )  # fmt: skip
    store.write_manifest(
        Manifest(
            artifact=artifact, stage="choice", version=VERSION, key=key, upstream=upstream,
            files={"choice.json": out.file},
        )
    )  # fmt: skip
    rates = ", ".join(f"step {one.step} {one.text()}" for one in choice.tried)
    logger.info("%d held-out prompts choose step %d: %s", len(choice.prompts), choice.best.step, rates)
    return artifact


def try_checkpoint(step: int, sha256: str, comparisons: Sequence[Comparison], confidence: float) -> Tried:
    """Measure how often a checkpoint won, in both rates that the gate looks at."""
    rate, controlled = win_rate(comparisons, confidence), length_controlled(comparisons, confidence)
    return Tried(step=step, adapter_sha256=sha256, length_controlled=controlled, **rate.model_dump())
