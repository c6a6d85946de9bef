"""The stages of a run, in order, and all that a whole run needs to know of each: a new stage is one more entry."""

import logging
import posixpath
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from tasks.config import EndpointConfig, GenerationConfig, JudgeConfig, JudgingConfig, PipelineConfig, TrainingConfig
from tasks.errors import PreflowError
from tasks.evaluate import choice, win_rate
from tasks.evaluate.choice import check_choice
from tasks.generate import sampling
from tasks.generate.sampling import check_same_template, longest_prompts, sampling_identity, try_sampler
from tasks.judge import asking, elsewhere, pairs
from tasks.judge.asking import try_judge
from tasks.judge.elsewhere import import_completions, import_preferences
from tasks.judge.pairs import is_validation
from tasks.judge.prompt import read_rubric
from tasks.llm.chat_template import ChatTemplate, check_prompts, choose_template, fast_tokenizer
from tasks.llm.client import Endpoint
from tasks.store import prompts
from tasks.store.prompts import import_prompts, source_digest
from tasks.store.workspace import Workspace, digest, folder_digest, server_path
from tasks.train import spec
from tasks.train.deployment import check_deployment
from tasks.train.launch import base_digest, check_training_inputs, token_identity

logger = logging.getLogger(__name__)
# Asks an endpoint one question, as the stage will; raises PreflowError if the answer is of no use.
Trial = Callable[[Endpoint], Awaitable[None]]


@dataclass(frozen=True)
class Stage:
    """What a whole run asks of a stage, given the run's configuration, written out in full.

    Attributes:
        name: the stage's, and that of its settings.
        identity: what determines its output: settings, and digests of what it reads; JSON-ready, without addresses.
        versions: those of the modules that make its output.
        checks: look at the files that it reads, before anything is spent; each raises PreflowError.
        endpoints: the endpoints that it asks, each with one real question of its kind.
        service_checks: ask whatever else it depends on.
    """

    name: str
    identity: Callable[[PipelineConfig], Any]
    versions: Callable[[], Iterable[int]]
    checks: Callable[[PipelineConfig], Iterable[Callable[[], object]]] = lambda config: ()
    endpoints: Callable[[PipelineConfig], Iterable[tuple[EndpointConfig, Trial]]] = lambda config: ()
    service_checks: Callable[[PipelineConfig], Iterable[Callable[[], Awaitable[object]]]] = lambda config: ()


def _prompts(config: PipelineConfig) -> list[str]:
    return [config.prompts, *([config.eval_prompts] if config.eval_prompts else [])]


def _given(config: PipelineConfig) -> list[str]:
    """Return the digest of the completions or pairs that a run begins with; nothing if it samples."""
    return [source_digest(uri) for uri in (config.preferences or config.completions,) if uri]


def _given_checks(config: PipelineConfig) -> list[Callable[[], object]]:
    if config.preferences:
        return [partial(import_preferences, config.preferences, config.workspace, config.judging)]
    return [partial(import_completions, config.completions, config.workspace)] if config.completions else []


def _judge(judging: JudgingConfig) -> dict[str, object]:
    return {**judging.identity(), "rubric": digest(read_rubric(judging.rubric))}


def check_split(config: PipelineConfig) -> None:
    """See that some prompts become training pairs, and some are held out, before anything is spent.

    Raises:
        PreflowError: the split, which is by prompt or group, puts all of them on one side.
    """
    if _given(config):
        return
    judging, sides, groups = config.judging, Counter[bool](), set[str]()
    for row in Workspace(config.workspace).read_rows(import_prompts(config.prompts, config.workspace).uri):
        groups.add(row.get("group") or row["id"])
        sides[is_validation(row["id"], row.get("group"), judging.seed, judging.val_ratio)] += 1
    what = "train" if not sides[False] else "evaluate"
    # A prompt that gives no pair is held out, too; one whose whole group gives none hardly is.
    is_by_chance = len(groups) == sides.total() or config.eval_prompts
    if not sides[False] or not (sides[True] or is_by_chance):
        raise PreflowError(
            f"{config.prompts}: all of its {sides.total()} prompts (of {len(groups)} groups) fall on one side of the "
            f"split (judging.val_ratio {judging.val_ratio:g}, seed {judging.seed}): nothing would be left to {what} on."
            " Give more prompts or groups, eval_prompts, another val_ratio, or another seed."
        )


def _training(config: PipelineConfig) -> list[Any]:
    training = config.training
    return [training.identity(), folder_digest(training.sft_adapter), base_digest(training), token_identity(training)]


def _find_template(training: TrainingConfig) -> ChatTemplate | None:
    found = choose_template(training, training.sft_adapter, training.base_model, training.base_revision)
    if found is not None and found.is_complete:
        return found
    logger.warning("chat template or tokenizer of %s cannot be read here: prompts are not checked", training.base_model)
    return None


