"""Every page that preflow shows, with what is hardest to lay out: long names without a space, wide figures."""

import random
from pathlib import Path
from typing import Any

from tasks.batch.costs import StageCost
from tasks.config import PipelineConfig, SweepConfig
from tasks.judge.quality.metrics import measure_judgements
from tasks.report.overview import glance_section, inputs_section, win_rate_figures
from tasks.report.page import ReportSection, Table
from tasks.report.sections import (
    choice_section,
    cost_section,
    evaluation_section,
    lineage_section,
    live_section,
    pairs_section,
    quality_section,
    sample_lengths,
    training_section,
)
from tasks.rounds.rounds import Round, RoundsResult, rounds_section
from tasks.run.estimate import JUDGING, Plan, Work
from tasks.run.estimate_page import approval_section
from tasks.store.measures import Choice, Evaluation, Health, Metric
from tasks.store.workspace import (
    AdapterRef,
    Cost,
    EvaluationRef,
    Manifest,
    Origin,
    PipelineResult,
    PreferencesRef,
    PromptsRef,
    VerdictsRef,
)
from tasks.sweep.page import plan_section, ranking_section
from tasks.sweep.points import expand_points
from tasks.sweep.ranking import PointResult, SweepResult, sidak
from tests.fakes.evaluated import evaluated

ADDRESS = "gs://a-bucket-of-a-company-with-a-long-name/teams/dialogue-writing/experiments/2026-11-26/prompts.jsonl"
MODEL = "a-provider-with-a-long-name/some-model-235b-a22b-instruct-2507-fp8-dynamic-with-no-space-in-its-name"
LONG = "Nospace" * 90
WORDS = "The kettle sings, the lodger hums, and nobody has paid the rent since the moon came down. " * 12
DIGEST = {"sha256": "0123456789abcdef" * 4, "size": 1, "rows": 1_234_567}


def rate(value: float, half: float, **more: Any) -> dict[str, Any]:
    counts = {"samples": 1_234_567, "prompts": 123_456, "ties": 0.123}
    return {"win_rate": value, "lower": value - half, "upper": value + half, **counts, **more}


def evaluation() -> Evaluation:
    labels = {"labels": 50, "share": {"value": 0.7, "lower": 0.4, "upper": 0.8},
              "kappa": {"value": 0.4, "lower": 0.2, "upper": 0.6}, "corrected": rate(0.55, 0.2)}  # fmt: skip
    second = {"judges": [MODEL, "another"], "rate": rate(0.52, 0.1), "transfer": 0.1}
    more = {"null": rate(0.5, 0.04, confidence=0.99), "length_controlled": rate(0.45, 0.1), "second": second}
    return Evaluation.model_validate(
        {**rate(0.61, 0.03), **more, "agreement": labels, "detectable": 0.55, "adapter_sha256": "a" * 64, "silent": 12}
    )


def quality() -> ReportSection:
    rng, judged = random.Random(3), []
    for number in range(60):
        votes = []
        for shift in range(2):
            best, worst = rng.sample(range(8), 2)
            about = {"judge": MODEL, "order": [(k + shift) % 8 for k in range(8)], "confidence": rng.randint(1, 5)}
            votes.append({**about, "best": best, "worst": worst})
        decision = {"status": "pair"} if number % 3 else {"status": "dropped", "reason": "best not unanimous"}
        texts = [f"[{LONG[:80]}] {'word ' * rng.randint(1, 400)}\n[BOB] {n}" for n in range(8)]
        judged.append({"id": f"{number}", "completions": texts, "votes": votes, "best": 0, "worst": 1, **decision})
    usage = {"requests": 120_000, "prompt_tokens": 10_800_000, "completion_tokens": 1_080_000}
    return quality_section(measure_judgements(judged, usage))


def metrics(steps: int = 4_000) -> list[dict[str, Any]]:
    names = ("loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected", "logps/chosen",
             "logps/rejected")  # fmt: skip
    rows: list[dict[str, Any]] = []
    for step in range(0, steps, 100):
        values = {name: 1000.0 * (k - 3) + step / 7 for k, name in enumerate(names)}
        rows.append({"step": step, "grad_norm": 1e-7 * step, **values})
        rows.append({"step": step, **{f"eval_{name}": value - 500 for name, value in values.items()}})
    return rows


def training() -> ReportSection:
    """Return the page of a training that has gone wrong in every way."""
    about = {"healthy": "rising or stable, never below -0.1", "meaning": WORDS[:90]}
    values = (("rewards/accuracies", 0.612, True), ("logps/rejected", -12_345.6, False), ("x", 1, None))
    readings = tuple(Metric(name=name, title=name, value=value, ok=ok, **about) for name, value, ok in values)
    sides = ("pairs", "used", "refused", "cut_sides", "longest")
    counts = {f"{part}_{side}": 1_234_567 for part in ("train", "val") for side in sides}
    source = "step 12,000, 2,345 held-out pairs"
    health = Health(source=source, readings=readings, warnings=(WORDS[:200],), advice=(LONG,))
    return training_section(health, metrics(), counts)


