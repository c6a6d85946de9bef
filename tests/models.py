"""Tiny models that several files of tests train: made once, kept under the digest of what makes them."""

import fcntl
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from tasks.demo import corpus, model, world
from tasks.demo.model import Recipe, build_base_model, build_sft_adapter
from tasks.store.refs import digest
from tasks.store.workspace import file_sha256
from tests.fakes.process import ROOT

KEPT = ROOT / ".cache" / "tests"
PACKAGES = ("torch", "transformers", "peft")
BASE = Recipe(rows=400, steps=60, batch_size=8, learning_rate=3e-3)


def demo_base(out: Path) -> Path:
    """Lay down a base model that was hardly trained: 18 CPU seconds where it is not kept."""
    return kept(out, lambda folder: build_base_model(folder, 7, BASE), (_sources(), BASE))


def demo_adapter(out: Path, seed: int, learning_rate: float = 2e-3) -> Path:
    """Lay down an SFT adapter of `demo_base`; the higher the learning rate, the further it is from the others."""
    recipe = Recipe(rows=100, steps=10, batch_size=8, learning_rate=learning_rate)

    def make(folder: Path) -> None:
        # The adapter's config names its base by the folder, which is `base` wherever the two are laid down.
        base = demo_base(folder.with_name(f"{folder.name}-for") / "base")
        build_sft_adapter(base, folder, seed, recipe)
        shutil.rmtree(base.parent)

    return kept(out, make, (_sources(), BASE, seed, recipe))


def _sources() -> object:
    paths = (__file__, corpus.__file__, world.FILE, model.__file__)
    return [file_sha256(Path(str(path))) for path in paths], [version(name) for name in PACKAGES]


def kept(out: Path, make: Callable[[Path], object], recipe: object) -> Path:
    """Copy a folder that `make` fills, which is asked to do it only once for a `recipe`; other processes wait."""
    folder = KEPT / digest(repr(recipe))[:16]
    KEPT.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            made = folder.with_suffix(".new")
            shutil.rmtree(made, ignore_errors=True)
            make(made)
            made.rename(folder)
    return Path(shutil.copytree(folder, out))
