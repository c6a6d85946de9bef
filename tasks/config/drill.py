"""A training that is preempted on purpose."""

from typing import Self

from pydantic import Field, model_validator

from tasks.config.base import MaybeLocation, ModelLocation, StageConfig


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
    base_model: ModelLocation | None = Field(
        None, description="Base model to train on; empty: a tiny one, made for the drill."
    )
    sft_adapter: MaybeLocation = Field(None, description="Its SFT adapter; empty: a tiny one, made for the drill.")
    pairs: MaybeLocation = Field(None, description="Preference pairs, a train.jsonl; empty: a few, made for the drill.")
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
