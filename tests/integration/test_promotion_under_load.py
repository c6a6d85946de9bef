"""The served adapter exchanged while clients ask without pause, on two real vLLM behind one name; and one that dies."""

import asyncio
import json
import os
import random
import signal
import socket
import statistics
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest

from flows import promote as promotion_flow
from flows import rollback as rollback_flow
from flows.promote import promote_adapter, reconcile_served
from flows.rollback import rollback_adapter
from tasks.config import EndpointConfig, PromotionConfig
from tasks.demo.services import Service, VllmOptions, answers, vllm_server
from tasks.errors import PreflowError
from tasks.llm import vllm_admin
from tasks.llm.client import Endpoint
from tasks.promote import pointer as promotion
from tasks.promote import vllm as serving
from tasks.promote.pointer import read_pointer
from tasks.promote.vllm import ProbeFailed
from tasks.store.workspace import AdapterRef, EvaluationRef, Workspace
from tests.deployed import until
from tests.models import demo_adapter, demo_base

VLLM_PYTHON = Path(__file__).parents[2] / ".venv-serve" / "bin" / "python"
NAME = "live"
CLIENTS, SWITCHES = 50, 20
HOST, ADDRESSES = "vllm.test", ["127.0.0.1", "127.0.0.2"]
getaddrinfo = socket.getaddrinfo
PROMPT_TOKENS, ANSWER_TOKENS = 140, 6  # longer than a block of the prefix cache

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]  # the end-to-end run promotes without a load


@dataclass
class Stage:
    """Two vLLM, a workspace, and two finished adapters that write different texts."""

    folder: Path
    vllm: Service
    urls: list[str]
    adapters: dict[str, AdapterRef]
    wanted: dict[tuple[str, int], str] = field(default_factory=dict)
    prompts: list[list[int]] = field(default_factory=list)

    @property
    def workspace(self) -> str:
        return str(self.folder / "workspace")

    @property
    def promotion(self) -> PromotionConfig:
        return PromotionConfig(name=NAME, endpoint=f"http://{HOST}:{self.vllm.port}/v1")

    async def promote(self, which: str) -> None:
        adapter = self.adapters[which]
        rate, uri = {"win_rate": 0.7, "lower": 0.6, "upper": 0.8}, f"{self.workspace}/win_rate.json"
        Workspace(self.workspace).write_json(uri, rate)
        won = EvaluationRef(uri=uri, sha256="0" * 64, size=1, rows=800, adapter_sha256=adapter.sha256, **rate)
        await promote_adapter.fn(adapter, won, self.workspace, self.promotion)

    def current(self) -> str | None:
        pointer = read_pointer(self.workspace, NAME)
        names = {adapter.sha256: name for name, adapter in self.adapters.items()}
        return names[pointer.current.adapter_sha256] if pointer else None

    async def answer(
        self, client: httpx.AsyncClient, model: str, number: int, stream: bool = False, replica: int = 0
    ) -> str:
        body = {
            "model": model, "prompt": self.prompts[number], "max_tokens": ANSWER_TOKENS, "temperature": 0,
            "ignore_eos": True, "stream": stream,
        }  # fmt: skip
        reply = await client.post(f"{self.urls[replica]}/completions", json=body)
        reply.raise_for_status()
        if not stream:
            return str(reply.json()["choices"][0]["text"])
        events = [line.removeprefix("data: ") for line in reply.text.splitlines() if line.startswith("data: {")]
        return "".join(json.loads(event)["choices"][0]["text"] for event in events)

    async def both(self, client: httpx.AsyncClient, number: int) -> list[str]:
        return [await self.answer(client, NAME, number, replica=replica) for replica in (0, 1)]


def random_text(seed: int, length: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(10, 600) for _ in range(length)]


