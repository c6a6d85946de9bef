"""The training child: `python -m tasks.trainer.worker SPEC`; its exit codes are `spec.ExitCode`."""

import gc
import json
import logging
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from tasks.errors import PreflowError
from tasks.store.workspace import DISK_FULL, Workspace
from tasks.train.invariants import InvariantError
from tasks.train.spec import ExitCode, Progress, TrainingSpec, is_main_process
from tasks.trainer.lease import Lease, LeaseLostError
from tasks.trainer.stopping import StopFlag, StopTraining

LOG = logging.getLogger(__name__)

# What gloo and NCCL say when the process at the other end is no more.
PEER_GONE = ("Connection reset by peer", "Connection closed by peer", "Broken pipe", "remote process exit")


@dataclass(frozen=True)
class WorkerFiles:
    """The local folder that parent and child share: the spec in it, progress and outcome out of it."""

    folder: Path

    def progress(self, progress: Progress) -> None:
        """Append one line for the parent."""
        with (self.folder / "progress.jsonl").open("a") as out:
            out.write(json.dumps(asdict(progress)) + "\n")

    def outcome(self, code: ExitCode, message: str) -> None:
        """Say how this process ended; the first process to fail is believed."""
        written = self.folder / f".outcome-{os.getpid()}"
        written.write_text(json.dumps({"code": code.value, "message": message}))
        try:
            os.link(written, self.folder / "outcome.json")
        except FileExistsError:
            LOG.info("another process of this training has told the outcome")
        written.unlink()


def watch_parent(grace_seconds: float) -> None:
    """End this process when its parent is gone (standard input closes), however it went.

    SIGTERM first, so that the state is saved; after `grace_seconds` the process exits in any case.
    """

    def watch() -> None:
        while os.read(0, 1):
            pass
        LOG.warning("the parent process is gone: saving and stopping")
        os.kill(os.getpid(), 15)
        time.sleep(grace_seconds)
        os._exit(ExitCode.PREEMPTED)

    threading.Thread(target=watch, name="parent", daemon=True).start()


@contextmanager
def holding_lease(spec: TrainingSpec, files: WorkerFiles, stop: StopFlag) -> Iterator[Workspace]:
    """Yield the workspace to write to; only the main process holds the lease and writes."""
    taken = files.folder / "lease-taken"
    if not is_main_process():
        while not taken.exists():  # in torch they would wait for it for ten minutes, and fail
            time.sleep(0.2)
        yield Workspace(spec.workspace)
        return
    lease = Lease(
        Workspace(spec.workspace).uri("training", spec.key, "lease.json"), spec.training.lease_seconds, stop.set
    )
    lease.acquire(lambda text: files.progress(Progress("waiting", text)))
    LOG.info("lease taken, token %d", lease.token)
    taken.touch()
    try:
        yield Workspace(spec.workspace, guard=lease.check)
    finally:
        lease.release()


def train(spec: TrainingSpec, files: WorkerFiles, stop: StopFlag) -> None:
    """Do the training that `spec` names, holding its lease."""
    scratch = tempfile.TemporaryDirectory(prefix="preflow-training-", ignore_cleanup_errors=True)
    with holding_lease(spec, files, stop) as store, scratch as folder:
        files.progress(Progress("loading", "importing torch and trl"))
        gc.disable()  # half a million new objects live on, and looking through them again and again takes a quarter
        from tasks.trainer.run import TrainingRun

        gc.freeze()
        gc.enable()
        tell = files.progress if is_main_process() else lambda _: None
        TrainingRun(spec, store, Path(folder), tell, stop).execute()


def run_and_classify(spec: TrainingSpec, files: WorkerFiles, stop: StopFlag) -> tuple[ExitCode, str]:
    """Train, and translate every ending into an exit code and a message for the user."""
    try:
        train(spec, files, stop)
    except (StopTraining, LeaseLostError) as reason:
        return ExitCode.PREEMPTED, str(reason)
    except InvariantError as error:
        return ExitCode.INVARIANT, str(error)
    except PreflowError as error:
        return ExitCode.USER_ERROR, str(error)
    except OSError as error:
        LOG.exception("the trainer failed")
        if error.errno in DISK_FULL:
            return ExitCode.USER_ERROR, (
                f"the disk is full ({error}). Make room in the workspace, and in {tempfile.gettempdir()} "
                "(TMPDIR) for local files; then run again: it goes on from its newest checkpoint."
            )
        return ExitCode.DEFECT, f"{type(error).__name__}: {error}"
    except Exception as error:
        LOG.exception("the trainer failed")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and any(words in str(error) for words in PEER_GONE):
            # One that failed by itself has told so before it went, and is believed.
            return ExitCode.PREEMPTED, "another process of this training was ended by a signal (perhaps out of memory)"
        if type(error).__name__ == "OutOfMemoryError":
            return ExitCode.USER_ERROR, (
                f"out of memory on the accelerator ({str(error).splitlines()[0]}). Set gradient_checkpointing, or "
                "lower per_device_train_batch_size (and raise gradient_accumulation_steps) or max_length."
            )
        if "does not have a deterministic implementation" in str(error):
            return ExitCode.USER_ERROR, (
                f"{str(error).splitlines()[0][:200]}: this model needs it, so set full_determinism to false; a resumed "
                "training is then exact but for the last bits."
            )
        return ExitCode.DEFECT, f"{type(error).__name__}: {error}"
    return ExitCode.DONE, "trained"


def main(arguments: list[str]) -> int:
    """Run the child; `arguments` is the folder that holds spec.json."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("accelerate").setLevel(logging.WARNING)  # of a resumed run it says the same for every batch
    files, stop = WorkerFiles(Path(arguments[0])), StopFlag()
    spec = TrainingSpec.model_validate_json((files.folder / "spec.json").read_bytes())
    try:
        stop.install()
        watch_parent(spec.training.grace_seconds)
        code, message = run_and_classify(spec, files, stop)
    except StopTraining as reason:
        code, message = ExitCode.PREEMPTED, str(reason)
    LOG.info("ending with %s: %s", code.name, message)
    if code is not ExitCode.DONE or is_main_process():
        files.outcome(code, message)
    return code.value


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
