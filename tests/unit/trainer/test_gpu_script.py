"""The measurements on a GPU name parts of the trainer: they are there, on a machine without a GPU too."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.long  # loads all of TRL
@pytest.mark.slow  # TRL is imported
def test_what_the_measurements_watch_is_there() -> None:
    code = "from tests.gpu.product import import_all, watch; import_all(); watch(print)"
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
