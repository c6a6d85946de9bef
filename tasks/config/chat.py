"""How messages become the model's tokens: the same in sampling, training and serving."""

from pydantic import Field, JsonValue

from tasks.config.base import MaybeLocation, Operational, StageConfig


class ChatSettings(StageConfig):
    """The chat template with what is handed to it, and the texts that end an answer."""

    chat_template: Operational[MaybeLocation] = None  # its content is part of every key
    """File with the chat template (a path or gs:// address), where neither the adapter nor the base model brings the
    right one. The server must speak with it too (vLLM: --chat-template), or take it from a request
    (--trust-request-chat-template)."""
    chat_template_kwargs: dict[str, JsonValue] = Field(default_factory=dict)
    """Handed to the chat template, e.g. {"enable_thinking": false}."""
    # Llama 3.2's own date where it knows no clock.
    date_string: str = Field("26 Jul 2024", pattern=r"^\d{2} (Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec) \d{4}$")
    """The date for chat templates that write one: fixed, so that all prompts of a run say the same."""
    stop: tuple[str, ...] = Field((), max_length=16, description="Texts at which sampling ends an answer.")

    def __hash__(self) -> int:
        return hash(self.model_dump_json())

    def template_kwargs(self) -> dict[str, JsonValue]:
        """Return what the chat template is handed."""
        return {"date_string": self.date_string, **self.chat_template_kwargs}
