"""What was measured, in one shape each: a metric with its healthy range, a win rate with its interval."""

from typing import Annotated, Any

from pydantic import BaseModel, Field, model_validator

from tasks.store.refs import EvaluationRef
from tasks.store.workspace import Workspace

AGREEMENT = "agreement.json"
# An SFT adapter that is silent in more of the comparisons than this is no adversary.
MOST_SFT_SILENT = 0.2
# What is no number is in no range: a gate must not compare with it.
Share = Annotated[float, Field(ge=0, le=1)]


def percent(share: float, form: str = ".1f") -> str:
    """Return a share in percent; with `.3g` a bound that a person chose, as short as it was written."""
    return f"{100 * share:{form}} %"


def percent_range(low: float, high: float) -> str:
    """Return an interval in percent."""
    return f"{100 * low:.1f}-{100 * high:.1f} %"


def rate_text(rate: float, low: float, high: float) -> str:
    """Return a rate with its interval, in percent."""
    return f"{percent(rate)} ({percent_range(low, high)})"


def p_text(p_value: float) -> str:
    """Return a p-value as it is read."""
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.3f}"


class Metric(BaseModel, frozen=True, extra="forbid"):
    """One measurement with the range it should lie in; `ok` is None where there is nothing to compare it with.

    `meaning` says in words what the value shows, and stands for it where it is not a single number.
    """

    name: str
    title: str
    value: float | None
    unit: str | None = None
    healthy: str
    ok: bool | None = None
    advice: str | None = None
    meaning: str = ""
    detail: dict[str, Any] = {}

    def text(self) -> str | None:
        """Return the value with its unit, as a report shows it: shares in percent."""
        if self.value is None:
            return self.meaning or None
        if (self.unit or "").startswith("share"):
            return percent(self.value)
        return f"{self.value:,.3g} {self.unit or ''}".strip()


class QualityReport(BaseModel, frozen=True, extra="forbid"):
    """Everything measured about a set of judgements or pairs; plain JSON through `model_dump(mode="json")`."""

    rows: int
    pairs: int
    statuses: dict[str, int]
    reasons: dict[str, int]
    metrics: list[Metric]
    detail: dict[str, Any] = {}

    def summary(self) -> str:
        """Return one line: how many pairs of how many rows, and what is out of range."""
        problems = self.problems()
        held = [metric for metric in self.metrics if metric.ok is not None]
        names = f": {', '.join(metric.title for metric in problems)}" if problems else ""
        counts = f"{len(problems)} of {len(held)} measurements out of range{names}"
        return f"{self.pairs:,} pairs of {self.rows:,} rows; {counts}"

    def metric(self, name: str) -> Metric:
        """Return the metric called `name`.

        Raises:
            KeyError: it was not measured on these data.
        """
        for metric in self.metrics:
            if metric.name == name:
                return metric
        raise KeyError(name)

    def problems(self) -> list[Metric]:
        """Return the metrics that are out of their healthy range."""
        return [metric for metric in self.metrics if metric.ok is False]


class WinRate(BaseModel, frozen=True):
    """How often one adapter's samples won against another's (ties are halves), with its interval.

    Attributes:
        win_rate: the mean outcome of the comparisons that could be read.
        lower: lower bound of the interval.
        upper: upper bound of the interval.
        confidence: two-sided confidence of the interval.
        samples: comparisons that count.
        prompts: held-out prompts they are of.
        clusters: what may be taken as independent: groups, and prompts without one.
        effective_samples: independent comparisons that would be as sure.
        ties: share of the comparisons that count as 0.5.
        unreadable: comparisons left out because no judge's verdict on them could be read.
        silent: comparisons that the new adapter lost because it wrote nothing, or failed.
        sft_silent: comparisons in which the SFT adapter wrote nothing.
    """

    win_rate: Share
    lower: Share
    upper: Share
    confidence: float = 0.95
    samples: int = 0
    prompts: int = 0
    clusters: int = 0
    effective_samples: float = 0.0
    ties: float = 0.0
    unreadable: int = 0
    silent: int = 0
    sft_silent: int = 0

    def text(self) -> str:
        """Return the rate with its interval, in percent."""
        return rate_text(self.win_rate, self.lower, self.upper)

    def interval(self) -> str:
        """Return the interval, in percent."""
        return percent_range(self.lower, self.upper)

    def holds(self, value: float) -> bool:
        """Tell whether the interval holds `value`."""
        return self.lower <= value <= self.upper


