"""Trained is what was sampled: from a real vLLM to the trainer's pairs, with the chat templates of real families."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.generate import generate_completions
from tasks.config import GenerationConfig, JudgingConfig
from tasks.demo.services import Service, VllmOptions, vllm_server
from tasks.errors import PreflowError
from tasks.generate.sampling import check_same_template
from tasks.judge.pairs import make_preferences
from tasks.llm.chat_template import ChatTemplate, choose_template
from tasks.llm.client import Endpoint
from tasks.store.records import CompletionsRow, PairRow, read_rows
from tasks.store.workspace import CompletionsRef, Manifest, PreferencesRef, VerdictsRef, Workspace
from tasks.trainer.data import load_pairs
from tests.fakes.chat import FAMILIES, Family, union_tokenizer
from tests.fakes.tiny_training import build_random_llama

VLLM_PYTHON = Path(__file__).parents[2] / ".venv-serve" / "bin" / "python"
PROMPTS = [
    [{"role": "user", "content": "  the cat?\n"}],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": " dog "},
        {"role": "user", "content": "<think>"},
    ],
    *([{"role": "user", "content": f"house {number}"}] for number in range(10)),
]
SAMPLING = {"num_completions": 3, "max_tokens": 48, "frequency_penalty": 0.0, "temperature": 1.0}

# The end-to-end run sees that what its vLLM sampled is what was trained on, for one template.
pytestmark = [pytest.mark.usefixtures("prefect_server"), pytest.mark.timeout(400), pytest.mark.long]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Service, Any]]:
    """A random model behind vLLM, whose tokenizer has the special tokens of all families, and that tokenizer.

    It takes the chat template from the request: one server does for all of them.
    """
    folder = tmp_path_factory.mktemp("served")
    tokenizer = union_tokenizer(folder / "base")
    ends = [tokenizer.convert_tokens_to_ids(family.eos) for family in FAMILIES]
    build_random_llama(folder / "base", len(tokenizer), sorted(set(ends)))
    options = VllmOptions(max_model_len=512, extra=("--trust-request-chat-template",))
    with vllm_server(VLLM_PYTHON, folder / "base", folder / "vllm.log", options=options) as server:
        yield server, tokenizer


def settings_for(server: Service, template: Path, family: Family) -> GenerationConfig:
    return GenerationConfig.model_validate(
        {"endpoint": server.base_url, "model": "base", "chat_template": str(template),
         "chat_template_kwargs": dict(family.kwargs), **SAMPLING}
    )  # fmt: skip


def judged(completions: CompletionsRef, workspace: str) -> PreferencesRef:
    """Have every row's first completion win over its second, and make the pairs."""
    store = Workspace(workspace)
    with store.writing(store.uri("verdicts", "v", "verdicts.jsonl")) as out:
        for row in read_rows(CompletionsRow, completions.uri):
            vote = {"judge": "j", "order": [0, 1, 2], "best": 0, "worst": 1, "confidence": 5}
            out.write_row({**row.model_dump(), "votes": [vote]})
    uri, manifest = (store.uri("verdicts", "v", name) for name in ("verdicts.jsonl", "manifest.json"))
    artifact = VerdictsRef(uri=uri, manifest=manifest, **out.facts())
    store.write_manifest(Manifest(artifact=artifact, stage="judging", version=1, key="v", files={}))
    return make_preferences(artifact, workspace, JudgingConfig(val_ratio=0.0))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
async def test_every_completion_is_trained_on_as_it_was_sampled(
    family: Family, served: tuple[Service, Any], tmp_path: Path
) -> None:
    server, tokenizer = served
    prompts, workspace = tmp_path / "prompts.jsonl", str(tmp_path / "ws")
    prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    settings = settings_for(server, family.file, family)
    completions = await generate_completions(str(prompts), workspace, settings)
    rows = {row.id: row for row in read_rows(CompletionsRow, completions.uri)}
    assert len(rows) == len(PROMPTS)
    ids = [sampled for row in rows.values() for sampled in row.token_ids]
    assert all(ids), "vLLM tells every completion's tokens"
    ends = {reason for row in rows.values() for reason in row.finish_reasons}
    assert ends == {"stop", "length"}, "some ended by themselves, some were cut"

    template = choose_template(settings, None)
    assert template is not None
    preferences = judged(completions, workspace)
    data = load_pairs(preferences.uri, Workspace(workspace), tokenizer, 512, template)
    assert data.report.exact_share == 1.0
    assert (data.report.other_prompts, data.report.foreign) == (0, 0), "rendered and read here as there"
    for pair, row in zip(data.pairs, read_rows(PairRow, preferences.uri), strict=True):
        sampled = rows[str(row.model_extra["id"])]  # type: ignore[index]
        assert [pair.prompt_ids, pair.chosen_ids, pair.rejected_ids] == [
            sampled.prompt_token_ids,
            *sampled.token_ids[:2],
        ]
        stops = [tokenizer.decode(side[-1:]) in {f.eos for f in FAMILIES} for side in sampled.token_ids if side]
        assert stops == [reason == "stop" for reason in sampled.finish_reasons], "who ended has the end of turn"


async def test_a_server_that_speaks_with_another_template_is_refused(served: tuple[Service, Any]) -> None:
    server, tokenizer = served
    settings = GenerationConfig.model_validate({"endpoint": server.base_url, "model": "base"})
    own, other = FAMILIES[0], next(family for family in FAMILIES if family.name == "vicuna")
    special = tokenizer.special_tokens_map
    async with await Endpoint.connect(settings, "generation") as endpoint:
        spoken = ChatTemplate(own.file.read_text(), "a", special, settings)
        await check_same_template(endpoint, settings, spoken, PROMPTS)
        foreign = ChatTemplate(other.file.read_text(), "b", special, settings)
        with pytest.raises(PreflowError, match="does not speak with the chat template of b and its tokenizer"):
            await check_same_template(endpoint, settings, foreign, PROMPTS)
