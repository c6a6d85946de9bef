"""What the judges are going to be asked and what that will cost, counted before anything is paid."""

from collections.abc import Iterable
from statistics import fmean

from pydantic import BaseModel, ConfigDict

from tasks.config import JudgeConfig, PipelineConfig
from tasks.judging import JudgePlan, Question, build_messages, plan_judging
from tasks.prompts import import_prompts
from tasks.shards import read_slice
from tasks.storage import CompletionsRef, Workspace
from tasks.wire import Usage

# English prose; a verdict is a JSON object of three numbers. A thinking model may use all of `max_tokens`.
CHARACTERS_PER_TOKEN = 4
VERDICT_TOKENS = 30
MEASURED_QUESTIONS = 200


class JudgeEstimate(BaseModel):
    """What one judge is going to be asked: requests, those already answered, tokens and US$ (expected and at most)."""

    model_config = ConfigDict(frozen=True)

    model: str
    requests: int
    known: int
    prompt_tokens: int
    completion_tokens: int
    most_completion_tokens: int
    usd: float
    most_usd: float


def estimate_judging(config: PipelineConfig, completions: CompletionsRef) -> list[JudgeEstimate]:
    """Return what each judge will be asked about the completions, without what it has answered before."""
    plan = plan_judging(completions, config.workspace, config.judging)
    return [_estimate(judge) for judge in plan.judges]


def _estimate(plan: JudgePlan) -> JudgeEstimate:
    store, rows = Workspace(plan.workspace), plan.rows()
    wanted = known = 0
    lengths: list[int] = []
    for part in plan.slices:
        units = {key: unit for row in read_slice(store, part) for key, unit in plan.judging.units_of(row).items()}
        answered = rows.find(list(units))
        wanted, known = wanted + len(units), known + len(answered)
        room = MEASURED_QUESTIONS - len(lengths)
        lengths += _lengths(plan.judging.rubric, [unit for key, unit in units.items() if key not in answered][:room])
    tokens = round(fmean(lengths or [0]) / CHARACTERS_PER_TOKEN)
    return _price(plan.judge, wanted - known, known, tokens)


def _lengths(rubric: str, questions: Iterable[Question]) -> list[int]:
    """Return the characters that each question takes."""
    return [sum(len(m["content"]) for m in build_messages(rubric, q.row, q.order)) for q in questions]


def _price(judge: JudgeConfig, requests: int, known: int, prompt_tokens: int) -> JudgeEstimate:
    expected = Usage(prompt_tokens=requests * prompt_tokens, completion_tokens=requests * VERDICT_TOKENS)
    most = expected.model_copy(update={"completion_tokens": requests * judge.max_tokens})
    return JudgeEstimate(
        model=judge.model,
        requests=requests,
        known=known,
        prompt_tokens=expected.prompt_tokens,
        completion_tokens=expected.completion_tokens,
        most_completion_tokens=most.completion_tokens,
        usd=expected.cost(judge),
        most_usd=most.cost(judge),
    )


def count_comparisons(config: PipelineConfig) -> int:
    """Return how many verdicts the evaluation will want at most, over all its judges: two orders of every sample."""
    evaluation, judging = config.evaluation, config.evaluation.judging or config.judging
    held_out = import_prompts(config.eval_prompts or config.prompts, config.workspace).rows
    draws = 2 if evaluation.null_test else 1
    return 2 * draws * evaluation.num_samples * min(held_out, evaluation.max_prompts) * len(judging.judges())
