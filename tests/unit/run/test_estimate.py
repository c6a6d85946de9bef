"""What runs will ask and cost, counted before anything is paid: once for all that share it, without what is known."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tasks.batch.rows import Outcome, read_slice
from tasks.config import JudgingConfig, PipelineConfig, SweepConfig
from tasks.judge.asking import plan_judging
from tasks.judge.elsewhere import import_completions
from tasks.run.estimate import COMPARING, JUDGING, TRAINING, Plan, Work, plan_runs
from tasks.run.estimate_page import approval_section
from tasks.store.workspace import AdapterRef, FileFacts, Manifest, Workspace


@pytest.fixture
def config(tmp_path: Path) -> PipelineConfig:
    """Six prompts, three held-out ones, an SFT adapter."""
    for name, count in (("prompts", 6), ("held-out", 3)):
        rows = ({"prompt": [{"role": "user", "content": f"{name} {number}"}]} for number in range(count))
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "adapter_config.json").write_text("{}")
    (tmp_path / "sft" / "adapter_model.safetensors").write_bytes(b"weights")
    return PipelineConfig.model_validate(
        {
            "prompts": str(tmp_path / "prompts.jsonl"), "eval_prompts": str(tmp_path / "held-out.jsonl"),
            "workspace": str(tmp_path / "workspace"), "generation": {"num_completions": 3},
            "judging": {"model": "a", "prompt_price": 1.0, "completion_price": 2.0, "rubric": "demo",
                        "shard_size": 100},
            "training": {"sft_adapter": str(tmp_path / "sft"), "max_steps": 8, "warmup_steps": 1},
            "evaluation": {"num_samples": 2},
        }
    )  # fmt: skip


def changed(config: PipelineConfig, **parts: dict[str, Any]) -> PipelineConfig:
    return config.model_copy(update={name: getattr(config, name).model_copy(update=to) for name, to in parts.items()})


def given(config: PipelineConfig, folder: Path, **row: Any) -> PipelineConfig:
    """Begin with six rows of completions or pairs that something else made; the last completions are equal."""
    rows = [{"prompt": [{"role": "user", "content": f"{n}"}], **row} for n in range(6)]
    if not row:
        rows = [{**row, "completions": [f"line {n} of {k if n < 5 else 0}" for k in range(3)]}
                for n, row in enumerate(rows)]  # fmt: skip
    file = folder / "given.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return config.model_copy(update={"preferences" if row else "completions": str(file)})


def test_work_that_runs_share_is_planned_once(config: PipelineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is known yet: six prompts, two judges in two orders each, four trainings, three held-out prompts."""
    runs = [
        changed(config.filled(), training={"beta": beta}, judging={"model": judge})
        for beta in (0.1, 0.2) for judge in ("a", "b")
    ]  # fmt: skip
    sweep, looks = SweepConfig(gpu_price=1.0), Counter[str]()
    with monkeypatch.context() as patch:
        patch.setattr(Workspace, "folders", lambda self, uri: looks.update([uri]) or [])
        plan = plan_runs(runs, sweep)
    assert looks[f"{config.workspace}/training"] == 1, "four trainings look for earlier ones once"
    found = [(work.stage.removeprefix("evaluate: "), tuple(work.points), work.requests) for work in plan.work]
    assert found == [
        ("sample completions", (1, 2, 3, 4), 6),
        ("judge preferences", (1, 3), 12), ("judge preferences", (2, 4), 12),
        *(("train", (point,), 0) for point in (1, 2, 3, 4)),
        ("sample SFT adapter", (1, 2, 3, 4), 3), *(("sample new adapter", (point,), 3) for point in (1, 2, 3, 4)),
        *(("compare", (point,), 12) for point in (1, 2, 3, 4)),
        ("sample SFT adapter again", (1, 2, 3, 4), 3), ("compare SFT with itself", (1, 2, 3, 4), 12),
    ]  # fmt: skip
    judged, trained = plan.work[1], plan.work[3]
    assert judged.completion_tokens == 12 * 30
    assert judged.most_usd - (judged.usd or 0) == pytest.approx(12 * (config.judging.max_tokens - 30) * 2.0 / 1e6)
    seconds = 8 * config.training.per_device_train_batch_size * config.training.gradient_accumulation_steps / 1.14
    assert (trained.gpu_minutes, trained.usd) == (pytest.approx(seconds / 60), pytest.approx(seconds / 3600))
    known = AdapterRef(
        uri="a", sha256="0" * 64, size=0, rows=0, manifest=f"{config.workspace}/training/k/manifest.json"
    )
    earlier = Manifest(
        artifact=known, stage="training", version=1, key="k", config=config.training, counts={"steps": 4},
        seconds=120, files={"adapter.safetensors": FileFacts(size=1, sha256="gone, and not read for an estimate")},
    )  # fmt: skip
    Workspace(config.workspace).write_manifest(earlier)
    again = plan_runs(runs, sweep).of(TRAINING).work[0]
    assert (again.is_measured, again.gpu_minutes) == (True, pytest.approx(4.0)), "eight steps at 30 s each"


