"""The preemption drill as its user runs it, from the command line."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.store.workspace import file_sha256
from tests.fakes.process import ROOT

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def workspace(prefect_server: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("workspace")


def drill(workspace: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "preflow", "drill", "--workspace", str(workspace), "--steps", "14"]
    return subprocess.run(
        [*command, *options], cwd=ROOT, capture_output=True, text=True, timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip


@pytest.mark.long  # two trainings, two preemptions
def test_a_preempted_training_comes_out_the_same_and_the_table_says_what_it_cost(workspace: Path) -> None:
    done = drill(workspace, "--preemptions", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if re.match(r" *[12] +SIG", line)]
    assert [row[1] for row in rows] == ["SIGTERM", "SIGKILL"]
    for _, _, at_step, resumed_from, steps_lost, seconds_lost in rows:
        assert int(steps_lost) == max(0, int(at_step) - int(resumed_from))
        assert float(seconds_lost) > 0
    assert rows[0][4] == "0", "on SIGTERM the trainer saves"
    assert int(rows[1][3]) % 3 == 0 or rows[1][3] == rows[0][3], "after SIGKILL it goes on from a checkpoint"
    assert re.search(r"byte for byte: adapter_config.json, adapter_model.safetensors, .*metrics.jsonl", done.stdout)
    log = next(workspace.glob("drill/preempted-*/training/*/train.log")).read_text()
    assert re.findall(r"resuming from the checkpoint of step (\d+)", log) == [row[3] for row in rows if row[3] != "0"]


@pytest.mark.long  # a third training
def test_a_difference_is_seen_and_named(workspace: Path) -> None:
    """The uninterrupted training of the test before is taken as it is, so a change to it must be noticed."""
    (metrics,) = workspace.glob("drill/uninterrupted-*/training/*/metrics.jsonl")
    metrics.write_text(metrics.read_text() + "\n")
    manifest = metrics.with_name("manifest.json")  # which tells damage from a difference
    facts = json.loads(manifest.read_text())
    facts["files"]["metrics.jsonl"] |= {"sha256": file_sha256(metrics), "size": metrics.stat().st_size}
    manifest.write_text(json.dumps(facts))
    done = drill(workspace, "--preemptions", "1")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "DIFFER from those of the uninterrupted training: metrics.jsonl" in done.stdout


@pytest.mark.long  # three commands
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--preemptions", "9"), "take more steps"),
        (("--deployment", "train-dpo/nowhere"), "no such deployment"),
        (("--set", "beta=-1"), "beta"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_trained(
    prefect_server: str, tmp_path: Path, options: tuple[str, ...], said: str
) -> None:
    done = drill(tmp_path, *options)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("drill/*/training"))
