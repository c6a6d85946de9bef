"""From the start to the first step at real size: nothing on the way takes more than linear time, or is silent."""

import dataclasses
import json
import time
from pathlib import Path

import pytest

from tasks.config import TrainingConfig
from tasks.errors import PreflowError
from tasks.train import phases
from tasks.train.phases import Phases
from tasks.train.spec import Progress
from tasks.trainer.model import load_tokenizer
from tests.fakes.tiny_training import large_tokenizer


def test_a_vocabulary_of_128k_tokens_is_compared_in_seconds(tmp_path: Path) -> None:
    training = TrainingConfig(base_model=str(large_tokenizer(tmp_path / "base")))
    own = large_tokenizer(tmp_path / "sft")
    started = time.monotonic()
    assert len(load_tokenizer(training, own)) == 128_256
    assert time.monotonic() - started < 60  # token by token it took 137 minutes


def test_a_token_with_another_number_is_named_among_128k(tmp_path: Path) -> None:
    training = TrainingConfig(base_model=str(large_tokenizer(tmp_path / "base")))
    file = large_tokenizer(tmp_path / "sft") / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    words = tokenizer["model"]["vocab"]
    words["w1000"], words["w2000"] = words["w2000"], words["w1000"]
    file.write_text(json.dumps(tokenizer))
    with pytest.raises(PreflowError, match=r"2 tokens have another number, 0 are missing \(e.g. 'w[12]000'\)"):
        load_tokenizer(training, tmp_path / "sft")


def test_a_long_phase_says_that_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phases, "FIRST_WORD_SECONDS", 0.02)
    said: list[Progress] = []
    run = Phases(said.append)
    with run.phase("short"):
        pass
    with run.phase("long"):
        deadline = time.monotonic() + 30
        while len(said) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert {progress.message.partition(",")[0] for progress in said} == {"long"}
    assert run.seconds["long"] >= 0.04 > run.seconds["short"]
    assert all(dataclasses.asdict(progress)["phase"] == "loading" for progress in said)
