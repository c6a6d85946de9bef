"""The ledger adds up to the cent, by hand-made bills."""

import pytest
from pydantic import ValidationError

from tasks.batch.costs import COLUMNS, Ledger, StageCost, format_seconds, format_usd
from tasks.config import EndpointConfig
from tasks.llm.responses import price
from tasks.store.workspace import Cost

PRICES = EndpointConfig(prompt_price=0.3, completion_price=2.5)
JUDGED = Cost(requests=2042, prompt_tokens=3_000_000, completion_tokens=400_000, thinking_tokens=350_000)


def make_ledger() -> Ledger:
    ledger = Ledger()
    ledger = ledger.plus(StageCost(stage="generate", used=Cost(requests=1021), seconds=1200))
    ledger = ledger.plus(StageCost(stage="judge", used=price(JUDGED, PRICES), seconds=300))
    return ledger.plus(StageCost(stage="train", used=Cost(gpu_seconds=2 * 900, usd=0.18), seconds=900))


def test_the_ledger_adds_up_over_stages_and_survives_json() -> None:
    total = make_ledger().total()
    assert (total.used.requests, total.used.thinking_tokens, total.used.gpu_seconds) == (3063, 350_000, 1800)
    assert total.used.usd == pytest.approx(3 * 0.3 + 0.4 * 2.5 + 0.18)
    assert total.seconds == 2400
    assert Ledger.model_validate_json(make_ledger().model_dump_json()) == make_ledger()
    with pytest.raises(ValidationError):
        Cost(requests=-1)


def test_costs_of_one_stage_go_to_one_line() -> None:
    ledger = make_ledger().plus(StageCost(stage="judge", used=Cost(requests=8, usd=0.1), seconds=10))
    assert [cost.stage for cost in ledger.stages] == ["generate", "judge", "train"]
    assert ledger.stages[1].used.requests == 2050
    assert ledger.stages[1].used.usd == pytest.approx(2.0)
    assert ledger.stages[1].seconds == 310


def test_rows_have_a_cell_for_each_column_and_show_apart_what_the_cache_saved() -> None:
    ledger = make_ledger()
    assert ledger.rows() == [
        ["stage", *COLUMNS],
        ["generate", "1,021", "-", "-", "-", "-", "20 min 00 s", "-"],
        ["judge", "2,042", "3,000,000", "400,000", "350,000", "-", "5 min 00 s", "1.90"],
        ["train", "-", "-", "-", "-", "30 min 00 s", "15 min 00 s", "0.18"],
        ["total", "3,063", "3,000,000", "400,000", "350,000", "30 min 00 s", "40 min 00 s", "2.08"],
    ]
    cached = ledger.plus(StageCost(stage="judge", cached=price(JUDGED, PRICES)))
    assert cached.total().used == ledger.total().used, "it is not charged"
    assert cached.rows()[-1] == ["saved by the cache", "2,042", "3,000,000", "400,000", "350,000", "-", "-", "1.90"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0 s"), (8.44, "8.4 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(("usd", "text"), [(0, "0.00"), (1234.5, "1,234.50"), (0.0123, "0.012"), (1e-6, "< 0.0001")])
def test_money(usd: float, text: str) -> None:
    assert format_usd(usd) == text
