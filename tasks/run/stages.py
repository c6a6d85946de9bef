"""The stages of a run, in order, and all that a whole run needs to know of each: a new stage is one more entry."""

import logging
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from tasks.config import EndpointConfig, JudgingConfig, PipelineConfig, TrainingConfig
from tasks.generate.sampling import check_same_template, longest_prompts, sampling_identity
from tasks.judge.asking import read_rubric
from tasks.llm.chat_template import ChatTemplate, check_prompts, choose_template, fast_tokenizer
from tasks.llm.client import resolve_secret
from tasks.store.prompts import import_prompts
from tasks.store.workspace import Workspace, digest, folder_digest
from tasks.train.launch import base_digest, check_training_inputs, token_identity
from tasks.train.work_pool import check_deployment

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stage:
    """What a whole run asks of a stage, given the run's configuration, written out in full.

    Attributes:
        name: the stage's, and that of its settings.
        identity: what determines its output: settings, and digests of what it reads; JSON-ready, without addresses.
        checks: look at the files that it reads, before anything is spent; each raises PreflowError.
        endpoints: the endpoints that it asks.
        service_checks: ask whatever else it depends on.
    """

    name: str
    identity: Callable[[PipelineConfig], Any]
    checks: Callable[[PipelineConfig], Iterable[Callable[[], object]]] = lambda config: ()
    endpoints: Callable[[PipelineConfig], Iterable[EndpointConfig]] = lambda config: ()
    service_checks: Callable[[PipelineConfig], Iterable[Callable[[], Awaitable[object]]]] = lambda config: ()


def _prompts(config: PipelineConfig) -> list[str]:
    return [config.prompts, *([config.eval_prompts] if config.eval_prompts else [])]


def _judge(judging: JudgingConfig) -> dict[str, Any]:
    return {**judging.identity(), "rubric": digest(read_rubric(judging.rubric))}


def _training(config: PipelineConfig) -> list[Any]:
    training = config.training
    return [training.identity(), folder_digest(training.sft_adapter), base_digest(training), token_identity(training)]


def _training_checks(config: PipelineConfig) -> list[Callable[[], object]]:
    trains_here = config.training_deployment is None
    return [
        partial(check_training_inputs, config.training, trains_here=trains_here),
        partial(_check_prompts, config),
    ]


def _find_template(training: TrainingConfig) -> ChatTemplate | None:
    found = choose_template(training, training.sft_adapter, training.base_model, training.base_revision)
    if found is None:
        logger.warning("no chat template of %s can be read here: prompts are not checked", training.base_model)
    return found


def _check_prompts(config: PipelineConfig) -> None:
    if (template := _find_template(config.training)) is not None:
        for uri in _prompts(config):
            check_prompts(uri, template)


async def _check_template(config: PipelineConfig) -> None:
    """See that the server that samples turns prompts into the tokens that are trained on."""
    training, generation = config.training, config.generation
    if (template := _find_template(training)) is not None:
        prompts = longest_prompts(Workspace(config.workspace), import_prompts(config.prompts, config.workspace))
        key = await resolve_secret(generation.api_key, "generation.api_key")
        messages = [prompt["prompt"] for prompt in prompts]
        await check_same_template(generation, template, messages, key, fast_tokenizer(training))


def _training_service(config: PipelineConfig) -> list[Callable[[], Awaitable[object]]]:
    if config.training_deployment is None:
        return []
    return [partial(check_deployment, config.training_deployment, config.workspace, config.training)]


def _evaluation(config: PipelineConfig) -> list[Any]:
    evaluation = config.evaluation
    settings = evaluation.model_dump(mode="json", exclude={"generation", "judging", "adapter_root"})
    samples = sampling_identity(evaluation.generation) if evaluation.generation else None
    return [settings, samples, _judge(evaluation.comparison_judge())]


def _evaluation_endpoints(config: PipelineConfig) -> list[EndpointConfig]:
    evaluation = config.evaluation
    return [*([evaluation.generation] if evaluation.generation else []), *evaluation.comparison_judge().judges()]


STAGES = (
    Stage(
        "prompts",
        identity=lambda config: [Workspace.holding(uri).sha256(uri) for uri in _prompts(config)],
        checks=lambda config: [partial(import_prompts, uri, config.workspace) for uri in _prompts(config)],
    ),
    Stage(
        "generation",
        identity=lambda config: sampling_identity(config.generation),
        endpoints=lambda config: [config.generation],
        service_checks=lambda config: [partial(_check_template, config)],
    ),
    Stage(
        "judging",
        identity=lambda config: _judge(config.judging),
        checks=lambda config: [partial(read_rubric, config.judging.rubric)],
        endpoints=lambda config: config.judging.judges(),
    ),
    Stage(
        "training",
        identity=_training,
        checks=_training_checks,
        service_checks=_training_service,
    ),
    Stage("evaluation", identity=_evaluation, endpoints=_evaluation_endpoints),
)


def fingerprint(config: PipelineConfig) -> dict[str, Any]:
    """Return, for a filled configuration, what a run's win rate depends on; no file is read twice for it."""
    return {stage.name: stage.identity(config) for stage in STAGES}