def _check_prompts(config: PipelineConfig) -> None:
    if (template := _find_template(config.training)) is not None:
        for uri in _prompts(config):
            check_prompts(uri, template)


def _evaluation(config: PipelineConfig) -> list[Any]:
    evaluation = config.evaluation
    settings = evaluation.model_dump(mode="json", exclude={"generation", "judging", "judges", "adapter_root"})
    samples = sampling_identity(evaluation.generation) if evaluation.generation else None
    return [settings, samples, _judge(evaluation.comparison_judge())]


async def _try_generation(endpoint: Endpoint, config: PipelineConfig) -> None:
    """Sample once, and see that the server turns prompts into the tokens that are trained on."""
    if config.evaluation.generation and config.evaluation.generation.endpoint == config.generation.endpoint:
        await _check_would_load(endpoint, config)
    await try_sampler(endpoint, config.generation)
    if (template := _find_template(config.training)) is not None:
        prompts = longest_prompts(Workspace(config.workspace), import_prompts(config.prompts, config.workspace))
        messages = [prompt["prompt"] for prompt in prompts]
        await check_same_template(endpoint, config.generation, template, messages, fast_tokenizer(config.training))


async def _try_evaluation(endpoint: Endpoint, config: PipelineConfig, generation: GenerationConfig) -> None:
    await _check_would_load(endpoint, config)
    await try_sampler(endpoint, generation)


async def _check_would_load(endpoint: Endpoint, config: PipelineConfig) -> None:
    """See that the server will load the new adapter, whose configuration is the SFT adapter's, from the workspace."""
    store, evaluation = Workspace(config.workspace), config.evaluation
    source = f"{config.training.sft_adapter}/adapter_config.json"
    content = Workspace.holding(source).read_bytes(source)
    uri = store.uri("preflight", digest(content.decode())[:32], "adapter_config.json")
    store.write_bytes(uri, content)
    await endpoint.check_would_load(server_path(posixpath.dirname(uri), config.workspace, evaluation.adapter_root))


def _judges(judging: JudgingConfig) -> list[tuple[EndpointConfig, Trial]]:
    async def ask(endpoint: Endpoint, judge: JudgeConfig) -> None:
        await try_judge(endpoint, judge, read_rubric(judging.rubric), judging.wants_scores)

    return [(judge, partial(ask, judge=judge)) for judge in judging.judges()]


def _evaluation_endpoints(config: PipelineConfig) -> list[tuple[EndpointConfig, Trial]]:
    generation, judging = config.evaluation.generation, config.evaluation.comparison_judge()
    sampler = [(generation, partial(_try_evaluation, config=config, generation=generation))] if generation else []
    return [*sampler, *_judges(judging)]


STAGES = (
    Stage(
        "prompts",
        identity=lambda config: [source_digest(uri) for uri in _prompts(config)],
        versions=lambda: [prompts.VERSION],
        checks=lambda config: [partial(import_prompts, uri, config.workspace) for uri in _prompts(config)],
    ),
    Stage(
        "generation",
        identity=lambda config: _given(config) or sampling_identity(config.generation),
        versions=lambda: [sampling.VERSION, elsewhere.VERSION],
        checks=_given_checks,
        endpoints=lambda config: (
            [] if _given(config) else [(config.generation, partial(_try_generation, config=config))]
        ),
    ),
    Stage(
        "judging",
        identity=lambda config: _judge(config.judging),
        versions=lambda: [asking.VERSION, pairs.VERSION],
        checks=lambda config: [partial(read_rubric, config.judging.rubric), partial(check_split, config)],
        endpoints=lambda config: [] if config.preferences else _judges(config.judging),
    ),
    Stage(
        "training",
        identity=_training,
        versions=lambda: [spec.STAGE_VERSION],
        checks=lambda config: [
            partial(check_training_inputs, config.training, trains_here=config.training_deployment is None),
            partial(_check_prompts, config),
        ],
        service_checks=lambda config: [
            partial(check_deployment, name, config.workspace, config.training)
            for name in (config.training_deployment,)
            if name
        ],
    ),
    Stage(
        "evaluation",
        identity=_evaluation,
        versions=lambda: [choice.VERSION, win_rate.VERSION],
        checks=lambda config: [partial(check_choice, config)],
        endpoints=_evaluation_endpoints,
    ),
)


def fingerprint(config: PipelineConfig) -> dict[str, object]:
    """Return, for a filled configuration, what a run's win rate depends on; no file is read twice for it.

    The stages' versions are a part of it: a run that an older preflow finished is not one that has nothing left to do.
    """
    return {stage.name: [*stage.versions(), stage.identity(config)] for stage in STAGES}
