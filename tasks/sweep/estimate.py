"""Working out what a sweep will do and cost, from the content keys and from what the workspace holds already."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from pydantic import BaseModel, ConfigDict

from tasks.config import EvaluationConfig, GenerationConfig, JudgeConfig, JudgingConfig, PipelineConfig, SweepConfig
from tasks.errors import PreflowError
from tasks.evaluate.win_rate import BASELINE, CANDIDATE, NULL, draw_settings, pair_samples
from tasks.generate.sampling import GenerationPlan, plan_generation
from tasks.judge.asking import CHARACTERS_PER_TOKEN, VERDICT_TOKENS, plan_judging
from tasks.judge.pairs import APPLIED, find_preferences
from tasks.judge.prompt import INSTRUCTIONS, read_rubric
from tasks.llm.responses import BATCH_PRICE
from tasks.store.prompts import import_prompts
from tasks.store.workspace import (
    MANIFEST,
    AdapterRef,
    CompletionsRef,
    PreferencesRef,
    PromptsRef,
    Workspace,
    digest,
)
from tasks.sweep.points import Point
from tasks.train.launch import training_key

TRAINING = "train"


class Work(BaseModel):
    """One piece of work of a sweep, done once for all `points`; tokens, minutes and money are those still to come."""

    model_config = ConfigDict(frozen=True)

    stage: str
    who: str
    points: tuple[int, ...]
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

    def usd(self) -> float:
        """What the work still to come is estimated at, in US$; what has no price counts nothing."""
        return sum(work.usd or 0.0 for work in self.work)

    def most_usd(self) -> float:
        """What it can cost at most, every verdict as long as its judge's max_tokens."""
        return sum(work.most_usd for work in self.work)

    def unfinished_points(self) -> set[int]:
        """Return the points for which something is still to be done."""
        return {number for work in self.work if not work.finished for number in work.points}

    def trainings(self) -> list[Work]:
        """Return the trainings, finished ones too."""
        return [work for work in self.work if work.stage == TRAINING]


