"""Training as a flow on a real Prefect server: what the UI shows while it runs and at its end."""

import base64
import re
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from flows.train import train_dpo
from tasks.train import LIVE_KEY, REFRESH_SECONDS
from tests.fakes.tiny_training import TinyWorld

PICTURE = re.compile(r"!\[[^]]*\]\(data:image/png;base64,([A-Za-z0-9+/=]+)\)")


class Spectator(threading.Thread):
    """Looks at the live page again and again, as a browser would, from beside the training."""

    def __init__(self, api: str, adapters: Path) -> None:
        super().__init__(daemon=True)
        self._client = httpx.Client(base_url=api, timeout=30)
        self._adapters = adapters
        self._over = threading.Event()
        self.pages: list[str] = []
        self.live: list[str] = []

    def run(self) -> None:
        while not self._over.wait(0.2):
            self.look()

    def look(self) -> None:
        running = not list(self._adapters.glob("*/adapter/COMMITTED.json"))
        page = next((artifact["data"] for artifact in self.artifacts() if artifact["key"] == LIVE_KEY), None)
        if page is not None and page not in self.pages:
            self.pages.append(page)
            self.live += [page] if running else []

    def artifacts(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self._client.post("/artifacts/filter", json={}).raise_for_status().json()
        return found

    def stop(self) -> None:
        self._over.set()
        self.join()
        self.look()


@pytest.mark.timeout(300)
async def test_the_ui_shows_a_training_while_it_runs(tmp_path: Path, prefect_server: str) -> None:
    world = TinyWorld.build(tmp_path / "world")
    spectator = Spectator(prefect_server, tmp_path / "workspace" / "training")
    before = {artifact["id"] for artifact in spectator.artifacts()}
    spectator.start()
    started = time.monotonic()
    training = world.config(max_steps=40, logging_steps=2)
    adapter = await train_dpo(world.preferences, str(tmp_path / "workspace"), training)
    seconds = time.monotonic() - started
    spectator.stop()

    assert Path(adapter.uri, "adapter_model.safetensors").is_file()
    made = [artifact for artifact in spectator.artifacts() if artifact["id"] not in before]
    (bar,) = [artifact for artifact in made if artifact["type"] == "progress"]
    assert bar["data"] == 100
    (page,) = [artifact["data"] for artifact in made if artifact["key"] == LIVE_KEY]
    assert "Finished" in page
    for shown in (spectator.live[0], page):
        (picture,) = PICTURE.findall(shown)
        assert base64.b64decode(picture).startswith(b"\x89PNG")
    assert "Running: " in spectator.live[0], "it was there before the adapter was"
    assert len(spectator.pages) <= 2 + seconds / REFRESH_SECONDS
