"""Sampling and judging against ten scripted providers at 30 % faults: nothing lost, nothing doubled, nothing wrong.

`python -m tests.integration.test_providers` prints the table of docs/endpoints.md.
"""

import asyncio
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tasks.batch.rows import Outcome, RowStore, ShardRef, slice_rows
from tasks.batch.shards import ShardWorker, Tally, merge_shards, settle
from tasks.config import GenerationConfig, JudgingConfig
from tasks.generate.sampling import Sampler, prompt_unit, try_sampler
from tasks.judge.asking import Judge, JudgingPlan, as_asked, try_judge
from tasks.llm import retries
from tasks.llm.client import Endpoint
from tasks.store.workspace import PromptsRef, Reference, Row, Workspace, digest
from tests.fakes.providers import ANSWER, PROVIDERS, Provider

Found = list[tuple[Row, Outcome]]
ROWS = 80  # the table is made of 200
N = 2


@dataclass
class Measured:
    """What one provider was asked, and what came of it."""

    requests: int
    failed: int
    left_out: list[str]
    lost: int
    doubled: int
    wrong: int


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    make_hasty(monkeypatch.setattr)


def make_hasty(setattr: Any) -> None:
    """Shorten the waits between attempts."""
    setattr(retries, "FIRST_BACKOFF_SECONDS", 0.01)
    setattr(retries, "LONGEST_BACKOFF_SECONDS", 0.1)
    os.environ["PROVIDER_KEY"] = "azure-key"


async def run_stage(folder: Path, source: Reference, units_of: Any, work: Any, fit: Any) -> Found:
    """Run a stage's shards without Prefect, and return each outcome with its row."""
    slices = slice_rows(Workspace(folder), source, 25)
    rows = RowStore(str(folder), "matrix", digest(source.sha256))
    worker = ShardWorker(rows, units_of, work, Tally(rows=source.rows), 16, _nothing)
    shards: list[ShardRef] = await settle((worker.run(part) for part in slices), 4)
    found = merge_shards(slices, shards, rows, units_of, fit)
    return [(row, outcome) for row, outcomes in found for outcome in outcomes]


def write(folder: Path, name: str, rows: list[Row]) -> PromptsRef:
    store = Workspace(folder)
    with store.writing(store.uri(name)) as out:
        for row in rows:
            out.write_row(row)
    return PromptsRef(uri=store.uri(name), **out.facts())


async def measure(provider: Provider, folder: Path, count: int = ROWS) -> Measured:
    """Sample for so many prompts and judge what came, in both orders."""
    headers = {provider.header[0]: "env:PROVIDER_KEY"} if provider.header else {}
    with provider.serve() as url:
        common: dict[str, Any] = {"endpoint": url, "model": "m", "api_key": None, "extra_headers": headers}
        sampled = await sample_all(folder, GenerationConfig(**common, num_completions=N), count)
        rows = [{**row, **outcome.row} for row, outcome in sampled if outcome.row]
        judging = JudgingConfig(**common, rubric="neutral", temperature=0.0)
        votes = await judge_all(folder, judging, write(folder, "completions.jsonl", rows))
    left_out = {name for _, outcome in [*sampled, *votes] for name in outcome.refused}
    lost = sum(outcome.row is None for _, outcome in [*sampled, *votes])
    wrong = sum(not is_of(row, text) for row in rows for text in row["completions"])
    wrong += sum(len(row["completions"]) != N for row in rows)
    wrong += sum(outcome.row["best"] != longer(row) for row, outcome in votes if outcome.row)
    stage = {key: count for key, count in provider.answered.items() if "Say hello." not in key and "ping" not in key}
    doubled = sum(stage.values()) - len(stage)
    return Measured(provider.requests, provider.failed, sorted(left_out), lost, doubled, wrong)


async def sample_all(folder: Path, config: GenerationConfig, count: int) -> Found:
    """Return what was sampled for each prompt."""
    prompts = [{"id": digest(n), "prompt": [{"role": "user", "content": f"Question {n}?"}]} for n in range(count)]
    async with await Endpoint.connect(config, "generation") as endpoint:
        await endpoint.check_model()
        await try_sampler(endpoint, config)
        source, work = write(folder, "prompts.jsonl", prompts), Sampler(endpoint, config).sample
        return await run_stage(folder, source, prompt_unit, work, lambda _, outcome: outcome)


async def judge_all(folder: Path, judging: JudgingConfig, completions: Reference) -> Found:
    """Return each vote with its row."""
    plan = JudgingPlan(workspace=str(folder), source=completions, judging=judging, rubric="Longer.", slices=[])
    (config,) = judging.judges()
    async with await Endpoint.connect(config, "judging") as endpoint:
        await try_judge(endpoint, config, plan.rubric)
        judge = Judge(endpoint, config, plan.rubric)
        return await run_stage(folder, completions, plan.units_of, judge.judge, as_asked)


async def _nothing() -> None:
    return None


def is_of(row: Row, text: str) -> bool:
    return text.startswith(f"{ANSWER} to <{row['prompt'][0]['content']}>")


def longer(row: Row) -> int:
    texts = row["completions"]
    return max(range(len(texts)), key=lambda place: (len(texts[place]), texts[place]))


@pytest.mark.parametrize("provider", PROVIDERS, ids=[provider.name for provider in PROVIDERS])
async def test_at_30_percent_faults_nothing_is_lost_doubled_or_wrong(provider: Provider, tmp_path: Path) -> None:
    found = await measure(provider, tmp_path)
    assert (found.lost, found.doubled, found.wrong) == (0, 0, 0)
    assert tuple(found.left_out) == provider.refused
    assert found.failed > 0.2 * found.requests


async def _print_table() -> None:
    make_hasty(setattr)
    print("| Provider | What is odd about it | Left out | Requests | Of them failed | Lost | Doubled | Wrong |")
    print("|---|---|---|---:|---:|---:|---:|---:|")
    for provider in PROVIDERS:
        with tempfile.TemporaryDirectory() as folder:
            m = await measure(provider, Path(folder), 200)
        left_out = ", ".join(m.left_out) or "-"
        figures = " | ".join(str(number) for number in (m.requests, m.failed, m.lost, m.doubled, m.wrong))
        print(f"| {provider.name} | {provider.quirks} | {left_out} | {figures} |", flush=True)


if __name__ == "__main__":
    asyncio.run(_print_table())
