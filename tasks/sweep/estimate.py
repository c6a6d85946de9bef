"""What a sweep will do and cost, from the content keys and from what the workspace holds already."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from pydantic import BaseModel, ConfigDict

from tasks.config import EvaluationConfig, GenerationConfig, JudgingConfig, PipelineConfig, SweepConfig
from tasks.errors import PreflowError
from tasks.evaluate.win_rate import BASELINE, CANDIDATE, NULL, draw_settings, pair_samples
from tasks.generate.sampling import plan_generation
from tasks.judge.asking import CHARACTERS_PER_TOKEN, VERDICT_TOKENS, plan_judging
from tasks.judge.pairs import APPLIED, find_preferences
from tasks.judge.prompt import INSTRUCTIONS, read_rubric
from tasks.store.prompts import import_prompts
from tasks.store.workspace import (
    MANIFEST,
    AdapterRef,
    CompletionsRef,
    PreferencesRef,
    PromptsRef,
    VerdictsRef,
    Workspace,
    digest,
)
from tasks.sweep.points import Point
from tasks.train.launch import training_key

TRAINING = "train"
# Whoever writes completions or trains, and what one completion (in tokens) or pair (in seconds) of theirs is expected
# to take until this workspace has measured it.
Worker: TypeAlias = tuple[str, float]
NOBODY: Worker = ("", 0.0)


class Work(BaseModel):
    """One piece of work of a sweep, done once for all `points`; tokens, minutes and money are those still to come."""

    model_config = ConfigDict(frozen=True)

    stage: str
    who: str
    points: tuple[int, ...] = ()
    requests: int = 0
    known: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    gpu_minutes: float = 0.0
    usd: float | None = 0.0
    most_usd: float = 0.0
    finished: bool = False

    @property
    def to_ask(self) -> int:
        """Requests that are still to be sent."""
        return self.requests - self.known


class SweepPlan(BaseModel):
    """All work of a sweep, each piece once."""

    model_config = ConfigDict(frozen=True)

    work: tuple[Work, ...]

    def total(self) -> Work:
        """Return all work as one piece; what has no price counts nothing, every verdict at most its max_tokens."""
        summed = ("requests", "known", "prompt_tokens", "completion_tokens", "gpu_minutes", "most_usd")
        sums = {name: sum(getattr(work, name) for work in self.work) for name in summed}
        return Work(stage="total", who="", usd=sum(work.usd or 0.0 for work in self.work), **sums)

    @property
    def is_priced(self) -> bool:
        """Whether everything that is still to come has a price."""
        return all(work.usd is not None for work in self.work)

    def unfinished_points(self) -> set[int]:
        """Return the points for which something is still to be done."""
        return {number for work in self.work if not work.finished for number in work.points}


def check_budget(plan: SweepPlan, sweep: SweepConfig) -> None:
    """Refuse a sweep that is estimated over its budget.

    Raises:
        PreflowError: with both figures and what to do.
    """
    usd = plan.total().usd or 0.0
    if sweep.budget_usd is not None and usd > sweep.budget_usd:
        dearest = max(plan.work, key=lambda work: work.usd or 0.0)
        raise PreflowError(
            f"the sweep is estimated at {usd:.2f} US$, over sweep.budget_usd ({sweep.budget_usd:.2f}); the "
            f"dearest piece is {dearest.stage} ({dearest.who}) at {dearest.usd or 0:.2f}. Nothing was spent. Estimates "
            "come from limits until the first figures are measured: raise budget_usd, or take fewer points or prompts."
        )


def plan_sweep(points: Sequence[Point], sweep: SweepConfig) -> SweepPlan:
    """Work out every piece of work of the points once; nobody is asked anything."""
    planner = _Planner(points[0].config.workspace, sweep)
    for point in points:
        planner.add(point)
    return planner.plan()


@dataclass(frozen=True)
class _Prompts:
    """Prompts, or the most that there can be: their ids, and the mean tokens of one, by estimate."""

    ids: tuple[str, ...]
    tokens: float
    ref: PromptsRef


@dataclass(frozen=True)
class _Samples:
    """Completions: those there are (`ref`), or what will be asked for.

    `key` stands for all of them, `group` for the settings that they share with others; `ids` and `prompt_tokens` are
    their prompts', `count` is how many each prompt has.
    """

    key: str
    group: str
    ids: tuple[str, ...]
    prompt_tokens: float
    count: int
    writer: Worker
    ref: CompletionsRef | None


@dataclass
class _Piece:
    """Work while it is being planned. Its tokens are worked out last, when all that is measured is known.

    A request holds `prompt_tokens` and `shown` completions by `shown_by`, and asks `writer` for `completions`.
    """

    stage: str
    who: str
    points: list[int] = field(default_factory=list)
    requests: int = 0
    known: int = 0
    finished: bool = False
    prices: tuple[float, float] = (0.0, 0.0)
    prompt_tokens: float = 0.0
    shown_by: Worker = NOBODY
    shown: int = 0
    writer: Worker = NOBODY
    completions: int = 1
    most_tokens: int = 0
    pairs: float = 0.0


class _Planner:
    """Collects the pieces of work of all points; equal ones become one."""

    def __init__(self, workspace: str, sweep: SweepConfig) -> None:
        self._workspace, self._sweep, self._store = workspace, sweep, Workspace(workspace)
        self._pieces: dict[str, _Piece] = {}
        self._measured: dict[Worker, float] = {}
        self._claimed: dict[str, set[str]] = {}
        self._prompts: dict[str, _Prompts] = {}

    def add(self, point: Point) -> None:
        """Plan one point, stage by stage."""
        config, number = point.config, point.number
        prompts = self._read(import_prompts(config.prompts, self._workspace))
        samples = self._sample("sample completions", number, prompts, config.generation)
        judged, verdicts = self._judge("judge preferences", number, samples, config.judging)
        preferences = find_preferences(verdicts, self._workspace, config.judging) if verdicts else None
        trained, adapter = self._train(number, judged, preferences, len(prompts.ids), config)
        # Before there are pairs, the held-out prompts are taken to be as many as there can be.
        source, most = config.eval_prompts or config.prompts, config.evaluation.max_prompts
        held_out = import_prompts(source, self._workspace, *((most, preferences.uri) if preferences else ()))
        self._evaluate(number, trained, adapter, self._read(held_out, most), config.evaluation)

    def plan(self) -> SweepPlan:
        """Return all work, stage by stage."""
        stages = list(dict.fromkeys(piece.stage for piece in self._pieces.values()))
        pieces = sorted(self._pieces.values(), key=lambda piece: stages.index(piece.stage))
        return SweepPlan(work=tuple(map(self._estimate, pieces)))

    def _estimate(self, piece: _Piece) -> Work:
        """Return the work with what is still to come of it."""
        known = piece.requests if piece.finished else piece.known
        to_ask = piece.requests - known
        prompt = to_ask * (piece.prompt_tokens + piece.shown * self._each(piece.shown_by))
        completion = to_ask * piece.completions * self._each(piece.writer)
        minutes = piece.pairs * self._each(piece.writer) / 60
        usd = (prompt * piece.prices[0] + completion * piece.prices[1]) / 1e6 + minutes * self._sweep.gpu_price / 60
        more = max(0.0, to_ask * piece.most_tokens - completion) if piece.most_tokens else 0.0
        priced = not to_ask or any(piece.prices), not minutes or self._sweep.gpu_price > 0
        return Work(
            stage=piece.stage, who=piece.who, points=tuple(piece.points), requests=piece.requests, known=known,
            prompt_tokens=round(prompt), completion_tokens=round(completion), gpu_minutes=minutes,
            usd=usd if all(priced) else None, most_usd=usd + more * piece.prices[1] / 1e6, finished=piece.finished,
        )  # fmt: skip

    def _each(self, worker: Worker) -> float:
        return self._measured.get(worker, worker[1])

    def _measure(self, writer: Worker, artifact: CompletionsRef | VerdictsRef, completions: int = 1) -> None:
        """Take the mean tokens of a completion from a finished artifact, unless there are some already."""
        if artifact.manifest and writer not in self._measured:
            cost = self._store.read_manifest(artifact).cost
            if cost.requests:
                self._measured[writer] = cost.completion_tokens / cost.requests / completions

    def _read(self, ref: PromptsRef, limit: int | None = None) -> _Prompts:
        key = f"{ref.sha256} {limit}"
        if key not in self._prompts:
            rows = [json.loads(line) for line in self._store.lines(ref.uri)][:limit]
            characters = sum(len(message["content"]) for row in rows for message in row["prompt"])
            tokens = characters / CHARACTERS_PER_TOKEN / max(1, len(rows))
            self._prompts[key] = _Prompts(tuple(row["id"] for row in rows), tokens, ref)
        return self._prompts[key]

    def _open(self, key: str, number: int, stage: str, who: str) -> tuple[_Piece, bool]:
        """Return the piece of work under a key, with one more point that shares it, and whether it is new."""
        is_new = key not in self._pieces
        piece = self._pieces.setdefault(key, _Piece(stage, who))
        piece.points.append(number)
        return piece, is_new

    def _claim(self, group: str, ids: Iterable[str]) -> set[str]:
        """Return those of `ids` that no earlier piece of the group takes care of."""
        claimed = self._claimed.setdefault(group, set())
        new = set(ids) - claimed
        claimed |= new
        return new

    def _sample(
        self, stage: str, number: int, prompts: _Prompts, generation: GenerationConfig, untrained: str | None = None
    ) -> _Samples:
        """Plan a draw; `untrained` stands for an adapter that is still to be made, so that nothing of it is known."""
        plan = None if untrained else plan_generation(prompts.ref, self._workspace, generation)
        finished = plan.find_finished() if plan and len(prompts.ids) == plan.prompts.rows else None
        group = plan.settings_key if plan else digest([untrained, generation.identity()])
        writer = (f"samples up to {generation.max_tokens}", float(generation.max_tokens))
        key = digest([group, prompts.ids])
        who = "new adapter" if generation.serve_from or untrained else generation.model
        piece, is_new = self._open(f"{stage} {key}", number, stage, who)
        if is_new:
            new = self._claim(group, prompts.ids)
            piece.requests, piece.finished = len(new), finished is not None
            piece.known = len(plan.rows().known(new)) if plan and not finished else 0
            piece.prices = (generation.prompt_price, generation.completion_price)
            piece.prompt_tokens, piece.completions = prompts.tokens, generation.num_completions
            piece.writer = writer
        if finished:
            self._measure(writer, finished, generation.num_completions)
        return _Samples(key, group, prompts.ids, prompts.tokens, generation.num_completions, writer, finished)

    def _judge(
        self, stage: str, number: int, samples: _Samples, judging: JudgingConfig
    ) -> tuple[str, VerdictsRef | None]:
        """Plan a judging by each of its judges; return what stands for it, and the verdicts if they are there.

        Before there are completions, what can be said is how much there is to ask at most.
        """
        rubric = read_rubric(judging.rubric)
        key = digest([samples.key, judging.verdict_identity(), rubric])
        plan = plan_judging(samples.ref, self._workspace, judging) if samples.ref else None
        verdicts = plan.finished if plan else None
        for place, judge in enumerate(judging.judges()):
            piece, is_new = self._open(f"{stage} {key} {place}", number, stage, judge.model)
            if not is_new:
                continue
            group = digest([samples.group, judge.identity(), rubric, judging.orders, judging.seed])
            piece.requests = len(self._claim(group, samples.ids)) * min(judging.orders, samples.count)
            piece.finished, piece.prices = verdicts is not None, (judge.prompt_price, judge.completion_price)
            piece.prompt_tokens = samples.prompt_tokens + (len(rubric) + len(INSTRUCTIONS)) / CHARACTERS_PER_TOKEN
            piece.shown_by, piece.shown = samples.writer, samples.count
            piece.writer, piece.most_tokens = (f"judge {judge.model}", VERDICT_TOKENS), judge.max_tokens
            if plan:
                remaining = plan.judges[place].remaining()
                piece.requests, piece.known = remaining.requests, remaining.known
                piece.prompt_tokens, piece.shown = remaining.prompt_tokens / max(1, remaining.to_ask), 0
            if verdicts and not judging.panel:
                self._measure(piece.writer, verdicts)
        return key, verdicts

    def _train(
        self, number: int, judged: str, preferences: PreferencesRef | None, most: int, config: PipelineConfig
    ) -> tuple[str, AdapterRef | None]:
        """Plan a training; return what stands for its adapter, and the adapter if it is there."""
        training, adapter = config.training, None
        if preferences is None:
            applied = config.judging.model_dump(mode="json", include=APPLIED)
            key = digest([judged, applied, training.identity(), training.sft_adapter, training.base_model])
        else:
            key = training_key(preferences, training)
            adapter = self._store.find_finished(self._store.uri("training", key, MANIFEST), AdapterRef)
        where = config.training_deployment or "this machine"
        piece, is_new = self._open(f"{TRAINING} {key}", number, TRAINING, where)
        if not is_new:
            return key, adapter
        batch = training.per_device_train_batch_size * training.gradient_accumulation_steps
        piece.finished = adapter is not None
        piece.writer = (f"{where}, {training.base_model}", 1 / self._sweep.pairs_per_second)
        if adapter is None:
            rows = preferences.rows if preferences else most
            piece.pairs = (training.max_steps or math.ceil(rows * training.num_train_epochs / batch)) * batch
        elif adapter.manifest:
            made = self._store.read_manifest(adapter)
            self._measured[piece.writer] = made.seconds / max(1, made.counts.get("steps", 0) * batch)
        return key, adapter

    def _evaluate(
        self, number: int, trained: str, adapter: AdapterRef | None, prompts: _Prompts, evaluation: EvaluationConfig
    ) -> None:
        sft, candidate, again = (
            draw_settings(evaluation, draw, self._workspace, adapter if draw == CANDIDATE else None)
            for draw in (BASELINE, CANDIDATE, NULL)
        )
        before = self._sample("evaluate: sample SFT adapter", number, prompts, sft)
        after = self._sample("evaluate: sample new adapter", number, prompts, candidate, None if adapter else trained)
        self._compare("evaluate: compare", number, before, after, evaluation.comparison_judge())
        if evaluation.null_test:
            null = self._sample("evaluate: sample SFT adapter again", number, prompts, again)
            self._compare("evaluate: compare SFT with itself", number, before, null, evaluation.null_judge())

    def _compare(self, stage: str, number: int, a: _Samples, b: _Samples, judging: JudgingConfig) -> None:
        """Plan the comparison of two draws: each pair of samples is a row of its own with two completions."""
        ids = tuple(f"{identity}#{sample}" for identity in a.ids for sample in range(min(a.count, b.count)))
        samples = _Samples(
            key=digest([a.key, b.key]), group=digest([a.group, b.group]), ids=ids, prompt_tokens=a.prompt_tokens,
            count=2, writer=a.writer,
            ref=pair_samples(a.ref, b.ref, self._workspace) if a.ref and b.ref else None,
        )  # fmt: skip
        self._judge(stage, number, samples, judging)
