"""The images' own instructions followed in an empty environment: what they install resolves, and it is enough.

`flow` is installed for real; what `train` adds to it is resolved. System packages and CUDA are what this does not show.
It needs the package registry, and is the one test that does.
"""

import json
import re
from collections.abc import Iterator

import pytest
import yaml

from tests.fakes.dockerfile import ReplayedImage, values
from tests.fakes.process import ROOT

PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]  # an environment is made as the image makes it


@pytest.fixture(scope="module")
def flow(tmp_path_factory: pytest.TempPathFactory) -> ReplayedImage:
    image = ReplayedImage("flow", tmp_path_factory.mktemp("flow"))
    image.build()
    return image


def entrypoints() -> Iterator[str]:
    """Yield the files of the deployments' flows."""
    for deployment in yaml.safe_load((ROOT / "deployments" / "prefect.yaml").read_text())["deployments"]:
        yield deployment["entrypoint"].split(":")[0]


def test_every_flow_that_is_deployed_can_be_imported(flow: ReplayedImage) -> None:
    modules = sorted({file.removesuffix(".py").replace("/", ".") for file in entrypoints()})
    assert "flows.pipeline" in modules
    flow.run("python", "-c", f"import {', '.join(modules)}")


def test_it_is_slim(flow: ReplayedImage) -> None:
    """Neither torch nor what only tests need."""
    found = flow.run(
        "python", "-c", "import importlib.util as u; print([n for n in ('torch', 'trl', 'pytest') if u.find_spec(n)])"
    )
    assert found.strip() == "[]"


def test_what_it_runs_is_there(flow: ReplayedImage) -> None:
    """The image's command and ours are installed, the registration script finds its files, the rubrics came along."""
    assert flow.run("prefect", "--version").strip() == PINS["prefect"]
    (command,) = (json.loads(value) for value in values("flow", "CMD"))
    assert (flow.python.parent / command[0]).exists()
    assert "check" in flow.run("preflow", "--help")
    flow.run("sh", "-n", "deployments/register.sh")
    for file in re.findall(r"deployments/[\w.-]*\w", (ROOT / "deployments" / "register.sh").read_text()):
        assert (flow.work / file).exists(), file
    assert (
        "seinfeld"
        in flow.run(
            "python", "-c", "from tasks.judge.prompt import read_rubric; print(read_rubric('seinfeld'))"
        ).lower()
    )


def test_every_package_has_the_version_that_the_tests_ran_with(flow: ReplayedImage) -> None:
    installed = json.loads(flow.run("python", "-m", "pip", "list", "--format", "json"))
    pins = {name.lower().replace("_", "-"): version for name, version in PINS.items()}
    versions = {package["name"].lower().replace("_", "-"): package["version"] for package in installed}
    own = {"pip", "setuptools", "preflow"}
    assert {name: version for name, version in versions.items() if name not in own} == {
        name: pins.get(name) for name in versions if name not in own
    }


def test_what_training_adds_resolves_and_moves_nothing(flow: ReplayedImage) -> None:
    before = json.loads(flow.run("python", "-m", "pip", "list", "--format", "json"))
    ReplayedImage("train", flow.root).build(dry=True)
    report = json.loads((flow.root / "report.json").read_text())
    added = {item["metadata"]["name"].lower(): item["metadata"]["version"] for item in report["install"]}
    assert {"torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate"} <= set(added)
    assert not {package["name"].lower() for package in before} & set(added)
    pins = {name.lower(): version for name, version in PINS.items()}
    for name in ("transformers", "trl", "peft", "bitsandbytes"):
        assert added[name] == pins[name]