def finished_training(folder: Path, base: Path, sft: Path, adapter: Path, name: str) -> AdapterRef:
    """Lay an adapter down as a training does, with the log-probs that the trainer's own code finds for it."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from tasks.trainer.model import record_probe

    training = folder / "workspace" / "training" / name
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    texts = [random_text(row, 60) for row in range(4)]
    probe = record_probe(model, sft, texts)
    store = Workspace(folder / "workspace")
    store.write_json(str(training / "probe.json"), probe.model_dump())
    sha256 = store.commit_folder(adapter, str(training / "adapter"))
    return AdapterRef(uri=str(training / "adapter"), sha256=sha256, size=1, rows=1)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    folder = tmp_path_factory.mktemp("stage")
    base, sft = demo_base(folder / "base"), demo_adapter(folder / "sft", seed=7)
    demo_adapter(folder / "a", seed=8, learning_rate=1e-2)
    demo_adapter(folder / "b", seed=9, learning_rate=2e-2)
    adapters = {name: finished_training(folder, base, sft, folder / name, name) for name in "ab"}
    first = vllm_server(VLLM_PYTHON, base, folder / "vllm.log", {"sft": sft})
    elsewhere = VllmOptions(extra=(f"--host={ADDRESSES[1]}",))
    second = vllm_server(VLLM_PYTHON, base, folder / "other.log", {"sft": sft}, elsewhere, first.port)
    urls = [f"http://{address}:{first.port}" for address in ADDRESSES]
    second.start()
    try:
        with first, pytest.MonkeyPatch.context() as patch:
            until(lambda: answers(f"{urls[1]}/health"))
            patch.setattr(socket, "getaddrinfo", resolve)
            found = Stage(folder, first, [f"{url}/v1" for url in urls], adapters)
            asyncio.run(find_telling_prompts(found))
            yield found
    finally:
        second.stop()


def resolve(host: Any, port: Any, *arguments: Any, **options: Any) -> Any:
    """Resolve names as a cluster does in which `HOST` is a headless Service with two pods."""
    hosts = ADDRESSES if host == HOST else [host]
    return [found for name in hosts for found in getaddrinfo(name, port, *arguments, **options)]


@asynccontextmanager
async def connected() -> AsyncIterator[httpx.AsyncClient]:
    # A kept connection may be closed by the server in the moment it is used again: that would be no failed request.
    limits = httpx.Limits(max_connections=CLIENTS + 2, max_keepalive_connections=0)
    async with httpx.AsyncClient(timeout=300, limits=limits) as client:
        yield client


async def find_telling_prompts(stage: Stage) -> None:
    """Keep prompts to which the two adapters give different answers, with those answers."""
    candidates = [random_text(number, PROMPT_TOKENS) for number in range(2 * CLIENTS)]
    stage.prompts = candidates
    answers: dict[str, list[str]] = {}
    async with connected() as client:
        for name in "ab":
            await stage.promote(name)
            answers[name] = await asyncio.gather(*(stage.answer(client, NAME, n) for n in range(len(candidates))))
    telling = [n for n in range(len(candidates)) if answers["a"][n] != answers["b"][n]]
    assert len(telling) >= CLIENTS // 2, "the two adapters are alike, so this test would see no mix-up"
    stage.prompts = [candidates[n] for n in telling]
    stage.wanted = {(name, i): answers[name][n] for name in "ab" for i, n in enumerate(telling)}


@dataclass
class Traffic:
    """What the clients saw: answers by the adapter that was current from the request's start to its end."""

    epoch: int = 0
    current: str | None = None
    stop: bool = False
    right: int = 0
    during: int = 0
    wrong: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    async def answered(self, count: int) -> None:
        """Wait until `count` more answers came from the adapter that was current throughout."""
        aim = self.right + count
        while self.right < aim and not (self.failed or self.wrong):  # noqa: ASYNC110
            await asyncio.sleep(0.05)

    async def client(self, stage: Stage, http: httpx.AsyncClient, number: int) -> None:
        turn = number
        while not self.stop:
            for_whom, epoch = self.current, self.epoch
            prompt, turn = number % len(stage.prompts), turn + 1
            try:
                text = await stage.answer(http, NAME, prompt, stream=number % 2 == 0, replica=turn % 2)
            except httpx.HTTPError as error:
                self.failed.append(repr(error))
                continue
            wanted = {name: stage.wanted[name, prompt] for name in "ab"}
            if for_whom is None or self.current is None or epoch != self.epoch:
                # A switch was under way: either adapter will do, but wholly the one or the other.
                self.during += 1
                if text not in wanted.values():
                    self.wrong.append(f"a mixture of adapters: {text!r}")
            elif text != wanted[for_whom]:
                self.wrong.append(f"after switch {epoch} to {for_whom}: {text!r}")
            else:
                self.right += 1


