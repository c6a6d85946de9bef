"""An evaluation as the stages leave it in a workspace, with votes that a test decides."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tasks.config import EvaluationConfig, JudgeConfig, JudgingConfig
from tasks.evaluate.win_rate import summarise_evaluation
from tasks.store.workspace import (
    AdapterRef,
    ChoiceRef,
    CompletionsRef,
    EvaluationRef,
    Manifest,
    Origin,
    VerdictsRef,
    Workspace,
)

RUBRIC = "The better one is better.\n"
ORDERS = ([0, 1], [1, 0])
Decide = Callable[[str], Sequence[int | None]]


def evaluated(
    root: Path,
    decide: Decide,
    prompts: int = 30,
    samples: int = 2,
    judges: Sequence[str] = (),
    adapter: AdapterRef | None = None,
    choice: ChoiceRef | None = None,
) -> EvaluationRef:
    """Write samples, verdicts, the null test and an evaluation.

    Args:
        root: the workspace.
        decide: the best sample (0: SFT, 1: new, None: unreadable) in both orders, given the comparison's id.
        prompts: held-out prompts.
        samples: of each prompt.
        judges: models that are asked, with the one that made the labels.
        adapter: the new adapter; None: one of which only the reference is there.
        choice: how it was chosen among the checkpoints of its training.
    """
    judging = JudgingConfig(model="labeller", rubric=str(root / "secret-folder" / "house.md"))
    evaluation = EvaluationConfig(
        num_samples=samples, judging=judging, judges=tuple(JudgeConfig(model=model) for model in judges)
    )
    adapter = adapter or AdapterRef(uri=str(root / "training/k/adapter"), sha256="a" * 64, size=1, rows=1)
    main = _verdicts(root, "main", decide, prompts, samples, evaluation.comparison_judge())
    rng = random.Random(1)
    even = _verdicts(root, "null", lambda _: [rng.randrange(2)] * 2, prompts, samples, evaluation.null_judge())
    return summarise_evaluation(adapter, main, even, str(root), evaluation, choice)


def _verdicts(root: Path, name: str, decide: Decide, prompts: int, samples: int, judging: JudgingConfig) -> VerdictsRef:
    store = Workspace(root)
    source, folder = store.uri("samples", name), store.uri("verdicts", name)
    rows = [_row(prompt, sample) for prompt in range(prompts) for sample in range(samples)]
    with store.writing(f"{source}/samples.jsonl") as out:
        for row in rows:
            out.write_row(row)
    common: Any = {"version": 1, "key": name}
    made = CompletionsRef(uri=f"{source}/samples.jsonl", manifest=f"{source}/manifest.json", **out.facts())
    prompts_file = Origin(kind="prompts", uri=str(root / "secret-folder" / "held-out.jsonl"), sha256="b" * 64)
    store.write_manifest(
        Manifest(artifact=made, stage="samples", upstream=(prompts_file,), files={"samples.jsonl": out.file}, **common)
    )
    with store.writing(f"{folder}/verdicts.jsonl") as out, store.writing(f"{folder}/rubric.md") as rubric:
        rubric.write(RUBRIC.encode())
        for row in rows:
            votes = [
                _vote(judge.model, order, best)
                for judge in judging.judges()
                for order, best in zip(ORDERS, decide(row["id"]), strict=True)
            ]
            out.write_row({**row, "votes": votes})
    verdicts = VerdictsRef(uri=f"{folder}/verdicts.jsonl", manifest=f"{folder}/manifest.json", **out.facts())
    files = {"verdicts.jsonl": out.file, "rubric.md": rubric.file}
    store.write_manifest(
        Manifest(artifact=verdicts, stage="judging", config=judging, upstream=(made,), files=files, **common)
    )
    return verdicts


def _row(prompt: int, sample: int) -> dict[str, Any]:
    scene = [{"role": "user", "content": f"[ANNA] Scene {prompt}. <b>bold</b> & \u00e9"}]
    texts = [f"[ANNA] sft {prompt}.{sample}", f"[ANNA] new {prompt}.{sample}"]
    return {"id": f"p{prompt}#{sample}", "prompt_id": f"p{prompt}", "prompt": scene, "completions": texts}


def _vote(judge: str, order: list[int], best: int | None) -> dict[str, Any]:
    if best is None:
        return {"judge": judge, "order": order, "error": "unreadable", "raw": "?"}
    return {"judge": judge, "order": order, "best": best, "worst": 1 - best, "confidence": 4}