class SecondOpinion(BaseModel, frozen=True):
    """What judges that did not make the labels say of the same samples.

    Attributes:
        judges: their models.
        rate: the win rate by their verdicts.
        transfer: their gain (over 0.5) as a share of that by the judge of the labels; None if that one sees no gain.
    """

    judges: tuple[str, ...]
    rate: WinRate
    transfer: float | None = None


class Interval(BaseModel, frozen=True):
    """A figure with its interval."""

    value: float
    lower: float
    upper: float

    def text(self) -> str:
        """Return the figure with its interval, in percent."""
        return rate_text(self.value, self.lower, self.upper)


class Agreement(BaseModel, frozen=True):
    """`agreement.json`: what a person, who did not know which side was which, says of the judge.

    Attributes:
        labels: comparisons that the person judged, and the judge too.
        share: how far both say the same: 1 for equal answers, 0 for opposite ones, 0.5 where one of them sees a tie.
        kappa: Cohen's, the agreement beyond chance; None where chance explains everything.
        corrected: the win rate in the person's eyes; its interval holds the judge's errors and how few the labels are.
    """

    labels: int
    share: Interval
    kappa: Interval | None = None
    corrected: WinRate


class Evaluation(WinRate):
    """`win_rate.json`: the new adapter against the SFT adapter, and what says whether that can be believed.

    Attributes:
        adapter_sha256: digest of the new adapter.
        null: two draws of the SFT adapter against each other, at 99 %: must hold 0.5.
        length_controlled: the win rate had the new adapter's samples been as often longer as shorter.
        second: the second opinion, if another judge was asked.
        detectable: the smallest true win rate that passes a gate at 50 % in 80 % of runs, going by these samples.
        agreement: with a person's labels, if there are any.
    """

    adapter_sha256: str
    null: WinRate | None = None
    length_controlled: WinRate | None = None
    second: SecondOpinion | None = None
    detectable: float | None = None
    agreement: Agreement | None = None

    @property
    def null_holds(self) -> bool:
        """Whether the SFT adapter against itself came out even; also where it was not tested."""
        return self.null is None or self.null.holds(0.5)

    @property
    def sft_is_silent(self) -> bool:
        """Whether the SFT adapter wrote nothing so often that it cannot have been sampled as it was trained."""
        return self.sft_silent > MOST_SFT_SILENT * self.samples

    @property
    def agrees(self) -> bool:
        """Whether a person agrees with the judge more often than by chance; also where nobody has labelled."""
        return self.agreement is None or self.agreement.share.lower > 0.5

    @property
    def proven(self) -> float:
        """The lower bound that the gate looks at: the lower one of the raw and the length-controlled win rate's."""
        return self.lower if self.length_controlled is None else min(self.lower, self.length_controlled.lower)

    def refusal(self, bar: float, min_agreement: float = 0.0) -> str | None:
        """Return why the adapter is not promoted over `bar`; None if it is.

        Args:
            bar: what the lower bounds of the win rates must be over.
            min_agreement: what that of the judge's agreement with a person must be over; 0: no labels are needed.
        """
        wanted = f"must be over min_win_rate ({percent(bar, '.3g')})"
        if self.sft_is_silent:
            return (
                f"the SFT adapter wrote nothing in {self.sft_silent} of {self.samples} comparisons, so winning shows "
                "nothing. Is it sampled as it was trained? Look at the chat template, generation.stop, "
                "generation.keep_lines and generation.max_tokens."
            )
        if self.null is not None and not self.null_holds:
            return (
                f"two draws of the SFT adapter come out at {self.null.text()} against each other, where the interval "
                f"({percent(self.null.confidence, '.3g')}) must hold 50 %: no win rate of this judge can be "
                "believed. Look at its positions in the quality report; take another judging.model, or more held-out "
                "prompts."
            )
        if self.lower <= bar:
            return (
                f"win rate {self.text()}; the interval's lower bound {wanted}. "
                "More held-out prompts narrow the interval; a lower training.beta moves the adapter further."
            )
        if self.length_controlled is not None and self.proven <= bar:
            return (
                f"win rate {self.text()}, but {self.length_controlled.text()} with length taken out; both lower bounds "
                f"{wanted}. The new adapter may have won by length alone: say in judging.rubric "
                "that length does not count, or lower generation.max_tokens."
            )
        return self.disagreement(min_agreement)

    def disagreement(self, min_agreement: float) -> str | None:
        """Return why a person's labels, or their absence, stand against a promotion; None if they do not."""
        if not min_agreement:
            return None
        if self.agreement is None:
            return (
                f"promotion.min_agreement is {percent(min_agreement, '.3g')}, and nobody has labelled comparisons of "
                "this run yet: `preflow label` takes 15 minutes. Then run it again; nothing is paid twice."
            )
        if self.agreement.share.lower <= min_agreement:
            return (
                f"the judge agrees with a person in {self.agreement.share.text()} of {self.agreement.labels} "
                f"comparisons; the lower bound must be over min_agreement ({percent(min_agreement, '.3g')}). "
                "Sharpen judging.rubric, or take another judging.model; more labels narrow the interval."
            )
        return None


