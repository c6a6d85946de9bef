"""Bad input to the whole pipeline: one clear message with the place and the remedy, before anything is spent."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.pipeline import dpo_pipeline
from tasks.config import PipelineConfig
from tasks.errors import PreflowError
from tests.fakes import FakeOpenAI
from tests.fakes.tiny_training import Shape, TinyWorld, build_adapter

GOOD_ROW = {"prompt": [{"role": "user", "content": "w1 w2 w3"}]}


@pytest.fixture(scope="module")
def endpoint(world: TinyWorld) -> Iterator[FakeOpenAI]:
    with FakeOpenAI({"key": "right", "base": str(world.base)}) as server:
        yield server


@pytest.fixture
def settings(
    tmp_path: Path, world: TinyWorld, endpoint: FakeOpenAI, prefect_server: str, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    monkeypatch.setenv("RIGHT_KEY", "right")
    monkeypatch.setenv("WRONG_KEY", "wrong-and-secret")
    (tmp_path / "prompts.jsonl").write_text(json.dumps(GOOD_ROW) + "\n")
    kept = tmp_path / "workspace" / "adapters" / "dpo" / "CURRENT.json"
    kept.parent.mkdir(parents=True)
    kept.write_text("what is served now")
    return {
        "prompts": str(tmp_path / "prompts.jsonl"),
        "workspace": str(tmp_path / "workspace"),
        "generation": {"endpoint": endpoint.url, "model": "sampler", "api_key": "env:RIGHT_KEY"},
        "judging": {"endpoint": endpoint.url, "model": "judge-hash", "api_key": "env:RIGHT_KEY", "rubric": "neutral"},
        "training": {
            "base_model": str(world.base),
            "sft_adapter": str(world.adapter),
            "load_in_4bit": False,
            "max_length": 512,
        },
        "promotion": {"endpoint": None},
    }


def _prompts(text: str) -> Callable[[dict[str, Any]], None]:
    return lambda settings: (Path(settings["prompts"]).write_text(text), None)[1]


def _set(dotted: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(settings: dict[str, Any]) -> None:
        *path, last = dotted.split(".")
        for name in path:
            settings = settings[name]
        settings[last] = value

    return change


def _row(**fields: Any) -> str:
    return json.dumps(GOOD_ROW) + "\n" + json.dumps(fields) + "\n"


def _high_rank(settings: dict[str, Any]) -> None:
    training, folder = settings["training"], Path(settings["prompts"]).with_name("high")
    training["sft_adapter"] = str(build_adapter(folder, Path(training["base_model"]), shape=Shape(rank=65)))


CASES: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "no file": (_set("prompts", "absent.jsonl"), r"absent\.jsonl: no such file"),
    "not json": (_prompts('{"prompt": [}\n'), r"prompts\.jsonl:1: not usable JSON"),
    "no prompt": (_prompts(_row(text="hello")), r"prompts\.jsonl:2: no prompt in it \(the row has: text\)"),
    "empty file": (_prompts(""), r"prompts\.jsonl: has no rows"),
    "unknown role": (
        _prompts(_row(prompt=[{"role": "narrator", "content": "x"}])),
        r"prompts\.jsonl:2: prompt\[0\]: the role 'narrator' is not system, user or assistant",
    ),
    "wrong endpoint": (_set("generation.endpoint", "http://127.0.0.1:9/v1"), r"http://127\.0\.0\.1:9/v1"),
    "unknown model": (_set("generation.model", "nobody"), r"nobody.*sampler"),
    "unknown judge": (_set("judging.model", "nobody"), r"nobody.*judge-hash"),
    "no adapter": (_set("training.sft_adapter", "absent/adapter"), r"absent/adapter"),
    "no base": (_set("training.base_model", "./absent-base"), r"base_model /.*/absent-base: no such folder"),
    "rank over the server's": (_high_rank, r"LoRA rank 65 is greater than max_lora_rank 64.*vLLM with --max-lora-rank"),
    "missing key": (_set("judging.api_key", "env:NO_SUCH_KEY"), r"judging\.api_key names env:NO_SUCH_KEY.*export"),
    "wrong key": (_set("judging.api_key", "env:WRONG_KEY"), r"env:WRONG_KEY"),
    "no rubric": (_set("judging.rubric", "absent.md"), r"judging\.rubric: '/.*/absent\.md'"),
    "workspace": (_set("workspace", "/proc/preflow"), r"workspace /proc/preflow: cannot be written"),
}


ASKS = {"unknown model", "unknown judge", "wrong key"}


@pytest.mark.parametrize("case", CASES, ids=str)
async def test_bad_input_is_refused_before_anything_is_spent(
    case: str, settings: dict[str, Any], endpoint: FakeOpenAI, tmp_path: Path
) -> None:
    spoil, message = CASES[case]
    spoil(settings)
    asked = len(endpoint.requests())
    with pytest.raises(PreflowError) as refused:
        await dpo_pipeline(PipelineConfig.model_validate(settings))
    assert re.search(message, str(refused.value), re.DOTALL), str(refused.value)
    assert "wrong-and-secret" not in str(refused.value)
    # To know that a model is there, those before it in the run are asked one short question each.
    questions = [request["sha"] for request in endpoint.requests()[asked:]]
    assert len(questions) == len(set(questions)) <= (2 if case in ASKS else 0), "more was asked before the refusal"
    assert (tmp_path / "workspace/adapters/dpo/CURRENT.json").read_text() == "what is served now"


FULL_DISK = """
import asyncio, json, resource, sys
from flows.generate import generate_completions
from tasks.config import GenerationConfig
# Linux refuses to let a file grow beyond this, as it does on a full disk.
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[4]), resource.RLIM_INFINITY))
config = GenerationConfig(endpoint=sys.argv[3], model="sampler", api_key="env:RIGHT_KEY", max_concurrency=4)
print(asyncio.run(generate_completions(sys.argv[1], sys.argv[2], config)).rows)
"""


def test_a_full_disk_loses_nothing(settings: dict[str, Any], endpoint: FakeOpenAI, tmp_path: Path) -> None:
    rows = [{"prompt": [{"role": "user", "content": f"scene {number} " + "and so on " * 40}]} for number in range(60)]
    Path(settings["prompts"]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = len(endpoint.requests())
    full = _generate(settings, endpoint, limit=20_000)
    assert full.returncode != 0
    assert re.search(r"disk is full|could not be written", full.stdout + full.stderr), full.stderr[-2000:]
    again = _generate(settings, endpoint, limit=100_000_000)
    assert again.returncode == 0, again.stderr[-2000:]
    assert again.stdout.split()[-1] == "60"
    assert len(endpoint.requests()) - before <= 60 + 4 + 1, "more was asked again than was in flight"


def _generate(settings: dict[str, Any], endpoint: FakeOpenAI, limit: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", FULL_DISK, settings["prompts"], settings["workspace"], endpoint.url, str(limit)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