async def test_what_vllm_would_not_load_is_known_from_its_configuration_alone(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_admin, "MOUNT_SECONDS", 0.0)
    settings = EndpointConfig(endpoint=stage.vllm.base_url, model="sft")
    config = json.loads((stage.folder / "sft" / "adapter_config.json").read_text())
    refused = "preflow-trial from .*LoRA rank 32 is greater than max_lora_rank 16.*start vLLM with --max-lora-rank of"
    async with await Endpoint.connect(settings, "evaluation") as endpoint:
        served = {model.id for model in await endpoint.models()}
        for rank, message in ((16, None), (32, refused), (16, None)):
            (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"r": rank}))
            with pytest.raises(PreflowError, match=message) if message else nullcontext():
                await endpoint.check_would_load(str(tmp_path))
        with pytest.raises(PreflowError, match=r"No adapter found for .*set adapter_root"):
            await endpoint.check_would_load(str(tmp_path / "nowhere"))
        assert {model.id for model in await endpoint.models()} == served


async def test_twenty_switches_under_load_lose_and_mix_up_nothing(
    stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    traffic, seconds = Traffic(), []
    async with connected() as http:
        traffic.current = stage.current()
        clients = [asyncio.create_task(traffic.client(stage, http, number)) for number in range(CLIENTS)]
        for number in range(SWITCHES):
            await traffic.answered(CLIENTS // 2)
            other = "b" if stage.current() == "a" else "a"
            traffic.current, start = None, time.monotonic()
            if number % 2:
                await rollback_adapter.fn(stage.workspace, stage.promotion, stage.adapters[other].sha256[:12])
            else:
                await stage.promote(other)
            seconds.append(time.monotonic() - start)
            assert stage.current() == other
            traffic.current, traffic.epoch = other, traffic.epoch + 1
        await asyncio.sleep(1)
        traffic.stop = True
        await asyncio.gather(*clients)
    with capsys.disabled():
        print(
            f"\n2 vLLM, {CLIENTS} clients, {SWITCHES} switches: {traffic.right} right, {traffic.during} during one; "
            f"a switch takes {statistics.median(seconds):.2f} s in the median"
        )
    assert (traffic.failed, traffic.wrong) == ([], [])
    assert traffic.right >= SWITCHES * CLIENTS // 2


async def test_an_adapter_is_read_from_disk_once(stage: Stage) -> None:
    """Without the plugin each step reads it again: slow, and the end of the engine where the folder has gone."""
    await stage.promote("a")
    pointer = read_pointer(stage.workspace, NAME)
    folder = Path(pointer.current.uri)
    away = folder.rename(folder.with_name("away"))
    try:
        async with connected() as http:
            answers = [await stage.answer(http, NAME, number) for number in range(4)]
    finally:
        away.rename(folder)
    assert answers == [stage.wanted["a", number] for number in range(4)]


async def test_a_wrong_adapter_fails_the_probe_and_the_old_one_is_put_back(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    await stage.promote("a")
    store = Workspace(stage.workspace)
    folder = store.uri("training", "swapped")  # b's weights next to the log-probs of a
    store.commit_folder(Path(stage.adapters["b"].uri), f"{folder}/adapter")
    store.write_bytes(f"{folder}/probe.json", Path(stage.adapters["a"].uri).parent.joinpath("probe.json").read_bytes())
    swapped = stage.adapters["b"].model_copy(update={"uri": f"{folder}/adapter"})
    async with connected() as http:
        before = await stage.both(http, 0)
        with monkeypatch.context() as patch:
            patch.setitem(stage.adapters, "b", swapped)
            with pytest.raises(ProbeFailed, match="is served again"):
                await stage.promote("b")
        assert stage.current() == "a"
        assert await stage.both(http, 0) == before


@pytest.mark.parametrize("flow", [promotion_flow, rollback_flow])
async def test_a_reconciliation_in_the_middle_does_not_undo_it(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, flow: ModuleType
) -> None:
    """It puts back what the pointer names, which is still the old adapter; then the pointer moves."""
    await stage.promote("b")
    await stage.promote("a")
    serve = promotion.serve_adapter

    async def undone(*arguments: Any) -> None:
        await serve(*arguments)
        await reconcile_served.fn(stage.workspace, stage.promotion)
        async with connected() as http:
            assert await stage.answer(http, NAME, 0) == stage.wanted["a", 0]

    with monkeypatch.context() as patch:
        patch.setattr(flow, "serve_adapter", undone)
        if flow is rollback_flow:
            await rollback_adapter.fn(stage.workspace, stage.promotion, stage.adapters["b"].sha256[:12])
        else:
            await stage.promote("b")
    assert stage.current() == "b"
    async with connected() as http:
        assert await stage.answer(http, NAME, 0) == stage.wanted["b", 0]


async def test_a_promotion_in_the_middle_of_a_reconciliation_is_seen_by_it(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has read the pointer, then the other flow promotes and ends, and then it loads what the pointer named."""
    await stage.promote("a")
    load, overtaking = promotion.swap_adapter, ["b"]

    async def overtaken(*arguments: Any) -> None:
        if overtaking:
            await stage.promote(overtaking.pop())
        await load(*arguments)

    async with connected() as http:
        await http.post(f"{stage.vllm.base_url}/unload_lora_adapter", json={"lora_name": NAME})
        with monkeypatch.context() as patch:
            patch.setattr(promotion, "swap_adapter", overtaken)
            await reconcile_served.fn(stage.workspace, stage.promotion)
        assert stage.current() == "b"
        assert await stage.answer(http, NAME, 0) == stage.wanted["b", 0]


async def test_a_vllm_killed_in_the_middle_leaves_the_pointer_and_is_put_right(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    await stage.promote("a")
    verify = serving.verify_served

    async def killed_first(*arguments: Any) -> None:
        watchdog = stage.vllm._process.pid
        (server,) = Path(f"/proc/{watchdog}/task/{watchdog}/children").read_text().split()
        os.killpg(int(server), signal.SIGKILL)
        stage.vllm.stop()
        await verify(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(serving, "verify_served", killed_first)
        with pytest.raises(PreflowError, match=r"could not be put back.*start vLLM, then promote again") as caught:
            await stage.promote("b")
    assert HOST in str(caught.value)
    assert stage.current() == "a"
    async with connected() as http:
        other = await stage.answer(http, NAME, 0, replica=1)
    assert other == stage.wanted["a", 0], "the one that lives serves what the pointer names"

    stage.vllm.start()
    stage.vllm.wait_ready()
    async with connected() as http:
        with pytest.raises(httpx.HTTPStatusError, match="404"):
            await stage.answer(http, NAME, 0)
        await reconcile_served.fn(stage.workspace, stage.promotion)
        assert await stage.answer(http, NAME, 0) == stage.wanted["a", 0]
        await stage.promote("b")
        assert stage.current() == "b"
        assert await stage.both(http, 0) == [stage.wanted["b", 0]] * 2


async def test_without_the_plugin_the_prefix_cache_has_nothing_of_the_adapter_before(stage: Stage) -> None:
    """A vLLM of the user's own: exchanged while nobody asks; prompts longer than a block were asked just before."""
    stage.vllm.stop()
    kept, stage.vllm.environment = stage.vllm.environment, {**stage.vllm.environment, "PYTHONPATH": ""}
    stage.vllm.start()
    try:
        stage.vllm.wait_ready()
        async with connected() as http:
            for name in "abab":
                await stage.promote(name)
                for _ in range(2):  # the second time from the cache
                    found = await asyncio.gather(*(stage.answer(http, NAME, n) for n in range(CLIENTS // 2)))
                    assert found == [stage.wanted[name, n] for n in range(CLIENTS // 2)]
    finally:
        stage.vllm.environment = kept
