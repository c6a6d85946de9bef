"""Everything of preflow that the measurements use, in one place; torch is imported in the functions alone."""

import functools
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tasks.config import TrainingConfig
from tasks.store.workspace import PreferencesRef, file_sha256, folder_digest
from tasks.train.spec import TrainingSpec

Say = Callable[[dict[str, Any]], None]


def write_spec(folder: Path, pairs: Path, workspace: Path, settings: dict[str, Any], digests: dict[str, str]) -> None:
    """Write what the training child reads; the folder's name is the training's key."""
    file = pairs / "train.jsonl"
    rows = sum(1 for _ in file.open())
    spec = TrainingSpec(
        preferences=PreferencesRef(uri=str(file), sha256=file_sha256(file), size=file.stat().st_size, rows=rows),
        workspace=str(workspace),
        training=TrainingConfig(**settings),
        key=folder.name,
        sft_sha256=digests["sft"],
        base_sha256=digests["base"],
    )
    folder.mkdir(parents=True)
    (folder / "spec.json").write_text(spec.model_dump_json())


def digest(folder: Path) -> str:
    """Return the digest under which preflow knows a model's or an adapter's folder."""
    return folder_digest(str(folder))


def training_folder(workspace: Path, key: str) -> Path:
    """Return where a training's artifacts lie: adapter/, metrics.jsonl, checkpoints/."""
    return workspace / "training" / key


def import_all() -> None:
    """Import what a training needs, which takes longer than anything else at its start."""
    import bitsandbytes  # noqa: F401

    import tasks.trainer.run  # noqa: F401


def train(folder: Path, say: Say) -> int:
    """Run the training child's own `main` in this process; what it does and how long it took goes to `say`."""
    from tasks.trainer import worker

    watch(say)
    return worker.main([str(folder)])


def watch(say: Say) -> None:
    """Have the training child tell `say` what it does and how long that took."""
    from tasks.trainer import run, worker
    from tasks.trainer.checkpoints import CheckpointStore
    from tasks.trainer.trainer import ExactTrainer

    _time(run, ("fetch_adapter", "load_tokenizer", "load_pairs", "load_base", "load_policy", "record_probe"), say)
    _time(ExactTrainer, ("__init__", "reference_logps", "_measure_start", "_check_resumed", "check_saved"), say)
    _time(CheckpointStore, ("save", "newest"), say)
    told = worker.WorkerFiles.progress

    def tell(files: Any, progress: Any) -> None:
        say(asdict(progress))
        told(files, progress)

    worker.WorkerFiles.progress = tell  # type: ignore[method-assign]


def _time(owner: Any, names: Iterable[str], say: Say) -> None:
    def timed(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            started = time.monotonic()
            try:
                return original(*args, **kwargs)
            finally:
                say({"did": name.strip("_"), "seconds": time.monotonic() - started})

        return wrapped

    for name in names:
        setattr(owner, name, timed(name, getattr(owner, name)))


def train_plainly(folder: Path, say: Say) -> int:
    """Train with TRL alone: the same pairs, model and arguments, its own data order and its reference in memory."""
    from datasets import load_dataset
    from peft import PeftModel
    from transformers import AutoTokenizer, TrainerCallback
    from trl import DPOTrainer

    from tasks.trainer.model import load_base
    from tasks.trainer.trainer import dpo_config

    class Told(TrainerCallback):  # type: ignore[misc]  # transformers is not followed
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            say({"phase": "training", "step": 0})

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            say({"phase": "training", "step": state.global_step})

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            say({"logged": {name: value for name, value in (logs or {}).items() if isinstance(value, float)}})

    spec = TrainingSpec.model_validate_json((folder / "spec.json").read_text())
    training = spec.training.model_copy(update={"logging_steps": 1, "save_steps": 1000})
    started = time.monotonic()
    base = load_base(training, 0)
    say({"did": "load_base", "seconds": time.monotonic() - started})
    data = load_dataset("json", data_files=spec.preferences.uri, cache_dir=str(folder / "datasets"))["train"]
    trainer = DPOTrainer(
        model=PeftModel.from_pretrained(base, training.sft_adapter, is_trainable=True),
        args=dpo_config(training, folder / "output", evaluate=False),
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(training.base_model),
        callbacks=[Told()],
    )
    trainer.train()
    return 0


def metrics(workspace: Path, key: str) -> list[dict[str, Any]]:
    """Return the rows that a training has logged, the first being the one before the first update."""
    file = training_folder(workspace, key) / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
