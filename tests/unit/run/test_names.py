"""Names of runs: what a person typed stays, what Prefect made up does not."""

import pytest
from prefect import flow
from prefect.client.schemas.objects import FlowRun
from prefect.context import FlowRunContext
from prefect.utilities.names import generate_slug

from tasks.config import PipelineConfig
from tasks.run.names import named

CONFIG, FLOW = PipelineConfig(), flow(print)


def name_of(given: str) -> str:
    run = FlowRun.model_construct(name=given)
    context = FlowRunContext.model_construct(flow=FLOW, flow_run=run, parameters={"config": CONFIG})
    token = FlowRunContext.__var__.set(context)
    try:
        return named("{config.promotion.name}: beta {config.training.beta:g}")()
    finally:
        FlowRunContext.__var__.reset(token)


@pytest.mark.parametrize("given", ["my beta 0.03 run", "beta-test", "lean", "try-2", "Small-try with lr 1e-6"])
def test_a_name_that_was_typed_stays(given: str) -> None:
    assert name_of(given) == given


def test_a_name_that_was_made_up_does_not() -> None:
    assert {name_of(generate_slug(2)) for _ in range(30)} == {"dpo: beta 0.1"}
    assert {name_of(name) for name in ("Rustic-Pizza", "Tasty-Arepas")} == {"dpo: beta 0.1"}