def run_pages() -> list[ReportSection]:
    found, prompt = evaluation(), [{"role": "user", "content": f"{LONG}\n{WORDS}"}]
    rows = [{"prompt": prompt, "completions": [LONG, WORDS], "outcome": outcome} for outcome in (0, 1, 0.5, None)]
    pair = {"prompt": prompt, "chosen": [{"content": WORDS}], "rejected": [{"content": LONG}], "confidence": 4.5}
    compared = evaluation_section(found, rows, 0.5, sample_lengths(rows))
    trained = training()
    glance = glance_section(found, 0.5, WORDS[:90], list(win_rate_figures(found, 0.5)), [compared, trained])
    facts = Table("The run", ("what", "value"), (("Base model", MODEL), ("Cost, US$", "not known: " + WORDS[:60])))
    made = manifests()
    settings = {"training.gradient_checkpointing": False, "prompts": ADDRESS, "judging.panel": [{"model": MODEL}]}
    used = Cost(requests=1_234_567, prompt_tokens=1_234_567_890, completion_tokens=987_654_321, usd=12_345.678)
    costs = [StageCost(stage=stage, used=used, seconds=123_456.0) for stage in ("evaluation", "total")]
    first = ReportSection(**{**vars(glance), "tables": (facts, *glance.tables)})
    about = {"length_controlled": rate(0.5, 0.1), "adapter_sha256": "a" * 64}
    tried = [{**rate(0.6, 0.02 * k), "step": 123_456 * k, **about} for k in (1, 2, 3)]
    choice = choice_section(Choice.model_validate({"tried": tried, "prompts": ["p"] * 60}))
    return [first, inputs_section(made, settings), compared, choice, quality(), pairs_section([pair] * 3), trained,
            cost_section(costs, is_priced=True), lineage_section(made)]  # fmt: skip


def manifests() -> list[Manifest]:
    file = Origin(kind="file", uri=ADDRESS, sha256="c" * 64)
    prompts = PromptsRef(uri=ADDRESS, **DIGEST)
    verdicts = VerdictsRef(uri=ADDRESS.replace("prompts", f"verdicts/{'e' * 64}/verdicts"), **DIGEST)
    adapter = AdapterRef(uri=ADDRESS.replace("prompts.jsonl", "adapter"), **DIGEST)
    models = [Origin(kind=kind, uri=MODEL, sha256="c" * 64) for kind in ("base_model", "sft_adapter")]
    about: dict[str, Any] = {"version": 1, "key": "k", "files": {}, "packages": {"transformers": "5.17.0.dev0+cu130"}}
    return [
        Manifest(artifact=prompts, stage="prompts", upstream=(file,), counts={"read": 1_234_567}, **about),
        Manifest(artifact=verdicts, stage="judging", upstream=(prompts, file), config={"model": MODEL}, **about),
        Manifest(artifact=adapter, stage="training", upstream=(verdicts, *models), config={"note": LONG}, **about),
    ]


def sweep_pages() -> list[ReportSection]:
    """Return the pages before and after a sweep of long changes, one of which failed."""
    grid = {
        "training.beta": [0.03, 0.1, 0.3],
        "training.learning_rate": [1e-6, 5e-6],
        "judging.model": [MODEL, "short"],
    }
    points = expand_points(PipelineConfig(), SweepConfig.model_validate({"grid": grid}))
    made = result(EvaluationRef(uri=ADDRESS, adapter_sha256="a" * 64, win_rate=0.5, lower=0.4, upper=0.6, **DIGEST))
    results = [PointResult(number=1, change={}, name=points[0].name, error=f"{ADDRESS}: {WORDS}")]
    for point in points[1:]:
        alone, widened, null = (rate(point.number / 15, 0.02), rate(point.number / 15, 0.05), rate(0.5, 0.04))
        about = {"number": point.number, "change": {}, "name": point.name, "made": made}
        results.append(PointResult.model_validate({**about, "rate": alone, "widened": widened, "null": null}))
    ranking = tuple(range(len(points), 1, -1))
    confidence = {"confidence": 0.95, "widened_confidence": sidak(0.95, len(ranking))}
    ranked = SweepResult(key="k", points=tuple(results), ranking=ranking, **confidence)
    work = [Work("evaluate: sample new adapter", MODEL, list(range(1, 13, 2)), 123_456, prompt_tokens=1_234_567_890,
                 completion_tokens=1_234_567_890, gpu_minutes=1234.5, usd=1234.5, most_usd=99999.0)]  # fmt: skip
    return [ranking_section(ranked, points), plan_section(Plan(work), points, SweepConfig(), 3)]


def result(evaluation: EvaluationRef) -> PipelineResult:
    preferences, adapter = PreferencesRef(uri=ADDRESS, val_rows=0, **DIGEST), AdapterRef(uri=ADDRESS, **DIGEST)
    return PipelineResult(preferences=preferences, adapter=adapter, evaluation=evaluation)


def all_pages(folder: Path) -> dict[str, list[ReportSection]]:
    """Return the sections of each page, by its name; `folder` is for what has to be in a workspace."""
    found = evaluated(folder, lambda _: [1, 1])
    last = Round(number=2, made=result(found), against_before=found, ended=WORDS)
    cost = {"prompt_tokens": 1_234_567_890, "completion_tokens": 987_654_321, "usd": 12_345.678, "most_usd": 99_999.9}
    approved = Plan([Work(JUDGING, who, [1], 1_234_567, **cost) for who in (MODEL, "short")])
    return {
        "rounds": [rounds_section(RoundsResult(rounds=(Round(number=1, made=result(found)), last), best=1))],
        "run": run_pages(),
        "approval": [approval_section(approved)],
        "sweep": sweep_pages(),
        "training-live": [live_section("Running: step 9,000 of 12,000.", metrics())],
    }
