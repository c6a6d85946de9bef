"""The training's lines: none that repeats readings, none that looks broken."""

import logging

import pytest

from tasks.train.launch import ProgressLog
from tasks.train.spec import Progress


def said(caplog: pytest.LogCaptureFixture, *steps: Progress) -> list[str]:
    caplog.set_level(logging.INFO, "tasks")
    log = ProgressLog()
    for step in steps:
        log.say(step)
    return [record.getMessage() for record in caplog.records]


def test_readings_that_have_not_changed_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    first = [Progress("training", step=step, total=60, loss=1.0746, accuracy=0.0, margin=0.0) for step in range(1, 10)]
    then = [Progress("training", step=step, total=60, loss=0.61, accuracy=0.7, margin=0.1) for step in range(10, 14)]
    lines = said(caplog, *first, *then)
    assert lines == [
        "training, step 1/60, loss 1.0746",
        "training, step 10/60, loss 0.6100, accuracy 0.7000, margin 0.1000",
    ]


def test_another_phase_and_the_last_step_are_said(caplog: pytest.LogCaptureFixture) -> None:
    steps = [Progress("loading"), Progress("training", step=59, total=60, loss=0.5, margin=0.2, accuracy=0.8)]
    lines = said(caplog, *steps, Progress("training", step=60, total=60, loss=0.5, margin=0.2, accuracy=0.8))
    assert [line.split(",")[0] for line in lines] == ["loading"] + ["training"] * 2


def test_ten_seconds_of_silence_are_enough(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr("tasks.train.launch.time.monotonic", lambda: next(clock))
    steps = [Progress("training", step=step, total=60, loss=0.5) for step in range(1, 9)]
    assert 1 < len(said(caplog, *steps)) < len(steps)
