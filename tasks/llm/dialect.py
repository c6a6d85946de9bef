"""What an endpoint takes of a chat request: found out once, from what it refuses by name, and said."""

import logging
import re
from typing import Any, TypeAlias

from tasks.llm.responses import PERMANENT, RequestRefused, Transient

log = logging.getLogger(__name__)
# A chat request as JSON, under the names that endpoints have for its parts.
Body: TypeAlias = dict[str, Any]

# What a request can do without, and the words that endpoints have for it.
OPTIONAL = {
    "temperature": r"temperature",
    "top_p": r"\btop_?p\b",
    "frequency_penalty": r"frequency_?penalty",
    "seed": r"(?<!-)\bseed\b(?!-)",  # not the models of that name, such as doubao-seed-1-6
    "return_token_ids": r"return_token_ids",
    "chat_template_kwargs": r"chat_template_kwargs",
    # vLLM's words without --trust-request-chat-template.
    "chat_template": r"chat_template(?!_kwargs)|trust-request-chat-template",
    "reasoning_effort": r"reasoning[_.]?effort|thinking[_ ]?(budget|level)",
    "response_format": r"response_?(format|schema)|json_?schema|structured output|guided|grammar|additionalProperties",
    "n": r"[`'\"]n[`'\"]|\bn ?[:=<>]|\bn (must|should|has to|is|are|exceeds)|\bn$|\bbody\.n\b"
    r"|only one (completion|choice|candidate)|candidate_?count|num_return_sequences|best_of"
    r"|(multiple|number of) (candidates|choices|completions)",
}
_LIMIT = re.compile(
    r"max(imum)?[_ ]?(completion|output|new)?[_ ]?tokens|(completion|output)[_ ]tokens?[_ ]limit", re.IGNORECASE
)
_SYSTEM = re.compile(
    r"(system|developer)['\"]? (role|message|prompt|instruction)s?\b.{0,40}\bnot\b|roles must alternate"
    r"|not support (a |the )?['\"]?(system|developer)\b|['\"](system|developer)['\"] is not"
    r"|(unexpected|invalid|unsupported|unknown|unrecognized) (message )?(role|value)s?\W{1,4}(system|developer)\b"
    r"|only (the )?user and (assistant|model) roles|valid role: user|must (start|begin) with a user"
    r"|\brole\W.{0,20}should be '?user\b",
    re.IGNORECASE,
)
FEWEST_TOKENS = 16
# A response_format that was never answered is left out once after so many failures of the server (status 5xx).
FORMAT_FAILURES = 3
# Refusals that have nothing to do with the request's settings.
CERTAIN = PERMANENT | {"not_found", "cut", "keeps_failing", "over_a_minute", "moved"}


class Dialect:
    """How a chat request must look for one endpoint: a setting it refuses is left out from then on."""

    def __init__(self, model: str) -> None:
        self._model = model
        self.dropped: set[str] = set()
        self._most_tokens: int | None = None
        self._limit_name = "max_tokens"
        self._system_role = True
        self._format_taken = False

    def shape(self, body: Body) -> Body:
        """Return `body` as the endpoint takes it."""
        shaped = {name: value for name, value in body.items() if name not in self.dropped and name != "max_tokens"}
        if limit := body.get("max_tokens"):
            shaped[self._limit_name] = self.allowed_tokens(limit)
        if not self._system_role:
            shaped["messages"] = _without_system(body["messages"])
        return shaped

    def refused(self, body: Body, sent: Body) -> tuple[str, ...]:
        """Name what was asked for in `body` and not `sent` so, for the endpoint refuses it."""
        names = [name for name in body if name not in sent and name != "max_tokens"]
        if (limit := sent.get(self._limit_name)) and limit < body.get("max_tokens", limit):
            names.append(f"max_tokens over {limit}")
        if sent["messages"] is not body["messages"] and sent["messages"] != body["messages"]:
            names.append("system role")
        return tuple(sorted(names))

    def allowed_tokens(self, wanted: int) -> int:
        """Return `wanted`, or the most completion tokens that the endpoint allows."""
        return min(wanted, self._most_tokens or wanted)

    def took(self, sent: Body) -> None:
        """Note that a request was answered."""
        self._format_taken = self._format_taken or "response_format" in sent

    def blames_format(self, sent: Body, failure: Transient, failures: int) -> bool:
        """Tell whether a server's failure is put down to the response_format: it says so, or goes on."""
        says_so = re.search(OPTIONAL["response_format"], str(failure), re.IGNORECASE)
        return failure.status >= 500 and self.doubts_format(sent) and bool(says_so or failures >= FORMAT_FAILURES)

    def doubts_format(self, sent: Body) -> bool:
        """Tell whether a failure may be due to the response_format: no request that has it was answered yet."""
        return "response_format" in sent and not self._format_taken

    def learned_since(self, body: Body, sent: Body) -> bool:
        """Tell whether `body` would be sent otherwise by now: the refusal of another request has told more."""
        now = self.shape(body)
        return any(now.get(name) != value for name, value in sent.items())

    def learn(self, refused: RequestRefused, sent: Body) -> bool:
        """Change what a refusal of `sent` asks to change; False if it names nothing that can be changed."""
        text = refused.text
        if refused.reason in CERTAIN or "greedy" in text:
            return False
        if "max_completion_tokens" in text and "max_tokens" in sent and self._limit_name == "max_tokens":
            self._limit_name = "max_completion_tokens"
            return self._say("wants max_tokens by the name max_completion_tokens")
        if self._system_role and _SYSTEM.search(text) and sent["messages"][0]["role"] == "system":
            self._system_role = False
            return self._say("takes no system role: its text opens the user's message")
        limit = sent.get(self._limit_name)
        if limit and limit > FEWEST_TOKENS and (_LIMIT.search(refused.param) or _LIMIT.search(text)):
            figures = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text.replace(self._model, " "))
            told = [int(number) for number in re.findall(r"\b\d{2,9}\b", figures)]
            told = [number for number in told if FEWEST_TOKENS <= number < limit]
            self._most_tokens = max(told, default=max(FEWEST_TOKENS, limit // 2))
            return self._say(f"allows at most {self._most_tokens} completion tokens")
        for said in filter(None, (refused.param, text)):
            named = [
                name for name, words in OPTIONAL.items()
                if name in sent and (said.strip() == name or re.search(words, said, re.IGNORECASE))
            ]  # fmt: skip
            if named:
                # Of temperature and top_p together some take either: the first is the one that matters.
                return self.drop("top_p" if {"top_p", "temperature"} <= set(named) else named[0])
        return False

    def drop(self, name: str) -> bool:
        """Leave `name` out from now on."""
        self.dropped.add(name)
        return self._say({"n": "gives one completion a request: one is asked for each"}.get(name, f"takes no {name}"))

    def _say(self, what: str) -> bool:
        log.warning("%s %s (found out from its refusal; so for the rest of this run)", self._model, what)
        return True


def _without_system(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """Return messages whose system texts stand at the beginning of the first user message."""
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    others = [dict(message) for message in messages if message["role"] != "system"]
    first = next((message for message in others if message["role"] == "user"), None)
    if first is None:
        return [{"role": "user", "content": system}, *others]
    first["content"] = f"{system}\n\n{first['content']}" if system else first["content"]
    return others
