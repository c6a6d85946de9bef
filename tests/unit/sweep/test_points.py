"""A sweep's points, their refusals, the presets, and how sure the best of many is."""

import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest

from tasks.config import (
    EndpointConfig,
    GenerationConfig,
    JudgingConfig,
    PipelineConfig,
    Preset,
    SweepConfig,
    TrainingConfig,
)
from tasks.errors import PreflowError
from tasks.report.page import ReportSection
from tasks.run import preflight
from tasks.run.estimate import Plan, Work
from tasks.run.estimate_page import plan_lines
from tasks.store.measures import WinRate
from tasks.store.workspace import EvaluationRef
from tasks.sweep import page, prepare, ranking
from tasks.sweep.page import conclude, plan_section, ranking_section
from tasks.sweep.points import apply_change, expand_points, parameter_names
from tasks.sweep.prepare import check_budget, find_unready, prepare_points, trainings_at_once
from tasks.sweep.ranking import PointResult, SweepResult, rank, sidak, winner
from tests.fakes import pages
from tests.fakes.evaluated import evaluated


def points(base: PipelineConfig | None = None, **sweep: Any) -> list[tuple[str, PipelineConfig]]:
    found = expand_points(base or PipelineConfig(), SweepConfig.model_validate(sweep))
    assert [point.number for point in found] == list(range(1, len(found) + 1))
    return [(point.name, point.config) for point in found]


def refusal(base: PipelineConfig | None = None, **sweep: Any) -> str:
    with pytest.raises(PreflowError) as refused:
        points(base, **sweep)
    return str(refused.value)


def test_a_grid_is_the_product_and_changes_are_points_of_their_own() -> None:
    found = points(
        grid={"training.beta": [0.05, 0.2], "judging.model": ["a", "b"]},
        changes=[{"training.num_train_epochs": 3, "training.learning_rate": 1e-6}, {}],
    )
    assert [name for name, _ in found] == [
        "training.beta=0.05, judging.model=a", "training.beta=0.05, judging.model=b",
        "training.beta=0.2, judging.model=a", "training.beta=0.2, judging.model=b",
        "training.num_train_epochs=3, training.learning_rate=1e-06", "unchanged",
    ]  # fmt: skip
    assert [(c.training.beta, c.judging.model) for _, c in found[1:3]] == [(0.05, "b"), (0.2, "a")]
    assert found[4][1].training.learning_rate == 1e-6
    assert found[5][1] == PipelineConfig().filled()


def test_what_is_sampled_with_is_trained_and_evaluated_with_at_every_point() -> None:
    ((_, config),) = points(changes=[{"generation.stop": ["END"], "generation.date_string": "01 Jan 2026"}])
    for stage in (config.generation, config.training, config.evaluation.generation):
        assert (stage.stop, stage.date_string) == (("END",), "01 Jan 2026")
    assert "a run samples, trains and evaluates in the same words" in refusal(changes=[{"training.stop": ["END"]}])


def test_every_parameter_can_be_named() -> None:
    base = PipelineConfig().filled()
    for name in parameter_names():
        value: Any = base.model_dump()
        for part in name.split("."):
            value = value[part]
        assert apply_change(base, {name: value}) == base, name


def test_all_points_are_measured_by_one_judge_on_like_samples() -> None:
    base = PipelineConfig(judging=JudgingConfig(model="first"), generation=GenerationConfig(temperature=0.8))
    grid = {"judging.model": ["a", "b"], "generation.temperature": [0.8, 1.1]}
    for _, config in points(base, grid=grid):
        assert config.evaluation.judging == base.judging
        assert config.evaluation.generation.temperature == 0.8


def test_points_of_equal_content_are_dropped_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = PipelineConfig(workspace=str(tmp_path), judging=JudgingConfig(rubric="demo"))
    monkeypatch.setattr(prepare, "_check_files", lambda point: None)
    monkeypatch.setattr(prepare, "point_keys", lambda found: [repr(one.config.training.identity()) for one in found])
    grid = {"training.beta": [0.1, 0.1, 0.2], "judging.max_concurrency": [1, 2]}
    found = prepare_points(config, SweepConfig(grid=grid, changes=[{}]))
    assert [(point.number, point.config.training.beta) for point in found.points] == [(1, 0.1), (2, 0.2)]
    assert found.duplicates == 5