def test_judging_is_counted_by_judge_at_its_own_price_without_what_is_known_and_equal_completions(
    config: PipelineConfig, tmp_path: Path
) -> None:
    config = given(config, tmp_path)
    assert [work.stage for work in plan_runs([config]).work[:2]] == [JUDGING, TRAINING], "nothing is sampled"
    panel = [{"model": "another", "prompt_price": 0, "completion_price": 0}]
    judging = {"panel": panel, "orders": 3, "max_tokens": 100, "min_chosen_score": 5}
    judged = config.model_copy(update={"judging": JudgingConfig(**(config.judging.model_dump() | judging))})
    first, second = plan_runs([judged]).of(JUDGING).work
    assert (first.requests, second.requests) == (15, 15)
    assert (first.completion_tokens, first.most_completion_tokens) == (15 * (30 + 3 * 8), 15 * 100)
    assert (first.usd, first.most_usd) == (
        pytest.approx((first.prompt_tokens + 2 * 15 * 54) / 1e6), pytest.approx((first.prompt_tokens + 2 * 1500) / 1e6)
    )  # fmt: skip
    assert (second.usd, second.most_usd) == (None, 0)


async def test_what_is_known_is_not_asked_again(config: PipelineConfig, tmp_path: Path) -> None:
    config = given(config, tmp_path)
    assert config.completions is not None
    plan = plan_judging(import_completions(config.completions, config.workspace), config.workspace, config.judging)
    (judge,), (part,) = plan.judges, plan.slices
    units = [key for row in read_slice(Workspace(config.workspace), part) for key in plan.units_of(row)]
    async with judge.rows().journal(part) as journal:
        for key in units[:4]:
            await journal.append(key, Outcome(row={"order": [0, 1, 2], "best": 0, "worst": 1}))
    (work,) = plan_runs([config]).of(JUDGING).work
    assert (work.requests, work.known, work.to_ask) == (10, 4, 6)


@pytest.mark.slow  # importing what measures pairs
def test_a_run_that_begins_with_pairs_is_not_judged(config: PipelineConfig, tmp_path: Path) -> None:
    sides = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    plan = plan_runs([given(changed(config, judging={"val_ratio": 0.0}), tmp_path, **sides)])
    assert not plan.of("sample completions").work + plan.of(JUDGING).work
    assert len(plan.of(TRAINING).work) == 1


def test_the_evaluations_verdicts_are_counted_at_most(config: PipelineConfig) -> None:
    def comparisons(**evaluation: Any) -> int:
        return plan_runs([changed(config, evaluation=evaluation)]).of(COMPARING).total().requests

    assert comparisons() == 2 * 2 * 2 * 3
    assert comparisons(num_samples=3, null_test=False, max_prompts=2) == 2 * 3 * 2


def test_what_is_to_be_approved_has_requests_and_both_costs() -> None:
    judging = Work(JUDGING, "judge", [1], 120, 20, 50_000, 3_000, 102_400, usd=0.02, most_usd=0.3)
    later = Work(COMPARING, "judge", [1], 480, usd=1.0, most_usd=2.0)
    page = approval_section(Plan([judging, later]))
    assert "asked 100 questions (about 0.02 US$, at most 0.30)" in page.summary
    assert "up to 480 verdicts more" in page.summary
    row = (f"{JUDGING} (judge)", 120, "20", 50_000, 3_000, 102_400, None, "0.02", "0.30")
    assert page.tables[0].rows[0] == page.tables[1].rows[0] == row
    free = approval_section(Plan([Work(JUDGING, "judge", [1], 120, usd=None)]))
    assert "no price set" in free.summary
    assert "judging.prompt_price" in free.advice[0]
