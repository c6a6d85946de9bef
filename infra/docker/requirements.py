"""Print what pyproject.toml (here, in the working directory) asks for, one requirement a line; extras as arguments.

With it an image installs the dependencies in a layer of their own, which a change of the code leaves alone.
"""

import sys
import tomllib
from pathlib import Path


def requirements(extras: list[str]) -> list[str]:
    """Return the build requirements, the dependencies and those of `extras`. Raises KeyError for an unknown extra."""
    settings = tomllib.loads(Path("pyproject.toml").read_text())
    project = settings["project"]
    found: list[str] = settings["build-system"]["requires"] + project["dependencies"]
    for extra in extras:
        found += project["optional-dependencies"][extra]
    return found


if __name__ == "__main__":
    print("\n".join(requirements(sys.argv[1:])))
