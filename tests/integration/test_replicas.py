"""Two servers behind one name, as behind a headless Service: an adapter is exchanged on both or on neither."""

import json
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tasks.config import PromotionConfig
from tasks.errors import PreflowError
from tasks.llm import vllm_admin
from tasks.llm.client import Endpoint
from tasks.promote import vllm
from tasks.promote.pointer import move_pointer, serve_adapter
from tasks.promote.vllm import ProbeFailed, is_served, swap_adapter
from tasks.store.workspace import AdapterRef, EvaluationRef
from tests.fakes.process import FakeOpenAI


@pytest.fixture
def servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The addresses of two servers that have the adapter `old` under the name `live`."""
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(json.dumps({"r": 4}))
    with FakeOpenAI() as first, FakeOpenAI() as second:
        addresses = [first.url, second.url]
        for address in addresses:
            ask(f"{address}/load_lora_adapter", lora_name="live", lora_path=str(tmp_path / "old"))

        async def both(endpoint: str) -> list[str]:
            port, other = (address.split(":")[2].removesuffix("/v1") for address in addresses)
            return [endpoint, endpoint.replace(port, other)] if port in endpoint else [endpoint]

        monkeypatch.setattr(vllm_admin, "replicas", both)
        monkeypatch.setattr(vllm, "replicas", both)
        yield addresses


def ask(url: str, **body: str) -> None:
    httpx.post(url, json=body).raise_for_status()


def served(address: str) -> str | None:
    models = httpx.get(f"{address}/models").json()["data"]
    return next((Path(item["root"]).name for item in models if item["id"] == "live"), None)


@pytest.mark.parametrize("broken", [None, 1])
async def test_both_servers_have_the_new_adapter_or_both_the_old_one(
    servers: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: int | None
) -> None:
    proved = []

    async def verify(server: Endpoint, uri: str, promotion: PromotionConfig) -> None:
        proved.append((server.config.endpoint, promotion.endpoint))
        if broken is not None and server.config.endpoint == servers[broken]:
            raise ProbeFailed("it is another adapter")

    monkeypatch.setattr(vllm, "verify_served", verify)
    promotion = PromotionConfig(name="live", endpoint=servers[0])
    given: tuple[Any, ...] = (str(tmp_path / "new"), str(tmp_path / "old"), str(tmp_path), promotion)
    if broken is None:
        await swap_adapter(*given)
        assert await is_served(str(tmp_path / "new"), str(tmp_path), promotion)
    else:
        with pytest.raises(PreflowError, match=r"another adapter.*is served again"):
            await swap_adapter(*given)
        with pytest.raises(
            PreflowError, match=r"another adapter\. CURRENT\.json still names it: fix.*reconcile-served"
        ):
            await swap_adapter(str(tmp_path / "old"), *given[1:])
    assert [served(address) for address in servers] == ["new" if broken is None else "old"] * 2
    assert {(address, address) for address in servers} == set(proved)


async def test_a_promotion_that_fails_does_not_undo_one_that_came_first(
    servers: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has read the pointer, then another flow promotes and ends, and then its own adapter fails the probe."""
    promotion, facts = PromotionConfig(name="live", endpoint=servers[0]), {"sha256": "a" * 64, "size": 1, "rows": 1}
    won = EvaluationRef(uri="e", adapter_sha256="a" * 64, win_rate=0.7, lower=0.6, upper=0.8, **facts)

    def promoted(name: str) -> None:
        adapter = AdapterRef(uri=str(tmp_path / name), **{**facts, "sha256": name * 20})
        move_pointer(adapter, won, adapter.uri, str(tmp_path), promotion)

    async def verify(server: Endpoint, uri: str, promotion: PromotionConfig) -> None:
        if uri.endswith("bad"):
            promoted("new")
            raise ProbeFailed("it is another adapter")

    monkeypatch.setattr(vllm, "verify_served", verify)
    promoted("old")
    shutil.copytree(tmp_path / "new", tmp_path / "bad")
    with pytest.raises(ProbeFailed, match="it is another adapter"):
        await serve_adapter(str(tmp_path / "bad"), str(tmp_path), promotion)
    assert [served(address) for address in servers] == ["new", "new"]


async def test_an_adapter_that_one_server_lacks_is_taken_from_the_other(servers: list[str], tmp_path: Path) -> None:
    ask(f"{servers[0]}/unload_lora_adapter", lora_name="live")
    promotion = PromotionConfig(name="live", endpoint=servers[0])
    assert not await is_served(str(tmp_path / "old"), str(tmp_path), promotion)
    async with await vllm._server(promotion) as server:
        await server.unload_adapter("live")
    assert served(servers[1]) is None


async def test_a_name_with_several_addresses_is_several_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (f"10.0.0.{number}", 8000)) for number in (2, 1, 2)]
    assert await vllm_admin.replicas("http://localhost:8000/v1") == ["http://localhost:8000/v1"]
    assert await vllm_admin.replicas("https://example.invalid/v1") == ["https://example.invalid/v1"]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    assert await vllm_admin.replicas("http://vllm:8000/v1") == ["http://10.0.0.1:8000/v1", "http://10.0.0.2:8000/v1"]
