"""The best checkpoint: found where it is planted, by prompts that then decide nothing, at a price that is bounded."""

from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest

from tasks.config import EvaluationConfig, PipelineConfig, TrainingConfig
from tasks.errors import PreflowError
from tasks.evaluate.choice import check_choice, evaluated_adapter, find_checkpoints, record_choice, try_checkpoint
from tasks.evaluate.power import Design
from tasks.report.sections import choice_section
from tasks.run.estimate import COMPARING, plan_runs
from tasks.store.measures import Choice, read_choice
from tasks.store.workspace import AdapterRef, Manifest, Workspace
from tests.fakes.comparisons import compared, draw_checkpoints
from tests.fakes.evaluated import evaluated

EVALUATION = EvaluationConfig(checkpoints=3)


def test_the_best_of_three_that_wins_a_tenth_more_is_found_in_nine_runs_of_ten() -> None:
    rng, rates = np.random.default_rng(13), (0.5, 0.6, 0.5)
    choosing, _ = EVALUATION.parts(500)
    found = fmean(draw_checkpoints(rng, rates, choosing).best.step == 1 for _ in range(60))
    assert found >= 0.9
    assert found == pytest.approx(Design(choosing, 4, 0.3, 1.9, 4).finds(0.1, 3), abs=0.06)
    assert Design(choosing, 4, 0.3, 1.9, 4).finds(0, 3) == pytest.approx(1 / 3, abs=0.001)


def test_of_equal_ones_the_later_is_taken_and_length_does_not_buy_the_choice() -> None:
    won = compared({str(k): [1.0, 0.0, 1.0] for k in range(40)})
    long = [type(one)(one.prompt, one.cluster, one.outcome, (100, 150 if one.outcome else 90)) for one in won]
    tried = [try_checkpoint(step, str(step), one, 0.95) for step, one in ((5, won), (10, won), (15, long))]
    assert tried[0].win_rate == tried[2].win_rate
    assert Choice(tried=tuple(tried), prompts=()).best.step == 10


def write_prompts(folder: Path, count: int, per_group: int = 0) -> str:
    groups = (f', "group": "{n // per_group}"' if per_group else "" for n in range(count))
    rows = (f'{{"prompt": [{{"role": "user", "content": "{n}"}}]{group}}}\n' for n, group in enumerate(groups))
    (folder / "prompts.jsonl").write_text("".join(rows))
    return str(folder / "prompts.jsonl")


@pytest.mark.slow  # a simulation
@pytest.mark.parametrize("checkpoints", [2, 3, 5, 8])
@pytest.mark.parametrize("null_test", [True, False])
@pytest.mark.parametrize("judges", [(), ({"model": "other"},)])
def test_the_choice_costs_at_most_35_percent_more_verdicts(
    tmp_path: Path, checkpoints: int, null_test: bool, judges: Any
) -> None:
    (tmp_path / "adapter_model.safetensors").touch()
    for held_out in (21, 100, 333):
        given = {
            "prompts": write_prompts(tmp_path, held_out), "workspace": str(tmp_path / "workspace"),
            "judging": {"rubric": "demo"}, "training": {"sft_adapter": str(tmp_path)},
        }  # fmt: skip
        counts = []
        for number in (0, checkpoints):
            evaluation = {"null_test": null_test, "judges": judges, "checkpoints": number}
            plan = plan_runs([PipelineConfig.model_validate({**given, "evaluation": evaluation})])
            counts.append(plan.of(COMPARING).total().requests)
        assert counts[0] < counts[1] * 1.2
        assert counts[1] <= 1.35 * counts[0]


def test_too_few_held_out_prompts_are_said_before_anything_is_spent(tmp_path: Path) -> None:
    common = {"prompts": write_prompts(tmp_path, 60, per_group=20), "workspace": str(tmp_path / "workspace")}
    for more, said in (
        ({"judging": {"val_ratio": 0.05}}, "about 3 prompts will be held out"),
        ({"eval_prompts": common["prompts"]}, "the smallest group of 20: at most 10 of them may choose"),
    ):
        config = PipelineConfig.model_validate({**common, **more, "evaluation": {"checkpoints": 3, "num_samples": 8}})
        with pytest.raises(PreflowError, match=said):
            check_choice(config)
        check_choice(config.model_copy(update={"evaluation": EvaluationConfig()}))


def trained(root: Path, checkpoints: int = 3) -> AdapterRef:
    """Write the manifests of a training that has kept adapters; the last one's reference comes back."""
    store, files = Workspace(root), dict[str, Any]()
    for step in range(1, checkpoints + 1):
        name = "" if step == checkpoints else f"step-{step:06d}/"
        folder = store.uri("training/k", name).rstrip("/")
        adapter = AdapterRef(
            uri=f"{folder}/adapter", manifest=f"{folder}/manifest.json", sha256=str(step) * 64, size=1, rows=1
        )
        store.write_manifest(
            Manifest(
                artifact=adapter, stage="training", version=1, key="k", counts={"steps": step},
                config=TrainingConfig(checkpoints=checkpoints), files=files if step == checkpoints else {},
            )
        )  # fmt: skip
        files[f"{name}manifest.json"] = {"size": store.size(adapter.manifest or ""), "sha256": ""}
    return adapter


def test_the_checkpoint_that_won_is_what_is_evaluated_shown_and_handed_on(tmp_path: Path) -> None:
    last = trained(tmp_path)
    checkpoints = find_checkpoints(last, EVALUATION)
    assert [one.sha256[0] for one in checkpoints] == ["1", "2", "3"]
    wins = {"1": 3, "2": 8, "3": 5}
    judged = []
    for one in checkpoints:
        root = tmp_path / one.sha256[0]
        made = evaluated(root, lambda row, of=one: [int(int(row[-1]) + int(row[1]) < wins[of.sha256[0]])] * 2, 9)
        verdicts = Workspace(root).read_manifest(made).origin("verdicts")
        judged.append((one, Workspace(root).read_manifest(verdicts).artifact))
    choice = record_choice(judged, str(tmp_path), EVALUATION)
    assert choice.adapter == checkpoints[1]
    assert record_choice(judged, str(tmp_path), EVALUATION) == choice
    evaluation = evaluated(tmp_path, lambda _: [1, 1], adapter=choice.adapter, choice=choice)
    assert evaluated_adapter(last, evaluation) == choice.adapter
    found = read_choice(evaluation)
    assert [one.step for one in found.tried] == [1, 2, 3]
    assert found.prompts == tuple(f"p{n}" for n in range(9))
    section = choice_section(found)
    assert "Of 3 checkpoints the one of step 2 is chosen, by 9 held-out prompts" in section.summary
    assert [row[:2] for row in section.tables[0].rows] == [(1, None), (2, "chosen"), (3, None)]


def test_a_training_that_kept_another_number_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PreflowError, match=r"ran with training.checkpoints 2. Set evaluation.checkpoints to 2"):
        find_checkpoints(trained(tmp_path, 2), EVALUATION)
    alone = AdapterRef(uri=str(tmp_path), sha256="a" * 64, size=1, rows=1)
    with pytest.raises(PreflowError, match=r"training.checkpoints 0"):
        find_checkpoints(alone, EVALUATION)
