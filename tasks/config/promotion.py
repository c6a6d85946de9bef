"""The gate, serving, and publishing."""

from pydantic import Field

from tasks.config.base import ADDRESS, Operational, SecretName, StageConfig


class PromotionConfig(StageConfig):
    """The gate, and where the adapter is served when it has passed."""

    name: str = Field("dpo", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name under which clients know the adapter."""
    min_win_rate: float = Field(0.5, ge=0, lt=1)
    """Bar: the lower bound of the win rate's interval must be over it."""
    min_agreement: float = Field(0.0, ge=0, lt=1)
    """Bar for the judge's agreement with a person (preflow label): the lower bound of its interval must be over it. 0.5
    is chance; 0: no labels are needed."""
    endpoint: Operational[str | None] = Field("http://127.0.0.1:8000/v1", pattern=ADDRESS)
    """vLLM that is to serve it at once; empty: only the workspace's pointer moves."""
    api_key: Operational[SecretName | None] = None
    """Where vLLM's key is: env:NAME, a Prefect Secret block, or gcp-secret:NAME for a GcpSecret block."""
    adapter_root: Operational[str | None] = None
    """Folder under which the vLLM server sees the workspace, where that differs from here."""


class PublishingConfig(StageConfig):
    """Where an adapter is published on the Hugging Face hub, and what its card cannot know from the manifests."""

    repo: str = Field("", pattern=r"^([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)?$")
    """Repository on the hub, owner/name; made if it is not there."""
    private: bool = Field(True, description="Make a new repository private; one that is there stays as it is.")
    evidence: bool = False
    """Also upload evidence.json, from which anyone can recompute the win rate: it holds the held-out prompts, what was
    written on them, and every vote."""
    token: Operational[SecretName] = "env:HF_TOKEN"
    """Where the hub's write token is: env:NAME or the name of a Prefect Secret block. Never the token."""
    base_model: str | None = Field(None, pattern=r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
    """The base model's name on the hub, for the card. Empty: training.base_model, if that is one."""
    license: str | None = Field(None, pattern=r"^[a-z0-9][a-z0-9.-]*$")
    """The hub's identifier of a license, e.g. llama3.2."""
