"""Names of runs: what a person typed stays, what a server made up does not."""

import pytest
from prefect.utilities.names import generate_slug

from tasks.config import PipelineConfig
from tasks.run.names import RunName


class Client:
    """Stands for the server: knows the name of one run."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def read_flow_run(self, _: object) -> "Client":
        return self


def name_of(given: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("PREFECT__FLOW_RUN_ID", "0b9fd2a1-77c3-4f0e-9d51-2c1e0a9b8c7d")
    monkeypatch.setattr("tasks.run.names.get_client", lambda sync_client: Client(given))
    return RunName("{config.promotion.name}: beta {config.training.beta:g}").format(config=PipelineConfig())


@pytest.mark.parametrize("given", ["my beta 0.03 run", "beta-test", "lean", "try-2"])
def test_a_name_that_was_typed_stays(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert name_of(given, monkeypatch) == given


def test_a_name_that_the_server_made_up_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(100):
        assert name_of(generate_slug(2), monkeypatch) == "dpo: beta 0.1"


def test_a_run_without_a_deployment_is_named_by_its_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT__FLOW_RUN_ID", raising=False)
    assert RunName("sample {model}, {now:%Y}").format(model="sft").startswith("sample sft, 20")