class Tried(Evaluation):
    """A checkpoint against the SFT adapter, on the prompts that choose; `step` is that of the training."""

    step: int


class Choice(BaseModel, frozen=True):
    """`choice.json`: the checkpoints of a training, in their order, and the prompts that chose, which do not decide.

    The rate of the chosen one is too high, because it was chosen for it; the evaluation's is not.
    """

    tried: tuple[Tried, ...]
    prompts: tuple[str, ...]

    @property
    def best(self) -> Tried:
        """The checkpoint with the highest lower bound, as the gate looks at it; of equal ones the later."""
        return max(reversed(self.tried), key=lambda one: one.proven)


def read_choice(evaluation: EvaluationRef) -> Choice | None:
    """Return how the adapter that was evaluated was chosen; None if it is the last of its training."""
    store = Workspace.holding(evaluation.uri)
    made = store.read_manifest(evaluation).origin("choice") if evaluation.manifest else None
    return Choice.model_validate(store.read_json(made.uri)) if made else None


def read_evaluation(evaluation: EvaluationRef) -> Evaluation:
    """Return what the comparisons came to, with the agreement of a person if somebody has labelled.

    Raises:
        FileNotFoundError: `win_rate.json` is gone.
        ValidationError: it was written by another version.
    """
    store = Workspace.holding(evaluation.uri)
    found = {"adapter_sha256": evaluation.adapter_sha256, **store.read_json(evaluation.uri)}
    if store.exists(labelled := evaluation.sibling(AGREEMENT)):
        found["agreement"] = store.read_json(labelled)
    return Evaluation.model_validate(found)


class Health(BaseModel, frozen=True):
    """`health.json`: the readings of a training, the warnings that follow from them together, and what to try."""

    source: str
    readings: tuple[Metric, ...] = ()
    warnings: tuple[str, ...] = ()
    advice: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every reading is in its range and nothing is warned of."""
        return not self.warnings and all(reading.ok for reading in self.readings)


class ProbeText(BaseModel, frozen=True, extra="forbid"):
    """Token ids, and the log-probs (nats) that training found for them from the second on."""

    token_ids: list[int] = Field(min_length=2)
    adapter: list[float]
    sft: list[float]
    base: list[float]

    @model_validator(mode="after")
    def _check(self) -> "ProbeText":
        if not len(self.adapter) == len(self.sft) == len(self.base) == len(self.token_ids) - 1:
            raise ValueError("as many log-probs as token ids after the first are needed")
        return self


class Probe(BaseModel, frozen=True, extra="forbid"):
    """`probe.json`: how a finished adapter is known, by the trained one, the SFT adapter and the bare base."""

    base_precision: str
    texts: list[ProbeText] = Field(min_length=1)
