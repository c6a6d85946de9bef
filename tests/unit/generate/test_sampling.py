"""Sampling's parts that need no server."""

import logging
from pathlib import Path
from typing import Any

import pytest

from tasks.batch.shards import ShardWorker, Tally
from tasks.config import GenerationConfig
from tasks.errors import PreflowError
from tasks.generate.sampling import Sampler, adapter_loaded, merge_completions, plan_generation, prompt_unit
from tasks.llm.responses import Answer, Choice, EndpointDown, RequestRefused
from tasks.store.workspace import Cost, PromptsRef, Workspace, digest

CONFIG = GenerationConfig(model="candidate", serve_from="/adapters/a", num_completions=2)
PROMPT = {"id": "a" * 64, "prompt": [{"role": "user", "content": "Hello?"}]}


class AdapterServer:
    """Stands in for a vLLM that loads an adapter, and then goes away."""

    def __init__(self) -> None:
        self.calls = list[str]()

    async def load_adapter(self, name: str, path: str, replace: bool) -> None:
        self.calls.append(f"load {name}")

    async def unload_adapter(self, name: str) -> None:
        self.calls.append(f"unload {name}")
        raise PreflowError("did not unload the adapter candidate: check that the server is up")


async def test_what_ended_the_sampling_is_not_hidden_by_the_clean_up(caplog: pytest.LogCaptureFixture) -> None:
    server: Any = AdapterServer()
    with pytest.raises(EndpointDown, match="Everything answered so far is kept"), caplog.at_level(logging.WARNING):
        async with adapter_loaded(server, CONFIG):
            raise EndpointDown("Everything answered so far is kept: run again")
    assert server.calls == ["load candidate", "unload candidate"]
    assert "did not unload the adapter" in caplog.text
    with pytest.raises(PreflowError, match="did not unload"):  # an error where nothing else is one
        async with adapter_loaded(server, CONFIG):
            pass


class OneAnswer:
    """Stands in for the client: the HTTP side of it is tested with the fake server."""

    def __init__(self, answer: Answer | Exception) -> None:
        self.answer = answer

    async def chat(self, messages: list[dict[str, str]], **settings: Any) -> Answer:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.mark.parametrize(
    ("answer", "reason", "detail", "final"),
    [
        (
            Answer([Choice("", "stop", "the model only thought"), Choice(" ", "stop", "the model wrote nothing")],
                   Cost(requests=1), "m"),
            "empty_completions", "the model only thought; the model wrote nothing", None,
        ),
        (RequestRefused(200, "content_filter", "no", usage=Cost(requests=1)), "content_filter", "no", True),
        (RequestRefused(502, "keeps_failing", "502", usage=Cost(requests=1)), "keeps_failing", "502", None),
    ],
)  # fmt: skip
async def test_a_prompt_without_completions_says_why(
    answer: Answer | Exception, reason: str, detail: str, final: bool | None
) -> None:
    endpoint: Any = OneAnswer(answer)
    outcome = await Sampler(endpoint, CONFIG).sample(PROMPT)
    assert outcome.error is not None
    assert detail in outcome.error["detail"]
    assert (outcome.error["reason"], outcome.final, outcome.usage.requests) == (reason, final, 1)


async def test_the_manifest_counts_what_was_made_without_a_setting_that_the_endpoint_refused(tmp_path: Path) -> None:
    store = Workspace(tmp_path)
    with store.writing(store.uri("prompts.jsonl")) as out:
        for number in range(3):
            out.write_row({**PROMPT, "id": digest(number)})
    prompts = PromptsRef(uri=store.uri("prompts.jsonl"), **out.facts())
    plan = plan_generation(prompts, str(tmp_path), CONFIG)
    choices = [Choice("Hello.", "stop"), Choice("Bye.", "content_filter")]
    endpoint: Any = OneAnswer(Answer(choices, Cost(requests=1), "m", refused=("system role", "temperature")))

    async def ready() -> None:
        return None

    for _ in range(2):  # the second time from what is kept
        worker = ShardWorker(plan.rows(), prompt_unit, Sampler(endpoint, CONFIG).sample, Tally(rows=3), 4, ready)
        made = merge_completions(plan, [await worker.run(part) for part in plan.slices])
        assert store.read_manifest(made).counts == {
            "failed": 0, "passing": 0, "cut": 3, "empty": 0, "prompts": 3, "refused system role": 3,
            "refused temperature": 3,
        }  # fmt: skip
        endpoint.answer = RuntimeError("nothing is asked twice")
