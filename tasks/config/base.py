"""What all configuration has in common: frozen models, secret names, titles of the form's fields."""

import os
import re
from pathlib import Path
from typing import Annotated, Any, TypeVar
from urllib.parse import unquote, urlparse

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, WithJsonSchema

from tasks.errors import LocationError

# A JSON schema, or a part of one.
Schema = dict[str, Any]

# Whole titles, where a field's name alone would not do.
TITLES = {
    "adapter_root": "Workspace as the server sees it",
    "api_key": "API key (name of the secret)",
    "bf16": "bfloat16 autocast",
    "bnb_4bit_compute_dtype": "4-bit base: compute type",
    "bnb_4bit_quant_type": "4-bit base: format",
    "bnb_4bit_use_double_quant": "4-bit base: double quantisation",
    "budget_usd": "Budget of the stage (US$)",
    "chat_template": "Chat template (file)",
    "chat_template_kwargs": "Arguments of the chat template",
    "completion_price": "Price of completion tokens (US$ per million)",
    "confidence": "Confidence of the interval",
    "date_string": "Date in the chat template",
    "endpoint": "Endpoint (base URL)",
    "eval_prompts": "Held-out prompts (JSONL)",
    "eval_steps": "Evaluate every (optimizer steps)",
    "generation": "Generation: sampling",
    "judges": "Second opinion: other judges",
    "judging": "Judging: the judge and the pairs",
    "evaluation": "Evaluation: proof on held-out prompts",
    "training": "Training: DPO",
    "promotion": "Promotion: gate and serving",
    "f_divergence": "Divergence from the reference",
    "ld_alpha": "Weight of surplus tokens (LD-DPO)",
    "router_aux_loss_coef": "Weight of the router's loss (MoE)",
    "use_weighting": "Weight pairs (WPO)",
    "keep_empty": "Keep prompts without an answer",
    "keep_lines": "Lines to keep (regular expression)",
    "leave_out_cut": "Leave out pairs with a cut side",
    "load_in_4bit": "Load the base in 4 bits (QLoRA)",
    "logging_steps": "Log every (optimizer steps)",
    "loss_type": "DPO loss",
    "lr_scheduler_type": "Learning-rate schedule",
    "max_attempts": "Attempts per verdict",
    "max_concurrency": "Requests in flight, at most",
    "max_failure_ratio": "Failures allowed (share of prompts)",
    "max_grad_norm": "Gradient clipping norm",
    "max_length": "Longest prompt + completion (tokens)",
    "max_outage_seconds": "Longest outage waited for (s)",
    "max_prompts": "Held-out prompts, at most",
    "max_steps": "Optimizer steps in all",
    "max_tokens": "Longest answer (tokens)",
    "measured_label_smoothing": "Label smoothing as measured",
    "min_agreement": "Bar for the agreement with a person",
    "min_chosen_score": "Score of the chosen side, at least (1-10)",
    "min_confidence": "Confidence of a pair, at least (1-5)",
    "min_win_rate": "Bar for the win rate's lower bound",
    "name": "Name it is served under",
    "null_test": "Null test: SFT against itself",
    "num_completions": "Completions per prompt",
    "num_processes": "Training processes (GPUs)",
    "num_samples": "Samples per prompt and adapter",
    "num_train_epochs": "Epochs",
    "orders": "Orders each prompt is judged in",
    "panel": "Panel: further judges",
    "per_device_eval_batch_size": "Evaluation batch (pairs)",
    "per_device_train_batch_size": "Micro-batch (pairs)",
    "gradient_accumulation_steps": "Micro-batches in an optimizer step",
    "prompt_price": "Price of prompt tokens (US$ per million)",
    "prompts": "Prompts (JSONL)",
    "rejected_sigmas": "Rejected: standard deviations below the mean",
    "report_to": "Experiment tracker",
    "requests_per_minute": "Requests per minute, at most",
    "save_steps": "Checkpoint every (optimizer steps)",
    "serve_from": "Adapter folder as vLLM sees it",
    "shard_size": "Prompts in a shard",
    "sft_weight": "Weight of the SFT loss",
    "size": "Size (bytes)",
    "stop": "Stop texts",
    "tokens_per_minute": "Tokens per minute, at most",
    "unsure_for_sft": "Unsure verdicts for the SFT term",
    "val_ratio": "Held-out share of the pairs",
    "val_rows": "Held-out pairs",
    "warmup_steps": "Warm-up (optimizer steps)",
}
WORDS = {"sft": "SFT", "dpo": "DPO", "uri": "URI", "sha256": "SHA-256", "seconds": "(s)"}


