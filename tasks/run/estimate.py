"""What runs will do and cost, from the content keys and from what the workspace holds already."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

from tasks.config import (
    EndpointConfig,
    EvaluationConfig,
    GenerationConfig,
    JudgingConfig,
    PipelineConfig,
    SweepConfig,
    TrainingConfig,
)
from tasks.errors import PreflowError
from tasks.evaluate.choice import find_checkpoints, record_choice
from tasks.evaluate.win_rate import BASELINE, CANDIDATE, NULL, draw_settings, pair_samples
from tasks.generate.sampling import plan_generation
from tasks.judge.asking import CHARACTERS_PER_TOKEN, plan_judging, verdict_tokens
from tasks.judge.elsewhere import import_completions, import_preferences
from tasks.judge.pairs import find_preferences
from tasks.judge.prompt import instructions, read_rubric
from tasks.llm.responses import BATCH_PRICE
from tasks.store.prompts import import_prompts, split_prompts
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
from tasks.train.launch import find_adapter, training_key

JUDGING, TRAINING, COMPARING = "judge preferences", "train", "evaluate: compare"
SUMMED = (
    "requests", "known", "prompt_tokens", "completion_tokens", "most_completion_tokens", "gpu_minutes", "most_usd",
)  # fmt: skip


@dataclass
class Work:
    """One piece of work, done once for all `points`; tokens, minutes and money are those still to come.

    `usd` is None where there is no price; what is `most_` counts every verdict as long as its judge's max_tokens, and
    `is_measured` says that minutes come from a training of this workspace, not from the speed of an L4.
    """

    stage: str
    who: str
    points: list[int] = field(default_factory=list)
    requests: int = 0
    known: int = 0
    prompt_tokens: float = 0.0
    completion_tokens: float = 0.0
    most_completion_tokens: float = 0.0
    gpu_minutes: float = 0.0
    is_measured: bool = False
    usd: float | None = 0.0
    most_usd: float = 0.0
    finished: bool = False

    @property
    def to_ask(self) -> int:
        """Requests that are still to be sent."""
        return self.requests - self.known

    def ask(self, requests: int, known: int, prompt: float, completion: float, most: float, of: EndpointConfig) -> None:
        """Take in requests, those of them that are known, and the tokens of each of the others, at a model's prices."""
        self.requests, self.known = requests, requests if self.finished else known
        self.prompt_tokens, self.completion_tokens = self.to_ask * prompt, self.to_ask * completion
        self.most_completion_tokens = self.to_ask * max(most, completion)
        share = BATCH_PRICE if getattr(of, "batch", False) else 1.0
        prompt_price, completion_price = share * of.prompt_price / 1e6, share * of.completion_price / 1e6
        self.usd = self.prompt_tokens * prompt_price + self.completion_tokens * completion_price
        self.most_usd = self.prompt_tokens * prompt_price + self.most_completion_tokens * completion_price
        if self.to_ask and not (of.prompt_price or of.completion_price):
            self.usd = None


@dataclass(frozen=True)
class Plan:
    """All work of one or more runs (points, numbered from 1), each piece once."""

    work: Sequence[Work]

    def total(self) -> Work:
        """Return all work as one piece; what has no price counts nothing."""
        total = Work("total", "", usd=sum(work.usd or 0.0 for work in self.work))
        for name in SUMMED:
            setattr(total, name, sum(getattr(work, name) for work in self.work))
        return total

    def of(self, stage: str) -> "Plan":
        """Return the work of a stage."""
        return Plan([work for work in self.work if work.stage.startswith(stage)])

    @property
    def is_priced(self) -> bool:
        """Whether everything that is still to come has a price."""
        return all(work.usd is not None for work in self.work)

    def points(self, unfinished: bool = False) -> set[int]:
        """Return the points that there is work for, or those for which something is still to be done."""
        return {number for work in self.work if not (unfinished and work.finished) for number in work.points}


