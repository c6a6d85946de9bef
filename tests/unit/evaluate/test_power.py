"""What an evaluation can show: said before it is paid, and as often right as the gate is passed."""

from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
from scipy.stats import norm

from tasks.config import EvaluationConfig, PipelineConfig
from tasks.evaluate import power
from tasks.evaluate.comparisons import length_controlled, win_rate
from tasks.evaluate.power import Design, design_of, plan_design, power_before_price, smallest_detectable
from tasks.evaluate.win_rate import judge_adapter
from tasks.store.measures import Evaluation
from tasks.store.workspace import Workspace
from tests.fakes.comparisons import better_wins, compared, draw_groups, draw_texts

INDEPENDENT = Design(prompts=400, samples=1, ties=0.0, design_effect=1.0, per_cluster=1.0)


def judged(comparisons: list) -> Evaluation:
    return judge_adapter("0" * 64, comparisons, [], None, EvaluationConfig())


@pytest.mark.slow  # a simulation
@pytest.mark.parametrize(("groups", "prompts", "icc"), [(10, 20, 0.05), (200, 1, 0.0)])
def test_predicted_power_is_that_of_simulated_gates(groups: int, prompts: int, icc: float) -> None:
    rng = np.random.default_rng(1)
    pilot = design_of(judged(draw_groups(rng, 40 * groups, prompts, icc, 0.58)), groups * prompts, 4)
    drawn = (draw_groups(rng, groups, prompts, icc, 0.58) for _ in range(200))
    passed = fmean(min(win_rate(one, 0.95).lower, length_controlled(one, 0.95).lower) > 0.5 for one in drawn)
    # 5 points for the prediction and two standard errors of 200 gates.
    assert pilot.power(0.58, 0.5, 0.95) == pytest.approx(passed, abs=0.05 + 2 * (0.25 / 200) ** 0.5)


def test_length_that_differs_costs_power() -> None:
    rng = np.random.default_rng(2)
    same, longer = (design_of(judged(draw_texts(rng, better_wins, by, norm.ppf(0.58), 800))) for by in (0.0, 0.6))
    assert longer.design_effect > 1.5 * same.design_effect
    assert smallest_detectable(longer) > smallest_detectable(same)


def test_a_judge_that_always_ties_does_not_make_every_later_evaluation_too_small() -> None:
    tied = judged(compared({str(k): [0.5] * 4 for k in range(100)}))
    assert design_of(tied).design_effect == pytest.approx(4)
    assert "too few" not in power.describe_power(design_of(tied, 200, 4), 0.5, 0.95)


def test_the_textbook_number_of_comparisons() -> None:
    """A win rate of 0.55 against 0.5, two-sided 5 %, power 80 %: (1.96 + 0.84)^2 / 4 / 0.05^2 = 785."""
    assert power.prompts_needed(INDEPENDENT, 0.55) == pytest.approx(785, rel=0.01)
    enough = Design(785, 1, 0.0, 1.0, 1.0)
    assert smallest_detectable(enough) == pytest.approx(0.55, abs=0.001)
    assert power.prompts_needed(INDEPENDENT, 0.6) == pytest.approx(785 / 4, rel=0.03)


def test_ties_and_alike_samples_are_taken_from_the_workspace(tmp_path: Path) -> None:
    store, evaluation = Workspace(str(tmp_path)), EvaluationConfig()
    default = plan_design(str(tmp_path), evaluation, 200)
    assert (default.prompts, default.samples, default.ties) == (200, 4, 0.3)
    alike = judged(compared({str(k): [float(k % 2)] * 4 for k in range(300)}))
    store.write_json(store.uri("evaluations/one/win_rate.json"), alike.model_dump(mode="json"))
    store.write_json(store.uri("evaluations/old/win_rate.json"), {"format": "of another version"})
    found = plan_design(str(tmp_path), evaluation, 200)
    assert (found.ties, found.per_cluster) == (0.0, 4.0)
    assert found.design_effect == pytest.approx(4, rel=0.05)
    more = plan_design(str(tmp_path), evaluation.model_copy(update={"num_samples": 8}), 200)
    assert smallest_detectable(more) == pytest.approx(smallest_detectable(found), abs=0.005), "copies add nothing"


def test_power_stands_before_the_price(tmp_path: Path) -> None:
    rows = "".join(f'{{"prompt": [{{"role": "user", "content": "scene {k}"}}]}}\n' for k in range(200))
    (tmp_path / "prompts.jsonl").write_text(rows)
    config = PipelineConfig.model_validate(
        {"prompts": f"{tmp_path}/prompts.jsonl", "eval_prompts": f"{tmp_path}/prompts.jsonl",
         "workspace": f"{tmp_path}/w"}
    )  # fmt: skip
    said = power_before_price(config, usd_per_verdict=0.001)
    assert said.startswith("200 held-out prompts x 4 samples (about 3.20 US$): an adapter that truly wins 55.7 %")
    assert "passes in 80 % of runs. To show 52.9 % takes 801 prompts (about 12.82 US$)." in said
    held_out = power_before_price(config.model_copy(update={"eval_prompts": None}))
    assert held_out.startswith("20 held-out prompts x 4 samples: "), "a tenth of the prompts is held out"
    chosen = config.model_copy(update={"evaluation": EvaluationConfig(checkpoints=3)})
    assert power_before_price(chosen).startswith("165 held-out prompts x 4 samples: ")
    assert "Another 35 choose among 3 checkpoints: " in power_before_price(chosen)
    assert power_before_price(chosen).endswith("wins 60 % where the others win 50 % is found in 87 % of runs.")
    assert "too few for any adapter" in power.describe_power(Design(1, 1, 0.0, 1.0, 1.0), 0.5, 0.95)
