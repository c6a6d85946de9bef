"""A whole run: checked before anything is spent, and its result kept so that a finished run is known as such."""

import inspect
import logging
import posixpath
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from typing import TypeAlias

from tasks.batch import leaving
from tasks.config import EndpointConfig, PipelineConfig
from tasks.errors import PreflowError
from tasks.llm.client import Endpoint
from tasks.llm.secrets import resolve_secret
from tasks.run.stages import STAGES, Trial, fingerprint
from tasks.store.workspace import PipelineResult, Workspace, stage_key

VERSION = 3
RESULT, CONFIG = "result.json", "config.json"
logger = logging.getLogger(__name__)
# Endpoint, model, and where its key is.
Model: TypeAlias = tuple[str, str, str | None]
# Why a model is of no use, None for one that answered.
Asked: TypeAlias = dict[Model, PreflowError | None]


def run_key(config: PipelineConfig) -> str:
    """Return the key of a run: of its inputs' contents and of all settings that decide results."""
    config = config.filled()
    return stage_key("run", VERSION, **fingerprint(config), promotion=config.promotion.identity())


def run_folder(config: PipelineConfig) -> str:
    """Return where a run's result, its page and the answers to it lie."""
    return Workspace(config.workspace).uri("runs", run_key(config))


def report_uri(config: PipelineConfig) -> str:
    """Return where the page of a run lies."""
    return posixpath.join(run_folder(config), "report.html")


def find_result(config: PipelineConfig) -> PipelineResult | None:
    """Return the result of an equal run, if it finished and everything it made is still intact."""
    store = Workspace(config.workspace)
    result = store.read_kept(posixpath.join(run_folder(config), RESULT), PipelineResult)
    return result if result and all(store.is_intact(ref) for ref in result.references()) else None


def record_result(config: PipelineConfig, result: PipelineResult) -> str:
    """Keep a run's configuration and result under its key, and return the folder that all of the run is kept in."""
    store, folder = Workspace(config.workspace), run_folder(config)
    store.write_json(posixpath.join(folder, CONFIG), config.model_dump(mode="json"))
    store.write_json(posixpath.join(folder, RESULT), result.model_dump(mode="json"))
    return folder


async def prepare_run(config: PipelineConfig) -> PipelineConfig:
    """Check everything a run needs before anything is spent, and return its configuration written out in full.

    Endpoints are not asked if an equal run has finished: there is nothing left to ask them. Nor are they asked again by
    a run that has waited for a batch without a process.

    Raises:
        PreflowError: naming the first thing that is wrong, where, and what to do.
    """
    config = config.filled()
    Workspace(config.workspace).check_writable()
    for check_input in input_checks(config):
        check_input()
    if find_result(config) is None and not leaving.has_left():
        await resolve_secret(config.promotion.api_key, "promotion.api_key")
        for check_service in service_checks(config, {}):
            await check_service()
    return config


def input_checks(config: PipelineConfig) -> list[Callable[[], object]]:
    """Return what checks the files that a run reads: each raises a PreflowError, and nobody is asked anything."""
    return [check for stage in STAGES for check in stage.checks(config)]


def service_checks(config: PipelineConfig, asked: Asked) -> Iterator[Callable[[], Awaitable[object]]]:
    """Yield what sees that the training deployment can train, and asks every model one real question.

    Args:
        config: a whole run's.
        asked: models that were asked before and are not asked again; those that are asked now are added.
    """
    # Before any question to a model, which costs something: the deployment, and every endpoint's secrets.
    for stage in STAGES:
        yield from stage.service_checks(config)
    models: dict[Model, tuple[str, EndpointConfig, Trial]] = {}
    for stage in STAGES:
        for settings, trial in stage.endpoints(config):
            who = (settings.endpoint, settings.model, settings.api_key)
            models.setdefault(who, (stage.name, settings, trial))
    for name, settings, _ in models.values():
        yield partial(Endpoint.connect, settings, name)
    for who, model in models.items():
        yield partial(_ask_once, asked, who, *model)


async def _ask_once(asked: Asked, who: Model, name: str, settings: EndpointConfig, trial: Trial) -> None:
    if who not in asked:
        asked[who] = None
        try:
            await _check_endpoint(name, settings, trial)
        except PreflowError as error:
            asked[who] = error
    if (problem := asked[who]) is not None:
        raise problem


async def _check_endpoint(name: str, settings: EndpointConfig, trial: Trial) -> None:
    async with await Endpoint.connect(settings, name) as endpoint:
        await endpoint.check_model()
        await trial(endpoint)


async def find_problems(config: PipelineConfig) -> list[str]:
    """Return everything that stands against a run, not only the first of it; one question to each model is spent."""
    config, found = config.filled(), list[str]()
    secret = partial(resolve_secret, config.promotion.api_key, "promotion.api_key")
    checks: list[Callable[[], object]] = [Workspace(config.workspace).check_writable, *input_checks(config)]
    checks += [secret, *service_checks(config, {})]
    for check in checks:
        try:
            if inspect.isawaitable(result := check()):
                await result
        except PreflowError as problem:
            found.append(str(problem))
        except FileNotFoundError:  # a check before has named that file
            if not found:
                raise
    return list(dict.fromkeys(found))
