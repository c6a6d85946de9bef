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
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tasks.config import ReportTo, TrainingConfig
from tasks.errors import PreflowError
from tasks.llm.chat_template import choose_template, template_of, tokenizer_digests
from tasks.store.workspace import MANIFEST, AdapterRef, PreferencesRef, Workspace, digest, folder_digest
from tasks.train.phases import Phases
from tasks.train.spec import STAGE_VERSION, ExitCode, Progress, TrainingPaths, TrainingSpec

LOG = logging.getLogger(__name__)

POLL_SECONDS = 0.1
# What the safetensors library itself allows.
LONGEST_HEADER = 100_000_000
LOG_LINES_SHOWN = 30


class Preempted(Exception):
    """The trainer was told to stop, or lost its lease, and has saved what it had: run again and it goes on."""


def training_key(preferences: PreferencesRef, training: TrainingConfig) -> str:
    """Return the digest of what determines the adapter; it names the training's folder.

    Raises:
        PreflowError: an adapter or model folder is missing or holds no weights.
    """
    training = with_measured_smoothing(preferences, training)
    return digest(
        {
            "stage": "training",
            "version": STAGE_VERSION,
            "train": preferences.sha256,
            "val": _val_digest(preferences),
            "sft_adapter": folder_digest(training.sft_adapter),
            "base": base_digest(training),
            "tokens": token_identity(training),
            "training": training.identity(),
        }
    )


def token_identity(training: TrainingConfig) -> dict[str, Any]:
    """Return what decides how pairs become tokens: chat template and tokenizer; a hub's are known by its revision."""
    base = training.base_model if Path(training.base_model).expanduser().is_dir() else None
    template = choose_template(training, training.sft_adapter, base)
    tokenizer = tokenizer_digests(training.sft_adapter, training.base_model)
    return {"template": template and template.identity(), "tokenizer": tokenizer}


def with_measured_smoothing(preferences: PreferencesRef, training: TrainingConfig) -> TrainingConfig:
    """Return the configuration with `label_smoothing` from the pairs' quality report, where that is asked for.

    Two verdicts that are each wrong with probability p, independently, differ with f = 2 p (1 - p): so a measured flip
    rate f gives p = (1 - sqrt(1 - 2 f)) / 2, the share of flipped pairs that the robust loss assumes (Chowdhury et al.
    2024, eq. 12).

    Raises:
        PreflowError: there is no flip rate, or it is that of coin flips.
    """
    if not training.measured_label_smoothing:
        return training
    uri = preferences.sibling("quality.json")
    store = Workspace.holding(uri)
    metrics = store.read_json(uri).get("metrics", []) if store.exists(uri) else []
    rate = next((metric["value"] for metric in metrics if metric["name"] == "flip_rate"), None)
    if rate is None or not 0 <= rate < 0.49:
        raise PreflowError(
            f"measured_label_smoothing: {uri} shows a flip rate of {rate}, not one below 0.49. Judge in at least 2 "
            "orders with a judge that is better than chance, or give label_smoothing itself."
        )
    return training.model_copy(update={"label_smoothing": (1 - math.sqrt(1 - 2 * rate)) / 2})


def base_digest(training: TrainingConfig) -> str:
    """Return what identifies the base: the content of a folder, or the hub's name and revision."""
    base = Path(training.base_model)
    if not base.is_dir():
        return digest({"hub": training.base_model, "revision": training.base_revision or "main"})
    with Phases(lambda progress: LOG.info("%s", progress.text())).phase(f"reading {base} for its digest"):
        return folder_digest(str(base))


def _val_digest(preferences: PreferencesRef) -> str | None:
    uri = preferences.sibling("val.jsonl")
    store = Workspace.holding(uri)
    return store.sha256(uri) if store.exists(uri) else None


def check_training_inputs(training: TrainingConfig, trains_here: bool = True) -> None:
    """Check adapter, base and tokenizer by their files alone, before anything is spent.

    Args:
        training: the configuration.
        trains_here: whether this machine trains, so that the experiment tracker must be installed here.

    Raises:
        PreflowError: with what is wrong, where, and what to do.
    """
    if trains_here:
        _check_tracker(training.report_to)
    adapter = _adapter_config(training.sft_adapter)
    _check_adapter_kind(training.sft_adapter, adapter)
    base = Path(training.base_model)
    named = adapter.get("base_model_name_or_path")
    if named and named != training.base_model and posixpath.basename(named) != posixpath.basename(str(base)):
        LOG.warning("SFT adapter %s names the base model %s; base_model is %s", training.sft_adapter, named, base)
    if base.is_dir():
        if training.base_revision:
            raise PreflowError(
                f"base_revision {training.base_revision}: base_model {base} is a folder, which has no revisions. Leave "
                "base_revision empty, or give a hub name."
            )
        _check_base_folder(base)
        _check_shapes(training.sft_adapter, adapter, json.loads((base / "config.json").read_text()))
        _check_tokenizer(base, training.sft_adapter)
        _ = template_of(training).around_answer
    elif base.is_absolute():
        raise PreflowError(f"base_model {training.base_model}: no such folder. Give a folder or a hub name.")