def test_the_inputs_are_checked_once_for_all_points_that_the_checks_cannot_tell_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = list[str]()
    monkeypatch.setattr(prepare, "_check_files", lambda point: checked.append(point.name))
    monkeypatch.setattr(prepare, "point_keys", lambda found: [point.name for point in found])
    told = ["judging.val_ratio=0.5", "judging.rubric=demo", "training.max_length=512", "evaluation.max_prompts=7",
            "training.base_revision=v2", "training_deployment=train-dpo/pool"]  # fmt: skip
    changes = [dict([name.split("=")]) for name in ("training.beta=0.3", "judging.model=b", *told)]
    prepare_points(PipelineConfig(workspace=str(tmp_path)), SweepConfig(changes=changes))
    assert checked == ["training.beta=0.3", *told]


def test_the_best_is_promoted_by_its_bound_that_holds_for_all_points_and_without_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranking, "sweep_key", lambda points: "k")
    points = expand_points(
        PipelineConfig(workspace=str(tmp_path), judging=JudgingConfig(model="labeller")),
        SweepConfig(grid={"training.beta": [0.1]}),
    )
    made = pages.result(evaluated(tmp_path, lambda _: [1, 1]))
    result = rank(points, [PointResult(number=1, change={}, name="one", made=made)])
    (best,) = result.points
    assert best.proven < best.widened.lower == best.rate.lower, "all of its samples are longer"
    for bar, won in ((best.proven - 0.01, True), (best.proven, False)):
        promotion = points[0].config.promotion.model_copy(update={"min_win_rate": bar})
        config = points[0].config.model_copy(update={"promotion": promotion})
        assert (winner(result, [points[0].model_copy(update={"config": config})]) is not None) == won


