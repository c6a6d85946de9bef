"""The judge, and the pairs made of its verdicts."""

from typing import Literal, Self

from pydantic import Field, JsonValue, model_validator

from tasks.config.base import ADDRESS, IfSet, Operational, RubricLocation, SecretName
from tasks.config.endpoint import EndpointConfig

PairPolicy = Literal["unanimous", "majority", "borda"]
# What makes pairs of the verdicts, and of itself changes none of them.
_APPLIED_LATER = frozenset({
    "pair_policy", "min_confidence", "rejected_sigmas", "min_chosen_score", "unsure_for_sft", "leave_out_cut",
    "val_ratio",
})  # fmt: skip

# The judge of those who choose none: a current, cheap model, as of 2026-11-26 and by public reports. They name it in
# the place of gemini-2.5-flash, whose end was announced for 2026-10-16; models end, so look again.
DEFAULT_JUDGE = "gemini-3.5-flash"
DEFAULT_JUDGE_ENDPOINT = "https://generativelanguage.googleapis.com/v1beta/openai/"


class JudgeConfig(EndpointConfig):
    """One LLM judge: where it is and how it is asked."""

    endpoint: Operational[str] = Field(DEFAULT_JUDGE_ENDPOINT, pattern=ADDRESS)
    """Base URL of the judge's OpenAI-compatible endpoint."""
    model: str = Field(DEFAULT_JUDGE, min_length=1, description="Judge model; a stronger one ranks more surely.")
    api_key: Operational[SecretName | None] = "env:OPENAI_API_KEY"
    """Where the judge's key is: env:NAME or the name of a Prefect Secret block. Never the key itself."""
    max_concurrency: Operational[int] = Field(16, ge=1, le=4096)
    """Judge requests in flight at once, at most."""
    temperature: float | None = Field(None, ge=0, le=2)
    """Judge temperature; empty: not sent, as reasoning models want it. 0 is the steadiest elsewhere."""
    max_tokens: int = Field(1024, ge=16, le=65_536, description="Token budget of a verdict, thinking included.")
    batch: Operational[bool] = False
    """Ask through the provider's batch API (OpenAI, Google and others have one): half of the price, an answer within a
    day. What fails there is asked the normal way."""
    max_attempts: int = Field(3, ge=1, le=10, description="Times one verdict is asked for until it can be read.")


class JudgingConfig(JudgeConfig):
    """Choice of the best and the worst completion by an LLM judge, and the pairs made of them."""

    panel: tuple[JudgeConfig, ...] = Field((), max_length=15)
    """Further judges that vote as well, each a model of its own; empty: one judge."""
    rubric: RubricLocation | None = None
    """What a good answer is (required): a name in tasks/judge/rubrics, such as neutral, or a .md file."""
    orders: int = Field(2, ge=1, le=64, description="Rotations in which each prompt is judged; 2 shows position bias.")
    pair_policy: PairPolicy = "unanimous"
    """unanimous: best and worst the same in every vote; majority: in most; borda: by summed ranks."""
    min_confidence: int = Field(1, ge=1, le=5, description="Pairs whose mean confidence is lower are dropped (1-5).")
    rejected_sigmas: IfSet[float | None] = Field(None, gt=0, le=5)
    """Rejected is the completion that scores closest to so many standard deviations below the mean of its prompt: 2 for
    16 completions or more (arXiv 2502.16825). Empty: the worst. Asks for scores."""
    min_chosen_score: IfSet[float | None] = Field(None, ge=1, le=10)
    """Pairs whose chosen side scores lower are left out: the best of bad ones teaches little. Empty: none is. Asks for
    scores."""
    unsure_for_sft: IfSet[bool] = False
    """Of prompts without a pair on whose best most votes agree, train the SFT term on it, and the DPO loss on nothing
    (arXiv 2602.00954). Off: they are left out."""
    leave_out_cut: bool = False
    """Leave out pairs with a side that was cut (at max_tokens, by a filter, by an abort). Off: they are trained on as
    they are, the cut side without an end of turn."""
    val_ratio: float = Field(0.1, ge=0, lt=1, description="Share of pairs (or groups) held out for evaluation.")
    seed: int = Field(42, ge=0, lt=2**31, description="Seed of the orders and of the train/val split.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        models = [judge.model for judge in self.judges()]
        if twice := sorted({model for model in models if models.count(model) > 1}):
            raise ValueError(f"panel: {', '.join(twice)} is asked twice; every judge must be another model")
        return self

    def judges(self) -> list[JudgeConfig]:
        """Return every judge that votes: this one, then the panel."""
        own = {name: getattr(self, name) for name in JudgeConfig.model_fields}
        return [JudgeConfig.model_construct(**own), *self.panel]

    @property
    def wants_scores(self) -> bool:
        """Whether the judges are also asked for a score from 1 to 10 of each completion."""
        return self.rejected_sigmas is not None or self.min_chosen_score is not None

    def verdict_identity(self) -> dict[str, JsonValue]:
        """Return the settings that determine the judges' answers; what they are asked for is not among them."""
        return {name: value for name, value in self.identity().items() if name not in _APPLIED_LATER}

    def pairs_identity(self) -> dict[str, JsonValue]:
        """Return the settings by which pairs are made of given verdicts."""
        return {name: value for name, value in self.identity().items() if name in _APPLIED_LATER | {"seed"}}
