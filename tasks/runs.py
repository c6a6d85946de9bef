"""A whole run: checked before anything is spent, and its result kept so that a finished run is known as such."""

import logging
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from tasks.caching import stage_key
from tasks.config import EndpointConfig, PipelineConfig
from tasks.endpoint import Endpoint, resolve_secret
from tasks.generation import sampling_identity
from tasks.judging import read_rubric
from tasks.prompts import import_prompts
from tasks.storage import (
    AdapterRef,
    CompletionsRef,
    EvaluationRef,
    PreferencesRef,
    PromotionRef,
    Reference,
    Workspace,
)
from tasks.training.launch import check_training_inputs

VERSION = 1
logger = logging.getLogger(__name__)


class PipelineResult(BaseModel):
    """What a pipeline run made; `promotion` is None if the adapter did not win by enough."""

    model_config = ConfigDict(frozen=True)

    completions: CompletionsRef
    preferences: PreferencesRef
    adapter: AdapterRef
    evaluation: EvaluationRef
    promotion: PromotionRef | None = None

    def references(self) -> list[Reference]:
        """Return everything that a finished run must still have."""
        return [self.completions, self.preferences, self.adapter, self.evaluation]


def run_key(config: PipelineConfig) -> str:
    """Return the key of a run: of its inputs' contents and of all settings that decide results."""
    config = config.filled()
    prompts = [config.prompts, config.eval_prompts] if config.eval_prompts else [config.prompts]
    return stage_key(
        "run",
        VERSION,
        prompts=[Workspace.holding(uri).sha256(uri) for uri in prompts],
        generation=sampling_identity(config.generation),
        judging=config.judging.identity(),
        rubric=read_rubric(config.judging.rubric),
        training=config.training.identity(),
        evaluation=config.evaluation.model_dump(mode="json", include={"num_samples", "max_prompts", "seed"}),
        promotion=config.promotion.identity(),
    )


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
    read_rubric(config.judging.rubric)
    check_training_inputs(config.training)
    for prompts in filter(None, (config.prompts, config.eval_prompts)):
        import_prompts(prompts, config.workspace)
    keys = await _resolve_keys(config)
    if find_result(config) is None:
        await _check_endpoints(config, keys)
    return config


async def _resolve_keys(config: PipelineConfig) -> dict[str, str | None]:
    named = {
        "generation.api_key": config.generation.api_key,
        "judging.api_key": config.judging.api_key,
        "promotion.api_key": config.promotion.api_key,
    }
    return {field: await resolve_secret(name, field) for field, name in named.items()}


async def _check_endpoints(config: PipelineConfig, keys: dict[str, str | None]) -> None:
    endpoints: dict[str, tuple[EndpointConfig, Any]] = {
        "generation": (config.generation, keys["generation.api_key"]),
        "judging": (config.judging, keys["judging.api_key"]),
    }
    for name, (settings, key) in endpoints.items():
        async with Endpoint(settings, key) as endpoint:
            info = await endpoint.check_model()
        logger.info("%s: %s answers as %s", name, settings.endpoint, info.id)
