"""A tiny base, adapter and pairs that a test may break."""

import shutil
from pathlib import Path

import pytest

from tests.fakes.tiny_training import TinyWorld, pairs, write_preferences


@pytest.fixture(scope="package")
def original(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return TinyWorld.build(tmp_path_factory.mktemp("original"), train=4, val=2)


@pytest.fixture
def world(original: TinyWorld, tmp_path: Path) -> TinyWorld:
    for name, source in (("base", original.base), ("sft", original.adapter)):
        shutil.copytree(source, tmp_path / name)
    preferences = write_preferences(tmp_path / "preferences", pairs(4, 3), pairs(2, 4))
    return TinyWorld(tmp_path / "base", tmp_path / "sft", preferences)
