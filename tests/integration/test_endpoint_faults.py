"""The client against a real server that fails in every way a provider does."""

import asyncio
import json
import logging
import socket
import time
import traceback
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path
from typing import Any

import prefect  # noqa: F401 - else the first log line imports it, for seconds and in the middle of a timeout
import pytest

from tasks.config import EndpointConfig
from tasks.errors import PreflowError
from tasks.llm import retries, vllm_admin
from tasks.llm.client import Endpoint
from tasks.llm.limits import BudgetExceeded
from tasks.llm.responses import Answer, EndpointDown, KeyRefused, RequestRefused
from tasks.llm.secrets import resolve_secret
from tests.fakes import FakeOpenAI
from tests.fakes.plan import FAULTS

SAMPLING: dict[str, Any] = {"n": 3, "seed": 42, "temperature": 0.9, "max_tokens": 256}


def prompt(number: int, text: str = "") -> list[dict[str, str]]:
    return [{"role": "system", "content": "You write scenes."}, {"role": "user", "content": f"Scene {number}. {text}"}]


def open_endpoint(fake: FakeOpenAI, key: str | None = None, **settings: Any) -> Endpoint:
    given = {"endpoint": fake.url, "model": "sampler", "request_timeout_seconds": 5, **settings}
    return Endpoint(EndpointConfig(**given), key)


@asynccontextmanager
async def serving(plan: dict[str, Any] | None = None, **settings: Any) -> AsyncIterator[tuple[FakeOpenAI, Endpoint]]:
    """Start a fake endpoint, and open it."""
    with FakeOpenAI(plan) as fake:
        async with open_endpoint(fake, **settings) as endpoint:
            yield fake, endpoint


async def ask(endpoint: Endpoint, number: int, text: str = "") -> Answer:
    return await endpoint.chat(prompt(number, text), **SAMPLING)


async def ask_all(endpoint: Endpoint, count: int) -> list[Answer]:
    return await asyncio.gather(*(ask(endpoint, number) for number in range(count)))


