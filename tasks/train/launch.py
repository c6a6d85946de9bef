"""Starting the training child and living with it: keys, checks before anything is spent, supervision. No torch here."""

import json
import logging
import math
import os
import posixpath
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from tasks.config import TrainingConfig
from tasks.errors import DiskFullError, PreflowError
from tasks.llm.chat_template import choose_template, template_of, tokenizer_digests
from tasks.store.workspace import DISK_FULL, MANIFEST, AdapterRef, PreferencesRef, Workspace, digest, folder_digest
from tasks.train.inputs import AdapterFiles, BaseFiles, only_known_forms
from tasks.train.phases import Phases
from tasks.train.spec import STAGE_VERSION, ExitCode, Progress, TrainingSpec

LOG = logging.getLogger(__name__)

POLL_SECONDS = 0.1
LOG_SECONDS = 10.0
LOG_LINES_SHOWN = 30


class Preempted(Exception):
    """The trainer was told to stop, or lost its lease, and has saved what it had: run again and it goes on."""


def training_key(preferences: PreferencesRef, training: TrainingConfig) -> str:
    """Return the digest of what determines the adapter; it names the training's folder."""
    training, val = with_measured_smoothing(preferences, training), preferences.sibling("val.jsonl")
    store = Workspace.holding(val)
    return digest(
        {
            "stage": "training",
            "version": STAGE_VERSION,
            "train": preferences.sha256,
            "val": store.sha256(val) if store.exists(val) else None,
            "sft_adapter": folder_digest(training.sft_adapter),
            "base": base_digest(training),
            "tokens": token_identity(training),
            "training": training.identity(),
        }
    )


def token_identity(training: TrainingConfig) -> dict[str, object]:
    """Return what decides how pairs become tokens: chat template and tokenizer; a hub's are known by its revision."""
    base = training.base_model if Path(training.base_model).expanduser().is_dir() else None
    template = choose_template(training, training.sft_adapter, base)
    tokenizer = tokenizer_digests(training.sft_adapter, training.base_model)
    return {"template": template and template.identity(), "tokenizer": tokenizer}


def with_measured_smoothing(preferences: PreferencesRef, training: TrainingConfig) -> TrainingConfig:
    """Return the configuration with `label_smoothing` from the pairs' quality report, where that is asked for.

    Two verdicts that are each wrong with probability p, independently, differ with f = 2 p (1 - p): so a measured flip
    rate f gives p = (1 - sqrt(1 - 2 f)) / 2 (Chowdhury et al. 2024, eq. 12). A pair needs several such verdicts to
    agree, so of the pairs fewer are wrong (`error_of_pairs`): that is the share of flipped pairs that the loss assumes.
    """
    if not training.measured_label_smoothing:
        return training
    uri, manifest = preferences.sibling("quality.json"), preferences.sibling(MANIFEST)
    store = Workspace.holding(uri)
    metrics = store.read_json(uri).get("metrics", []) if store.exists(uri) else []
    rate = next((metric["value"] for metric in metrics if metric["name"] == "flip_rate"), None)
    if rate is None or not 0 <= rate < 0.49:
        raise PreflowError(
            f"measured_label_smoothing: {uri} shows a flip rate of {rate}, not one below 0.49. Judge in at least 2 "
            "orders with a judge that is better than chance, or give label_smoothing itself."
        )
    judged = store.read_json(manifest).get("config", {}) if store.exists(manifest) else {}
    votes = judged.get("orders", 1) * (1 + len(judged.get("panel", [])))
    needed = votes if judged.get("pair_policy", "unanimous") == "unanimous" else votes // 2 + 1
    smoothing = error_of_pairs((1 - math.sqrt(1 - 2 * rate)) / 2, votes, needed)
    return training.model_copy(update={"label_smoothing": smoothing})


def error_of_pairs(error: float, votes: int, needed: int) -> float:
    """Return the share of wrong pairs among those on which `needed` of `votes` agree, each wrong with this chance."""

    # Not scipy's: the sum is in the training's key to its last bit, whatever is installed.
    def agree(chance: float) -> float:
        return sum(
            math.comb(votes, count) * chance**count * (1 - chance) ** (votes - count)
            for count in range(needed, votes + 1)
        )

    return agree(error) / (agree(error) + agree(1 - error))


