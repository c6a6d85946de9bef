"""DPO training."""

from typing import Literal, Self

from pydantic import Field, model_validator

from tasks.config.base import IfSet, Location, ModelLocation, Operational
from tasks.config.chat import ChatSettings

LossType = Literal["sigmoid", "hinge", "ipo", "robust", "sigmoid_norm", "apo_zero"]
Schedule = Literal["cosine", "linear", "constant_with_warmup"]
ComputeType = Literal["bfloat16", "float16", "float32"]
Tracker = Literal["none", "wandb", "tensorboard", "mlflow"]


class TrainingConfig(ChatSettings):
    """DPO of the SFT adapter with TRL; names and defaults are TRL's or the usual ones for a 3B model on an L4."""

    # Where the base is; what it is, by content or by name and revision, is part of every key.
    base_model: Operational[ModelLocation] = "meta-llama/Llama-3.2-3B"
    """Base model: a hub name or a folder."""
    base_revision: Operational[str | None] = None
    """Commit or tag of a base model from the hub; empty: its newest. A folder has none."""
    sft_adapter: Operational[Location] = "adapters/sft"
    """The SFT LoRA adapter to improve: a folder or gs:// address."""
    load_in_4bit: bool = Field(True, description="Quantise the base to 4 bits (QLoRA).")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = Field("nf4", description="4-bit format of the base.")
    bnb_4bit_compute_dtype: ComputeType = Field("bfloat16", description="Compute type of the 4-bit base.")
    bnb_4bit_use_double_quant: bool = Field(True, description="Quantise the quantisation constants too.")
    beta: float = Field(0.1, gt=0, le=10, description="Strength of the pull to the reference; lower moves further.")
    loss_type: LossType = Field("sigmoid", description="DPO loss; sigmoid is standard.")
    sft_weight: float = Field(0.0, ge=0, le=10)
    """Weight of an added SFT loss on the chosen side (the DPO loss has weight 1); 1 keeps the format."""
    f_divergence: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = "reverse_kl"
    """Divergence from the reference; reverse_kl is standard DPO."""
    ld_alpha: float | None = Field(None, ge=0, le=1)
    """Weight of the tokens by which one side is longer than the other (LD-DPO); below 1 length pays less, empty: all
    tokens count alike."""
    use_weighting: bool = Field(False, description="Weight pairs by how probable the policy finds them (WPO).")
    router_aux_loss_coef: float = Field(0.0, ge=0, le=1)
    """Weight of the load-balancing loss of a mixture-of-experts base."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="Share of pairs taken to be flipped (robust loss).")
    measured_label_smoothing: bool = False
    """Take label_smoothing from the judge's measured flip rate (robust loss)."""
    learning_rate: float = Field(5e-6, gt=0, le=1, description="Peak learning rate.")
    num_train_epochs: float = Field(1.0, gt=0, le=100, description="Passes over the training pairs.")
    max_steps: int | None = Field(None, ge=1, description="Optimizer steps in all; overrides the epochs.")
    lr_scheduler_type: Schedule = Field("cosine", description="Learning-rate schedule after the warm-up.")
    warmup_steps: int = Field(20, ge=0)
    """Optimizer steps of linear warm-up; a run of no more steps takes a tenth of its own."""
    weight_decay: float = Field(0.0, ge=0, le=1, description="AdamW's weight decay.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradient clipping norm.")
    per_device_train_batch_size: int = Field(2, ge=1, le=512, description="Pairs in a micro-batch.")
    per_device_eval_batch_size: int = Field(1, ge=1, le=512, description="Pairs in an evaluation batch.")
    gradient_accumulation_steps: int = Field(8, ge=1, le=1024, description="Micro-batches in an optimizer step.")
    max_length: int = Field(2048, ge=16, description="Longest prompt + completion, in tokens; the rest is cut.")
    bf16: bool = Field(True, description="bfloat16 autocast on CUDA; the trained adapter itself is always fp32.")
    gradient_checkpointing: bool = True
    """Recompute activations: 30-50 % more time, and 4 pairs of 2048 tokens fit an L4 with a 3B model."""
    group_by_length: bool = Field(True, description="Fill micro-batches with pairs of like length: less padding.")
    disable_dropout: bool = True
    """Train without dropout, the adapter's and the base's, so that the policy starts exactly at the reference."""
    cache_reference: Operational[bool] = True
    """Compute the reference log-probs once and keep them; off: again in every step, same result."""
    full_determinism: Operational[bool] = False
    """Compute on a GPU so that equal work gives equal bytes, after a preemption too; slower."""
    eval_steps: int = Field(25, ge=1, description="Optimizer steps between evaluations.")
    save_steps: Operational[int] = Field(25, ge=1, description="Optimizer steps between checkpoints.")
    checkpoints: IfSet[int] = Field(0, ge=0, le=8)
    """Adapters that are kept of one training, evenly spaced over its steps, the last among them, for
    evaluation.checkpoints to choose from, which sets this too. 0: the last alone."""
    logging_steps: int = Field(10, ge=1, description="Optimizer steps between log lines.")
    seed: int = Field(42, ge=0, lt=2**31, description="Seed of shuffling and dropout.")
    report_to: Operational[Tracker] = Field("none", description="Experiment tracker.")
    num_processes: int = Field(1, ge=1, le=8)
    """Training processes (GPUs) on this machine, through accelerate."""
    grace_seconds: Operational[float] = Field(12, gt=0, le=600)
    """Time a preempted trainer gets to save, in seconds."""
    lease_seconds: Operational[float] = Field(60, ge=1, le=3600)
    """A trainer that gave no sign of life for so long, in seconds, is replaced by a waiting one."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        smoothed = [name for name in ("label_smoothing", "measured_label_smoothing") if getattr(self, name)]
        robust = self.loss_type == "robust"
        if smoothed and not robust:
            raise ValueError(f"{smoothed[0]} works with loss_type robust alone, not with {self.loss_type}")
        if robust and not smoothed:
            raise ValueError(
                "loss_type robust without smoothing is the sigmoid loss: set label_smoothing or "
                "measured_label_smoothing, or take loss_type sigmoid"
            )
        if self.loss_type == "apo_zero" and self.f_divergence != "reverse_kl":
            raise ValueError(f"loss_type apo_zero works with f_divergence reverse_kl, not {self.f_divergence}")
        if self.use_weighting and self.sft_weight:
            # trl 1.16 multiplies the SFT loss in place, which is one number for the whole batch: torch refuses that.
            raise ValueError(
                f"use_weighting and sft_weight ({self.sft_weight:g}) do not go together: trl cannot weight the SFT "
                "loss. Set sft_weight to 0, or use_weighting to false"
            )
        if self.bnb_4bit_quant_type != "nf4" and not self.load_in_4bit:
            raise ValueError(f"bnb_4bit_quant_type {self.bnb_4bit_quant_type} does nothing without load_in_4bit")
        if self.max_steps is not None and self.warmup_steps > self.max_steps:
            raise ValueError(f"warmup_steps ({self.warmup_steps}) is more than max_steps ({self.max_steps})")
        return self