def texts(answers: list[Answer]) -> list[list[str]]:
    return [[choice.text for choice in answer.choices] for answer in answers]


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the waits; their growth and jitter stay."""
    monkeypatch.setattr(retries, "FIRST_BACKOFF_SECONDS", 0.02)
    monkeypatch.setattr(retries, "LONGEST_BACKOFF_SECONDS", 0.2)
    monkeypatch.setattr(retries, "PING_SECONDS", 1.0)


# ---- answers


async def test_what_is_none_is_not_sent_and_the_rest_arrives() -> None:
    async with serving() as (fake, endpoint):
        await endpoint.chat(prompt(1), n=2, seed=9, temperature=None, response_format=None)
        with pytest.raises(RequestRefused, match="greedy"):
            await endpoint.chat(prompt(1), n=2, seed=9, temperature=0)
        assert endpoint.stats.succeeded == endpoint.stats.usage.requests == 1
    first = fake.requests()[0]
    assert (first["n"], first["seed"], first["model"]) == (2, 9, "sampler")


# ---- faults


@pytest.mark.usefixtures("hasty")
async def test_at_30_percent_faults_every_prompt_gets_its_own_answer() -> None:
    async with serving() as (_, healthy):
        expected = texts(await ask_all(healthy, 150))
    plan = {
        "seed": 1, "latency_ms": 5, "retry_after": 0.05, "burst": 3, "slow_seconds": 0.2,
        "faults": dict.fromkeys(FAULTS, 0.3 / len(FAULTS)),
    }  # fmt: skip
    async with serving(plan, request_timeout_seconds=1.5) as (fake, endpoint):
        assert texts(await ask_all(endpoint, 150)) == expected
        stats, rows = endpoint.stats, fake.requests()
    assert set(FAULTS) <= {row["fault"] for row in rows}
    assert (stats.sent, stats.succeeded) == (len(rows), 150)
    # Each body's last attempt is its only answered one: nothing was asked again after an answer.
    unanswered = {"reset_headers", "reset_body", "broken_json"}
    answered = Counter(row["sha"] for row in rows if row["status"] == 200 and row["fault"] not in unanswered)
    assert len(answered) == 150
    repeated = sum(count - 1 for count in answered.values())
    assert repeated <= sum(row["fault"] == "slow" for row in rows)


KINDS = pytest.mark.parametrize("kind", ["refuse", "503", "hang"])


@KINDS
@pytest.mark.usefixtures("hasty")
async def test_an_outage_is_waited_out_and_said_at_every_heartbeat(
    kind: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "HEARTBEAT_SECONDS", 0.8)
    plan = {"latency_ms": 5, "outage": {"after": 40, "seconds": 2.0, "kind": kind}}
    settings = {"max_concurrency": 8, "max_outage_seconds": 20, "request_timeout_seconds": 0.5}
    with caplog.at_level(logging.WARNING):
        async with serving(plan, **settings) as (_, endpoint):
            assert len(await ask_all(endpoint, 120)) == endpoint.stats.succeeded == 120
            assert endpoint.stats.sent > 120
    waiting = [record.message for record in caplog.records if "waiting" in record.message]
    assert 2 <= len(waiting) <= 6, "a line at each heartbeat, not one an attempt"
    assert "giving up after 20 s" in waiting[-1]


@KINDS
@pytest.mark.usefixtures("hasty")
async def test_an_outage_that_lasts_too_long_ends_the_stage(kind: str) -> None:
    plan = {"outage": {"after": 11, "seconds": 600, "kind": kind}}
    settings = {"max_concurrency": 4, "max_outage_seconds": 1.0, "request_timeout_seconds": 0.4}
    async with serving(plan, **settings) as (fake, endpoint):
        started = time.monotonic()
        with pytest.raises(EndpointDown, match=rf"{fake.url}.*max_outage_seconds is 1.*run again"):
            await ask_all(endpoint, 100)
        assert 1.0 <= time.monotonic() - started < 300  # the outage would have lasted 600 s
        assert endpoint.stats.succeeded == 10


async def test_a_wish_to_wait_longer_than_the_longest_outage_is_not_granted() -> None:
    plan = {"faults": {"rate_limit_after": 1.0}, "retry_after": 3600}
    async with serving(plan, max_outage_seconds=60, max_concurrency=2) as (fake, endpoint):
        with pytest.raises(EndpointDown, match="asks to wait 3600 s, and max_outage_seconds is 60"):
            await ask(endpoint, 1)
        assert len(fake.requests()) == 1
        async with asyncio.timeout(120):  # nobody waits for what was not granted
            answers = await asyncio.gather(*(ask(endpoint, number) for number in range(6)), return_exceptions=True)
    assert all(isinstance(answer, EndpointDown) for answer in answers)


@pytest.mark.usefixtures("hasty")
async def test_time_without_requests_is_no_outage() -> None:
    """An endpoint that nothing was asked of for longer than max_outage_seconds has not been down."""
    plan = {"seed": 1, "faults": {"error_500": 1.0}, "max_faults": 1}
    async with serving(plan, max_outage_seconds=1.5) as (fake, endpoint):
        await ask(endpoint, 1)
        await asyncio.sleep(1.8)
        await ask(endpoint, 2)
    assert [row["status"] for row in fake.requests()] == [500, 200, 500, 200]


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize(("others", "seconds"), [(200, 600), (0, 600), (0, 0.3)])
async def test_a_request_that_never_succeeds_is_refused_and_neither_retried_for_ever_nor_taken_for_an_outage(
    others: int, seconds: float
) -> None:
    async with serving({"latency_ms": 20}, max_concurrency=4, max_outage_seconds=seconds) as (fake, endpoint):
        answers = asyncio.ensure_future(ask_all(endpoint, others))
        with pytest.raises(RequestRefused, match="the engine cannot digest") as caught:
            await ask(endpoint, 1, "ALWAYS-FAILS")
        assert (caught.value.status, caught.value.reason) == (500, "keeps_failing")
        assert len(await answers) == others
    assert fake.requests()[-1]["status"] == 200  # the last is a ping, or another's


@pytest.mark.parametrize(
    ("plan", "text", "error", "message"),
    [
        ({}, "TOO-LONG-FOR-THE-CONTEXT", RequestRefused, "context_length"),
        ({}, "WITHHELD-BY-THE-FILTER", RequestRefused, "content_filter"),
        ({"samplers": ["other"]}, "", PreflowError, r"does not serve the model 'sampler'.*set model"),
    ],
)
async def test_what_can_never_be_answered_is_refused_at_once(
    plan: dict[str, Any], text: str, error: type[Exception], message: str
) -> None:
    async with serving(plan) as (fake, endpoint):
        with pytest.raises(error, match=message):
            await ask(endpoint, 1, text)
    assert len(fake.requests()) == 1


async def test_callers_that_go_away_leave_no_trace() -> None:
    plan, money = {"latency_ms": 300, "latency_sigma": 0}, {"prompt_price": 1, "budget_usd": 10}
    async with serving(plan, max_concurrency=2, **money) as (_, endpoint):
        callers = [asyncio.ensure_future(ask(endpoint, number)) for number in range(6)]
        await asyncio.sleep(0.1)
        for caller in callers:
            caller.cancel()
        await asyncio.gather(*callers, return_exceptions=True)
        assert len(await ask_all(endpoint, 4)) == 4


# ---- rates


async def test_retry_after_holds_all_requests_at_once() -> None:
    plan = {"latency_ms": 10, "limit_requests": 10, "limit_seconds": 3}
    async with serving(plan, max_concurrency=4) as (fake, endpoint):
        assert len(await ask_all(endpoint, 20)) == 20
    rows = fake.requests()
    refused = [row["time"] for row in rows if row["status"] == 429]
    at_first = [moment for moment in refused if moment < refused[0] + 0.8]
    assert 1 <= len(at_first) <= 4  # those in flight when the limit was hit, and none of the six that waited
    # After them nothing came until the time that the server had asked for was over.
    quiet = [row["time"] for row in rows if refused[0] + 0.8 < row["time"] < refused[0] + 2.0]
    assert quiet == []


@pytest.mark.usefixtures("hasty")
async def test_the_window_shrinks_to_what_the_server_takes_and_grows_back() -> None:
    plan = {"latency_ms": 20, "latency_sigma": 0.1, "max_in_flight": 4}
    async with serving(plan, max_concurrency=64) as (fake, endpoint):
        assert len(await ask_all(endpoint, 400)) == 400
        assert endpoint.stats.window <= 8
    rows = fake.requests()
    late = rows[len(rows) // 3 :]
    assert sum(row["status"] == 503 for row in late) / len(late) < 0.25
    assert max(row["in_flight"] for row in late) >= 4
    async with serving({"faults": {"unavailable": 1.0}, "max_faults": 1}, max_concurrency=8) as (_, endpoint):
        await ask(endpoint, 0)
        assert endpoint.stats.window == 4
    async with serving(max_concurrency=8) as (_, endpoint):
        await ask_all(endpoint, 60)
        assert endpoint.stats.window == 8


# ---- money


async def test_the_budget_is_never_exceeded_and_nearly_used() -> None:
    settings = {"max_concurrency": 16, "budget_usd": 0.2, "prompt_price": 1.0, "completion_price": 10.0}
    async with serving({"latency_ms": 5, "thinking_tokens": 50}, **settings) as (fake, endpoint):
        answers = await asyncio.gather(*(ask(endpoint, number) for number in range(400)), return_exceptions=True)
        stats = endpoint.stats
    used = [row["usage"] for row in fake.requests()]
    billed = sum((usage["prompt_tokens"] * 1.0 + usage["completion_tokens"] * 10.0) / 1e6 for usage in used)
    assert stats.spent_usd == pytest.approx(billed)
    assert 0.19 <= billed <= 0.2
    failures = [answer for answer in answers if isinstance(answer, BaseException)]
    assert failures
    assert all(isinstance(failure, BudgetExceeded) for failure in failures)
    assert "budget_usd is 0.2" in str(failures[0])
    assert stats.usage.thinking_tokens == 150 * stats.succeeded


# ---- keys


async def test_a_refused_key_is_named_and_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeOpenAI({"key": "right"}) as fake:
        async with open_endpoint(fake, "sk-wrong-and-secret", api_key="env:JUDGE_KEY") as endpoint:
            for call in (ask(endpoint, 1), endpoint.check_model()):
                with pytest.raises(KeyRefused, match=r"env:JUDGE_KEY.*export JUDGE_KEY") as caught:
                    await call
                assert fake.url in str(caught.value)
                assert "wrong-and-secret" not in "".join(traceback.format_exception(caught.value)) + repr(endpoint)
        async with open_endpoint(fake, "right") as endpoint:
            await ask(endpoint, 1)
        monkeypatch.setenv("OPENAI_API_KEY", "right")  # of another service: an endpoint without a key is not sent it
        async with open_endpoint(fake) as endpoint:
            with pytest.raises(KeyRefused, match=r"without a key.*set api_key"):
                await ask(endpoint, 1)


@pytest.mark.usefixtures("prefect_server")
async def test_a_key_comes_from_a_prefect_secret_block() -> None:
    from prefect.blocks.system import Secret

    await Secret(value="1234567890").save("judge-key")  # digits must stay text
    assert await resolve_secret("judge-key", "judging.api_key") == "1234567890"
    with pytest.raises(PreflowError, match=r"judging\.api_key.*'no-such-block'.*does not exist"):
        await resolve_secret("no-such-block", "judging.api_key")


# ---- what is served


@pytest.mark.parametrize(
    ("plan", "model", "path", "found", "message"),
    [
        ({"gemini_names": True}, "sft", "/v1", "models/sft", None),
        ({"gemini_names": True}, "models/sft", "/v1", "models/sft", None),
        ({}, "sft-v2", "/v1", None, r"does not serve the model 'sft-v2'.*dpo, .*sampler, sft"),
        ({}, "sft", "", None, r"set endpoint to http://127\.0\.0\.1:\d+/v1"),
        ({"list_models": False}, "sft", "/v1", "sft", None),
    ],
)
async def test_a_model_is_found_under_its_names_or_what_is_wrong_is_said(
    plan: dict[str, Any],
    model: str,
    path: str,
    found: str | None,
    message: str | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with FakeOpenAI({"max_model_len": 512, **plan}) as fake:
        async with open_endpoint(fake, model=model, endpoint=fake.url.removesuffix("/v1") + path) as endpoint:
            with pytest.raises(PreflowError, match=message) if message else nullcontext():
                info = await endpoint.check_model()
                unlisted = "does not list its models" in caplog.text
                assert (info.id, info.max_model_len) == (found, None if unlisted else 512)
                assert unlisted == ("list_models" in plan)


@pytest.mark.parametrize(("listens", "message"), [(False, "is not usable.*curl {url}/models"), (True, "within 1 s")])
async def test_an_endpoint_that_is_not_there_or_silent_is_reported_within_seconds(
    listens: bool, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_admin, "CHECK_SECONDS", 1.0 if listens else 10.0)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        if listens:
            taken.listen()
        url, started = f"http://127.0.0.1:{taken.getsockname()[1]}/v1", time.monotonic()
        async with Endpoint(EndpointConfig(endpoint=url), None) as endpoint:
            with pytest.raises(PreflowError, match=message.format(url=url)):
                await endpoint.check_model()
        assert time.monotonic() - started < 120


def make_adapter(folder: Path, rank: int) -> str:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"r": rank}))
    return str(folder)


async def test_adapters_are_loaded_replaced_and_unloaded(tmp_path: Path) -> None:
    first, second = make_adapter(tmp_path / "a", 8), make_adapter(tmp_path / "b", 8)
    async with serving({"samplers": ["sampler"]}, model="tuned") as (_, endpoint):
        await endpoint.load_adapter("tuned", first, replace=False)
        info = await endpoint.check_model()
        assert (info.root, info.parent) == (first, "sampler")
        before = await ask(endpoint, 1)
        with pytest.raises(PreflowError, match=r"already been loaded.*replace"):
            await endpoint.load_adapter("tuned", second, replace=False)
        await endpoint.load_adapter("tuned", second, replace=True)
        assert (await endpoint.check_model()).root == second
        assert (await ask(endpoint, 1)).choices != before.choices
        await endpoint.unload_adapter("tuned")
        await endpoint.unload_adapter("tuned")
        assert "tuned" not in [model.id for model in await endpoint.models()]


@pytest.mark.parametrize(
    ("ranks", "late", "message"),
    [
        ((64, 64), 0.0, None),
        ((64, 64), 0.3, None),  # a mount that shows the file late
        ((64, 8), 0.0, r"rank 16 is greater than max_lora_rank 8\..*--max-lora-rank"),  # of the second alone
        ((64, 8), 0.3, r"rank 16 is greater than max_lora_rank 8\..*--max-lora-rank"),
        ((64, None), 0.0, "Check that the server is up"),
        ((64, 64), 9.0, "No adapter found.*must exist where the server runs"),
    ],
)
async def test_every_replica_is_asked_whether_it_would_load_an_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: tuple[int, int | None], late: float, message: str | None
) -> None:
    monkeypatch.setattr(vllm_admin, "MOUNT_SECONDS", 2.0)
    monkeypatch.setattr(vllm_admin, "MOUNT_PAUSE", 0.1)
    plans = [{"max_lora_rank": rank or 64, "wants_weights": True} for rank in ranks]
    async with serving(plans[0]) as (first, endpoint), serving(plans[1]) as (second, _):

        async def both(_: str) -> list[str]:
            return [fake.url.removesuffix("/v1") for fake in (first, second)]

        monkeypatch.setattr(vllm_admin, "replicas", both)
        if ranks[1] is None:
            second.stop()
        shown = asyncio.get_running_loop().call_later(late, make_adapter, tmp_path / "sft", 16)
        if not late:
            make_adapter(tmp_path / "sft", 16)
            shown.cancel()
        with pytest.raises(PreflowError, match=message) if message else nullcontext():
            await endpoint.check_would_load(str(tmp_path / "sft"))
        shown.cancel()
        assert not [model.id for model in await endpoint.models() if model.parent]


async def test_an_adapter_that_cannot_be_loaded_is_explained(tmp_path: Path) -> None:
    high, nowhere = make_adapter(tmp_path / "high", 128), str(tmp_path / "nowhere")
    async with serving() as (fake, endpoint):
        for name, path, message in (
            ("x", nowhere, r"No adapter found.*must exist where the server runs"),
            ("x", high, r"rank 128.*--max-lora-rank of at least that, or train the SFT adapter with a lower r"),
            ("sampler", high, "conflicts with a served base model"),
        ):
            with pytest.raises(PreflowError, match=message):
                await endpoint.load_adapter(name, path, replace=True)
        fake.stop()
        with pytest.raises(PreflowError, match="Check that the server is up"):
            await endpoint.load_adapter("x", high, replace=True)
    async with serving({"runtime_lora": False}) as (_, endpoint):
        for call in (endpoint.load_adapter("x", high, replace=True), endpoint.unload_adapter("x")):
            with pytest.raises(PreflowError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
                await call