def base_digest(training: TrainingConfig) -> str:
    """Return what identifies the base: the content of a folder, or the hub's name and revision."""
    base = Path(training.base_model)
    if not base.is_dir():
        return digest({"hub": training.base_model, "revision": training.base_revision or "main"})
    with Phases(lambda progress: LOG.info("%s", progress.text())).phase(f"reading {base} for its digest"):
        return folder_digest(str(base))


def check_training_inputs(training: TrainingConfig, trains_here: bool = True) -> None:
    """Check adapter, base and tokenizer by what can be seen without weights, before anything is spent.

    Where this machine trains, its packages count, and it must reach the hub.
    """
    tracker = training.report_to
    if trains_here and tracker != "none" and find_spec(tracker) is None:
        raise PreflowError(f"report_to {tracker}: not installed here; pip install {tracker}, or set none")
    adapter = AdapterFiles.read(training.sft_adapter)
    adapter.check()
    base = _find_base(training, trains_here)
    if base is not None:
        named = str(adapter.config.get("base_model_name_or_path") or base.name)
        if posixpath.basename(named) != posixpath.basename(base.name):
            LOG.warning("SFT adapter %s names the base model %s; base_model is %s", adapter.uri, named, base.name)
        with only_known_forms(f"base_model {base.name} or sft_adapter {adapter.uri}"):
            base.check(training.max_length, training.router_aux_loss_coef)
            base.check_holds(adapter)
            base.check_tokenizer(adapter.uri)
        _ = template_of(training, base=str(base.folder)).around_answer


def _find_base(training: TrainingConfig, trains_here: bool) -> BaseFiles | None:
    name, folder = training.base_model, Path(training.base_model)
    if folder.is_dir():
        if training.base_revision:
            raise PreflowError(
                f"base_revision {training.base_revision}: base_model {folder} is a folder, which has no revisions. "
                "Leave base_revision empty, or give a hub name."
            )
        return BaseFiles.of_folder(folder)
    if folder.is_absolute():
        raise PreflowError(f"base_model {name}: no such folder. Give a folder or a hub name.")
    try:
        return BaseFiles.of_hub(name, training.base_revision or "main")
    except OSError as error:
        if trains_here:
            raise PreflowError(
                f"base_model {name}: the hub cannot be asked for it from here, and this machine's cache does not hold "
                f"it ({error}). Check the network, HF_TOKEN and HF_HUB_OFFLINE, or give a folder."
            ) from error
        LOG.warning("base_model %s cannot be looked at from here (%s): the deployment that trains will", name, error)
        return None


def find_adapter(store: Workspace, key: str) -> AdapterRef | None:
    """Return the adapter of a training, if it is finished."""
    return store.find_finished(store.uri("training", key, MANIFEST), AdapterRef)


def run_training(
    preferences: PreferencesRef,
    workspace: str,
    training: TrainingConfig,
    key: str,
    on_progress: Callable[[Progress], None] | None = None,
) -> AdapterRef:
    """Return the trained adapter: at once if it is there, else by training, or going on training, in a child process.

    `key` is from `training_key`; `on_progress` is told every sign of life.

    Raises:
        PreflowError: the trainer stopped for a reason the user can act on (an invariant is named).
        Preempted: the trainer was told to stop and saved; run again.
        BaseException: whatever interrupted this process; the child has been stopped, in time to save.
    """
    training, store = with_measured_smoothing(preferences, training), Workspace(workspace)
    if finished := find_adapter(store, key):
        return finished
    spec = TrainingSpec(
        preferences=preferences, workspace=store.root, training=training, key=key,
        sft_sha256=folder_digest(training.sft_adapter), base_sha256=base_digest(training),
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="preflow-worker-", ignore_cleanup_errors=True) as folder:
        files = Path(folder)
        log = Path(store.uri("training", key, "train.log")) if store.is_local else files.with_suffix(".log")
        try:
            (files / "spec.json").write_text(spec.model_dump_json())
            code = _supervise(_command(files, training), log, files, training, on_progress)
            _raise_for(code, files, log)
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            where = f"{tempfile.gettempdir()} (TMPDIR) or the workspace"
            raise DiskFullError(f"the disk is full ({error}): make room in {where}; run again") from error
    if finished := find_adapter(store, key):
        return finished
    raise PreflowError(f"training ended without an adapter; see {log}")


