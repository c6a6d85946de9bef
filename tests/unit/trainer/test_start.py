"""From the start to the first step at real size: nothing on the way takes more than linear time, or is silent."""

import dataclasses
import json
import time
from pathlib import Path

import numpy
import pytest
from safetensors.numpy import load_file, save_file

from tasks.train import phases
from tasks.train.launch import check_training_inputs
from tasks.train.phases import Phases
from tasks.train.spec import Progress
from tests.fakes.tiny_training import TinyWorld, large_tokenizer


def test_a_vocabulary_of_128k_tokens_is_compared_in_seconds(tmp_path: Path) -> None:
    world = TinyWorld.build(tmp_path)
    for folder in (world.base, world.adapter):
        large_tokenizer(folder)
    config = world.base / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": 128_256}))
    weights = load_file(world.base / "model.safetensors")
    weights["model.embed_tokens.weight"] = numpy.zeros((128_256, 64), numpy.float16)
    save_file(weights, world.base / "model.safetensors")
    started = time.monotonic()
    check_training_inputs(world.config())
    assert time.monotonic() - started < 600  # token by token it took 137 minutes


def test_a_long_phase_says_that_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[Progress] = []
    run = Phases(said.append)
    with run.phase("short"):
        pass
    monkeypatch.setattr(phases, "FIRST_WORD_SECONDS", 0.02)
    with run.phase("long"):
        deadline = time.monotonic() + 30
        while len(said) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert {progress.message.partition(",")[0] for progress in said} == {"long"}
    assert run.seconds.keys() == {"short", "long"}
    assert run.seconds["long"] >= 0.06
    assert all(dataclasses.asdict(progress)["phase"] == "loading" for progress in said)
