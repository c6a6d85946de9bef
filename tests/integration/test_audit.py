"""Pairs made elsewhere go in, and a page on their quality comes out."""

import json
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from prefect.client.schemas.sorting import ArtifactSort

from flows.audit import audit_preferences

pytestmark = pytest.mark.usefixtures("prefect_server")


async def test_an_audit_shows_that_the_longer_side_was_chosen(tmp_path: Path) -> None:
    pairs = [
        {
            "prompt": [{"role": "user", "content": f"scene {number}"}],
            "chosen": [{"role": "assistant", "content": "so much more of the same " * (2 + number % 3)}],
            "rejected": [{"role": "assistant", "content": f"short {number}"}],
        }
        for number in range(60)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    report = await audit_preferences(str(tmp_path / "pairs.jsonl"))
    longer = report.metric("longer_chosen")
    assert (longer.value, longer.ok) == (1.0, False)
    async with get_client() as client:
        ours = ArtifactFilter(key=ArtifactFilterKey(any_=["preferences"]))
        page, *_ = await client.read_artifacts(artifact_filter=ours, sort=ArtifactSort.CREATED_DESC)
    assert "The judge prefers the longer completion" in str(page.data)