def _check_tracker(tracker: ReportTo) -> None:
    if tracker is not ReportTo.NONE and find_spec(tracker.value) is None:
        raise PreflowError(f"report_to {tracker.value}: not installed here; pip install {tracker.value}, or set none")


def _adapter_config(uri: str) -> dict[str, Any]:
    store = Workspace.holding(uri)
    names = {posixpath.basename(file) for file in store.list(uri)}
    if "adapter_config.json" not in names:
        raise PreflowError(
            f"sft_adapter {uri}: no adapter_config.json there (found: {', '.join(sorted(names)) or 'nothing'}). Give "
            "the folder that PEFT's save_pretrained() wrote."
        )
    folder_digest(uri)
    config = store.read_json(posixpath.join(uri, "adapter_config.json"))
    if not isinstance(config, dict):
        raise PreflowError(f"{uri}/adapter_config.json: not a JSON object; save the adapter again")
    return config


def _check_adapter_kind(uri: str, config: dict[str, Any]) -> None:
    kind, rank, bias = config.get("peft_type"), config.get("r"), config.get("bias", "none")
    saved, targets = config.get("modules_to_save"), config.get("target_modules") or []
    problems = [
        (kind != "LORA", f"peft_type is {kind!r}; only LORA can be trained and served"),
        (config.get("use_dora"), "it is a DoRA adapter (use_dora), which vLLM does not serve; train a plain LoRA"),
        (saved, f"modules_to_save is {saved}, which vLLM does not serve; train the SFT adapter without"),
        (bias != "none", f"bias is {bias!r}, which vLLM does not serve; train the SFT adapter with bias='none'"),
        (not isinstance(rank, int) or rank < 1, f"its rank r is {rank!r}, not a positive number"),
        ("lm_head" in targets, "it targets lm_head, which DPO would never train; train the SFT adapter without"),
    ]
    for present, problem in problems:
        if present:
            raise PreflowError(f"sft_adapter {uri}: {problem} (adapter_config.json)")


def _check_base_folder(base: Path) -> None:
    if not (base / "config.json").is_file():
        raise PreflowError(f"base_model {base}: no config.json there. Give the folder of a transformers model.")
    if not any(base.glob("*.safetensors")):
        raise PreflowError(f"base_model {base}: no .safetensors there. Save the model with save_pretrained(folder).")


def _check_shapes(uri: str, adapter: dict[str, Any], base: dict[str, Any]) -> None:
    hidden = base.get("hidden_size")
    if not isinstance(hidden, int):
        return
    for name, shape in _weight_shapes(uri).items():
        if name.endswith("q_proj.lora_A.weight") and shape != [adapter["r"], hidden]:
            raise PreflowError(
                f"sft_adapter {uri}: its weight {name} has shape {shape}, the base model (hidden size {hidden}) needs "
                f"[{adapter['r']}, {hidden}]. The adapter was trained on another base; give that one as base_model."
            )


def _weight_shapes(uri: str) -> dict[str, list[int]]:
    """Read the header of a safetensors file: 8 bytes of length, then JSON."""
    file = posixpath.join(uri, "adapter_model.safetensors")
    store = Workspace.holding(file)
    try:
        length = int.from_bytes(store.read_ranges(file, [(0, 8)])[0], "little")
        content = json.loads(store.read_ranges(file, [(8, 8 + min(length, LONGEST_HEADER))])[0])
    except FileNotFoundError as error:
        message = f"sft_adapter {uri}: no adapter_model.safetensors there. Save it with safe serialization."
        raise PreflowError(message) from error
    except ValueError as error:
        raise PreflowError(f"{file}: damaged, its header cannot be read ({error}); copy the adapter again") from error
    return {name: entry["shape"] for name, entry in content.items() if name != "__metadata__"}


def _check_tokenizer(base: Path, adapter: str) -> None:
    folders = [adapter, str(base)]
    names = {posixpath.basename(file) for folder in folders for file in Workspace.holding(folder).list(folder)}
    if not names & {"tokenizer.json", "tokenizer.model", "vocab.json"}:
        raise PreflowError(f"no tokenizer in {base} nor in {adapter}: save one there with tokenizer.save_pretrained()")


