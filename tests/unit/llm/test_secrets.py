"""No field that names a secret takes one, whichever model has it; and no secret of a worker reaches the Job's text."""

import importlib
import json
import pkgutil
import re
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

import flows
import tasks
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


def secret_fields() -> list[tuple[type[BaseModel], str]]:
    found = {(model, name) for model in models() for name in model.model_fields if NAMES_A_SECRET.search(name)}
    return sorted(found, key=lambda field: (field[0].__name__, field[1]))


FIELDS = secret_fields()


def test_the_fields_that_are_known_are_found() -> None:
    found = {f"{model.__name__}.{name}" for model, name in FIELDS}
    assert {"EndpointConfig.api_key", "GenerationConfig.api_key", "JudgeConfig.api_key", "JudgingConfig.api_key",
            "PromotionConfig.api_key"} <= found  # fmt: skip


@pytest.mark.parametrize(("model", "name"), FIELDS, ids=[f"{model.__name__}.{name}" for model, name in FIELDS])
def test_a_literal_key_is_refused_and_not_shown(model: type[BaseModel], name: str) -> None:
    for literal in LITERALS:
        with pytest.raises(ValidationError) as refused:
            model.model_validate({name: literal})
        assert name in str(refused.value)
        assert "must name a secret" in str(refused.value)
        assert literal not in str(refused.value)


@pytest.mark.parametrize(("model", "name"), FIELDS, ids=[f"{model.__name__}.{name}" for model, name in FIELDS])
def test_the_name_of_a_secret_is_taken(model: type[BaseModel], name: str) -> None:
    for good in ("env:OPENAI_API_KEY", "my-judge-key", "gemini25flashprodkey", "llmjudgekey2025prod", "gpt4o2judge"):
        assert getattr(model.model_validate({name: good}), name) == good


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


def deployment_texts() -> Iterator[tuple[str, str]]:
    for folder in ("deployments", "infra"):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and path.suffix in (".yaml", ".json", ".env", ".tf", ".sh", ".conf", ".Dockerfile"):
                yield str(path.relative_to(ROOT)), path.read_text()


def test_no_key_stands_in_what_is_deployed() -> None:
    pattern = re.compile(r"\b(sk-[A-Za-z0-9]{8,}|hf_[A-Za-z0-9]{8,}|AIza[\w-]{20,}|-----BEGIN [A-Z ]*PRIVATE KEY)")
    texts = dict(deployment_texts())
    assert len(texts) > 20
    assert {name: found for name, text in texts.items() if (found := pattern.findall(text))} == {}


def parameters_of(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, item in value.items():
            yield name, item
            yield from parameters_of(item)
    elif isinstance(value, list):
        for item in value:
            yield from parameters_of(item)


def test_deployment_parameters_only_name_secrets() -> None:
    import yaml

    document = yaml.safe_load((ROOT / "deployments" / "prefect.yaml").read_text())
    given = [(name, value) for name, value in parameters_of(document) if NAMES_A_SECRET.search(str(name))]
    for name, value in given:
        assert value is None or re.fullmatch(r"env:[A-Z_]+|[a-z0-9-]+", str(value)), name
