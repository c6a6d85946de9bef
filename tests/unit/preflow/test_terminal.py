"""What a run shows where there is no terminal: a line a stage, warnings, and everything in the file."""

import logging
from pathlib import Path

import pytest

from preflow.terminal import POINTS, STAGES, Display

ENGINE, OWN = logging.getLogger("prefect.flow_runs"), logging.getLogger("tasks.batch.progress")


def begin(flow: str, run: str) -> None:
    ENGINE.info("Beginning subflow run %r for flow %r", run, flow)


def end(flow: str, run: str, state: str = "Completed") -> None:
    ENGINE.info("Finished in state %s()", state, extra={"flow_name": flow, "flow_run_name": run})


@pytest.fixture(autouse=True)
def _levels(monkeypatch: pytest.MonkeyPatch) -> None:
    for logger in (ENGINE, OWN, logging.getLogger("tasks")):
        monkeypatch.setattr(logger, "level", logging.INFO)
    monkeypatch.setattr(ENGINE, "handlers", [])


def test_a_stage_is_one_line_with_the_last_that_it_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = logging.getLogger().handlers
    with Display(tmp_path / "logs" / "run.log", STAGES):
        begin("dpo-pipeline", "whole")
        begin("generate-completions", "sample sft")
        OWN.info("sample (sft): 45 of 240, 12.3/s, about 16 s to go")
        OWN.warning("27 %% of the completions were cut")
        OWN.warning("27 %% of the completions were cut")
        OWN.info("sample (sft): 240 of 240")
        end("generate-completions", "sample sft")
        begin("evaluate-adapter", "evaluate 0123")
        begin("generate-completions", "sample sft")
        end("generate-completions", "sample sft")
        OWN.info("evaluation: win rate 0.83")
        end("evaluate-adapter", "evaluate 0123")
        end("dpo-pipeline", "whole")
    shown = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in shown] == ["warning:", "done", "done"]
    assert shown[1].endswith("240 of 240")
    assert "evaluate" in shown[2]
    assert shown[2].endswith("win rate 0.83")
    assert "45 of 240" in (tmp_path / "logs" / "run.log").read_text()
    assert logging.getLogger().handlers == before


def test_each_point_of_a_sweep_has_its_line_and_a_failed_one_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Display(tmp_path / "run.log", POINTS):
        for number in (1, 2):
            begin("sweep-point", f"point {number}: training.beta=0.{number}")
        end("sweep-point", "point 1: training.beta=0.1")
        end("sweep-point", "point 2: training.beta=0.2", "Failed")
    shown = capsys.readouterr().err.splitlines()
    assert shown[0].startswith("done point 1: training.beta=0.1")
    assert shown[1].startswith("failed point 2: training.beta=0.2")