def field_title(name: str, _: Any) -> str:
    """Return the title of the field `name`, for pydantic's `field_title_generator`."""
    if name in TITLES:
        return TITLES[name]
    title = " ".join(WORDS.get(word, word) for word in name.split("_"))
    return title[:1].upper() + title[1:]


# Fields that do not change what a stage produces (addresses, concurrency, keys, prices) carry this mark: they stay
# out of `identity()`, and so out of every cache key.
_OPERATIONAL = "operational"
# Fields with this mark are part of `identity()` only where they are set: a setting that came later leaves the keys of
# those who do not use it as they were.
_IF_SET = "if set"
T = TypeVar("T")
Operational = Annotated[T, _OPERATIONAL]
IfSet = Annotated[T, _IF_SET]


# What refuses a literal key where the name of one belongs. The pattern stands in the form's schema too, so that a
# server refuses a key before it stores it: what pydantic refuses is in the database by then. Refused are the prefixes
# of known keys, and what looks random: letters and digits in turns, long hexadecimal runs, a very long word.
_PREFIX = (
    r"(?:sk|pk|rk|xai|csk|pplx|nvapi|glpat)-|(?:sk|pk|rk)_(?:live|test)|(?:sk|hf|gsk|r8|fw|ghp|github_pat)_[A-Za-z0-9]{8}"
    r"|gsk-|(?:key|tok|token|api)[-_][a-z]*\d{6}|AIza|AKIA|eyJ"
)
_WORD = r"(?:[A-Za-z0-9_-]*[-_])?"  # the words before the one that is looked at
_TURNS = r"[A-Za-z]*\d+[A-Za-z]+\d+[A-Za-z]"
_RANDOM = (
    rf"{_WORD}(?:(?=[A-Za-z0-9]{{20}}){_TURNS}|(?=[A-Za-z0-9]{{16}}){_TURNS}+\d|[A-Za-z0-9]{{29}})"
    r"|[0-9a-fA-F-]{32}|.{65}"
)
SECRET_NAME = (
    rf"^(?!(?:env:|gcp-secret:)?(?:{_PREFIX}|{_RANDOM}))"
    r"(?:env:[A-Za-z_][A-Za-z0-9_]*|(?:gcp-secret:)?[a-z0-9][a-z0-9-]*)$"
)


def _check_secret_name(value: str) -> str:
    if not re.fullmatch(SECRET_NAME, value):
        raise ValueError(
            "must name a secret, and this looks like a key itself: write env:NAME for an environment variable, the "
            "name of a Prefect Secret block (lower-case words with dashes between them), or gcp-secret:NAME for a "
            "GcpSecret block"
        )
    return value


SecretName = Annotated[
    str, AfterValidator(_check_secret_name), WithJsonSchema({"type": "string", "pattern": SECRET_NAME})
]

# An address without a user, a password or a key in it: it is stored and logged. Azure's has a query, api-version=DATE:
# a date is no key, nor is what is named a version, a deployment, a model or a region.
_DATE = r"[A-Za-z_-]+=[0-9]{4}-[0-9]{2}-[0-9]{2}(?:-preview)?"
_SETTING = rf"(?:{_DATE}|[A-Za-z_-]*(?:version|deployment|model|region)=[A-Za-z0-9._-]{{1,24}})"
ADDRESS = rf"^https?://[^\s@?#]+(?:\?{_SETTING}(?:&{_SETTING})*)?$"


