"""Training as a flow on a real Prefect server: what the UI shows while it runs and at its end."""

import base64
import re
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from flows.train import train_dpo
from tasks.store.measures import Probe
from tasks.train.task import LIVE_KEY
from tests.deployed import ask
from tests.fakes.tiny_training import TinyWorld

PICTURE = re.compile(r"!\[[^]]*\]\(data:image/png;base64,([A-Za-z0-9+/=]+)\)")


def artifacts(api: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = ask(api, "POST", "/artifacts/filter", {})
    return found


@pytest.mark.long  # a training; the end-to-end run shows one
async def test_the_ui_shows_a_training_while_it_runs(world: TinyWorld, tmp_path: Path, prefect_server: str) -> None:
    before = {artifact["id"] for artifact in artifacts(prefect_server)}
    training = world.config(max_steps=150, logging_steps=2)
    adapter = await train_dpo(world.preferences, str(tmp_path / "workspace"), training)

    made = [artifact for artifact in artifacts(prefect_server) if artifact["id"] not in before]
    (bar,) = [artifact for artifact in made if artifact["type"] == "progress"]
    assert bar["data"] == 100
    (page,) = [artifact for artifact in made if artifact["key"] == LIVE_KEY]
    pictures = PICTURE.findall(page["data"])
    assert pictures
    assert all(base64.b64decode(picture).startswith(b"\x89PNG") for picture in pictures)
    assert "Finished" in page["data"]
    check_probe(world, Path(adapter.uri))
    # The page is refreshed in place, so when it was made tells whether it could be seen while the training ran.
    finished = Path(adapter.uri, "COMMITTED.json").stat().st_mtime
    assert datetime.fromisoformat(page["created"]).timestamp() < finished


def check_probe(world: TinyWorld, adapter: Path) -> None:
    """The log-probs that a promotion will ask for are those of the adapter as it lies on disk."""
    probe = Probe.model_validate_json((adapter.parent / "probe.json").read_text())
    assert probe.base_precision == "float32"
    assert len(probe.texts) == 6
    for text in probe.texts:
        for name, folder in (("adapter", adapter), ("sft", world.adapter), ("base", None)):
            assert getattr(text, name) == pytest.approx(log_probs(world.base, folder, text.token_ids), abs=1e-4), name
        assert text.adapter != pytest.approx(text.sft, abs=1e-2)


def log_probs(base: Path, adapter: Path | None, ids: list[int]) -> list[float]:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        found = torch.log_softmax(model.eval()(torch.tensor([ids])).logits[0, :-1], dim=-1)
    return [float(row[token]) for row, token in zip(found, ids[1:], strict=True)]
