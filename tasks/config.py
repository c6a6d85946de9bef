"""Every parameter: one frozen model a stage, with bounds, units and the text of the Prefect form."""

import re
from enum import StrEnum
from statistics import NormalDist
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from tasks.titles import field_title

# Fields that do not change what a stage produces (addresses, concurrency, keys, prices) carry this mark: they stay
# out of `identity()`, and so out of every cache key.
OPERATIONAL: dict[str, Any] = {"operational": True}


def _check_secret_name(value: str) -> str:
    if re.fullmatch(r"env:[A-Za-z_][A-Za-z0-9_]*", value):
        return value
    random_run = re.search(r"(?=[a-z]*\d)(?=\d*[a-z])[a-z0-9]{16}", value) or re.fullmatch(r"[0-9a-f-]{32,}", value)
    looks_like_a_key = re.match(r"(sk|hf|gsk|xai|pk|key)[-_]", value) or len(value) > 48 or random_run
    if looks_like_a_key or not re.fullmatch(r"[a-z0-9][a-z0-9-]*", value):
        raise ValueError(
            "must name a secret, not be one: write env:NAME for an environment variable, or the name of a Prefect "
            "Secret block (lower-case letters, digits and dashes)"
        )
    return value


SecretName = Annotated[str, AfterValidator(_check_secret_name)]


class StageConfig(BaseModel):
    """Base of all configuration: frozen, no unknown fields, and errors that never print a value (it might be a key)."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, field_title_generator=field_title)

    def identity(self) -> dict[str, Any]:
        """Return the settings that determine the stage's output, JSON-ready, for its content key."""
        operational = {
            name
            for name, field in type(self).model_fields.items()
            if isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("operational")
        }
        settings = self.model_dump(mode="json", exclude=operational)
        for name, value in self:
            if name in settings and isinstance(value, tuple):
                settings[name] = [item.identity() if isinstance(item, StageConfig) else item for item in value]
        return settings


class EndpointConfig(StageConfig):
    """How to reach a model behind an OpenAI-compatible address."""

    endpoint: str = Field(
        "http://127.0.0.1:8000/v1",
        pattern=r"^https?://",
        description="Base URL of the OpenAI-compatible endpoint; usually ends in /v1.",
        json_schema_extra=OPERATIONAL,
    )
    model: str = Field("sft", min_length=1, description="Name under which the endpoint serves the model.")
    api_key: SecretName | None = Field(
        None,
        description="Where the key is: env:NAME or the name of a Prefect Secret block. Never the key itself.",
        json_schema_extra=OPERATIONAL,
    )
    max_concurrency: int = Field(
        32,
        ge=1,
        le=4096,
        description="Requests in flight at once, at most (a sliding window).",
        json_schema_extra=OPERATIONAL,
    )
    request_timeout_seconds: float = Field(
        300, gt=0, le=3600, description="Time limit of one attempt, in seconds.", json_schema_extra=OPERATIONAL
    )
    max_outage_seconds: float = Field(
        600,
        ge=0,
        le=86_400,
        description="How long an endpoint that is down or refuses with 429/5xx is waited for, in seconds.",
        json_schema_extra=OPERATIONAL,
    )
    requests_per_minute: int | None = Field(
        None, ge=1, description="Hard cap on requests per minute; empty: none.", json_schema_extra=OPERATIONAL
    )
    tokens_per_minute: int | None = Field(
        None, ge=1, description="Hard cap on tokens per minute; empty: none.", json_schema_extra=OPERATIONAL
    )
    prompt_price: float = Field(
        0.0, ge=0, description="Price of a million prompt tokens, in US$.", json_schema_extra=OPERATIONAL
    )
    completion_price: float = Field(
        0.0,
        ge=0,
        description="Price of a million completion tokens (thinking included), in US$.",
        json_schema_extra=OPERATIONAL,
    )
    budget_usd: float | None = Field(
        None,
        gt=0,
        description="Stop before this stage costs more than this, in US$; empty: no limit.",
        json_schema_extra=OPERATIONAL,
    )
    shard_size: int | None = Field(
        None,
        ge=1,
        le=1000,
        description="Prompts in a shard (one Prefect task run); empty: chosen by the row count.",
        json_schema_extra=OPERATIONAL,
    )
    max_failure_ratio: float = Field(
        0.01,
        ge=0,
        le=1,
        description="Share of prompts that may fail for good before the stage fails.",
        json_schema_extra=OPERATIONAL,
    )

    @model_validator(mode="after")
    def _check_limits(self) -> Self:
        if self.budget_usd is not None and not (self.prompt_price or self.completion_price):
            raise ValueError(
                f"budget_usd is {self.budget_usd:g} for {self.model}, but prompt_price and completion_price are 0, so "
                "nothing could be counted: set the prices, or leave budget_usd empty"
            )
        most = getattr(self, "max_tokens", 0)
        if self.tokens_per_minute is not None and self.tokens_per_minute < most:
            raise ValueError(
                f"tokens_per_minute ({self.tokens_per_minute}) is less than max_tokens ({most}): a single answer may "
                "be over the cap; lower max_tokens or raise tokens_per_minute"
            )
        return self