def secrets_by_name(depth: int = 3) -> Schema:
    """Return a JSON schema for free-form settings, in which whatever is called a key or token must name a secret."""
    secret = {"anyOf": [{"type": "string", "pattern": SECRET_NAME}, {"type": "null"}]}
    listed = {"anyOf": [*secret["anyOf"], {"type": "array", "items": secret}]}
    inner = secrets_by_name(depth - 1) if depth else {}
    return {"patternProperties": {r"(^|\.)(api_key|token)$": listed}, "additionalProperties": inner, "items": inner}


# An address without one of its slashes, a path of Windows: folders of such names would be made here.
_MISWRITTEN = re.compile(r"(gs|s3|hf|file|https?):/?[^/]|[A-Za-z]:[\\/]|\\\\")


def resolve_location(value: str) -> str:
    """Return a path or address as it is used everywhere: a path is absolute, and `~` and file:// are resolved."""
    if _MISWRITTEN.match(value):
        raise LocationError(f"{value}: write gs://bucket/prefix, or a path of this machine with /")
    if value.startswith("file://"):
        value = unquote(urlparse(value).path)
    if "://" in value:
        return value.rstrip("/") if urlparse(value).netloc else value
    return str(Path(os.path.expanduser(value)).absolute())  # ~nobody stays as it is


def _resolve_model(value: str) -> str:
    """Resolve the path of a model's folder; a hub's name stays as it is."""
    is_folder = value.startswith((".", "/", "~", "file://")) or Path(value).is_dir()
    return resolve_location(value) if is_folder else value


def _resolve_rubric(value: str) -> str:
    """Resolve the path of a rubric; the name of one of ours stays as it is."""
    return value if re.fullmatch(r"[\w-]+", value) else resolve_location(value)


# A path or a gs:// address, a base model's folder or hub name, and a rubric's name or path.
Location = Annotated[str, Field(min_length=1), AfterValidator(resolve_location)]
MaybeLocation = Annotated[Location | None, BeforeValidator(lambda value: None if value == "" else value)]
ModelLocation = Annotated[str, Field(min_length=1), AfterValidator(_resolve_model)]
RubricLocation = Annotated[str, Field(min_length=1), AfterValidator(_resolve_rubric)]


def _explain_form(schema: Schema) -> None:
    """Add each field's bounds to its help, and call nothing what the form does: None."""
    for field in schema.get("properties", {}).values():
        kinds = field.get("anyOf", [field])
        bounds = " ".join(filter(None, map(_bounds, kinds)))
        text = " ".join(str(field.get("description", "")).split())
        if {"type": "null"} in kinds:
            text = re.sub(r"\bempty: none\b", "None: no limit", text)
            text = re.sub(r"\b[Ee]mpty: ", "None: ", text)
        field["description"] = f"{text} {bounds}".strip()


def _bounds(kind: Schema) -> str:
    """Return what a number may be, as a sentence."""
    low, high = kind.get("minimum"), kind.get("maximum")
    if low is not None and high is not None:
        return f"{low:,} to {high:,}."
    named = {"minimum": "at least", "exclusiveMinimum": "over", "maximum": "at most", "exclusiveMaximum": "below"}
    found = ", ".join(f"{words} {kind[name]:,}" for name, words in named.items() if name in kind)
    return f"{found[:1].upper()}{found[1:]}." if found else ""


class StageConfig(BaseModel):
    """Base of all configuration: frozen, no unknown fields, and errors that never print a value (it might be a key).

    A field's help in the form is its `description`, or the text below it.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        hide_input_in_errors=True,
        validate_default=True,
        allow_inf_nan=False,
        field_title_generator=field_title,
        use_attribute_docstrings=True,
        json_schema_extra=_explain_form,
    )

    def identity(self) -> dict[str, JsonValue]:
        """Return the settings that determine the stage's output, JSON-ready, for its content key."""
        left_out = {
            name
            for name, field in type(self).model_fields.items()
            if _OPERATIONAL in field.metadata or (_IF_SET in field.metadata and not getattr(self, name))
        }
        settings = self.model_dump(mode="json", exclude=left_out)
        for name, value in self:
            if name in settings and isinstance(value, tuple):
                settings[name] = [item.identity() if isinstance(item, StageConfig) else item for item in value]
        return settings
