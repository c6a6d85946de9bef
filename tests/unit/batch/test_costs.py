"""The ledger adds up to the cent, by hand-made bills."""

import pytest
from pydantic import ValidationError

from tasks.batch.costs import Ledger, StageCost, format_seconds, format_usd
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


def test_usage_is_priced_per_million_tokens() -> None:
    assert price(JUDGED, PRICES).usd == pytest.approx(3 * 0.3 + 0.4 * 2.5)


def test_ledger_adds_up_over_stages() -> None:
    total = make_ledger().total()
    assert total.used.requests == 3063
    assert total.used.thinking_tokens == 350_000
    assert total.used.gpu_seconds == 1800
    assert total.used.usd == pytest.approx(1.9 + 0.18)
    assert total.seconds == 2400


def test_costs_of_one_stage_go_to_one_line() -> None:
    more = StageCost(stage="judge", used=Cost(requests=8, usd=0.1), seconds=10)
    ledger = make_ledger().plus(more)
    assert [cost.stage for cost in ledger.stages] == ["generate", "judge", "train"]
    assert ledger.stages[1].used.requests == 2050
    assert ledger.stages[1].used.usd == pytest.approx(2.0)
    assert ledger.stages[1].seconds == 310


def test_what_the_cache_saved_is_shown_apart_and_not_charged() -> None:
    ledger = make_ledger()
    assert [row[0] for row in ledger.rows()] == ["stage", "generate", "judge", "train", "total"]
    cached = ledger.plus(StageCost(stage="judge", cached=price(JUDGED, PRICES)))
    assert cached.total().used == ledger.total().used
    assert cached.rows()[-1] == ["saved by the cache", "2,042", "3,000,000", "400,000", "350,000", "-", "-", "1.90"]


def test_rows_have_a_cell_for_each_column() -> None:
    heading, *rows = make_ledger().rows()
    assert heading[:3] == ["stage", "requests", "prompt tokens"]
    assert rows[1] == ["judge", "2,042", "3,000,000", "400,000", "350,000", "-", "5 min 00 s", "1.90"]
    assert rows[2] == ["train", "-", "-", "-", "-", "30 min 00 s", "15 min 00 s", "0.18"]
    assert rows[3][:2] == ["total", "3,063"]
    assert {len(row) for row in rows} == {len(heading)}


def test_ledger_survives_json() -> None:
    ledger = make_ledger()
    assert Ledger.model_validate_json(ledger.model_dump_json()) == ledger


def test_negative_costs_are_refused() -> None:
    with pytest.raises(ValidationError):
        Cost(requests=-1)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0 s"), (8.44, "8.4 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(("usd", "text"), [(0, "0.00"), (1234.5, "1,234.50"), (0.0123, "0.012"), (1e-6, "< 0.0001")])
def test_money(usd: float, text: str) -> None:
    assert format_usd(usd) == text