class GenerationConfig(EndpointConfig):
    """Sampling of completions from the SFT model."""

    adapter: str | None = Field(
        None,
        description="Folder (or gs:// address) of the adapter that `model` names; its digest identifies the "
        "completions. Empty: the pipeline takes training.sft_adapter; alone, the model's name must do.",
        json_schema_extra=OPERATIONAL,
    )
    serve_from: str | None = Field(
        None,
        description="Folder, as vLLM sees it, from which the adapter is loaded under `model` while sampling, and "
        "unloaded afterwards. Empty: the endpoint serves `model` already.",
        json_schema_extra=OPERATIONAL,
    )
    num_completions: int = Field(3, ge=1, le=64, description="Completions per prompt; judging needs at least 2.")
    temperature: float = Field(0.9, ge=0, le=2, description="Sampling temperature; 0.8-1.0 is the useful range.")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus sampling: share of the probability mass kept.")
    max_tokens: int = Field(256, ge=1, le=32_768, description="Longest completion, in tokens.")
    frequency_penalty: float = Field(0.5, ge=-2, le=2, description="Penalty on repeated tokens; 0.3-0.7 is usual.")
    seed: int = Field(42, ge=0, lt=2**31, description="Seed of every sample: the same seed gives the same completions.")
    keep_lines: str | None = Field(
        None, description="Regular expression; only lines it matches are kept, e.g. ^\\[[A-Z]+\\] . Empty: all lines."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.temperature == 0 and self.num_completions > 1:
            raise ValueError(
                f"temperature 0 gives num_completions ({self.num_completions}) equal texts: raise temperature, or set "
                "num_completions to 1"
            )
        if self.keep_lines is not None:
            try:
                re.compile(self.keep_lines)
            except re.error as error:
                raise ValueError(f"keep_lines is not a regular expression: {error}") from error
        return self


class PairPolicy(StrEnum):
    """When a best and a worst become a preference pair."""

    UNANIMOUS = "unanimous"
    MAJORITY = "majority"
    BORDA = "borda"


class JudgeConfig(EndpointConfig):
    """One LLM judge: where it is and how it is asked."""

    endpoint: str = Field(
        "https://generativelanguage.googleapis.com/v1beta/openai/",
        pattern=r"^https?://",
        description="Base URL of the judge's OpenAI-compatible endpoint.",
        json_schema_extra=OPERATIONAL,
    )
    model: str = Field("gemini-2.5-flash", min_length=1, description="Judge model; a stronger one ranks more surely.")
    api_key: SecretName | None = Field(
        "env:OPENAI_API_KEY",
        description="Where the judge's key is: env:NAME or the name of a Prefect Secret block. Never the key itself.",
        json_schema_extra=OPERATIONAL,
    )
    max_concurrency: int = Field(
        16, ge=1, le=4096, description="Judge requests in flight at once, at most.", json_schema_extra=OPERATIONAL
    )
    temperature: float = Field(0.0, ge=0, le=2, description="Judge temperature; anything but 0 adds noise.")
    max_tokens: int = Field(1024, ge=16, le=65_536, description="Token budget of a verdict, thinking included.")
    max_attempts: int = Field(3, ge=1, le=10, description="Times one verdict is asked for until it can be read.")


class JudgingConfig(JudgeConfig):
    """Choice of the best and the worst completion by an LLM judge, and the pairs made of them."""

    panel: tuple[JudgeConfig, ...] = Field(
        (), max_length=15, description="Further judges that vote as well, each a model of its own; empty: one judge."
    )
    rubric: str = Field("seinfeld", description="Rubric: a name in tasks/rubrics, or the path of a .md file.")
    orders: int = Field(2, ge=1, le=64, description="Rotations in which each prompt is judged; 2 shows position bias.")
    pair_policy: PairPolicy = Field(
        PairPolicy.UNANIMOUS,
        description="unanimous: best and worst the same in every vote; majority: in most; borda: by summed ranks.",
    )
    min_confidence: int = Field(1, ge=1, le=5, description="Pairs whose mean confidence is lower are dropped (1-5).")
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

    def verdict_identity(self) -> dict[str, Any]:
        """Return the settings that determine the judges' answers; pair policy, bar and split are applied later."""
        applied_later = {"pair_policy", "min_confidence", "val_ratio", "shard_size"}
        return {name: value for name, value in self.identity().items() if name not in applied_later}


class LossType(StrEnum):
    """The DPO losses that are offered; see TRL's `DPOConfig.loss_type`."""

    SIGMOID = "sigmoid"
    HINGE = "hinge"
    IPO = "ipo"
    ROBUST = "robust"
    SIGMOID_NORM = "sigmoid_norm"


class Schedule(StrEnum):
    """Learning-rate schedules after the warm-up."""

    COSINE = "cosine"
    LINEAR = "linear"
    CONSTANT = "constant_with_warmup"


class ComputeType(StrEnum):
    """Precision in which the quantised weights are multiplied."""

    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


class QuantType(StrEnum):
    """4-bit formats of bitsandbytes."""

    NF4 = "nf4"
    FP4 = "fp4"


class ReportTo(StrEnum):
    """Experiment trackers that the trainer can write to."""

    NONE = "none"
    WANDB = "wandb"
    TENSORBOARD = "tensorboard"
    MLFLOW = "mlflow"


class TrainingConfig(StageConfig):
    """DPO of the SFT adapter with TRL; names and defaults are TRL's or the usual ones for a 3B model on an L4."""

    base_model: str = Field("meta-llama/Llama-3.2-3B", min_length=1, description="Base model: a hub name or a folder.")
    base_revision: str | None = Field(
        None, description="Commit or tag of a base model from the hub; empty: its newest. A folder has none."
    )
    sft_adapter: str = Field(
        "adapters/sft",
        min_length=1,
        description="The SFT LoRA adapter to improve: a folder or gs:// address.",
        json_schema_extra=OPERATIONAL,
    )
    load_in_4bit: bool = Field(True, description="Quantise the base to 4 bits (QLoRA).")
    bnb_4bit_quant_type: QuantType = Field(QuantType.NF4, description="4-bit format of the base.")
    bnb_4bit_compute_dtype: ComputeType = Field(ComputeType.BFLOAT16, description="Compute type of the 4-bit base.")
    bnb_4bit_use_double_quant: bool = Field(True, description="Quantise the quantisation constants too.")
    beta: float = Field(0.1, gt=0, le=10, description="Strength of the pull to the reference; lower moves further.")
    loss_type: LossType = Field(LossType.SIGMOID, description="DPO loss; sigmoid is standard.")
    sft_weight: float = Field(
        0.0,
        ge=0,
        le=10,
        description="Weight of an added SFT loss on the chosen side (the DPO loss has weight 1); 1 keeps the format.",
    )
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="Share of pairs taken to be flipped (robust loss).")
    measured_label_smoothing: bool = Field(
        False, description="Take label_smoothing from the judge's measured flip rate (robust loss)."
    )
    learning_rate: float = Field(5e-6, gt=0, le=1, description="Peak learning rate.")
    num_train_epochs: float = Field(1.0, gt=0, le=100, description="Passes over the training pairs.")
    max_steps: int | None = Field(None, ge=1, description="Optimizer steps in all; overrides the epochs.")
    lr_scheduler_type: Schedule = Field(Schedule.COSINE, description="Learning-rate schedule after the warm-up.")
    warmup_steps: int = Field(20, ge=0, description="Optimizer steps of linear warm-up.")
    weight_decay: float = Field(0.0, ge=0, le=1, description="AdamW's weight decay.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradient clipping norm.")
    per_device_train_batch_size: int = Field(2, ge=1, le=512, description="Pairs in a micro-batch.")
    per_device_eval_batch_size: int = Field(1, ge=1, le=512, description="Pairs in an evaluation batch.")
    gradient_accumulation_steps: int = Field(8, ge=1, le=1024, description="Micro-batches in an optimizer step.")
    max_length: int = Field(2048, ge=16, description="Longest prompt + completion, in tokens; the rest is cut.")
    bf16: bool = Field(True, description="bfloat16 autocast on CUDA; the trained adapter itself is always fp32.")
    gradient_checkpointing: bool = Field(
        True,
        description="Recompute activations: 30-50 % more time, and 4 pairs of 2048 tokens fit an L4 with a 3B model.",
    )
    group_by_length: bool = Field(True, description="Fill micro-batches with pairs of like length: less padding.")
    disable_dropout: bool = Field(
        True, description="Train without the adapter's dropout, so that the policy starts exactly at the reference."
    )
    cache_reference: bool = Field(
        True,
        description="Compute the reference log-probs once and keep them; off: again in every step, same result.",
        json_schema_extra=OPERATIONAL,
    )
    eval_steps: int = Field(25, ge=1, description="Optimizer steps between evaluations.")
    save_steps: int = Field(25, ge=1, description="Optimizer steps between checkpoints.", json_schema_extra=OPERATIONAL)
    logging_steps: int = Field(10, ge=1, description="Optimizer steps between log lines.")
    seed: int = Field(42, ge=0, lt=2**31, description="Seed of shuffling and dropout.")
    report_to: ReportTo = Field(ReportTo.NONE, description="Experiment tracker.", json_schema_extra=OPERATIONAL)
    num_processes: int = Field(
        1, ge=1, le=8, description="Training processes (GPUs) on this machine, through accelerate."
    )
    grace_seconds: float = Field(
        12,
        gt=0,
        le=600,
        description="Time a preempted trainer gets to save, in seconds.",
        json_schema_extra=OPERATIONAL,
    )
    lease_seconds: float = Field(
        60,
        ge=1,
        le=3600,
        description="A trainer that gave no sign of life for so long, in seconds, is replaced by a waiting one.",
        json_schema_extra=OPERATIONAL,
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        smoothed = [name for name in ("label_smoothing", "measured_label_smoothing") if getattr(self, name)]
        robust = self.loss_type is LossType.ROBUST
        if smoothed and not robust:
            raise ValueError(f"{smoothed[0]} works with loss_type robust alone, not with {self.loss_type.value}")
        if robust and not smoothed:
            raise ValueError(
                "loss_type robust without smoothing is the sigmoid loss: set label_smoothing or "
                "measured_label_smoothing, or take loss_type sigmoid"
            )
        if self.bnb_4bit_quant_type is not QuantType.NF4 and not self.load_in_4bit:
            raise ValueError(f"bnb_4bit_quant_type {self.bnb_4bit_quant_type.value} does nothing without load_in_4bit")
        if self.max_steps is not None and self.warmup_steps > self.max_steps:
            raise ValueError(f"warmup_steps ({self.warmup_steps}) is more than max_steps ({self.max_steps})")
        return self


class EvaluationConfig(StageConfig):
    """Proof on held-out prompts: the judge compares samples of the new adapter with the SFT adapter's."""

    num_samples: int = Field(4, ge=1, le=64, description="Samples per held-out prompt and adapter.")
    max_prompts: int = Field(500, ge=1, description="Held-out prompts used, at most.")
    null_test: bool = Field(True, description="Also compare two draws of the SFT adapter: must come out near 0.5.")
    confidence: float = Field(0.95, gt=0.5, lt=1, description="Confidence of the win rate's interval.")
    seed: int = Field(1042, ge=0, lt=2**31, description="Seed of the samples and of the interval's bootstrap.")
    generation: GenerationConfig | None = Field(
        None, description="Sampling endpoint and settings; empty: those of the generation stage."
    )
    judging: JudgingConfig | None = Field(None, description="The judge; empty: that of the judging stage.")
    adapter_root: str | None = Field(
        None,
        description="Folder under which the vLLM server sees the workspace, where that differs from here.",
        json_schema_extra=OPERATIONAL,
    )

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
        return self

    def best_lower_bound(self) -> float:
        """Return what the win rate's lower bound can be at most, all n samples won: n / (n + z^2) (Wilson, 1927)."""
        samples = self.num_samples * self.max_prompts
        return samples / (samples + NormalDist().inv_cdf((1 + self.confidence) / 2) ** 2)

    def comparison_judge(self) -> JudgingConfig:
        """Return the judge as it compares two samples: always in both orders."""
        return (self.judging or JudgingConfig()).model_copy(update={"orders": 2})


class PromotionConfig(StageConfig):
    """The gate, and where the adapter is served when it has passed."""

    name: str = Field(
        "dpo", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Name under which clients know the adapter."
    )
    min_win_rate: float = Field(
        0.5, ge=0, lt=1, description="Bar: the lower bound of the win rate's interval must be over it."
    )
    endpoint: str | None = Field(
        "http://127.0.0.1:8000/v1",
        pattern=r"^https?://",
        description="vLLM that shall serve it at once; empty: only the workspace's pointer moves.",
        json_schema_extra=OPERATIONAL,
    )
    api_key: SecretName | None = Field(
        None, description="Where vLLM's key is: env:NAME or a Prefect Secret block.", json_schema_extra=OPERATIONAL
    )
    adapter_root: str | None = Field(
        None,
        description="Folder under which the vLLM server sees the workspace, where that differs from here.",
        json_schema_extra=OPERATIONAL,
    )


class PublishingConfig(StageConfig):
    """Where an adapter is published on the Hugging Face hub, and what its card cannot know from the manifests."""

    repo: str = Field(
        "",
        pattern=r"^([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)?$",
        description="Repository on the hub, owner/name; made if it is not there.",
    )
    private: bool = Field(True, description="Make a new repository private; one that is there stays as it is.")
    token: SecretName = Field(
        "env:HF_TOKEN",
        description="Where the hub's write token is: env:NAME or the name of a Prefect Secret block. Never the token.",
        json_schema_extra=OPERATIONAL,
    )
    base_model: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$",
        description="The base model's name on the hub, for the card. Empty: training.base_model, if that is one.",
    )
    license: str | None = Field(
        None, pattern=r"^[a-z0-9][a-z0-9.-]*$", description="The hub's identifier of a license, e.g. llama3.2."
    )


