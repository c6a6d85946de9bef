"""An image and a server of two versions."""

import prefect
import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Running

from tasks.run.versions import say_version_skew


@pytest.mark.parametrize(("server", "told"), [(prefect.__version__, False), ("3.7.1", True)])
def test_a_server_of_another_version_is_told_of(
    server: str, told: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(SyncPrefectClient, "api_version", lambda _: server)
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        say_version_skew(None, FlowRun.model_construct(), Running())
    assert (f"this run has Prefect {prefect.__version__} and its server has {server}" in caplog.text) is told