def check_budget(plan: SweepPlan, sweep: SweepConfig) -> None:
    """Refuse a sweep that is estimated over its budget.

    Raises:
        PreflowError: with both figures and what to do.
    """
    if sweep.budget_usd is not None and plan.usd() > sweep.budget_usd:
        dearest = max(plan.work, key=lambda work: work.usd or 0.0)
        raise PreflowError(
            f"the sweep is estimated at {plan.usd():.2f} US$, over sweep.budget_usd ({sweep.budget_usd:.2f}); the "
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
    ref: PromptsRef | None = None


@dataclass(frozen=True)
class _Samples:
    """Completions: those there are, or what will be asked for.

    `key` stands for all of them, `group` for the settings that they share with others.
    """

    key: str
    group: str
    prompts: _Prompts
    count: int
    writer: str
    ref: CompletionsRef | None


class _Figures:
    """Tokens of one completion, by who writes it: the mean of what this workspace has measured, or else the limit."""

    def __init__(self, store: Workspace) -> None:
        self._store = store
        self._limits: dict[str, int] = {}
        self._measured: dict[str, float] = {}

    def limit(self, writer: str, tokens: int) -> None:
        """Note the most tokens that a writer may use for a completion."""
        self._limits[writer] = max(tokens, self._limits.get(writer, 0))

    def measure(self, writer: str, manifest: str | None, completions: int = 1) -> None:
        """Take the mean from a finished artifact's manifest, unless there is one already."""
        if manifest is None or writer in self._measured:
            return
        cost = self._store.read_manifest(manifest).cost
        if cost.requests:
            self._measured[writer] = cost.completion_tokens / cost.requests / completions

    def tokens(self, writer: str) -> float:
        """Return the tokens of one completion; 0 where nobody writes."""
        return self._measured.get(writer, self._limits.get(writer, 0))


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
    shown_by: str = ""
    shown: int = 0
    writer: str = ""
    completions: int = 1
    most_tokens: int = 0
    gpu_minutes: float = 0.0

    def estimate(self, figures: _Figures, gpu_price: float) -> Work:
        """Return the work with what is still to come of it."""
        known = self.requests if self.finished else self.known
        to_ask = self.requests - known
        prompt = to_ask * (self.prompt_tokens + self.shown * figures.tokens(self.shown_by))
        completion = to_ask * self.completions * figures.tokens(self.writer)
        usd = (prompt * self.prices[0] + completion * self.prices[1]) / 1e6 + self.gpu_minutes * gpu_price / 60
        most = (
            usd + max(0.0, to_ask * self.most_tokens - completion) * self.prices[1] / 1e6 if self.most_tokens else usd
        )
        priced = not to_ask or any(self.prices), not self.gpu_minutes or gpu_price > 0
        return Work(
            stage=self.stage, who=self.who, points=tuple(self.points), requests=self.requests, known=known,
            prompt_tokens=round(prompt), completion_tokens=round(completion), gpu_minutes=self.gpu_minutes,
            usd=usd if all(priced) else None, most_usd=most, finished=self.finished,
        )  # fmt: skip


class _Planner:
    """Collects the pieces of work of all points; equal ones become one."""

    def __init__(self, workspace: str, sweep: SweepConfig) -> None:
        self._workspace, self._sweep, self._store = workspace, sweep, Workspace(workspace)
        self._figures = _Figures(self._store)
        self._pieces: dict[str, _Piece] = {}
        self._claimed: dict[str, set[str]] = {}
        self._prompts: dict[str, _Prompts] = {}

    def add(self, point: Point) -> None:
        """Plan one point, stage by stage."""
        config, number = point.config, point.number
        prompts = self._read(import_prompts(config.prompts, self._workspace))
        samples = self._sample("sample completions", number, prompts, config.generation)
        judged = self._judge("judge preferences", number, samples, config.judging)
        preferences = self._find_preferences(samples, config.judging)
        trained, adapter = self._train(number, judged, preferences, len(prompts.ids), config)
        self._evaluate(number, trained, adapter, self._held_out(config, preferences), config.evaluation)

    def plan(self) -> SweepPlan:
        """Return all work, stage by stage."""
        stages = list(dict.fromkeys(piece.stage for piece in self._pieces.values()))
        pieces = sorted(self._pieces.values(), key=lambda piece: stages.index(piece.stage))
        return SweepPlan(work=tuple(piece.estimate(self._figures, self._sweep.gpu_price) for piece in pieces))

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

    # ---- sampling

    def _sample(
        self, stage: str, number: int, prompts: _Prompts, generation: GenerationConfig, untrained: str | None = None
    ) -> _Samples:
        """Plan a draw; `untrained` stands for an adapter that is still to be made, so that nothing of it is known."""
        plan = None if untrained or not prompts.ref else plan_generation(prompts.ref, self._workspace, generation)
        exact = plan is not None and len(prompts.ids) == plan.prompts.rows
        group = plan.settings_key if plan else digest([untrained, generation.identity()])
        samples = _Samples(
            key=digest([group, prompts.ids]), group=group, prompts=prompts, count=generation.num_completions,
            writer=f"samples up to {generation.max_tokens}", ref=plan.find_finished() if plan and exact else None,
        )  # fmt: skip
        who = "new adapter" if generation.serve_from or untrained else generation.model
        piece, is_new = self._open(f"{stage} {samples.key}", number, stage, who)
        if is_new:
            self._fill_sampling(piece, samples, generation, plan)
        return samples

    def _fill_sampling(
        self, piece: _Piece, samples: _Samples, generation: GenerationConfig, plan: GenerationPlan | None
    ) -> None:
        new = self._claim(samples.group, samples.prompts.ids)
        piece.requests, piece.finished = len(new), samples.ref is not None
        piece.known = len(plan.rows().known(new)) if plan and not samples.ref else 0
        piece.prices = (generation.prompt_price, generation.completion_price)
        piece.prompt_tokens, piece.completions = samples.prompts.tokens, samples.count
        piece.writer = samples.writer
        self._figures.limit(piece.writer, generation.max_tokens)
        if samples.ref:
            self._figures.measure(piece.writer, samples.ref.manifest, samples.count)

    # ---- judging

    def _judge(self, stage: str, number: int, samples: _Samples, judging: JudgingConfig) -> str:
        """Plan a judging by each of its judges, and return what stands for it."""
        key = digest([samples.key, judging.verdict_identity(), read_rubric(judging.rubric)])
        plan = plan_judging(samples.ref, self._workspace, judging) if samples.ref else None
        verdicts = plan.finished if plan else None
        for place, judge in enumerate(judging.judges()):
            piece, is_new = self._open(f"{stage} {key} {place}", number, stage, judge.model)
            if not is_new:
                continue
            piece.finished = verdicts is not None
            self._fill_judging(piece, samples, judging, judge)
            if plan:
                remaining = plan.judges[place].remaining()
                piece.requests, piece.known = remaining.requests, remaining.known
                piece.prompt_tokens, piece.shown = remaining.prompt_tokens / max(1, remaining.to_ask), 0
            if verdicts and not judging.panel:
                self._figures.measure(piece.writer, verdicts.manifest)
        return key

    def _fill_judging(self, piece: _Piece, samples: _Samples, judging: JudgingConfig, judge: JudgeConfig) -> None:
        """Count what there is to ask at most, which is all that can be said before there are completions."""
        rubric = read_rubric(judging.rubric)
        group = digest([samples.group, judge.identity(), rubric, judging.orders, judging.seed])
        new = self._claim(group, samples.prompts.ids)
        piece.requests = len(new) * min(judging.orders, samples.count)
        share = BATCH_PRICE if judge.batch else 1.0
        piece.prices = (share * judge.prompt_price, share * judge.completion_price)
        piece.prompt_tokens = samples.prompts.tokens + (len(rubric) + len(INSTRUCTIONS)) / CHARACTERS_PER_TOKEN
        piece.shown_by, piece.shown = samples.writer, samples.count
        piece.writer = f"judge {judge.model}"
        # What a verdict is expected to take; `most_usd` counts all of max_tokens.
        self._figures.limit(piece.writer, VERDICT_TOKENS)
        piece.most_tokens = judge.max_tokens

    def _find_preferences(self, samples: _Samples, judging: JudgingConfig) -> PreferencesRef | None:
        if samples.ref is None:
            return None
        verdicts = plan_judging(samples.ref, self._workspace, judging).finished
        return find_preferences(verdicts, self._workspace, judging) if verdicts else None

    # ---- training

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
        piece, is_new = self._open(f"{TRAINING} {key}", number, TRAINING, config.training_deployment or "this machine")
        if is_new:
            piece.finished = adapter is not None
            batch = training.per_device_train_batch_size * training.gradient_accumulation_steps
            rows = preferences.rows if preferences else most
            steps = training.max_steps or math.ceil(rows * training.num_train_epochs / batch)
            piece.gpu_minutes = 0.0 if adapter else steps * batch / self._sweep.pairs_per_second / 60
        return key, adapter

    # ---- evaluation

    def _held_out(self, config: PipelineConfig, preferences: PreferencesRef | None) -> _Prompts:
        """Return the held-out prompts; before there are pairs, the most that there can be."""
        source, most = config.eval_prompts or config.prompts, config.evaluation.max_prompts
        if preferences is None:
            return self._read(import_prompts(source, self._workspace), most)
        return self._read(import_prompts(source, self._workspace, most, preferences.uri))

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
        ids = tuple(f"{identity}#{sample}" for identity in a.prompts.ids for sample in range(min(a.count, b.count)))
        samples = _Samples(
            key=digest([a.key, b.key]), group=digest([a.group, b.group]), prompts=_Prompts(ids, a.prompts.tokens),
            count=2, writer=a.writer, ref=pair_samples(a.ref, b.ref, self._workspace) if a.ref and b.ref else None,
        )  # fmt: skip
        self._judge(stage, number, samples, judging)