@pytest.mark.parametrize(
    ("sweep", "said"),
    [
        ({}, r"no points: give sweep\.presets, sweep\.grid"),
        ({"grid": {"training.bta": [1]}}, r"'training\.bta'; did you mean training\.beta or"),
        ({"grid": {"beta": [1]}}, r"'beta'; did you mean training\.beta\?"),
        ({"grid": {"temperature": [1]}}, r"did you mean generation\.temperature or judging\.temperature"),
        ({"grid": {"zzz": [1]}}, r"no parameter 'zzz'; names are like training\.beta"),
        ({"grid": {"training": [{}]}}, r"'training' is a whole stage; name one of its parameters"),
        ({"grid": {"workspace": ["x"]}}, r"'workspace' cannot be swept"),
        ({"grid": {"promotion.name": ["x"]}}, r"'promotion\.name' cannot be swept"),
        ({"grid": {"training.beta": []}}, r"training\.beta has no values"),
        ({"grid": {"training.beta": [0.1, -1]}}, r"1 of 2 .*point 2 \(training\.beta=-1\): training\.beta: .*greater"),
        ({"grid": {"training.beta": ["much"]}}, r"point 1 \(training\.beta=much\): training\.beta: .*number"),
        (
            {"changes": [{"training.beta": 0.2}, {"training.max_steps": 5}]},
            r"point 2 \(training\.max_steps=5\): training: .*warmup_steps \(20\) is more than max_steps \(5\)",
        ),
        ({"grid": {"generation.num_completions": [1]}}, r"point 1 .*num_completions must be at least 2"),
        ({"grid": {"training.seed": list(range(25))}}, r"25 points, over sweep\.max_points \(24\)"),
        ({"grid": {"training.seed": list(range(200)), "judging.seed": list(range(100))}}, r"20,000 combinations"),
        ({"presets": ["judge"]}, r"preset judge: name the stronger judge in sweep\.stronger_judge"),
        ({"presets": ["more_data"]}, r"preset more_data: give the larger prompts file in sweep\.more_prompts"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(sweep: dict[str, Any], said: str) -> None:
    assert re.search(said, refusal(**sweep), re.DOTALL), refusal(**sweep)


def test_all_wrong_points_are_told_at_once_and_no_key_with_them() -> None:
    text = refusal(changes=[{"judging.api_key": "sk-secret"}, {"judging.panel": [{"api_key": "sk-secret"}]}, {}])
    assert "2 of 3 points are wrong" in text
    assert "point 1 (judging.api_key=...)" in text
    assert "point 2 (judging.panel=...): judging.panel.0.api_key" in text
    assert "sk-secret" not in text


def test_a_sweep_that_would_wait_for_a_person_at_every_point_is_refused() -> None:
    with pytest.raises(PreflowError, match="approve_before"):
        prepare_points(PipelineConfig(approve_before=("promotion",)), SweepConfig(grid={"training.beta": [0.1]}))


def test_the_presets() -> None:
    base = PipelineConfig(training=TrainingConfig(max_steps=60))
    sweep = {"presets": get_args(Preset), "stronger_judge": "big", "more_prompts": "all.jsonl"}
    slower = "training.max_steps=null, training.learning_rate=1e-06"
    assert [name for name, _ in points(base, **sweep)] == [
        "unchanged", "training.beta=0.05", "training.beta=0.01", "judging.model=big", "generation.num_completions=5",
        "generation.temperature=1.0", "generation.temperature=1.2", "prompts=…/all.jsonl",
        f"training.num_train_epochs=2, {slower}", f"training.num_train_epochs=3, {slower}",
        "training.warmup_steps=5", "training.warmup_steps=10",
    ]  # fmt: skip


def test_a_point_has_the_keys_of_the_configuration_that_is_pasted_from_it() -> None:
    """A value that was validated and its default must be the same JSON, or a replay would train again."""
    ((_, config),) = points(changes=[{"training.beta": 0.2}])
    pasted = PipelineConfig.model_validate_json(config.model_dump_json(exclude_defaults=True))
    for other in (pasted.training, TrainingConfig(beta=0.2)):
        assert json.dumps(other.identity()) == json.dumps(config.training.identity())
    assert json.dumps(pasted.judging.identity()) == json.dumps(config.judging.identity())


WORK = (
    Work(stage="sample completions", who="sft", points=[1, 2, 3, 5], requests=100, known=40, prompt_tokens=6000,
         completion_tokens=9000, usd=None),
    Work(stage="judge preferences", who="judge", points=[1, 2], requests=200, usd=2.5, most_usd=20.0),
    Work(stage="train", who="beta 0.1", points=[1], gpu_minutes=13.4, usd=0.08, most_usd=0.08),
    Work(stage="train", who="beta 0.2", points=[2], finished=True),
)  # fmt: skip


def test_a_sweep_over_its_budget_is_refused_with_the_dearest_piece() -> None:
    plan = Plan(WORK)
    check_budget(plan, SweepConfig(budget_usd=2.59))
    with pytest.raises(
        PreflowError, match=r"2\.58 US\$, over sweep\.budget_usd \(2\.00\).*judge preferences \(judge\) at 2\.50"
    ):
        check_budget(plan, SweepConfig(budget_usd=2))


def test_the_plan_shows_what_is_shared_and_what_is_known() -> None:
    found = expand_points(PipelineConfig(), SweepConfig(grid={"training.beta": [0.1, 0.2]}))
    section = plan_section(Plan(WORK), found, SweepConfig(), duplicates=3)
    assert "3 equal to another were left out" in section.summary
    assert "1 trainings and 260 requests, about 2.58 US$, at most 20.08 and what has no price set." in section.summary
    assert "One by one, the points would take 2 trainings and 800 requests" in section.summary
    rows = section.tables[0].rows
    assert rows[0] == ("sample completions (sft)", "1-3, 5", 100, "40", 6000, 9000, None, None, "no price set", None)
    assert rows[2][7:] == ("13 min 24 s", "0.08", "0.08")
    assert rows[3][3] == "finished"
    assert rows[-1][-2:] == ("2.58", "20.08")
    assert list(plan_lines(Plan(WORK))) == [
        "  sample completions (sft, points 1-3, 5): 60 requests (40 more known), about 6,000 + 9,000 tokens, "
        "no price set",
        "  judge preferences (judge, points 1-2): 200 requests, about 0 + 0 tokens, 2.50 US$",
        "  train (beta 0.1, points 1): about 13 min 24 s on an L4; not measured here yet",
        "cost: about 2.58 US$, at most 20.08 and what has no price set",
    ]


async def test_a_model_that_several_points_ask_has_one_question_on_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    async def trial(stage: str, settings: EndpointConfig, _: object) -> None:
        asked.append(settings.model)
        if settings.model == "down":
            raise PreflowError("does not answer")

    monkeypatch.setattr(preflight, "_check_endpoint", trial)
    config = PipelineConfig.model_validate({"judging": {"model": "a", "api_key": None}})
    points = expand_points(config, SweepConfig(grid={"judging.model": ["a", "b", "down"], "training.beta": [0.1, 0.2]}))
    work = Work("train", "here", points=[point.number for point in points])
    unready = await find_unready(points, Plan([work]))
    assert sorted(unready) == [5, 6]
    assert sorted(asked) == ["a", "b", "down", config.generation.model]


def _result(number: int, rate: float | None, **more: Any) -> PointResult:
    about = {"number": number, "change": {}, "name": f"n{number}", "evaluation_fingerprint": "one", **more}
    if rate is None:
        return PointResult(error="judge down", **about)
    # What was made is not shown here, so a failed point is told by its error alone.
    alone, widened = (WinRate(win_rate=rate, lower=rate - half, upper=rate + half) for half in (0.03, 0.05))
    return PointResult(rate=alone, widened=widened, **about)


def test_a_sweep_of_which_nothing_is_left_says_why() -> None:
    results = (_result(1, None), _result(2, None))
    result = SweepResult(key="k", points=results, ranking=(), confidence=0.95, widened_confidence=0.95)
    with pytest.raises(PreflowError, match=r"all 2 points failed.*\npoint 1 \(n1\): judge down\npoint 2 \(n2\): judge"):
        conclude(result, "runs")


RANKED = SweepResult(
    key="k", points=(_result(1, 0.50), _result(2, None), _result(3, 0.54, evaluation_fingerprint="another")),
    ranking=(3, 1), confidence=0.95, widened_confidence=sidak(0.95, 2),
)  # fmt: skip
EVALUATED = EvaluationRef(
    uri="e", sha256="0" * 64, size=1, rows=1, adapter_sha256="a" * 64, win_rate=0.5, lower=0.4, upper=0.6
)
BETAS = SweepConfig(grid={"training.beta": [0.1, 0.2, 0.3]})


def test_the_ranking_is_honest() -> None:
    section = ranking_section(RANKED, expand_points(PipelineConfig(), BETAS))
    assert "point 3 (n3) wins 54.0 % (51.0-57.0 %)" in section.summary
    assert "looks better than it is" in section.summary
    assert "49.0-59.0 % (each at 97.47 %, together at least 95 %; Sidak 1967)" in section.summary
    assert (sidak(0.95, 1), sidak(0.95, 6)) == (0.95, pytest.approx(0.991487, abs=1e-6))
    advice = " ".join(section.advice)
    for said in ("not all measured on the same prompts", "points 3 and 1 overlap", "Not even the best point"):
        assert said in advice
    assert [row[1] for row in section.tables[0].rows] == [3, 1]
    (_, config), (_, command) = section.blocks
    assert json.loads(config)["training"]["beta"] == 0.3
    assert command.startswith("prefect deployment run dpo-pipeline/local --param 'config={")


def test_what_stands_against_the_best_point_is_said_though_its_interval_is_over_the_bar() -> None:
    null = WinRate(win_rate=0.6, lower=0.55, upper=0.65, confidence=0.99)
    best = _result(3, 0.7, proven=0.45, null=null)
    given = RANKED.model_copy(update={"points": (*RANKED.points[:2], best), "declined": "not approved"})
    section = ranking_section(given, expand_points(PipelineConfig(), BETAS))
    assert [text.partition(",")[0] for text in section.advice[1:]] == [
        "Two draws of the SFT adapter come out at 60.0 % (55.0-65.0 %)",
        "Point 3 may have won by length alone: with length taken out",
        "Point 3 is not served: not approved",
    ]
    assert section.tables[0].rows[-1][-3] == "55.0-65.0 % (99 %)"


async def test_a_point_s_page_says_why_the_best_is_not_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def keep(*_: ReportSection) -> None: ...

    monkeypatch.setattr(page, "publish", keep)
    monkeypatch.setattr(page, "run_sections", lambda _, run: [ReportSection("Run", run.declined)])
    found = [_result(number, 0.5 + number / 100, made=pages.result(EVALUATED)) for number in (1, 2, 3)]
    result = RANKED.model_copy(update={"points": tuple(found), "ranking": (3, 2, 1)})
    swept = expand_points(PipelineConfig(workspace=str(tmp_path)), BETAS)
    for declined in (None, "nobody has labelled"):
        await page.report_sweep(result.model_copy(update={"declined": declined}), swept)
        for number, said in ((3, declined or "no point by itself"), (2, "no point by itself")):
            assert said in (tmp_path / "sweeps" / "k" / f"point-{number}.html").read_text()


def test_points_that_train_on_this_machine_run_one_after_another() -> None:
    here, there = PipelineConfig(), PipelineConfig(training_deployment="train-dpo/l4-spot")
    for base, change, at_once in ((here, {}, 1), (there, {}, 3), (there, {"training_deployment": None}, 1)):
        sweep = SweepConfig(changes=[{"training.beta": 0.2}, {"training.beta": 0.3, **change}], parallel=3)
        assert trainings_at_once(expand_points(base, sweep), sweep) == at_once