def plan_runs(configs: Sequence[PipelineConfig], sweep: SweepConfig | None = None) -> Plan:
    """Work out every piece of work of runs in one workspace once; nobody is asked anything.

    Args:
        configs: the runs, each with the number of its place, from 1.
        sweep: what a training takes and costs, where none was measured here.
    """
    planner = _Planner(configs[0].workspace, sweep or SweepConfig())
    for number, config in enumerate(configs, 1):
        planner.add(number, config.filled())
    stages = list(dict.fromkeys(work.stage for work in planner.work.values()))
    return Plan(sorted(planner.work.values(), key=lambda work: stages.index(work.stage)))


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
    their prompts', `count` is how many each prompt has, and `tokens` what one of them is expected to have.
    """

    key: str
    group: str
    ids: tuple[str, ...]
    prompt_tokens: float
    count: int
    tokens: float
    ref: CompletionsRef | None


class _Planner:
    """Collects the work of all points; equal pieces become one."""

    def __init__(self, workspace: str, sweep: SweepConfig) -> None:
        self._workspace, self._sweep, self._store = workspace, sweep, Workspace(workspace)
        self.work: dict[str, Work] = {}
        self._measured: dict[str, float] = {}
        self._claimed: dict[str, set[str]] = {}
        self._prompts: dict[str, _Prompts] = {}
        self._number = 0

    def add(self, number: int, config: PipelineConfig) -> None:
        """Plan one run, stage by stage."""
        self._number = number
        judged, preferences, most_pairs = self._label(config)
        trained, adapter = self._train(judged, preferences, most_pairs, config)
        # Before there are pairs, the held-out prompts are taken to be as many as there can be.
        source, most = config.eval_prompts or config.prompts, config.evaluation.max_prompts
        held_out = import_prompts(source, self._workspace, *((most, preferences.uri) if preferences else ()))
        deciding, evaluation = self._read(held_out, most), config.evaluation
        if evaluation.checkpoints:
            choosing, deciding = self._split(deciding, evaluation, preferences is not None)
            trained, adapter = f"chosen {trained}", self._choose(trained, adapter, choosing, evaluation)
        sft, again = (draw_settings(evaluation, draw, self._workspace) for draw in (BASELINE, NULL))
        candidate = draw_settings(evaluation, CANDIDATE, self._workspace, adapter)
        before = self._sample("evaluate: sample SFT adapter", deciding, sft)
        after = self._sample("evaluate: sample new adapter", deciding, candidate, None if adapter else trained)
        self._compare(COMPARING, before, after, evaluation.comparison_judge())
        if evaluation.null_test:
            null = self._sample("evaluate: sample SFT adapter again", deciding, again)
            self._compare(f"{COMPARING} SFT with itself", before, null, evaluation.null_judge())

    def _label(self, config: PipelineConfig) -> tuple[str, PreferencesRef | None, int]:
        """Plan all up to the pairs; return what stands for them, the pairs if they are there, and how many at most."""
        if config.preferences is not None:
            pairs = import_preferences(config.preferences, self._workspace, config.judging)
            return pairs.sha256, pairs, pairs.rows
        if config.completions is not None:
            samples = self._given(import_completions(config.completions, self._workspace))
        else:
            prompts = self._read(import_prompts(config.prompts, self._workspace))
            samples = self._sample("sample completions", prompts, config.generation)
        judged, verdicts = self._judge(JUDGING, samples, config.judging)
        preferences = find_preferences(verdicts, self._workspace, config.judging) if verdicts else None
        return judged, preferences, len(samples.ids)

    def _given(self, made: CompletionsRef) -> _Samples:
        """Return completions that something else made; what they cost there is nobody's here."""
        counts = {row["id"]: len(row["completions"]) for row in self._store.read_rows(made.uri)}
        mean = round(sum(counts.values()) / max(1, len(counts)))
        return _Samples(made.sha256, made.sha256, tuple(counts), 0.0, mean, 0.0, made)

    def _tokens(self, writer: str, expected: float, of: CompletionsRef | VerdictsRef | None, count: int = 1) -> float:
        """Return the tokens of a completion of a writer: the mean of finished ones, else what is expected."""
        if of and of.manifest and writer not in self._measured:
            cost = self._store.read_manifest(of).cost
            if cost.requests:
                self._measured[writer] = cost.completion_tokens / cost.requests / count
        return self._measured.get(writer, expected)

    def _read(self, ref: PromptsRef, limit: int | None = None) -> _Prompts:
        key = f"{ref.sha256} {limit}"
        if key not in self._prompts:
            rows = list(islice(self._store.read_rows(ref.uri), limit))
            characters = sum(len(message["content"]) for row in rows for message in row["prompt"])
            tokens = characters / CHARACTERS_PER_TOKEN / max(1, len(rows))
            self._prompts[key] = _Prompts(tuple(row["id"] for row in rows), tokens, ref)
        return self._prompts[key]

    def _split(self, prompts: _Prompts, evaluation: EvaluationConfig, is_final: bool) -> tuple[_Prompts, _Prompts]:
        """Return the prompts that choose the checkpoint and the others, by their number as long as pairs may come."""
        most = evaluation.parts(len(prompts.ids))[0]
        if is_final:
            choosing, deciding = split_prompts(prompts.ref, self._workspace, most, evaluation.seed)
            return self._read(choosing), self._read(deciding)
        return replace(prompts, ids=prompts.ids[:most]), replace(prompts, ids=prompts.ids[most:])

    def _open(self, key: str, stage: str, who: str, finished: bool) -> Work | None:
        """Note one more point for the piece of work under a key; return the piece if it is new, to be filled in."""
        is_new = key not in self.work
        work = self.work.setdefault(key, Work(stage, who, finished=finished))
        work.points.append(self._number)
        return work if is_new else None

    def _claim(self, group: str, ids: Iterable[str]) -> set[str]:
        """Return those of `ids` that no earlier piece of the group takes care of."""
        claimed = self._claimed.setdefault(group, set())
        new = set(ids) - claimed
        claimed |= new
        return new

    def _sample(
        self, stage: str, prompts: _Prompts, generation: GenerationConfig, untrained: str | None = None
    ) -> _Samples:
        """Plan a draw; `untrained` stands for an adapter that is still to be made, so that nothing of it is known."""
        plan = None if untrained else plan_generation(prompts.ref, self._workspace, generation)
        finished = plan.find_finished() if plan and len(prompts.ids) == plan.prompts.rows else None
        group = plan.settings_key if plan else digest([untrained, generation.identity()])
        key, count = digest([group, prompts.ids]), generation.num_completions
        tokens = self._tokens(f"samples up to {generation.max_tokens}", generation.max_tokens, finished, count)
        who = "new adapter" if generation.serve_from or untrained else generation.model
        if work := self._open(f"{stage} {key}", stage, who, finished is not None):
            new = self._claim(group, prompts.ids)
            known = len(plan.rows().known(new)) if plan and not finished else 0
            work.ask(len(new), known, prompts.tokens, count * tokens, 0, generation)
        return _Samples(key, group, prompts.ids, prompts.tokens, count, tokens, finished)

    def _judge(self, stage: str, samples: _Samples, judging: JudgingConfig) -> tuple[str, VerdictsRef | None]:
        """Plan a judging by each of its judges; return what stands for it, and the verdicts if they are there.

        Before there are completions, what can be said is how much there is to ask at most.
        """
        rubric = read_rubric(judging.rubric)
        told = instructions(judging.wants_scores)
        key = digest([samples.key, judging.verdict_identity(), rubric, told])
        plan = plan_judging(samples.ref, self._workspace, judging) if samples.ref else None
        verdicts = plan.finished if plan else None
        instructed = samples.prompt_tokens + (len(rubric) + len(told)) / CHARACTERS_PER_TOKEN
        expected, measured = verdict_tokens(judging, samples.count), None if judging.panel else verdicts
        for place, judge in enumerate(judging.judges()):
            tokens = self._tokens(f"judge {judge.model}, {expected:.0f} tokens", expected, measured)
            work = self._open(f"{stage} {key} {place}", stage, judge.model, verdicts is not None)
            if work is None:
                continue
            group = digest([samples.group, judge.identity(), rubric, told, judging.orders, judging.seed])
            new = self._claim(group, samples.ids)
            if plan:
                left = plan.judges[place].remaining()
                each = left.prompt_tokens / max(1, left.to_ask)
                work.ask(left.requests, left.known, each, tokens, judge.max_tokens, judge)
            else:
                questions, shown = len(new) * min(judging.orders, samples.count), samples.count * samples.tokens
                work.ask(questions, 0, instructed + shown, tokens, judge.max_tokens, judge)
        return key, verdicts

    def _train(
        self, judged: str, preferences: PreferencesRef | None, most: int, config: PipelineConfig
    ) -> tuple[str, AdapterRef | None]:
        """Plan a training; return what stands for its adapter, and the adapter if it is there."""
        training, adapter = config.training, None
        if preferences is None:
            models = (training.sft_adapter, training.base_model)
            key = digest([judged, config.judging.pairs_identity(), training.identity(), models])
        else:
            key = training_key(preferences, training)
            adapter = find_adapter(self._store, key)
        who = config.training_deployment or "this machine"
        work = self._open(f"{TRAINING} {key}", TRAINING, who, adapter is not None)
        if work and not adapter:
            batch = training.per_device_train_batch_size * training.gradient_accumulation_steps
            rows = preferences.rows if preferences else most
            steps = training.max_steps or math.ceil(rows * training.num_train_epochs / batch)
            seconds = self._seconds_a_pair(training.base_model)
            work.is_measured = seconds is not None
            work.gpu_minutes = steps * batch * (seconds or 1 / self._sweep.pairs_per_second) / 60
            work.most_usd = work.gpu_minutes * self._sweep.gpu_price / 60
            work.usd = work.most_usd if self._sweep.gpu_price else None
        return key, adapter

    def _seconds_a_pair(self, base_model: str) -> float | None:
        """Return the time that a finished training of the base took for a pair; None if this workspace has none."""
        measured, folder = f"training of {base_model}", self._store.uri("training")
        for key in self._store.folders(folder) if measured not in self._measured else ():
            try:
                made = self._store.read_manifest(f"{folder}/{key}/{MANIFEST}")
            except PreflowError:  # under way, or damaged
                continue
            if made.config.get("base_model") != base_model or not made.counts.get("steps"):
                continue
            settings = made.settings(TrainingConfig)
            batch = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
            self._measured[measured] = made.seconds / made.counts["steps"] / batch
            break
        return self._measured.setdefault(measured, 0.0) or None  # looked for once, found or not

    def _choose(
        self, trained: str, adapter: AdapterRef | None, prompts: _Prompts, evaluation: EvaluationConfig
    ) -> AdapterRef | None:
        """Plan the choice among the checkpoints of a training; return the one that is chosen, if that is known."""
        sft = draw_settings(evaluation, BASELINE, self._workspace)
        before = self._sample("evaluate: sample SFT adapter", prompts, sft)
        tried = find_checkpoints(adapter, evaluation) if adapter else [None] * evaluation.checkpoints
        judged = list[tuple[AdapterRef, VerdictsRef]]()
        for place, one in enumerate(tried):
            new = draw_settings(evaluation, CANDIDATE, self._workspace, one)
            untrained = None if one else f"{place} {trained}"
            after = self._sample("evaluate: sample checkpoints", prompts, new, untrained)
            verdicts = self._compare(f"{COMPARING} checkpoints", before, after, evaluation.null_judge())
            judged += [(one, verdicts)] if one and verdicts else []
        return record_choice(judged, self._workspace, evaluation).adapter if len(judged) == len(tried) else None

    def _compare(self, stage: str, a: _Samples, b: _Samples, judging: JudgingConfig) -> VerdictsRef | None:
        """Plan the comparison of two draws: each pair of samples is a row of its own with two completions."""
        ids = tuple(f"{identity}#{sample}" for identity in a.ids for sample in range(min(a.count, b.count)))
        samples = _Samples(
            key=digest([a.key, b.key]), group=digest([a.group, b.group]), ids=ids, prompt_tokens=a.prompt_tokens,
            count=2, tokens=a.tokens,
            ref=pair_samples(a.ref, b.ref, self._workspace) if a.ref and b.ref else None,
        )  # fmt: skip
        return self._judge(stage, samples, judging)[1]
