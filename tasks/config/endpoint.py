"""An OpenAI-compatible endpoint: address, limits, prices."""

import os
from typing import Self

from pydantic import Field, JsonValue, model_validator

from tasks.config.base import ADDRESS, IfSet, Operational, SecretName, StageConfig

# On a cluster more than the ten minutes: there a model's node may be taken away, and a new one takes its time to come.
OUTAGE_SECONDS = float(os.environ.get("PREFLOW_MAX_OUTAGE_SECONDS", "600"))

# Of a request: what it asks, how often, and in which form it is answered.
_OWN_FIELDS = frozenset({"model", "messages", "n", "stream"})


class EndpointConfig(StageConfig):
    """How to reach a model behind an OpenAI-compatible address."""

    endpoint: Operational[str] = Field("http://127.0.0.1:8000/v1", pattern=ADDRESS)
    """Base URL of the OpenAI-compatible endpoint; usually ends in /v1."""
    model: str = Field("sft", min_length=1, description="Name under which the endpoint serves the model.")
    api_key: Operational[SecretName | None] = None
    """Where the key is: env:NAME, the name of a Prefect Secret block, or gcp-secret:NAME for a GcpSecret block (Google
    Secret Manager). Never the key itself."""
    max_concurrency: Operational[int] = Field(32, ge=1, le=4096)
    """Requests in flight at once, at most (a sliding window)."""
    request_timeout_seconds: Operational[float] = Field(300, gt=0, le=3600)
    """Time limit of one attempt, in seconds."""
    max_outage_seconds: Operational[float] = Field(OUTAGE_SECONDS, ge=0, le=86_400)
    """How long an endpoint that is down or refuses with 429/5xx is waited for, in seconds."""
    requests_per_minute: Operational[int | None] = Field(None, ge=1)
    """Hard cap on requests per minute; empty: none."""
    tokens_per_minute: Operational[int | None] = Field(None, ge=1)
    """Hard cap on tokens per minute; empty: none."""
    reasoning_effort: IfSet[str | None] = Field(None, pattern=r"^[a-z]+$")
    """How much a model thinks before it answers (none, minimal, low, medium, high); empty: not sent."""
    extra_body: IfSet[dict[str, JsonValue]] = Field({})
    """Further fields of every request, as the endpoint names them, such as {"chat_template_kwargs": {"enable_thinking":
    false}}."""
    extra_headers: Operational[dict[str, SecretName]] = Field({})
    """Further headers of every request; a value is env:NAME or the name of a Prefect Secret block."""
    prompt_price: Operational[float] = Field(0.0, ge=0, description="Price of a million prompt tokens, in US$.")
    completion_price: Operational[float] = Field(0.0, ge=0)
    """Price of a million completion tokens (thinking included), in US$."""
    budget_usd: Operational[float | None] = Field(None, gt=0)
    """Stop before this stage costs more than this, in US$; empty: no limit."""
    shard_size: Operational[int | None] = Field(None, ge=1, le=1000)
    """Prompts in a shard (one Prefect task run); empty: chosen by the row count."""
    max_failure_ratio: Operational[float] = Field(0.01, ge=0, le=1)
    """Share of prompts that may fail for good before the stage fails."""

    def __hash__(self) -> int:
        """Hash by content: `extra_body` is a dict, which pydantic's own hash does not take."""
        return hash(self.model_dump_json())

    @model_validator(mode="after")
    def _check_limits(self) -> Self:
        if self.budget_usd is not None and not (self.prompt_price or self.completion_price):
            raise ValueError(
                f"budget_usd is {self.budget_usd:g} for {self.model}, but prompt_price and completion_price are 0, so "
                "nothing could be counted: set the prices, or leave budget_usd empty"
            )
        if taken := sorted(_OWN_FIELDS & self.extra_body.keys()):
            raise ValueError(f"extra_body: {', '.join(taken)} would replace what preflow asks; take it out")
        most = getattr(self, "max_tokens", 0)
        if self.tokens_per_minute is not None and self.tokens_per_minute < most:
            raise ValueError(
                f"tokens_per_minute ({self.tokens_per_minute}) is less than max_tokens ({most}): a single answer may "
                "be over the cap; lower max_tokens or raise tokens_per_minute"
            )
        return self
