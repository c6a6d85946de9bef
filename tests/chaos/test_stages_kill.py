"""kill -9 in every stage: the same bytes come out, and only what was in flight is asked for again.

Each stage is killed once, in `make test-all` four times; PREFLOW_KILLS says how often.
"""

import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.stage_process import run_stages
from tests.fakes import FakeOpenAI
from tests.integration.test_stages import write_prompts

KILLS = int(os.environ.get("PREFLOW_KILLS", "1"))
CONCURRENCY = 8
PROMPTS = 60
PLAN = {"latency_ms": 40, "oracle_every": 3}
FINAL = ("completions.jsonl", "failures.jsonl", "verdicts.jsonl", "judged.jsonl", "train.jsonl", "val.jsonl",
         "quality.json", "samples.jsonl", "comparisons.jsonl", "win_rate.json")  # fmt: skip


@dataclass
class Side:
    """One workspace with an endpoint of its own."""

    folder: Path
    fake: FakeOpenAI
    api: str
    adapter: Path

    def start(self) -> ForkServerProcess:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["flows.generate", "flows.judge", "flows.evaluate"])
        process = context.Process(target=run_stages, args=(self.order(),))
        process.start()
        return process

    def order(self) -> dict[str, Any]:
        common = {"endpoint": self.fake.url, "max_concurrency": CONCURRENCY, "shard_size": 11}
        return {
            "api": self.api, "home": os.environ["PREFECT_HOME"], "log": str(self.folder / "log"),
            "workspace": str(self.folder / "ws"), "prompts": str(self.folder / f"prompts-0-{PROMPTS}.jsonl"),
            "held_out": str(self.folder / "prompts-500-30.jsonl"), "adapter": str(self.adapter),
            "generation": {**common, "model": "sampler"},
            "judging": {**common, "model": "judge-hash", "api_key": None, "rubric": "demo"},
        }  # fmt: skip

    def requests(self) -> int:
        return self.fake.log.read_bytes().count(b'"path": "/v1/chat/completions"') if self.fake.log.exists() else 0

    def finals(self) -> dict[str, bytes]:
        """The final files, by stage and name; which key a folder has depends on no path, so those are equal too."""
        root = self.folder / "ws"
        files = [path for path in root.rglob("*") if path.name in FINAL]
        return {str(path.relative_to(root)): path.read_bytes() for path in files}


def make_side(folder: Path, api: str) -> Side:
    folder.mkdir()
    write_prompts(folder, PROMPTS)
    write_prompts(folder, 30, first=500)
    adapter = folder.parent / "adapter"
    adapter.mkdir(exist_ok=True)
    (adapter / "adapter_model.safetensors").write_bytes(b"weights")
    (adapter / "adapter_config.json").write_text('{"r": 8}')
    return Side(folder, FakeOpenAI(PLAN, folder / "fake"), api, adapter)


def run_to_the_end(side: Side) -> None:
    process = side.start()
    process.join(200)
    assert process.exitcode == 0, (side.folder / "log").read_text()[-3000:]


def kill_at(side: Side, request: int, delay: float) -> bool:
    """Start the stages and kill -9 them `delay` seconds after the given request; False if they had ended by then."""
    process = side.start()
    assert process.pid is not None
    while process.is_alive() and side.requests() < request:
        time.sleep(0.01)
    time.sleep(delay)
    was_alive = process.is_alive()
    if was_alive:
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert was_alive or process.exitcode == 0, (side.folder / "log").read_text()[-3000:]
    return was_alive


def stage_bounds(side: Side) -> list[tuple[int, int]]:
    """The first and the last request of each stage in an uninterrupted run: sampling, judging, evaluating."""
    models = [row["model"] for row in side.fake.requests()]
    judged = models.index("judge-hash")
    evaluated = next(i for i, model in enumerate(models) if i > judged and model != "judge-hash")
    return [(0, judged), (judged, evaluated), (evaluated, len(models))]


@pytest.mark.timeout(1800)
def test_killed_at_random_moments_the_stages_end_in_the_same_bytes(tmp_path: Path, prefect_server: str) -> None:
    uninterrupted, killed = (make_side(tmp_path / name, prefect_server) for name in ("uninterrupted", "killed"))
    rng = random.Random(int(os.environ.get("PREFLOW_SEED", "0")))
    with uninterrupted.fake, killed.fake:
        run_to_the_end(uninterrupted)
        kills = 0
        for first, last in stage_bounds(uninterrupted):
            moments = sorted(rng.uniform(first, last + 1) for _ in range(KILLS))
            for moment in moments:
                # What earlier kills had in flight is asked for again, and shifts this stage's requests.
                repeated = killed.requests() - unique(killed)
                kills += kill_at(killed, int(moment) + repeated, rng.uniform(0, 0.1))
        run_to_the_end(killed)
        assert kills >= 2 * KILLS, "most kills came too late"
        expected, found = uninterrupted.finals(), killed.finals()
        assert {path.rpartition("/")[2] for path in expected} == set(FINAL)
        assert found.keys() == expected.keys()
        assert [path for path in expected if found[path] != expected[path]] == []
        assert unique(killed) == unique(uninterrupted) == uninterrupted.requests()
        repeats = killed.requests() - unique(killed)
        assert repeats <= kills * CONCURRENCY, f"{repeats} requests were repeated for {kills} kills"
        print(f"{kills} kills, {killed.requests()} requests, {repeats} repeated")


def unique(side: Side) -> int:
    return len(Counter(row["sha"] for row in side.fake.requests()))
