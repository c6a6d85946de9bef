"""One whole run."""

from typing import Literal, Self

from pydantic import Field, model_validator

from tasks.config.base import Location, MaybeLocation, Operational, StageConfig
from tasks.config.chat import ChatSettings
from tasks.config.evaluation import EvaluationConfig
from tasks.config.generation import GenerationConfig
from tasks.config.judging import JudgingConfig
from tasks.config.promotion import PromotionConfig
from tasks.config.training import TrainingConfig

ApprovalPoint = Literal["judging", "promotion"]


class PipelineConfig(StageConfig):
    """One whole run: prompts in, a better adapter out."""

    prompts: Location = Field("prompts.jsonl", description="Prompts (or SFT rows), JSONL: a path or gs://.")
    eval_prompts: MaybeLocation = None
    """Held-out prompts, JSONL. Empty: the rows of `prompts` that no training pair came from."""
    completions: MaybeLocation = None
    """Completions that something else sampled, to begin at judging. Empty: sample them."""
    preferences: MaybeLocation = None
    """Preference pairs that something else made, to begin at training; `prompts` are then the held-out ones. Empty:
    sample and judge."""
    workspace: Location = "workspace"
    """Where everything is kept: a folder or gs://bucket/prefix. gs://BLOCK@bucket/prefix takes the credentials of the
    GcpCredentials block BLOCK; without one, the machine's own are taken."""
    generation: GenerationConfig = Field(default_factory=GenerationConfig, description="Sampling of completions.")
    judging: JudgingConfig = Field(default_factory=JudgingConfig, description="The judge and the pairs.")
    training: TrainingConfig = Field(default_factory=TrainingConfig, description="DPO.")
    training_deployment: Operational[str | None] = Field(None, pattern=r"^train-dpo/[^/]+$")
    """Deployment that trains, e.g. train-dpo/l4-spot for a spot GPU; empty: where the pipeline runs."""
    max_restarts: Operational[int] = Field(5, ge=0, le=100)
    """Times a training that crashed on its work pool is started again; preemptions do not count."""
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig, description="Proof on held-out prompts.")
    promotion: PromotionConfig = Field(default_factory=PromotionConfig, description="The gate and serving.")
    approve_before: Operational[tuple[ApprovalPoint, ...]] = Field((), max_length=2)
    """Wait for a person's yes, given with Resume: before judging (shows calls, tokens and cost), before promotion
    (shows the evaluation). Empty: never."""
    approval_timeout_seconds: Operational[int] = Field(604_800, ge=1, le=31_536_000)
    """How long the run waits for that, in seconds (a week); then it fails and can be retried."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.generation.num_completions < 2:
            raise ValueError("generation.num_completions must be at least 2: judging needs a best and a worst")
        if self.judging.orders > self.generation.num_completions:
            raise ValueError(
                f"judging.orders ({self.judging.orders}) is more than generation.num_completions "
                f"({self.generation.num_completions}): there are only so many rotations"
            )
        if self.judging.unsure_for_sft and not self.training.sft_weight:
            raise ValueError(
                "judging.unsure_for_sft gives the SFT term more to learn from, and training.sft_weight is 0: set it to "
                "1, or leave unsure_for_sft off"
            )
        sigmas, count = self.judging.rejected_sigmas, self.generation.num_completions
        if sigmas is not None and count - 1 <= sigmas**2:
            # Samuelson's inequality: of n values none lies more than sqrt(n - 1) standard deviations from their mean.
            raise ValueError(
                f"judging.rejected_sigmas {sigmas:g} does nothing with generation.num_completions {count}: of so few "
                f"none scores that far below their mean. Take {int(sigmas**2) + 2} or more (16 is usual), or leave it "
                "empty"
            )
        if self.training.max_length <= self.generation.max_tokens:
            raise ValueError(
                f"training.max_length ({self.training.max_length} tokens, prompt and completion) leaves no room for a "
                f"prompt next to generation.max_tokens ({self.generation.max_tokens}): completions would be cut"
            )
        self._check_chat()
        if self.training.measured_label_smoothing and self.judging.orders < 2:
            raise ValueError("training.measured_label_smoothing needs judging.orders of at least 2, to see flips")
        return self

    def _check_chat(self) -> None:
        for stage, settings in (("training", self.training), ("evaluation.generation", self.evaluation.generation)):
            given = settings.model_fields_set & set(ChatSettings.model_fields) if settings else ()
            for name in sorted(given):
                if getattr(settings, name) != getattr(self.generation, name):
                    raise ValueError(
                        f"{stage}.{name} is not generation.{name}: a run samples, trains and evaluates in the same "
                        f"words. Set it in generation; {stage} takes it from there"
                    )

    @model_validator(mode="after")
    def _check_proof(self) -> Self:
        if not self.judging.val_ratio and not self.eval_prompts:
            raise ValueError("judging.val_ratio 0 holds no prompts out to evaluate on: raise it, or set eval_prompts")
        labelling = {judge.model for judge in (self.evaluation.judging or self.judging).judges()}
        if known := sorted(labelling & {judge.model for judge in self.evaluation.judges}):
            raise ValueError(
                f"evaluation.judges: {', '.join(known)} made the labels; a second opinion takes another model"
            )
        kept, tried = self.training.checkpoints, self.evaluation.checkpoints
        if kept and tried and kept != tried:
            raise ValueError(
                f"evaluation.checkpoints ({tried}) chooses among as many as training.checkpoints ({kept}) keeps: leave "
                "training.checkpoints 0, it then takes this number"
            )
        best, bar = self.evaluation.best_lower_bound(), self.promotion.min_win_rate
        if best <= bar:
            raise ValueError(
                f"promotion.min_win_rate ({bar:g}) is out of reach of evaluation.max_prompts "
                f"({self.evaluation.max_prompts}) x evaluation.num_samples ({self.evaluation.num_samples}): if all "
                f"were won, the lower bound would be {best:.3f}"
            )
        same_server = self.promotion.endpoint in (self.generation.endpoint, self.generation.endpoint.rstrip("/"))
        if same_server and self.promotion.name == self.generation.model:
            raise ValueError(
                f"promotion.name and generation.model are both {self.promotion.name!r} on one server: the new adapter "
                "would take the place of the one that is sampled from; give it another name"
            )
        return self

    def filled(self) -> "PipelineConfig":
        """Return the same configuration with what one stage takes from another written out."""
        generation = self.generation
        if generation.adapter is None:
            generation = generation.model_copy(update={"adapter": self.training.sft_adapter})
        chat = {name: getattr(generation, name) for name in ChatSettings.model_fields}
        judging = self.evaluation.judging or self.judging
        if judging.rubric is None:
            judging = judging.model_copy(update={"rubric": self.judging.rubric})
        sampling = (self.evaluation.generation or generation).model_copy(update=chat)
        evaluation = self.evaluation.model_copy(update={"generation": sampling, "judging": judging})
        kept = self.evaluation.checkpoints or self.training.checkpoints
        training = self.training.model_copy(update={**chat, "checkpoints": kept})
        return self.model_copy(update={"generation": generation, "training": training, "evaluation": evaluation})
