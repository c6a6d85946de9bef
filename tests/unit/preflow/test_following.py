"""A deployment that `preflow up` serves is started there, though nobody has named its server."""

from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from uuid import uuid4

import httpx
import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.settings import PREFECT_API_URL, temporary_settings

from preflow import following
from preflow.settings import load_settings
from tasks.demo.up import Up
from tasks.errors import PreflowError

GONE = httpx.ConnectError("refused")
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


def test_a_server_that_is_away_for_a_while_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = SimpleNamespace(id=uuid4(), level=20, timestamp=datetime.now(UTC), message="it trains")
    ended = SimpleNamespace(id=uuid4(), name="run", state=SimpleNamespace(is_final=lambda: True))
    answers: list[Any] = [GONE, ended]

    def read(_: object) -> Any:
        if isinstance(answer := answers.pop(0), Exception):
            raise answer
        return answer

    client: Any = SimpleNamespace(read_flow_run=read, read_logs=lambda *_, **__: [line], api_url=API)
    monkeypatch.setattr(following, "POLL_SECONDS", 0.0)
    assert following.watch(cast(SyncPrefectClient, client), cast(Any, ended)) is ended
    assert "it trains" in capsys.readouterr().out
    answers.append(GONE)
    monkeypatch.setattr(following, "PATIENCE_SECONDS", -1.0)
    with pytest.raises(PreflowError, match=f"{API} does not answer"):
        following.watch(cast(SyncPrefectClient, client), cast(Any, ended))
