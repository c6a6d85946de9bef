"""No field that names a secret takes one, whichever model has it; and no secret of a worker reaches the Job's text."""

import importlib
import json
import pkgutil
import re
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ValidationError

import flows
import tasks
from tasks.errors import PreflowError
from tasks.llm.secrets import resolve_secret
from tests.fakes.process import ROOT
from tests.unit.infra.test_job_template import RUN, render

# Torch is not needed to find a field, and the demo's models are not configuration.
SKIPPED = ("tasks.trainer.", "tasks.demo.", "flows.demo")
NAMES_A_SECRET = re.compile(r"api_?key|secret|password|credential|(auth|access|hub|hf|bearer)_token")
LITERALS = [
    "sk-proj-abcdefghijklmnop", "hf_abcdefghijklmnopqrstuvwxyzABCDEFGH", "AIzaSyA-1234567890abcdefghijklmnopqrstu",
    "0123456789abcdef0123456789abcdef", "Bearer abc.def.ghi", "a" * 64, "gsk_1a2b3c4d5e6f",
]  # fmt: skip


def models() -> Iterator[type[BaseModel]]:
    for package in (tasks, flows):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.startswith(SKIPPED):
                importlib.import_module(module.name)
    waiting = list(BaseModel.__subclasses__())
    while waiting:
        model = waiting.pop()
        waiting += model.__subclasses__()
        if model.__module__.partition(".")[0] in ("tasks", "flows"):
            yield model


FIELDS = sorted(
    {(model, name) for model in models() for name in model.model_fields if NAMES_A_SECRET.search(name)},
    key=lambda field: (field[0].__name__, field[1]),
)


@pytest.mark.parametrize(("model", "name"), FIELDS, ids=[f"{model.__name__}.{name}" for model, name in FIELDS])
def test_the_name_of_a_secret_is_taken_and_a_literal_key_is_refused_and_not_shown(
    model: type[BaseModel], name: str
) -> None:
    assert {"EndpointConfig", "JudgingConfig", "PromotionConfig"} <= {owner.__name__ for owner, _ in FIELDS}
    for literal in LITERALS:
        with pytest.raises(ValidationError) as refused:
            model.model_validate({name: literal})
        assert name in str(refused.value)
        assert "must name a secret" in str(refused.value)
        assert literal not in str(refused.value)
    for good in ("env:OPENAI_API_KEY", "my-judge-key", "gemini25flashprodkey", "llmjudgekey2025prod", "gpt4o2judge"):
        assert getattr(model.model_validate({name: good}), name) == good


@pytest.mark.parametrize(
    ("value", "found", "message"),
    [
        (" sk-1\n", "sk-1", None),
        *((value, None, r"judging\.api_key.*JUDGE_KEY.*export JUDGE_KEY=") for value in (None, "", "  ")),
        ("sk-wäre\nschön", None, "cannot be a key"),
    ],
)
async def test_a_secret_comes_from_the_environment_and_one_that_is_none_is_named_and_not_shown(
    value: str | None, found: str | None, message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("JUDGE_KEY", value)
    with pytest.raises(PreflowError, match=message) if message else nullcontext() as caught:
        assert await resolve_secret("env:JUDGE_KEY", "judging.api_key") == found
    assert "sk-" not in str(caught and caught.value)


async def test_the_workers_secrets_are_not_in_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    planted = {
        "OPENAI_API_KEY": "sk-planted-job-1", "HF_TOKEN": "hf_planted_job_2", "WANDB_API_KEY": "planted-job-3",
        "VLLM_API_KEY": "planted-job-4",
    }  # fmt: skip
    for name, value in planted.items():
        monkeypatch.setenv(name, value)
    text = json.dumps(await render())
    assert RUN.name in text or str(RUN.id) in text
    assert [value for value in planted.values() if value in text] == []
    assert "preflow-train" in text, "the training's secrets come by reference"


def test_no_key_stands_in_what_is_deployed_and_parameters_only_name_secrets() -> None:
    pattern = re.compile(r"\b(sk-[A-Za-z0-9]{8,}|hf_[A-Za-z0-9]{8,}|AIza[\w-]{20,}|-----BEGIN [A-Z ]*PRIVATE KEY)")
    endings = (".yaml", ".json", ".env", ".tf", ".sh", ".conf", ".Dockerfile")
    files = [path for folder in ("deployments", "infra") for path in (ROOT / folder).rglob("*")]
    texts = {path: path.read_text() for path in files if path.is_file() and path.suffix in endings}
    assert len(texts) > 20
    assert {path: found for path, text in texts.items() if (found := pattern.findall(text))} == {}
    for name, value in parameters_of(yaml.safe_load((ROOT / "deployments" / "prefect.yaml").read_text())):
        if NAMES_A_SECRET.search(str(name)):
            assert value is None or re.fullmatch(r"env:[A-Z_]+|[a-z0-9-]+", str(value)), name


def parameters_of(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        yield from value.items()
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from parameters_of(item)
