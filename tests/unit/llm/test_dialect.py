"""What an endpoint takes is found out from the words that providers refuse with."""

from typing import Any

import pytest

from tasks.llm.dialect import Dialect
from tasks.llm.responses import RequestRefused

MESSAGES = [{"role": "system", "content": "Judge."}, {"role": "user", "content": "This."}]
BODY: dict[str, Any] = {
    "model": "m", "messages": MESSAGES, "temperature": 0.0, "top_p": 0.9, "seed": 7, "n": 3, "max_tokens": 1024,
    "response_format": {"type": "json_schema"}, "reasoning_effort": "low", "return_token_ids": True,
    "chat_template": "{{ messages }}", "chat_template_kwargs": {"date_string": "26 Jul 2024"},
}  # fmt: skip


def refusal(text: str, param: str = "") -> RequestRefused:
    return RequestRefused(400, "bad_request", text, param)


@pytest.mark.parametrize(
    ("text", "param", "dropped"),
    [
        ("Unsupported parameter: 'temperature' is not supported.", "temperature", "temperature"),
        ("Unsupported value: 'temperature' does not support 0. Only the default (1) is.", "", "temperature"),
        ("body.seed extra fields not permitted", "", "seed"),
        ("Extra inputs are not permitted", "seed", "seed"),
        ("`temperature` and `top_p` cannot both be specified for this model", "", "top_p"),
        ("Invalid JSON payload: Unknown name \"additionalProperties\" at 'generation_config.response_schema'", "",
         "response_format"),
        ("This response_format type is unavailable now", "", "response_format"),
        ("json_schema is not supported", "response_format.type", "response_format"),
        ("Failed to parse grammar", "", "response_format"),
        ("`json_schema` is not supported by doubao-seed-1-6 (bytedance-seed/seed-1.6)", "", "response_format"),
        ("Only one completion choice is allowed", "", "n"),
        ("'n' must be 1", "", "n"),
        ("This model does not support n>1", "", "n"),
        ("Unsupported parameter: n", "", "n"),
        ("body.n Extra inputs are not permitted", "", "n"),
        ("Only one candidate can be specified", "", "n"),
        ("candidateCount must be in the range of 1 to 1", "", "n"),
        ("Unrecognized request argument supplied: reasoning_effort", "", "reasoning_effort"),
        ("Unrecognized request argument supplied: return_token_ids", "", "return_token_ids"),
        ("body.chat_template_kwargs: Extra inputs are not permitted", "", "chat_template_kwargs"),
        ("Chat template is passed with request, but --trust-request-chat-template is not set. Refused request with "
         "untrusted chat template.", "", "chat_template"),
    ],
)  # fmt: skip
def test_a_setting_that_is_refused_by_name_is_left_out(text: str, param: str, dropped: str) -> None:
    dialect = Dialect("m")
    assert dialect.learn(refusal(text, param), dialect.shape(BODY))
    assert set(BODY) - set(dialect.shape(BODY)) == {dropped}
    assert dialect.refused(BODY, dialect.shape(BODY)) == (dropped,)


@pytest.mark.parametrize(
    "refused",
    [
        refusal("Invalid request"),
        refusal("An error in the chat template: the first message must be the user's"),
        refusal("messages: at least one message is required"),
        refusal("n must be 1 when using greedy sampling"),
        refusal("the generation was stopped, for its seedbed is too large"),
        RequestRefused(400, "context_length", "max_tokens: 8000 tokens in all"),
        RequestRefused(404, "not_found", "The model `n` does not exist"),
        RequestRefused(400, "content_filter", "seed"),
    ],
)
def test_other_refusals_change_nothing(refused: RequestRefused) -> None:
    dialect = Dialect("m")
    assert not dialect.learn(refused, dialect.shape(BODY))
    assert dialect.shape(BODY) == BODY


def test_a_refusal_that_goes_on_after_all_was_left_out_ends() -> None:
    dialect, refused = Dialect("m"), refusal("temperature, top_p, seed and max_tokens are refused")
    assert sum(1 for _ in iter(lambda: dialect.learn(refused, dialect.shape(BODY)), False)) < 30


@pytest.mark.parametrize(
    ("text", "most"),
    [
        ("max_tokens is too large: 1024. This model supports at most 512 completion tokens.", 512),
        ("max_tokens: 1024 > 400, which is the maximum allowed number of output tokens", 400),
        ("Invalid max_tokens value, the valid range of max_tokens is [1, 800]", 800),
        ("maxOutputTokens value of 1024 but the supported range is from 1 (inclusive) to 1000 (exclusive)", 1000),
        ("max_tokens is too large: 1,024. This model supports at most 1,000 completion tokens", 1000),
        ("`max_new_tokens` must be <= 800. Given: 1024", 800),
        ("max_tokens is too large", 512),
        ("max_tokens must be at most 1,000", 1000),
        ("4000 exceeds the model's output token limit of 512", 512),
        ("too many tokens: max tokens must be less than or equal to 400", 400),
        ("The maximum tokens you requested exceeds the model limit of 512. Try again with a lower value.", 512),
        ("`max_tokens` must be less than or equal to `64`, for gpt-2024-08", 64),
    ],
)
def test_a_limit_that_is_too_high_is_lowered_to_what_is_allowed(text: str, most: int) -> None:
    dialect = Dialect("gpt-2024-08")
    assert dialect.learn(refusal(text), dialect.shape(BODY))
    assert dialect.shape(BODY)["max_tokens"] == dialect.allowed_tokens(4000) == most
    assert dialect.refused(BODY, dialect.shape(BODY)) == (f"max_tokens over {most}",)


def test_max_tokens_has_another_name_for_newer_models() -> None:
    dialect = Dialect("m")
    text = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
    assert dialect.learn(refusal(text, "max_tokens"), dialect.shape(BODY))
    assert dialect.shape(BODY)["max_completion_tokens"] == 1024
    assert "max_tokens" not in dialect.shape(BODY)
    assert dialect.refused(BODY, dialect.shape(BODY)) == ()
    assert dialect.learn(refusal("max_completion_tokens is too large: at most 300"), dialect.shape(BODY))
    assert dialect.shape(BODY)["max_completion_tokens"] == 300


@pytest.mark.parametrize(
    "text",
    ["System role not supported", "Developer instruction is not enabled for models/gemma-3-27b-it",
     "Conversation roles must alternate user/assistant", "system messages are not allowed",
     "Only user and assistant roles are supported!", "Unexpected role: system", "role 'system' is not supported",
     "'system' is not one of ['user', 'assistant'] - 'messages.0.role'", "This model does not support system messages",
     "Unsupported value: 'messages[0].role' does not support 'system' with this model.",
     "Unexpected message role: 'system'",
     "body.messages.0.role Input should be 'user' or 'assistant'",
     "Invalid value: 'system'. Supported values are: 'user' and 'assistant'.", "Please use a valid role: user, model."],
)  # fmt: skip
def test_without_a_system_role_its_text_opens_the_user_s_message(text: str) -> None:
    dialect = Dialect("m")
    assert dialect.learn(refusal(text), dialect.shape(BODY))
    assert dialect.shape(BODY)["messages"] == [{"role": "user", "content": "Judge.\n\nThis."}]
    assert MESSAGES[1]["content"] == "This."
    assert dialect.refused(BODY, dialect.shape(BODY)) == ("system role",)
    user = {**BODY, "messages": MESSAGES[1:]}
    assert dialect.refused(user, dialect.shape(user)) == ()
    assert not dialect.learn(refusal(text), dialect.shape(BODY))
