"""Proof on held-out prompts."""

from statistics import NormalDist
from typing import Self

from pydantic import Field, model_validator

from tasks.config.base import Operational, StageConfig
from tasks.config.generation import GenerationConfig
from tasks.config.judging import JudgeConfig, JudgingConfig

# So many verdicts more, in percent, may the choice among checkpoints cost.
MOST_MORE = 35


class EvaluationConfig(StageConfig):
    """Proof on held-out prompts: the judge compares samples of the new adapter with the SFT adapter's."""

    num_samples: int = Field(4, ge=1, le=64, description="Samples per held-out prompt and adapter.")
    max_prompts: int = Field(500, ge=1, description="Held-out prompts used, at most.")
    null_test: bool = Field(True, description="Also compare two draws of the SFT adapter: must come out near 0.5.")
    checkpoints: int = Field(0, ge=0, le=8)
    """Checkpoints of the training, evenly spaced, the last among them: the judge chooses the best on a part of the
    held-out prompts, and the others decide. 3 is usual; at most 35 % more verdicts. 0: the last."""
    confidence: float = Field(0.95, gt=0.5, lt=1, description="Confidence of the win rate's interval.")
    seed: int = Field(1042, ge=0, lt=2**31)
    """Seed of the samples, and of which prompts choose the checkpoint."""
    generation: GenerationConfig | None = None
    """Sampling endpoint and settings; empty: those of the generation stage."""
    judging: JudgingConfig | None = Field(None, title="Judging: the judge")
    """The judge; empty: that of the judging stage."""
    judges: tuple[JudgeConfig, ...] = Field((), max_length=15)
    """Second opinion, advised: judges that made no label, asked about the same samples. Each another model; empty:
    none, and a quirk of the labelling judge looks like a gain."""
    adapter_root: Operational[str | None] = None
    """Folder under which the vLLM server sees the workspace, where that differs from here."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.generation is not None and self.generation.temperature == 0:
            if self.num_samples > 1:
                raise ValueError(
                    f"generation.temperature 0 gives num_samples ({self.num_samples}) equal texts: raise temperature, "
                    "or set num_samples to 1"
                )
            if self.null_test:
                raise ValueError("null_test compares two draws, and generation.temperature 0 makes them equal")
        if self.checkpoints == 1:
            raise ValueError("checkpoints 1 leaves nothing to choose from: give 3, or 0 to take the last")
        models = [judge.model for judge in (*(self.judging.judges() if self.judging else ()), *self.judges)]
        if twice := sorted({model for model in models if models.count(model) > 1}):
            raise ValueError(f"judges: {', '.join(twice)} judges already; a second opinion takes another model")
        return self

    def best_lower_bound(self) -> float:
        """Return the win rate's lower bound if all n samples are won: n / (n + z^2) (Wilson, 1927)."""
        samples = self.num_samples * self.parts(self.max_prompts)[1]
        return samples / (samples + NormalDist().inv_cdf((1 + self.confidence) / 2) ** 2)

    def parts(self, held_out: int) -> tuple[int, int]:
        """Return how many of so many held-out prompts choose the checkpoint, at most, and how many decide.

        With a share a of the prompts to choose among k checkpoints, k a + (1 - a) comparisons are made in place of 1,
        by the judges that made the labels; the other judges and the null test have fewer.
        """
        used = min(held_out, self.max_prompts)
        choosing = MOST_MORE * used // (100 * (self.checkpoints - 1)) if self.checkpoints else 0
        return choosing, used - choosing

    def comparison_judge(self) -> JudgingConfig:
        """Return the judges as they compare the new adapter with the SFT adapter: always in both orders."""
        judging = self.null_judge()
        return judging.model_copy(update={"panel": (*judging.panel, *self.judges)})

    def null_judge(self) -> JudgingConfig:
        """Return the judges as they compare the SFT adapter with itself: those that made the labels, in both orders."""
        both = {"orders": 2, "rejected_sigmas": None, "min_chosen_score": None, "unsure_for_sft": False}
        return (self.judging or JudgingConfig()).model_copy(update=both)
