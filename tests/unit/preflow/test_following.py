"""A deployment that `preflow up` serves is started there, though nobody has named its server."""

from pathlib import Path

import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.settings import PREFECT_API_URL, temporary_settings

from preflow import following
from preflow.settings import load_settings
from tasks.demo.up import Up
from tasks.errors import PreflowError

API = "http://127.0.0.1:4321/api"


@pytest.mark.parametrize(("running", "said"), [(API, f"asked {API}"), (None, "there is no Prefect server")])
def test_the_server_of_up_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, running: str | None, said: str
) -> None:
    def start(client: SyncPrefectClient, *_: object) -> None:
        raise PreflowError(f"asked {str(client.api_url).rstrip('/')}")

    (tmp_path / "config.yaml").write_text("prompts: p.jsonl\n")
    monkeypatch.setenv("PREFECT_API_URL", "")
    monkeypatch.setattr(Up, "api", lambda _: running)
    monkeypatch.setattr(following, "start", start)
    with temporary_settings(restore_defaults={PREFECT_API_URL}), pytest.raises(PreflowError, match=said):
        following.follow("dpo-pipeline/mine", load_settings(tmp_path / "config.yaml"), sweep=False)
