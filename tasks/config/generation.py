"""Sampling of completions."""

import re
from typing import Self

from pydantic import Field, model_validator

from tasks.config.base import MaybeLocation, Operational
from tasks.config.chat import ChatSettings
from tasks.config.endpoint import EndpointConfig


class GenerationConfig(ChatSettings, EndpointConfig):
    """Sampling of completions from the SFT model."""

    adapter: Operational[MaybeLocation] = None
    """Folder (or gs:// address) of the adapter that `model` names; its digest identifies the completions. Empty: the
    pipeline takes training.sft_adapter; alone, the model's name must do."""
    serve_from: Operational[str | None] = None
    """Folder, as vLLM sees it, from which the adapter is loaded under `model` while sampling, and unloaded afterwards.
    Empty: the endpoint serves `model` already."""
    num_completions: int = Field(3, ge=1, le=64, description="Completions per prompt; judging needs at least 2.")
    temperature: float = Field(0.9, ge=0, le=2, description="Sampling temperature; 0.8-1.0 is the useful range.")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus sampling: share of the probability mass kept.")
    max_tokens: int = Field(256, ge=1, le=32_768, description="Longest completion, in tokens.")
    frequency_penalty: float = Field(0.5, ge=-2, le=2, description="Penalty on repeated tokens; 0.3-0.7 is usual.")
    seed: int = Field(42, ge=0, lt=2**31, description="Seed of every sample: the same seed gives the same completions.")
    keep_lines: str | None = None
    r"""Regular expression; only lines it matches are kept, e.g. ^\[[A-Z]+\] . Empty: all lines."""
    keep_empty: bool = False
    """Keep a prompt on which every completion is empty. The evaluation does: there silence loses."""

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
