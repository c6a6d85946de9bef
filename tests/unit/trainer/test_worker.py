"""How a training's ending is classified: every error gets a code, and a message that says what to do."""

import errno
import re
import threading
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from tasks.config import TrainingConfig
from tasks.errors import PreflowError
from tasks.store.workspace import PreferencesRef
from tasks.train.invariants import InvariantError
from tasks.train.spec import ExitCode, TrainingSpec
from tasks.trainer import worker
from tasks.trainer.checkpoints import os_error
from tasks.trainer.lease import LeaseLostError
from tasks.trainer.stopping import StopFlag, StopTraining

FULL = "Error while serializing: I/O error: No space left on device (os error 28)"


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), ExitCode.USER_ERROR, r"the disk is full .*TMPDIR"),
        (os_error(SafetensorError(FULL), Path("/scratch")), ExitCode.USER_ERROR, r"the disk is full .*/scratch"),
        (OSError(errno.EIO, "Input/output error"), ExitCode.DEFECT, "OSError: .*Input/output error"),
        (os_error(SafetensorError("bad header"), Path("/scratch")), ExitCode.DEFECT, "/scratch: bad header"),
        (torch.OutOfMemoryError("CUDA out of memory"), ExitCode.USER_ERROR, "out of memory on the accelerator"),
        (RuntimeError("histc does not have a deterministic implementation"), ExitCode.USER_ERROR, "full_determinism"),
        (PreflowError("give another base"), ExitCode.USER_ERROR, "give another base"),
        (InvariantError("adapter-moves", "it did not"), ExitCode.INVARIANT, "invariant adapter-moves: it did not"),
        (LeaseLostError("another trainer"), ExitCode.PREEMPTED, "another trainer"),
        (StopTraining("asked to stop"), ExitCode.PREEMPTED, "asked to stop"),
        (KeyError("x"), ExitCode.DEFECT, "KeyError: 'x'"),
    ],
)
def test_an_ending_has_a_code_and_a_message(
    error: BaseException, code: ExitCode, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, said = ending(error, tmp_path, monkeypatch)
    assert found is code
    assert re.search(message, said), said


def spec_of(folder: Path) -> TrainingSpec:
    pairs = PreferencesRef(uri="train.jsonl", sha256="0", size=0, rows=0)
    return TrainingSpec(preferences=pairs, workspace=str(folder), training=TrainingConfig(), key="k", sft_sha256="0",
                        base_sha256="0")  # fmt: skip


def ending(error: BaseException, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[ExitCode, str]:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(worker, "train", fail)
    return worker.run_and_classify(spec_of(folder), worker.WorkerFiles(folder), StopFlag())


def test_all_processes_of_a_training_wait_for_the_lease_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that went ahead would wait for the first in torch, which gives up after ten minutes."""
    arguments, order = (spec_of(tmp_path), worker.WorkerFiles(tmp_path), StopFlag()), list[str]()

    def follow() -> None:
        with worker.holding_lease(*arguments):
            order.append("second")

    monkeypatch.setenv("RANK", "1")
    second = threading.Thread(target=follow)
    second.start()
    second.join(0.5)
    order.append("first")
    monkeypatch.setenv("RANK", "0")
    with worker.holding_lease(*arguments):
        second.join(30)
    assert order == ["first", "second"]


LOST = "[gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:18309: Connection reset by peer. This is typically"


@pytest.mark.parametrize(
    ("processes", "code", "message"),
    [(1, ExitCode.DEFECT, "Connection reset"), (2, ExitCode.PREEMPTED, "another process of this training")],
)
def test_a_process_whose_neighbour_was_killed_has_no_defect(
    processes: int, code: ExitCode, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    found, said = ending(RuntimeError(LOST), tmp_path, monkeypatch)
    assert found is code
    assert message in said
