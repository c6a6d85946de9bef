"""Training as a flow on a real Prefect server: what the UI shows while it runs and at its end."""

import base64
import re
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx

from flows.train import train_dpo
from tasks.train import LIVE_KEY
from tests.fakes.tiny_training import TinyWorld

PICTURE = re.compile(r"!\[[^]]*\]\(data:image/png;base64,([A-Za-z0-9+/=]+)\)")


def artifacts(api: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = httpx.post(f"{api}/artifacts/filter", json={}, timeout=30).raise_for_status().json()
    return found


async def test_the_ui_shows_a_training_while_it_runs(tmp_path: Path, prefect_server: str) -> None:
    world = TinyWorld.build(tmp_path / "world")
    before = {artifact["id"] for artifact in artifacts(prefect_server)}
    training = world.config(max_steps=40, logging_steps=2)
    adapter = await train_dpo(world.preferences, str(tmp_path / "workspace"), training)

    made = [artifact for artifact in artifacts(prefect_server) if artifact["id"] not in before]
    (bar,) = [artifact for artifact in made if artifact["type"] == "progress"]
    assert bar["data"] == 100
    (page,) = [artifact for artifact in made if artifact["key"] == LIVE_KEY]
    (picture,) = PICTURE.findall(page["data"])
    assert base64.b64decode(picture).startswith(b"\x89PNG")
    assert "Finished" in page["data"]
    # The page is refreshed in place, so when it was made tells whether it could be seen while the training ran.
    finished = Path(adapter.uri, "COMMITTED.json").stat().st_mtime
    assert datetime.fromisoformat(page["created"]).timestamp() < finished
