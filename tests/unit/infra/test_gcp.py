"""The Terraform configuration, as far as it can be checked without the provider."""

import json
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest

from tests.fakes.process import ROOT

GCP = ROOT / "infra" / "gcp"
TABLE = json.loads((ROOT / "tests" / "fakes" / "google_provider.json").read_text())
TEXT = "\n".join(path.read_text() for path in sorted(GCP.glob("*.tf")))


@cache
def configuration() -> dict[str, list[Any]]:
    """Return the blocks of all files by their kind."""
    import hcl2

    blocks: dict[str, list[Any]] = {}
    for path in sorted(GCP.glob("*.tf")):
        for kind, found in hcl2.loads(path.read_text()).items():
            blocks.setdefault(kind, []).extend(found)
    return blocks


def named(kind: str) -> dict[str, Any]:
    """Return the blocks of one kind by their name; the parser leaves the quotes on."""
    return {name.strip('"'): body for block in configuration()[kind] for name, body in block.items()}


def resources() -> dict[str, Any]:
    return {
        f"{kind.strip(chr(34))}.{name.strip(chr(34))}": body
        for block in configuration()["resource"]
        for kind, inner in block.items()
        for name, body in inner.items()
    }


@pytest.mark.slow  # all of Terraform is parsed
def test_every_reference_has_its_resource() -> None:
    known = set(resources())
    for reference in re.findall(r"(?<![\w.])(google_\w+\.\w+)", TEXT):
        assert reference in known or f"data.{reference}" in TEXT, reference


META = {"count", "for_each", "depends_on"}  # Terraform's own, in every resource
Body = dict[str, Any]


def blocks_of(body: Body) -> Iterator[tuple[str, Body]]:
    """Yield the nested blocks of a body, those that `dynamic` makes among them."""
    for name, value in body.items():
        if name == "dynamic":
            for block in value:
                yield from ((kind.strip('"'), inner["content"][0]) for kind, inner in block.items())
        elif (
            not name.startswith("__")
            and isinstance(value, list)
            and value
            and all(isinstance(item, dict) for item in value)
        ):
            yield from ((name, item) for item in value)


def check_arguments(body: Body, known: Body, where: str) -> None:
    """Refuse what the provider does not know at this place, and what it needs and does not get."""
    blocks = list(blocks_of(body))
    given = {name for name in body if not name.startswith("__")} - {"dynamic"} | {name for name, _ in blocks}
    required, optional, needed_blocks, other_blocks = (
        {entry.partition(":")[0] for entry in known.get(kind, "").split()}
        for kind in ("required", "optional", "required_blocks", "other_blocks")
    )
    allowed = required | optional | other_blocks | known.get("blocks", {}).keys()
    required |= needed_blocks
    assert given <= allowed, f"{where} has no {given - allowed}"
    assert required <= given, f"{where} needs {required - given}"
    for name, inner in blocks:
        # A block of which the table has the name alone must be empty, as `auto {}` is.
        check_arguments(inner, known.get("blocks", {}).get(name, {}), f"{where}.{name}")


def test_the_provider_knows_every_argument() -> None:
    """By a table of its schema, and without Terraform."""
    assert len(resources()) > 15
    for name, body in resources().items():
        own = {argument: value for argument, value in body.items() if argument not in META}
        check_arguments(own, TABLE[name.split(".")[0]], name)
    for block in configuration()["data"]:
        for kind, inner in block.items():
            for body in inner.values():
                check_arguments(body, TABLE[f"data.{kind.strip(chr(34))}"], kind)


def test_the_settings_of_the_overlay_are_all_written() -> None:
    given = set(re.findall(r"^\s*([A-Z_]+)=", named("output")["cluster_settings"]["value"], re.MULTILINE))
    example = (ROOT / "infra/k8s/overlays/gke/settings.env").read_text()
    assert given == {line.split("=")[0] for line in example.splitlines() if line}


def test_workload_identity_is_given_to_accounts_that_exist() -> None:
    accounts = (ROOT / "infra/k8s/base/accounts.yaml").read_text()
    for account in re.findall(r'"(preflow-\w+)"', re.search(r"bucket_accounts\s+= (.*)", TEXT).group(1)):  # type: ignore[union-attr]
        assert f"name: {account}\n" in accounts
    members = resources()["google_storage_bucket_iam_member.flows"]
    assert members["role"].strip('"') == "roles/storage.objectUser"
    for pool in ("cpu", "l4_spot", "l4_on_demand"):
        (node,) = resources()[f"google_container_node_pool.{pool}"]["node_config"]
        assert node["workload_metadata_config"][0]["mode"].strip('"') == "GKE_METADATA"


def test_no_secret_passes_through_terraform() -> None:
    assert "google_secret_manager_secret.this" in resources()
    assert "google_secret_manager_secret_version" not in TEXT
    script = (ROOT / "infra/k8s/secrets.sh").read_text()
    for name in re.findall(r'"([a-z-]+)"', re.search(r"secrets = toset\((.*)\)", TEXT).group(1)):  # type: ignore[union-attr]
        assert f"value {name} " in script, f"secrets.sh does not read {name}"
