"""A whole run: checked before anything is spent, and its result kept so that a finished run is known as such."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from contextvars import ContextVar
from functools import cache, partial
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from tasks.config import EndpointConfig, JudgingConfig, PipelineConfig
from tasks.errors import PreflowError
from tasks.generate.sampling import sampling_identity
from tasks.judge.asking import read_rubric
from tasks.llm.client import Endpoint, resolve_secret
from tasks.store.prompts import import_prompts
from tasks.store.workspace import (
    AdapterRef,
    CompletionsRef,
    EvaluationRef,
    PreferencesRef,
    PromotionRef,
    Reference,
    Workspace,
    digest,
    folder_digest,
    stage_key,
)
from tasks.train.launch import base_digest, check_training_inputs
from tasks.train.work_pool import check_deployment

VERSION = 2
logger = logging.getLogger(__name__)
_turn: ContextVar[asyncio.Lock | None] = ContextVar("turn", default=None)


class PipelineResult(BaseModel):
    """What a pipeline run made; `promotion` is None if the adapter did not win by enough, or was `declined`."""

    model_config = ConfigDict(frozen=True)

    completions: CompletionsRef
    preferences: PreferencesRef
    adapter: AdapterRef
    evaluation: EvaluationRef
    promotion: PromotionRef | None = None
    declined: str | None = None

    def references(self) -> list[Reference]:
        """Return everything that a finished run must still have."""
        return [self.completions, self.preferences, self.adapter, self.evaluation]


class Contents:
    """What determines the outcome of runs, by content: every file and folder is read once for all of them."""

    def __init__(self) -> None:
        self._sampling, self._folder, self._base = cache(sampling_identity), cache(folder_digest), cache(base_digest)
        self._file = cache(lambda uri: Workspace.holding(uri).sha256(uri))

    def of(self, config: PipelineConfig) -> dict[str, Any]:
        """Return, for a filled configuration, what a run's win rate depends on: JSON-ready, without addresses."""
        evaluation = config.evaluation
        return {
            "prompts": [uri and self._file(uri) for uri in (config.prompts, config.eval_prompts)],
            "generation": self._sampling(config.generation),
            "judging": self._judge(config.judging),
            "training": [
                config.training.identity(),
                self._folder(config.training.sft_adapter),
                self._base(config.training),
            ],
            "evaluation": evaluation.model_dump(mode="json", exclude={"generation", "judging", "adapter_root"}),
            "measured": [
                evaluation.generation and self._sampling(evaluation.generation),
                self._judge(evaluation.comparison_judge()),
            ],
        }

    def _judge(self, judging: JudgingConfig) -> dict[str, Any]:
        return {**judging.identity(), "rubric": digest(read_rubric(judging.rubric))}


def run_key(config: PipelineConfig) -> str:
    """Return the key of a run: of its inputs' contents and of all settings that decide results."""
    config = config.filled()
    return stage_key("run", VERSION, **Contents().of(config), promotion=config.promotion.identity())


def find_result(config: PipelineConfig) -> PipelineResult | None:
    """Return the result of an equal run, if it finished and everything it made is still intact."""
    store = Workspace(config.workspace)
    uri = store.uri("runs", run_key(config), "result.json")
    if not store.exists(uri):
        return None
    try:
        result = PipelineResult.model_validate(store.read_json(uri))
    except ValidationError:
        logger.warning("%s was written by another version of preflow: the run's stages are looked up anew", uri)
        return None
    return result if all(store.is_intact(ref) for ref in result.references()) else None


def record_result(config: PipelineConfig, result: PipelineResult) -> None:
    """Keep a run's result under its key."""
    store = Workspace(config.workspace)
    store.write_json(store.uri("runs", run_key(config), "result.json"), result.model_dump(mode="json"))


async def prepare_run(config: PipelineConfig) -> PipelineConfig:
    """Check everything a run needs before anything is spent, and return its configuration written out in full.

    Endpoints are not asked if an equal run has finished: there is nothing left to ask them.

    Raises:
        PreflowError: naming the first thing that is wrong, where, and what to do.
    """
    config = config.filled()
    Workspace(config.workspace).check_writable()
    check_inputs(config)
    if find_result(config) is None:
        await resolve_secret(config.promotion.api_key, "promotion.api_key")
        await check_services(config)
    return config


def check_inputs(config: PipelineConfig) -> None:
    """Check the files that a run reads; nobody is asked anything.

    Raises:
        PreflowError: naming the first file that is wrong, where, and what to do.
    """
    for check in _input_checks(config):
        check()


def _input_checks(config: PipelineConfig) -> Iterator[Callable[[], object]]:
    yield partial(read_rubric, config.judging.rubric)
    yield partial(check_training_inputs, config.training, trains_here=config.training_deployment is None)
    for prompts in filter(None, (config.prompts, config.eval_prompts)):
        yield partial(import_prompts, prompts, config.workspace)


async def check_services(config: PipelineConfig) -> None:
    """See that every endpoint answers, knows its model and takes its key, and that the training deployment can train.

    Raises:
        PreflowError: one does not, or it cannot.
    """
    for check in _service_checks(config):
        await check()


def _service_checks(config: PipelineConfig) -> Iterator[Callable[[], Awaitable[object]]]:
    if config.training_deployment is not None:
        yield partial(check_deployment, config.training_deployment, config.workspace, config.training)
    endpoints: list[tuple[str, EndpointConfig]] = [("generation", config.generation)]
    endpoints += [("judging", judge) for judge in config.judging.judges()]
    if config.evaluation.generation:
        endpoints.append(("evaluation.generation", config.evaluation.generation))
    endpoints += [("evaluation.judging", judge) for judge in config.evaluation.comparison_judge().judges()]
    asked: set[tuple[str, str, str | None]] = set()
    for name, settings in endpoints:
        who = (settings.endpoint, settings.model, settings.api_key)
        if who not in asked:
            asked.add(who)
            yield partial(_check_endpoint, name, settings)


async def _check_endpoint(name: str, settings: EndpointConfig) -> None:
    async with Endpoint(settings, await resolve_secret(settings.api_key, f"{name}.api_key")) as endpoint:
        info = await endpoint.check_model()
    logger.info("%s: %s answers as %s", name, settings.endpoint, info.id)


async def find_problems(config: PipelineConfig) -> list[str]:
    """Return everything that stands against a run, not only the first of it; nothing is spent."""
    config, found = config.filled(), list[str]()
    checks: list[Callable[[], object]] = [Workspace(config.workspace).check_writable, *_input_checks(config)]
    for check in checks:
        try:
            check()
        except PreflowError as problem:
            found.append(str(problem))
    secret = partial(resolve_secret, config.promotion.api_key, "promotion.api_key")
    questions: list[Callable[[], Awaitable[object]]] = [secret, *_service_checks(config)]
    for ask in questions:
        try:
            await ask()
        except PreflowError as problem:
            found.append(str(problem))
    return list(dict.fromkeys(found))


@asynccontextmanager
async def taking_turns() -> AsyncIterator[None]:
    """Have runs that are under way at once in the block ask endpoints one after another (see `my_turn`)."""
    token = _turn.set(asyncio.Lock())
    try:
        yield
    finally:
        _turn.reset(token)


@asynccontextmanager
async def my_turn() -> AsyncIterator[None]:
    """Wait until no run beside this one asks endpoints: what it asked is kept then and found, not asked again."""
    lock = _turn.get()
    if lock is None:
        yield
        return
    async with lock:
        yield