def run_training(
    preferences: PreferencesRef,
    workspace: str,
    training: TrainingConfig,
    key: str,
    on_progress: Callable[[Progress], None] | None = None,
) -> AdapterRef:
    """Return the trained adapter: at once if it is there, else by training, or going on training, in a child process.

    Args:
        preferences: the pairs.
        workspace: where everything is kept.
        training: the configuration.
        key: from `training_key`.
        on_progress: told every sign of life.

    Raises:
        PreflowError: the trainer stopped for a reason the user can act on (an invariant is named).
        Preempted: the trainer was told to stop and saved; run again.
        BaseException: whatever interrupted this process; the child has been stopped, in time to save.
    """
    training = with_measured_smoothing(preferences, training)
    store = Workspace(workspace)
    paths = TrainingPaths.of(store.root, key)
    finished = store.find_finished(paths.file(MANIFEST), AdapterRef)
    if finished is not None:
        return finished
    spec = TrainingSpec(
        preferences=preferences, workspace=store.root, training=training, key=key,
        sft_sha256=folder_digest(training.sft_adapter), base_sha256=base_digest(training),
    )  # fmt: skip
    desk = Path(tempfile.mkdtemp(prefix="preflow-desk-"))
    log = Path(paths.file("train.log")) if store.is_local else desk.with_suffix(".log")
    try:
        (desk / "spec.json").write_text(spec.model_dump_json())
        code = _supervise(_command(desk, training), log, desk, training, on_progress)
        _raise_for(code, desk, log)
    finally:
        shutil.rmtree(desk, ignore_errors=True)
    finished = store.find_finished(paths.file(MANIFEST), AdapterRef)
    if finished is None:
        raise PreflowError(f"training ended without an adapter; see {log}")
    return finished


def _command(desk: Path, training: TrainingConfig) -> list[str]:
    worker = ["-m", "tasks.trainer.worker", str(desk)]
    if training.num_processes == 1:
        return [sys.executable, *worker]
    # accelerate's --multi_gpu is torchrun; without CUDA the workers find each other through gloo.
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(training.num_processes)]
    launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    return [sys.executable, *launcher, *worker]


def _environment() -> dict[str, str]:
    environment = dict(os.environ)
    root = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH", "")]))
    environment.setdefault("TOKENIZERS_PARALLELISM", "false")
    # A pipeline that runs unattended sends nothing about its data or models anywhere.
    environment.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    environment.setdefault("WANDB_ERROR_REPORTING", "false")
    if not shutil.which("nvidia-smi"):
        environment.setdefault("OMP_NUM_THREADS", "1")
    return environment


def _supervise(
    command: list[str], log: Path, desk: Path, training: TrainingConfig, on_progress: Callable[[Progress], None] | None
) -> int:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        # Standard input stays open as long as this process lives: its end tells the child that the parent is gone.
        child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=output, stderr=output, env=_environment(), start_new_session=True
        )
    lines = _Tail(desk / "progress.jsonl")
    try:
        while child.poll() is None:
            _relay(lines, on_progress)
            time.sleep(POLL_SECONDS)
        _relay(lines, on_progress)
    except BaseException:
        _stop(child, training.grace_seconds)
        raise
    finally:
        if child.stdin is not None:
            child.stdin.close()
    return child.returncode


def _relay(lines: Iterator[str | None], on_progress: Callable[[Progress], None] | None) -> None:
    for line in lines:
        if line is None:
            return
        progress = Progress.from_json(json.loads(line))
        LOG.info("training: %s", progress.text())
        if on_progress is not None:
            on_progress(progress)


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


class _Tail(Iterator["str | None"]):
    """The complete lines a growing file has so far, and None where it ends for now."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._position = 0

    def __next__(self) -> str | None:
        if not self._path.exists():
            return None
        with self._path.open() as file:
            file.seek(self._position)
            line = file.readline()
            if not line.endswith("\n"):
                return None
            self._position = file.tell()
            return line


def _raise_for(code: int, desk: Path, log: Path) -> None:
    outcome = desk / "outcome.json"
    message = ""
    if outcome.exists():
        told = json.loads(outcome.read_text())
        code, message = int(told["code"]), str(told["message"])
    if code == ExitCode.DONE:
        return
    if code == ExitCode.PREEMPTED:
        raise Preempted(message or "the trainer was stopped")
    if code < 0:
        raise Preempted(f"the trainer was ended by {signal.Signals(-code).name} (SIGKILL: perhaps out of memory)")
    if code in (ExitCode.INVARIANT, ExitCode.USER_ERROR):
        raise PreflowError(message)
    raise PreflowError(
        f"training failed with exit code {code} ({message or 'no message'}). Its log is {log}; it ends with:\n"
        + "\n".join(log.read_text(errors="replace").splitlines()[-LOG_LINES_SHOWN:])
    )