class ApprovalPoint(StrEnum):
    """Where a run can wait for a person's yes: before the judge is paid, or before a new adapter is served."""

    JUDGING = "judging"
    PROMOTION = "promotion"


class PipelineConfig(StageConfig):
    """One whole run: prompts in, a better adapter out."""

    prompts: str = Field("prompts.jsonl", min_length=1, description="Prompts (or SFT rows), JSONL: a path or gs://.")
    eval_prompts: str | None = Field(
        None,
        description="Held-out prompts, JSONL. Empty: the rows of `prompts` that no training pair came from.",
    )
    workspace: str = Field("workspace", min_length=1, description="Where everything is kept: a folder or gs://.")
    generation: GenerationConfig = Field(default_factory=GenerationConfig, description="Sampling of completions.")
    judging: JudgingConfig = Field(default_factory=JudgingConfig, description="The judge and the pairs.")
    training: TrainingConfig = Field(default_factory=TrainingConfig, description="DPO.")
    training_deployment: str | None = Field(
        None,
        pattern=r"^train-dpo/[^/]+$",
        description="Deployment that trains, e.g. train-dpo/l4-spot for a spot GPU; empty: where the pipeline runs.",
        json_schema_extra=OPERATIONAL,
    )
    max_restarts: int = Field(
        5,
        ge=0,
        le=100,
        description="Times a training that crashed on its work pool is started again; preemptions do not count.",
        json_schema_extra=OPERATIONAL,
    )
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig, description="Proof on held-out prompts.")
    promotion: PromotionConfig = Field(default_factory=PromotionConfig, description="The gate and serving.")
    approve_before: tuple[ApprovalPoint, ...] = Field(
        (),
        max_length=2,
        description="Wait for a person's yes, given with Resume: before judging (shows calls, tokens and cost), before "
        "promotion (shows the evaluation). Empty: never.",
        json_schema_extra=OPERATIONAL,
    )
    approval_timeout_seconds: int = Field(
        604_800,
        ge=1,
        le=31_536_000,
        description="How long the run waits for that, in seconds (a week); then it fails and can be retried.",
        json_schema_extra=OPERATIONAL,
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.generation.num_completions < 2:
            raise ValueError("generation.num_completions must be at least 2: judging needs a best and a worst")
        if self.judging.orders > self.generation.num_completions:
            raise ValueError(
                f"judging.orders ({self.judging.orders}) is more than generation.num_completions "
                f"({self.generation.num_completions}): there are only so many rotations"
            )
        if self.training.max_length <= self.generation.max_tokens:
            raise ValueError(
                f"training.max_length ({self.training.max_length} tokens, prompt and completion) leaves no room for a "
                f"prompt beside generation.max_tokens ({self.generation.max_tokens}): completions would be cut"
            )
        if self.training.measured_label_smoothing and self.judging.orders < 2:
            raise ValueError(
                "training.measured_label_smoothing needs judging.orders of at least 2 to see verdicts flip"
            )
        return self

    @model_validator(mode="after")
    def _check_proof(self) -> Self:
        if not self.judging.val_ratio and not self.eval_prompts:
            raise ValueError(
                "judging.val_ratio 0 holds no prompts out for the evaluation: raise it, or set eval_prompts"
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
        evaluation = self.evaluation.model_copy(
            update={
                "generation": self.evaluation.generation or generation,
                "judging": self.evaluation.judging or self.judging,
            }
        )
        return self.model_copy(update={"generation": generation, "evaluation": evaluation})


class Preset(StrEnum):
    """Points that are usually worth a try, the most promising first; docs/sweeps.md says what each changes and why."""

    BETA = "beta"
    JUDGE = "judge"
    COMPLETIONS = "completions"
    TEMPERATURE = "temperature"
    MORE_DATA = "more_data"
    EPOCHS = "epochs"
    WARMUP = "warmup"


class SweepConfig(StageConfig):
    """What a sweep varies and where its limits are. Presets, grid and changes are added up; equal points run once."""

    presets: tuple[Preset, ...] = Field(
        (), description="Ready-made points, each against the configuration as it is, which runs as a point too."
    )
    grid: dict[str, list[Any]] = Field(
        {},
        description='Values by dotted name, e.g. {"training.beta": [0.05, 0.1]}; every combination is a point.',
    )
    changes: list[dict[str, Any]] = Field(
        [],
        description='One point each, e.g. {"training.num_train_epochs": 3, "training.learning_rate": 1e-6}; {} is the '
        "configuration as it is.",
    )
    stronger_judge: str | None = Field(
        None, min_length=1, description="For the preset judge: a model at the judge's endpoint, such as gemini-2.5-pro."
    )
    more_prompts: str | None = Field(
        None,
        min_length=1,
        description="For the preset more_data: a larger prompts file (JSONL); prompts that are in the first too cost "
        "nothing again.",
    )
    max_points: int = Field(24, ge=1, le=1000, description="A sweep of more points is refused.")
    budget_usd: float | None = Field(
        None, gt=0, description="A sweep whose estimate is higher, in US$, is refused; empty: no limit."
    )
    gpu_price: float = Field(
        0.0, ge=0, description="Price of a GPU hour for training, in US$ (a spot L4: 0.3-0.4); 0: not counted."
    )
    pairs_per_second: float = Field(
        1.14, gt=0, description="Pairs trained a second, for the estimate; 1.14 was measured for a 3B model on an L4."
    )
    parallel: int = Field(
        1, ge=1, le=64, description="Trainings at once, where the configuration trains through a deployment."
    )
    promote_best: bool = Field(
        False, description="Promote the best point if its interval, widened for the number of points, is over the bar."
    )


class DrillConfig(StageConfig):
    """A training that is preempted again and again, and must come out the same."""

    deployment: str | None = Field(
        None,
        pattern=r"^train-dpo/[^/]+$",
        description="Deployment that trains, e.g. train-dpo/l4-spot; empty: a child process on this machine.",
    )
    preemptions: int = Field(4, ge=1, le=50, description="Times it is preempted, SIGTERM and SIGKILL in turn.")
    max_steps: int = Field(40, ge=4, le=100_000, description="Optimizer steps of the training.")
    save_steps: int = Field(10, ge=1, description="Optimizer steps between checkpoints.")
    seed: int = Field(42, ge=0, lt=2**31, description="Seed of the steps at which it is preempted.")
    grace_seconds: float = Field(15, gt=0, le=600, description="Seconds from SIGTERM to SIGKILL; GKE spot gives 15.")
    price_per_hour: float = Field(0.35, ge=0, description="Price of the machine, in US$ an hour.")
    base_model: str | None = Field(None, description="Base model to train on; empty: a tiny one, made for the drill.")
    sft_adapter: str | None = Field(None, description="Its SFT adapter; empty: a tiny one, made for the drill.")
    pairs: str | None = Field(None, description="Preference pairs, a train.jsonl; empty: a few, made for the drill.")
    kubeconfig: str | None = Field(
        None, description="Kubernetes: file that says how to reach the cluster; empty: the usual one, or the pod's own."
    )
    namespace: str = Field("preflow", min_length=1, description="Kubernetes: namespace of the work pool's Jobs.")
    image: str | None = Field(None, description="Kubernetes: image to train with; empty: the work pool's.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = [self.base_model, self.sft_adapter, self.pairs]
        if any(given) and not all(given):
            raise ValueError("give base_model, sft_adapter and pairs, or none of them")
        if self.preemptions > self.max_steps // 2:
            raise ValueError(f"{self.preemptions} preemptions do not fit {self.max_steps} steps: raise max_steps")
        return self
