"""The training child as its launcher runs it: the whole way, its endings, and two processes at once."""

import json
import os
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file

from tasks.store.workspace import AdapterRef, Workspace
from tasks.train.launch import Preempted, run_training, training_key
from tasks.train.spec import Progress
from tests.fakes.tiny_training import CHAT_TEMPLATE, TinyWorld
from tests.fakes.training_process import TrainingProcesses


class Trained:
    """One training through `run_training`, with what it reported."""

    def __init__(self, world: TinyWorld, workspace: Path, **changes: Any) -> None:
        self.progress: list[Progress] = []
        self.workspace, self.training = workspace, world.config(**changes)
        self.key = training_key(world.preferences, self.training)
        self.world = world
        self.adapter = self.run()

    def run(self) -> AdapterRef:
        return run_training(self.world.preferences, str(self.workspace), self.training, self.key, self.progress.append)

    @property
    def folder(self) -> Path:
        return self.workspace / "training" / self.key


@pytest.fixture(scope="module")
def trained(world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(world, tmp_path_factory.mktemp("workspace"))


def test_the_reference_names_a_whole_adapter(trained: Trained, world: TinyWorld) -> None:
    adapter = trained.adapter
    assert Path(adapter.uri) == trained.folder / "adapter"
    assert Workspace(trained.workspace).is_intact(adapter)
    assert adapter.rows == 28
    assert adapter.size == (trained.folder / "adapter" / "adapter_model.safetensors").stat().st_size
    names = {file.name for file in (trained.folder / "adapter").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "COMMITTED.json"}
    template = (trained.folder / "adapter" / "chat_template.jinja").read_text()
    assert template == CHAT_TEMPLATE, "sampling from it and serving it speak as it was trained"


def test_the_metrics_start_before_the_first_update_and_end_with_an_evaluation(trained: Trained) -> None:
    rows = [json.loads(line) for line in (trained.folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == sorted(row["step"] for row in rows)
    assert rows[0]["step"] == 0
    assert rows[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert [row["step"] for row in rows if "eval_loss" in row] == [5, 10, 12]
    assert [row["step"] for row in rows if "loss" in row] == [0, 3, 6, 9, 12]
    assert {"eval_rewards/accuracies", "eval_rewards/margins"} <= rows[-1].keys()
    assert not [name for row in rows for name in row if "runtime" in name or "per_second" in name]


def test_the_manifest_says_what_made_it(trained: Trained, world: TinyWorld) -> None:
    manifest = json.loads((trained.folder / "manifest.json").read_text())
    assert manifest["config"]["learning_rate"] == 1e-2
    upstream = {entry["kind"]: entry["sha256"] for entry in manifest["upstream"]}
    assert upstream["preferences"] == world.preferences.sha256
    assert upstream.keys() == {"preferences", "sft_adapter", "base_model", "chat_template"}
    assert manifest["counts"]["train_used"] == 28
    assert manifest["packages"]["trl"].startswith("1.16")
    assert manifest["figures"]["first_loss"] == pytest.approx(0.693147, abs=1e-5)
    assert manifest["figures"]["step"] == 12
    assert 0 < manifest["seconds"] < 600
    assert "adapter/adapter_model.safetensors" in manifest["files"]
    timing = json.loads((trained.folder / "timing.json").read_text())
    assert len(timing["checkpoint_seconds"]) == 3
    assert json.loads((trained.folder / "health.json").read_text())["readings"]


def test_progress_is_told_and_a_finished_training_is_not_repeated(trained: Trained) -> None:
    phases = [progress.phase for progress in trained.progress]
    assert phases[0] == "loading"
    assert {"reference", "training", "evaluating", "saving"} <= set(phases)
    last = [progress for progress in trained.progress if progress.phase == "training"][-1]
    assert (last.step, last.total) == (12, 12)
    assert last.pairs_per_second is not None
    assert last.pairs_per_second > 0
    trained.progress.clear()
    assert trained.run() == trained.adapter
    assert trained.progress == []


@pytest.mark.long  # another training
def test_another_beta_takes_the_reference_log_probs_that_are_there(
    trained: Trained, world: TinyWorld, processes: TrainingProcesses
) -> None:
    other = world.config(beta=0.3, learning_rate=3e-3, max_steps=20)
    assert processes.run(world.preferences, trained.workspace, other) == 0, processes.log()
    assert "reference log-probs taken from" in processes.log()
    assert len(list((trained.workspace / "reference-logprobs").iterdir())) == 1


@pytest.mark.long  # another training
def test_a_damaged_adapter_is_made_again(
    trained: Trained, world: TinyWorld, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = trained.folder / "adapter" / "adapter_model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert trained.run() == trained.adapter
    assert "adapter/adapter_model.safetensors: damaged" in caplog.text
    assert file.read_bytes() == content


@pytest.mark.long  # two processes on one core each
def test_two_processes_train_what_one_trains_and_resume_exactly(
    world: TinyWorld, processes: TrainingProcesses, tmp_path: Path
) -> None:
    """Through accelerate's launcher: as many pairs a step, summed in another order; SIGTERM in the middle."""
    changes = {"num_processes": 2, "gradient_accumulation_steps": 1, "max_steps": 6, "eval_steps": 6}
    training = world.config(**changes)
    key = training_key(world.preferences, training)

    def interrupt(progress: Progress) -> None:
        if progress.step >= 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_training(world.preferences, str(tmp_path / "preempted"), training, key, interrupt)
    preempted = Trained(world, tmp_path / "preempted", **changes)
    assert "resuming from the checkpoint of step" in (preempted.folder / "train.log").read_text()
    uninterrupted = Trained(world, tmp_path / "uninterrupted", **changes)
    assert preempted.adapter.sha256 == uninterrupted.adapter.sha256
    assert (preempted.folder / "metrics.jsonl").read_bytes() == (uninterrupted.folder / "metrics.jsonl").read_bytes()

    first = json.loads((uninterrupted.folder / "metrics.jsonl").read_text().splitlines()[0])
    assert (first["step"], first["loss"]) == (0, pytest.approx(0.693147, abs=1e-5))
    single = world.config(max_steps=6, eval_steps=6)
    assert processes.run(world.preferences, tmp_path / "single", single) == 0, processes.log()
    (adapter,) = tmp_path.glob("single/training/*/adapter/adapter_model.safetensors")
    one, two = load_file(adapter), load_file(Path(uninterrupted.adapter.uri) / "adapter_model.safetensors")
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-5


@pytest.mark.long  # another training
def test_a_killed_process_of_two_is_trained_on_like_a_killed_single_one(world: TinyWorld, tmp_path: Path) -> None:
    """The launcher hides the signal behind exit code 1; the task starts again on what `Preempted` says."""
    training = world.config(num_processes=2)
    key, killed = training_key(world.preferences, training), []

    def kill(progress: Progress) -> None:
        if progress.step and not killed:
            worker = next(process for process in psutil.process_iter(["cmdline"]) if _is_second_worker(process))
            killed.append(worker.pid)
            worker.kill()

    with pytest.raises(Preempted):
        run_training(world.preferences, str(tmp_path), training, key, kill)
    assert killed
    assert run_training(world.preferences, str(tmp_path), training, key).rows == world.preferences.rows


def _is_second_worker(process: psutil.Process) -> bool:
    try:
        mine = any(parent.pid == os.getpid() for parent in process.parents())
        return mine and process.environ().get("RANK") == "1"
    except psutil.Error:
        return False
