"""A Dockerfile's instructions, and an image made of them below a folder, without a container."""

import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.fakes.process import ROOT

DOCKER = ROOT / "infra" / "docker"
Instruction = tuple[str, str]
# Most of what is installed is never imported here: byte code is made of what is.
QUICK = {"PIP_NO_COMPILE": "1"}


def instructions(image: str) -> list[Instruction]:
    """Return a Dockerfile's instructions and their values, in order."""
    from dockerfile_parse import DockerfileParser

    parser = DockerfileParser(path=str(DOCKER / f"{image}.Dockerfile"), env_replace=False)
    return [(item["instruction"], item["value"]) for item in parser.structure if item["instruction"] != "COMMENT"]


def values(image: str, instruction: str) -> list[str]:
    """Return the values of all instructions of one kind, in order."""
    return [value for name, value in instructions(image) if name == instruction]


@dataclass(frozen=True)
class ReplayedImage:
    """An image's working directory below `root`, with an empty virtual environment in place of the image's Python.

    Two images with one `root` share the environment.
    """

    name: str
    root: Path

    @property
    def work(self) -> Path:
        return self.root / self.name

    @property
    def python(self) -> Path:
        return self.root / "venv" / "bin" / "python"

    @property
    def environment(self) -> dict[str, str]:
        """What a process in the image sees: nothing of this one's Python, Prefect or repository."""
        kept = {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "SSL_", "REQUESTS_"))}
        path = f"{self.python.parent}:/usr/local/bin:/usr/bin:/bin"
        return {**kept, "PATH": path, "HOME": str(self.root), "LANG": "C.UTF-8", "DO_NOT_TRACK": "1", **QUICK}

    def run(self, *command: str) -> str:
        """Run a command in the working directory and return what it prints."""
        done = subprocess.run(command, cwd=self.work, env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}{done.stderr}"
        return done.stdout

    def build(self, dry: bool = False) -> None:
        """Follow every COPY and RUN, but for those that install system packages.

        Args:
            dry: stop at the dependencies, and only resolve them, into `report.json`.
        """
        self.work.mkdir(parents=True)
        if not self.python.exists():
            subprocess.run([sys.executable, "-m", "venv", self.root / "venv"], check=True)
        for instruction, value in instructions(self.name):
            if instruction == "COPY":
                self._copy(*value.split())
            if instruction == "RUN" and "apt-get" not in value:
                self._execute(value, dry)
                if dry:
                    return

    def _copy(self, *paths: str) -> None:
        *sources, target = paths
        for source in sources:
            if (ROOT / source).is_dir():
                ignore = shutil.ignore_patterns("__pycache__")
                shutil.copytree(ROOT / source, self.work / target, ignore=ignore, dirs_exist_ok=True)
            else:
                shutil.copy(ROOT / source, self.work / target)

    def _execute(self, script: str, dry: bool) -> None:
        script = script.replace("/tmp/", f"{self.root}/")
        if dry:
            script = script.replace("pip install ", f"pip install --dry-run --report {self.root}/report.json ")
        # Compiling is the image's business; it doubles the time here.
        self.run("sh", "-euc", f"export PIP_NO_COMPILE=1 PIP_DISABLE_PIP_VERSION_CHECK=1; {script}")
