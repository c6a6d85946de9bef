"""compose.yaml names images, commands and paths that are there."""

import re
from typing import Any

import yaml

from tests.fakes.process import ROOT

SERVICES: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]


def test_what_waits_for_another_waits_until_it_is_ready() -> None:
    for service in SERVICES.values():
        for other, how in service.get("depends_on", {}).items():
            ready = how["condition"] == "service_completed_successfully" or "healthcheck" in SERVICES[other]
            assert ready, other


def test_the_images_are_made_with_what_the_commands_need() -> None:
    flow = (ROOT / "infra" / "docker" / "flow.Dockerfile").read_text()
    assert "COPY deployments deployments" in flow
    assert SERVICES["register"]["command"] == ["deployments/register.sh"]
    pool = SERVICES["worker"]["command"][SERVICES["worker"]["command"].index("--pool") + 1]
    assert f"make_pool {pool} --type process" in (ROOT / "deployments" / "register.sh").read_text()
    serve = (ROOT / "infra" / "docker" / "serve.sh").read_text()
    assert set(SERVICES["vllm"]["environment"]) <= {*re.findall(r"[A-Z_]{5,}", serve), "HF_TOKEN"}


def test_no_secret_stands_in_it() -> None:
    for service in SERVICES.values():
        for name, value in service.get("environment", {}).items():
            assert not re.search(r"PASSWORD|KEY|TOKEN", name) or value.startswith("${"), name
