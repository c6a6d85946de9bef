"""Training against plain TRL: the same pairs, model and settings, in one run.

    python tests/benchmarks/bench_training.py [--hidden 256] [--layers 4] [--pairs 96] [--repeats 1]

Each mode runs in a process of its own, from loaded libraries to the saved adapter. Plain is what TRL 1.16 does with the
same arguments: the reference adapter in memory, its forward pass in every step, pairs in random order. Printed are
seconds, pairs a second and the process's peak memory; the sweep is three values of beta.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tasks.config import TrainingConfig  # noqa: E402
from tests.fakes.tiny_training import WORDS, Shape, build_adapter, build_base, write_preferences  # noqa: E402

BETAS = (0.05, 0.1, 0.3)
# mode: (plain TRL?, changes to the configuration, betas)
MODES: dict[str, tuple[bool, dict[str, Any], tuple[float, ...]]] = {
    "plain TRL": (True, {}, (0.1,)),
    "preflow": (False, {}, (0.1,)),
    "preflow, live reference": (False, {"cache_reference": False}, (0.1,)),
    "preflow, not grouped by length": (False, {"group_by_length": False}, (0.1,)),
    "plain TRL, gradient checkpointing": (True, {"gradient_checkpointing": True}, (0.1,)),
    "preflow, gradient checkpointing": (False, {"gradient_checkpointing": True}, (0.1,)),
    "plain TRL, sweep of 3 betas": (True, {}, BETAS),
    "preflow, sweep of 3 betas": (False, {}, BETAS),
}


def build(root: Path, hidden: int, layers: int, count: int) -> None:
    """Write a model and pairs whose lengths vary as scenes do (log-normal)."""
    shape = Shape(hidden=hidden, layers=layers, rank=16, dropout=0.05)
    base = build_base(root / "base", shape=shape)
    build_adapter(root / "sft", base, shape=shape)
    rng = random.Random(0)

    def text(median: int) -> str:
        return " ".join(rng.choices(WORDS, k=min(220, max(5, int(median * rng.lognormvariate(0, 0.5))))))

    def row() -> dict[str, Any]:
        sides = {side: [{"role": "assistant", "content": text(60)}] for side in ("chosen", "rejected")}
        return {"prompt": [{"role": "user", "content": text(80)}], **sides}

    write_preferences(root / "preferences", [row() for _ in range(count)], [row() for _ in range(count // 10)])


def config(root: Path, changes: dict[str, Any]) -> TrainingConfig:
    """Return the guide's settings on the bench's model."""
    settings = {
        "base_model": str(root / "base"), "sft_adapter": str(root / "sft"), "load_in_4bit": False, "warmup_steps": 1,
        "max_length": 512, "per_device_eval_batch_size": 2, "learning_rate": 1e-3,
        "gradient_checkpointing": False,
    }  # fmt: skip
    return TrainingConfig(**{**settings, **changes})


def run_preflow(root: Path, workspace: Path, training: TrainingConfig) -> None:
    """Train with preflow, in this process."""
    from tasks.store.workspace import PreferencesRef, Workspace, folder_digest
    from tasks.train.launch import base_digest, training_key
    from tasks.train.spec import TrainingSpec
    from tasks.trainer.run import TrainingRun
    from tasks.trainer.stopping import StopFlag

    preferences = PreferencesRef(uri=str(root / "preferences" / "train.jsonl"), sha256="0", size=0, rows=0)
    spec = TrainingSpec(
        preferences=preferences, workspace=str(workspace), training=training, key=training_key(preferences, training),
        sft_sha256=folder_digest(training.sft_adapter), base_sha256=base_digest(training),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        TrainingRun(spec, Workspace(workspace), Path(scratch), lambda _: None, StopFlag()).execute()


def run_plain(root: Path, workspace: Path, training: TrainingConfig) -> None:
    """Train with TRL alone and the same arguments, in this process."""
    from datasets import load_dataset
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOTrainer

    from tasks.trainer.trainer import dpo_config

    base = AutoModelForCausalLM.from_pretrained(training.base_model)
    files = {name: str(root / "preferences" / f"{name}.jsonl") for name in ("train", "val")}
    data = load_dataset("json", data_files=files, cache_dir=str(workspace / "datasets"))
    trainer = DPOTrainer(
        model=PeftModel.from_pretrained(base, training.sft_adapter, is_trainable=True),
        args=dpo_config(training, workspace, evaluate=True),
        train_dataset=data["train"],
        eval_dataset=data["val"],
        processing_class=AutoTokenizer.from_pretrained(training.base_model),
    )
    trainer.train()
    trainer.model.save_pretrained(str(workspace / "adapter"), selected_adapters=["default"])


def measure(mode: str, root: Path) -> dict[str, float]:
    """Run one mode in this process and return its figures."""
    import datasets
    import torch

    import tasks.trainer.run  # noqa: F401  everything slow to import, before the clock starts

    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    plain, changes, betas = MODES[mode]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started, cpu = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as workspace:
        for number, beta in enumerate(betas):
            folder = Path(workspace) / (str(number) if plain else "all")
            folder.mkdir(exist_ok=True)
            (run_plain if plain else run_preflow)(root, folder, config(root, {**changes, "beta": beta}))
    return {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu,
        "peak_mb": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
    }


def main() -> None:
    """Build the bench, run every mode in its own process and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("hidden", 256), ("layers", 4), ("pairs", 96), ("repeats", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--mode", choices=list(MODES))
    parser.add_argument("--root", type=Path)
    options = parser.parse_args()
    if options.mode:
        print(json.dumps(measure(options.mode, options.root)))
        return
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder), options.hidden, options.layers, options.pairs)
        print(f"{'mode':38} {'seconds':>8} {'cpu s':>8} {'pairs/s':>8} {'peak MB':>8}")
        for mode, (_, _, betas) in MODES.items():
            runs = [run_once(mode, folder) for _ in range(options.repeats)]
            best = min(runs, key=lambda figures: figures["cpu_seconds"])
            rate = options.pairs * len(betas) / best["cpu_seconds"]
            print(f"{mode:38} {best['seconds']:8.1f} {best['cpu_seconds']:8.1f} {rate:8.2f} {best['peak_mb']:8.0f}",
                  flush=True)  # fmt: skip


def run_once(mode: str, folder: str) -> dict[str, float]:
    """Run one mode in a fresh process."""
    command = [sys.executable, __file__, "--mode", mode, "--root", folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"{mode} failed:\n{done.stderr[-3000:]}")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


if __name__ == "__main__":
    main()