def _command(files: Path, training: TrainingConfig) -> list[str]:
    worker = ["-m", "tasks.trainer.worker", str(files)]
    if training.num_processes == 1:
        return [sys.executable, *worker]
    # accelerate's --multi_gpu is torchrun; without CUDA the workers find each other through gloo.
    launcher = "-m accelerate.commands.launch --multi_gpu --num_machines 1 --mixed_precision no --dynamo_backend no"
    options = ["--main_process_port", "0", "--num_processes", str(training.num_processes)]
    return [sys.executable, *launcher.split(), *options, *worker]


def _environment() -> dict[str, str]:
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    # A pipeline that runs unattended sends nothing about its data or models anywhere.
    quiet = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_TELEMETRY": "1", "WANDB_ERROR_REPORTING": "false"}
    threads = {} if shutil.which("nvidia-smi") else {"OMP_NUM_THREADS": "1"}
    return {**quiet, **threads, **os.environ, "PYTHONPATH": path}


def _supervise(
    command: list[str], log: Path, files: Path, training: TrainingConfig, on_progress: Callable[[Progress], None] | None
) -> int:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        # Standard input stays open as long as this process lives: its end tells the child that the parent is gone.
        child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=output, stderr=output, env=_environment(), start_new_session=True
        )
    said, position, ended = ProgressLog(), 0, False
    try:
        while not ended:
            ended = child.poll() is not None
            news, position = _read_progress(files / "progress.jsonl", position)
            for progress in news:
                said.say(progress)
                if on_progress is not None:
                    on_progress(progress)
            time.sleep(0 if ended else POLL_SECONDS)
    except BaseException:
        _stop(child, training.grace_seconds)
        raise
    finally:
        if child.stdin is not None:
            child.stdin.close()
    return child.returncode


def _read_progress(file: Path, position: int) -> tuple[list[Progress], int]:
    """Return what the child has told since `position`, by whole lines, and where its next line begins."""
    if not file.exists():
        return [], position
    with file.open("rb") as content:
        content.seek(position)
        new = content.read()
    whole = new[: new.rfind(b"\n") + 1]
    return [Progress(**json.loads(line)) for line in whole.splitlines()], position + len(whole)


class ProgressLog:
    """Logs how a training goes: a line when there are new readings or another phase, and else every ten seconds."""

    def __init__(self) -> None:
        self._known: tuple[object, ...] = ()
        self._next = 0.0

    def say(self, progress: Progress) -> None:
        """Log a sign of life, unless it repeats what the last line said."""
        readings = (progress.phase, progress.message, progress.loss, progress.accuracy, progress.margin)
        if readings == self._known and time.monotonic() < self._next and progress.step < progress.total:
            return
        self._known, self._next = readings, time.monotonic() + LOG_SECONDS
        LOG.info("%s", progress.text())


def _stop(child: subprocess.Popen[bytes], grace_seconds: float) -> None:
    """Ask the child's whole session to stop, give it `grace_seconds` to save, then end it."""
    LOG.warning("stopping the trainer: it has %.0f s to save", grace_seconds)
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGTERM)
    try:
        child.wait(grace_seconds)
    except subprocess.TimeoutExpired:
        LOG.error("the trainer did not stop in %.0f s and is killed; the checkpoint before is used", grace_seconds)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def _raise_for(code: int, files: Path, log: Path) -> None:
    outcome = files / "outcome.json"
    message = ""
    if outcome.exists():
        told = json.loads(outcome.read_text())
        code, message = int(told["code"]), str(told["message"])
    if code == ExitCode.DONE:
        return
    if code == ExitCode.PREEMPTED:
        raise Preempted(message or "the trainer was stopped")
    # Of several processes the launcher hides the signal. One that ends by itself tells its outcome.
    if code < 0 or (not message and (files / "progress.jsonl").exists()):
        by = signal.Signals(-code).name if code < 0 else "a signal"
        raise Preempted(f"a process of the trainer was ended by {by} (SIGKILL: perhaps out of memory)")
    if message and code in (ExitCode.INVARIANT, ExitCode.USER_ERROR):
        raise PreflowError(message)
    raise PreflowError(
        f"training failed with exit code {code} ({message or 'no message'}). Its log is {log}; it ends with:\n"
        + "\n".join(log.read_text(errors="replace").splitlines()[-LOG_LINES_SHOWN:])
    )
