"""Materials for a training of seconds: a base model hardly trained, an adapter on it, pairs of scenes."""

import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.demo.corpus import Flaw, continuation, episodes, opening, system_message

SEED = 7
PAIRS, HELD_OUT_PAIRS = 48, 4
FLAWS = frozenset({Flaw.WRONG_VOICE, Flaw.NO_ENDING})


@dataclass(frozen=True)
class TinyMaterials:
    """Where they are."""

    folder: Path

    @property
    def pairs(self) -> Path:
        """The preference pairs; val.jsonl lies beside them."""
        return self.folder / "preferences" / "train.jsonl"

    def settings(self) -> dict[str, Any]:
        """Return the training settings that suit them."""
        return {
            "base_model": str(self.folder / "base"), "sft_adapter": str(self.folder / "sft"), "load_in_4bit": False,
            "bf16": False, "gradient_checkpointing": False, "learning_rate": 1e-3, "gradient_accumulation_steps": 2,
            "max_length": 256,
        }  # fmt: skip


def make_tiny_materials(folder: Path) -> TinyMaterials:
    """Return the materials in a folder, made where they are missing; equal code makes equal bytes."""
    materials = TinyMaterials(folder)
    base, adapter = folder / "base", folder / "sft"
    if not (base.exists() and adapter.exists()):
        from tasks.demo.model import Recipe, build_base_model, build_sft_adapter

        build_base_model(base, SEED, Recipe(rows=100, steps=2, batch_size=4, learning_rate=3e-3))
        build_sft_adapter(base, adapter, SEED, Recipe(rows=20, steps=2, batch_size=4, learning_rate=2e-3))
        for file in folder.rglob("*.safetensors"):
            file.chmod(0o644)  # safetensors writes 0600, and a pod is another user
    materials.pairs.parent.mkdir(parents=True, exist_ok=True)
    _write(materials.pairs.with_name("val.jsonl"), pair_rows(HELD_OUT_PAIRS, held_out=True))
    _write(materials.pairs, pair_rows(PAIRS, held_out=False))
    return materials


def pair_rows(count: int, *, held_out: bool) -> list[dict[str, Any]]:
    """Return preference rows: the same scene continued well, and with flaws."""
    pool, rows = episodes(held_out=held_out), []
    for number in range(count):
        rng = random.Random(f"pairs/{SEED}/{held_out}/{number}")
        episode = rng.choice(pool)
        start = opening(episode, rng)
        scene = "\n".join(str(line) for line in start)
        sides = {"chosen": frozenset[Flaw](), "rejected": FLAWS}
        rows.append(
            {
                "prompt": [
                    {"role": "system", "content": system_message(episode)},
                    {"role": "user", "content": scene},
                ],
                **{
                    side: [{"role": "assistant", "content": continuation(episode, start, flaws, rng)}]
                    for side, flaws in sides.items()
                },
            }
        )
    return rows


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
