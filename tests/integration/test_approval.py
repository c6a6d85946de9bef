"""A person's yes: a paused run waits for it, a no ends the run, and what was approved is not asked again."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowFilter, FlowFilterName
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.sorting import FlowRunSort
from prefect.flow_runs import aresume_flow_run

from tasks.config import PipelineConfig
from tasks.errors import PreflowError
from tasks.run import approval
from tasks.run.approval import NotApproved, approve_judging, approve_promotion, cancel_if_refused, read_answers
from tasks.store.workspace import AdapterRef, CompletionsRef, EvaluationRef, PromotionRef, Workspace

# The browser asks, says yes and looks at what is shown.
pytestmark = [pytest.mark.usefixtures("prefect_server"), pytest.mark.long]


class Bench:
    """A run that has its completions, and what a stage would hand on."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        prompts = [{"prompt": [{"role": "user", "content": f"Scene {n}"}]} for n in range(6)]
        (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
        (folder / "sft").mkdir(exist_ok=True)
        (folder / "sft" / "adapter_config.json").write_text("{}")
        (folder / "sft" / "adapter_model.safetensors").write_bytes(b"weights")
        settings: dict[str, Any] = {
            "prompts": str(folder / "prompts.jsonl"),
            "workspace": str(folder / "workspace"),
            "training": {"sft_adapter": str(folder / "sft")},
            "judging": {"rubric": "neutral", "prompt_price": 1.0, "completion_price": 10.0, "max_tokens": 100},
            "evaluation": {"num_samples": 2, "null_test": False},
            "approve_before": ["judging", "promotion"],
        }
        self.config = PipelineConfig.model_validate({**settings, **changes}).filled()
        self.store = Workspace(self.config.workspace)

    def completions(self) -> CompletionsRef:
        with self.store.writing(self.store.uri("completions", "c.jsonl")) as out:
            for n in range(6):
                prompt = [{"role": "user", "content": f"Scene {n}"}]
                # The last prompt's completions are equal: nothing is asked about it.
                texts = [f"[ANN] line {n} of {k if n < 5 else 0}" for k in range(3)]
                out.write_row({"id": f"{n:064x}", "prompt": prompt, "completions": texts})
        return CompletionsRef(uri=self.store.uri("completions", "c.jsonl"), **out.facts())

    def evaluation(self) -> EvaluationRef:
        row = {"id": "a#0", "prompt": [{"role": "user", "content": "s"}], "completions": ["old", "new"], "outcome": 1.0}
        self.store.write_bytes(self.store.uri("evaluations", "comparisons.jsonl"), (json.dumps(row) + "\n").encode())
        rate: dict[str, Any] = {"win_rate": 0.7, "lower": 0.6, "upper": 0.8}
        found = {**rate, "confidence": 0.95, "samples": 90, "prompts": 30, "ties": 0.0, "adapter_sha256": "0" * 64}
        uri = self.store.uri("evaluations", "win_rate.json")
        self.store.write_json(uri, found)
        return EvaluationRef(uri=uri, sha256=self.store.sha256(uri), size=1, rows=1, adapter_sha256="0" * 64, **rate)


@flow(name="judged", on_failure=[cancel_if_refused])
async def judged(bench: Any) -> str:
    await approve_judging(bench.config, bench.completions())
    return "judged"


@flow(name="promoted")
async def promoted(bench: Any, promotion: PromotionRef | None = None) -> str | None:
    return await approve_promotion(bench.config, bench.evaluation(), promotion)


async def newest(name: str) -> FlowRun | None:
    async with get_client() as client:
        runs = await client.read_flow_runs(
            flow_filter=FlowFilter(name=FlowFilterName(any_=[name])), sort=FlowRunSort.START_TIME_DESC, limit=1
        )
    return runs[0] if runs else None


async def waiting(name: str, work: "asyncio.Task[Any]") -> FlowRun:
    """Return the run of `work` as soon as it waits and can be resumed."""
    while not work.done():
        run = await newest(name)
        if run is not None and run.state is not None and run.state.is_paused():
            async with get_client() as client:
                keys = run.state.state_details.run_input_keyset or {}
                given = await client.filter_flow_run_input(
                    run.id, key_prefix=keys["schema"], limit=1, exclude_keys=set()
                )
            if given:
                return run
        await asyncio.sleep(0.2)
    raise AssertionError(f"{name} did not wait: {work.exception() or work.result()}")


async def test_a_yes_lets_the_run_go_on_and_is_asked_for_only_once(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    work = asyncio.create_task(judged(bench))
    run = await waiting("judged", work)
    await aresume_flow_run(run.id, run_input={"approve": True, "note": "cheap"})
    assert await work == "judged"
    (answer,) = read_answers(bench.config, "judging")
    assert (answer.approve, answer.note, answer.flow_run_id) == (True, "cheap", str(run.id))
    assert await judged(bench) == "judged"
    last = await newest("judged")
    assert last is not None
    assert last.id != run.id
    assert len(read_answers(bench.config, "judging")) == 1


async def test_a_no_cancels_the_run_with_the_reason_and_the_next_run_asks_again(tmp_path: Path) -> None:
    bench = Bench(tmp_path, prompts=str(tmp_path / "prompts.jsonl"), approve_before=["judging"])
    for attempt in (1, 2):
        work = asyncio.create_task(judged(bench))
        run = await waiting("judged", work)
        await aresume_flow_run(run.id, run_input={"approve": False, "note": f"too dear {attempt}"})
        with pytest.raises(NotApproved, match=f"too dear {attempt}"):
            await work
        ended = await newest("judged")
        assert ended is not None
        assert ended.state is not None
        assert (ended.state.name, ended.id) == ("Cancelled", run.id)
        assert f"too dear {attempt}" in (ended.state.message or "")
        assert len(read_answers(bench.config, "judging")) == attempt


async def test_answers_that_two_runs_are_given_at_once_are_both_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, both = Bench(tmp_path), asyncio.Barrier(2)

    async def yes(*_: Any) -> approval.Decision:
        await both.wait()
        return approval.Decision(approve=True)

    monkeypatch.setattr(approval, "_ask", yes)
    await asyncio.gather(judged(bench), judged(bench))
    assert len(read_answers(bench.config, "judging")) == 2


async def test_what_was_approved_is_bound_to_what_was_shown(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    work = asyncio.create_task(promoted(bench))
    run = await waiting("promoted", work)
    await aresume_flow_run(run.id, run_input={"approve": True})
    assert await work is None
    assert await promoted(bench) is None, "it was approved"
    uri = bench.store.uri("evaluations", "win_rate.json")
    other = bench.evaluation().model_copy(update={"sha256": "1" * 64})
    assert bench.store.exists(uri)
    bench.evaluation = lambda: other  # type: ignore[method-assign]
    work = asyncio.create_task(promoted(bench))
    run = await waiting("promoted", work)
    await aresume_flow_run(run.id, run_input={"approve": False, "note": "reads badly"})
    assert await work == "not approved (promotion): reads badly"


async def test_nobody_is_asked_where_there_is_nothing_to_decide(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    adapter = AdapterRef(uri="a", sha256="0" * 64, size=1, rows=1)
    served = PromotionRef(uri="p", sha256="2" * 64, size=1, rows=1, name="dpo", adapter_sha256=adapter.sha256)
    assert await promoted(bench, served) is None
    bench.config = bench.config.model_copy(update={"approve_before": ()})
    assert await promoted(bench) is None
    assert await judged(bench) == "judged"
    assert read_answers(bench.config, "promotion") == []


async def test_a_run_that_nobody_approves_in_time_fails_and_says_what_to_do(tmp_path: Path) -> None:
    bench = Bench(tmp_path, approval_timeout_seconds=1)
    with pytest.raises(PreflowError, match="approval_timeout_seconds"):
        await judged(bench)
    with pytest.raises(PreflowError, match="only a flow run"):
        await approve_judging(bench.config, bench.completions())
