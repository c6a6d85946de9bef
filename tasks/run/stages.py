"""The stages of a run, in order, and all that a whole run needs to know of each: a new stage is one more entry."""

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from tasks.config import EndpointConfig, JudgingConfig, PipelineConfig
from tasks.generate.sampling import sampling_identity
from tasks.judge.asking import read_rubric
from tasks.store.prompts import import_prompts
from tasks.store.workspace import Workspace, digest, folder_digest
from tasks.train.launch import base_digest, check_training_inputs
from tasks.train.work_pool import check_deployment


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
    return [training.identity(), folder_digest(training.sft_adapter), base_digest(training)]


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
        checks=lambda config: [
            partial(check_training_inputs, config.training, trains_here=config.training_deployment is None)
        ],
        service_checks=_training_service,
    ),
    Stage("evaluation", identity=_evaluation, endpoints=_evaluation_endpoints),
)


def fingerprint(config: PipelineConfig) -> dict[str, Any]:
    """Return, for a filled configuration, what a run's win rate depends on; no file is read twice for it."""
    return {stage.name: stage.identity(config) for stage in STAGES}
