"""What the demo starts from, made once and kept: prompts, a tiny base model, its SFT adapter."""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from prefect import task

from tasks.demo import SMOLLM2, TINY, DemoModel
from tasks.store.workspace import digest, file_sha256

SEED = 7
# Training and held-out prompts of each model: a real one takes half an hour of two cores for its few.
PROMPTS: dict[DemoModel, tuple[int, int]] = {TINY: (240, 200), SMOLLM2: (40, 20)}


@dataclass(frozen=True)
class Materials:
    """The demo's materials: prompts as JSONL, a base model and its SFT adapter; `of` a folder."""

    prompts: Path
    held_out: Path
    base: Path
    sft: Path
    model: DemoModel = TINY

    @classmethod
    def of(cls, folder: Path, model: DemoModel = TINY) -> "Materials":
        """Return those in a folder, there or not."""
        return cls(folder / "prompts.jsonl", folder / "held-out.jsonl", folder / "base", folder / "sft", model)


def locate_materials(root: Path, model: DemoModel = TINY) -> Materials:
    """Return where the materials of this version of the code belong: the folder's name is the code's digest."""
    names = ["corpus.py", "world.toml", "model.py", *(["smollm2.py"] if model == SMOLLM2 else [])]
    sources = [Path(__file__).parent / name for name in names]
    key = digest([*map(file_sha256, sources), SEED, *PROMPTS[model]])[:12]
    return Materials.of(root / "materials" / key, model)


@task(name="make-prompts")
def make_prompts(materials: Materials) -> None:
    """Write the training and the held-out prompts, if they are not there."""
    from tasks.demo.corpus import heldout_prompts, training_prompts

    training, held_out = PROMPTS[materials.model]
    if not materials.prompts.exists():
        _write_rows(materials.prompts, training_prompts(training, SEED))
    if not materials.held_out.exists():
        _write_rows(materials.held_out, heldout_prompts(held_out, SEED))


def _builders(model: DemoModel) -> Any:
    """Return the module that builds a model and its adapter; it imports torch."""
    return import_module(f"tasks.demo.{'smollm2' if model == SMOLLM2 else 'model'}")


@task(name="make-base-model")
def make_base_model(materials: Materials) -> None:
    """Pretrain the tiny base model, or unpack the real one, if it is not there."""
    if not materials.base.exists():
        _builders(materials.model).build_base_model(materials.base, SEED)


@task(name="make-sft-adapter")
def make_sft_adapter(materials: Materials) -> None:
    """Fine-tune the SFT adapter, if it is not there."""
    if not materials.sft.exists():
        _builders(materials.model).build_sft_adapter(materials.base, materials.sft, SEED)


MAKERS = (make_prompts, make_base_model, make_sft_adapter)


def make_materials(root: Path, model: DemoModel = TINY) -> Materials:
    """Make what is missing, in a flow, and return where everything is."""
    materials = locate_materials(root, model)
    for make in MAKERS:
        make(materials)
    return materials


def ensure_materials(materials: Materials) -> None:
    """Make what is missing, outside of any flow, and say beforehand how long that takes."""
    if not materials.sft.exists():
        print("making the demo's prompts, a tiny base model and its SFT adapter: 2 to 3 minutes, once", flush=True)
    for make in MAKERS:
        make.fn(materials)


def make_tiny_materials(folder: Path) -> tuple[dict[str, Any], str]:
    """Make what a training of seconds needs where it is missing: a base model hardly trained, an adapter on it, pairs.

    Returns the training settings that suit them, and the pairs' train.jsonl; equal code makes equal bytes.
    """
    from tasks.demo.corpus import pair_rows

    base, adapter, pairs = folder / "base", folder / "sft", folder / "preferences"
    if not (base.exists() and adapter.exists()):
        from tasks.demo.model import Recipe, build_base_model, build_sft_adapter

        build_base_model(base, SEED, Recipe(rows=100, steps=2, batch_size=4, learning_rate=3e-3))
        build_sft_adapter(base, adapter, SEED, Recipe(rows=20, steps=2, batch_size=4, learning_rate=2e-3))
        for file in folder.rglob("*.safetensors"):
            file.chmod(0o644)  # safetensors writes 0600, and a pod is another user
    _write_rows(pairs / "val.jsonl", pair_rows(4, SEED, held_out=True))
    _write_rows(pairs / "train.jsonl", pair_rows(48, SEED, held_out=False))
    settings = {
        "base_model": str(base), "sft_adapter": str(adapter), "load_in_4bit": False, "bf16": False,
        "gradient_checkpointing": False, "learning_rate": 1e-3, "gradient_accumulation_steps": 2, "max_length": 256,
    }  # fmt: skip
    return settings, str(pairs / "train.jsonl")


def _write_rows(path: Path, rows: Iterable[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    part.replace(path)
