"""Costs add up to the cent, by hand-made bills."""

import pytest
from pydantic import ValidationError

from tasks.batch.costs import COLUMNS, add_up, format_seconds, format_usd
from tasks.config import EndpointConfig
from tasks.llm.responses import price
from tasks.store.workspace import CompletionsRef, Cost, Manifest

PRICES = EndpointConfig(prompt_price=0.3, completion_price=2.5)
JUDGED = Cost(requests=2042, prompt_tokens=3_000_000, completion_tokens=400_000, thinking_tokens=350_000)


def made(stage: str, cost: Cost, seconds: float) -> Manifest:
    artifact = CompletionsRef(uri="/c", sha256="0", size=0, rows=0)
    return Manifest(artifact=artifact, stage=stage, version=1, key="k", files={}, cost=cost, seconds=seconds)


def test_costs_are_added_up_by_stage_with_a_cell_for_each_column() -> None:
    costs = add_up([
        made("generate", Cost(requests=1021), 1200), made("judge", price(JUDGED, PRICES), 300), made("free", Cost(), 0),
        made("train", Cost(gpu_seconds=2 * 900, usd=0.18), 900), made("judge", Cost(requests=8, usd=0.1), 10),
    ])  # fmt: skip
    assert [cost.row() for cost in costs] == [
        ("generate", 1021, None, None, None, None, "20 min 00 s", None),
        ("judge", 2050, 3_000_000, 400_000, 350_000, None, "5 min 10 s", "2.00"),
        ("train", None, None, None, None, "30 min 00 s", "15 min 00 s", "0.18"),
        ("total", 3071, 3_000_000, 400_000, 350_000, "30 min 00 s", "40 min 10 s", "2.18"),
    ]
    assert {len(cost.row()) for cost in costs} == {len(COLUMNS)}
    assert costs[-1].used.usd == pytest.approx(3 * 0.3 + 0.4 * 2.5 + 0.1 + 0.18)
    with pytest.raises(ValidationError):
        Cost(requests=-1)


def test_durations_and_money() -> None:
    seconds = {0: "0.0 s", 8.44: "8.4 s", 59.4: "59 s", 59.6: "1 min 00 s", 200: "3 min 20 s", 7500: "2 h 05 min"}
    assert {of: format_seconds(of) for of in seconds} == seconds
    usd = {0: "0.00", 1234.5: "1,234.50", 0.0123: "0.012", 1e-6: "< 0.0001"}
    assert {of: format_usd(of) for of in usd} == usd
