"""The seeded plan of a fake endpoint: which attempt at which request goes wrong, and how."""

import hashlib
import random
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict

Fault = Literal[
    "rate_limit",  # 429 without Retry-After
    "rate_limit_after",  # 429 with Retry-After: `retry_after` seconds
    "error_500",
    "unavailable",  # 503; with `burst`, the requests that follow get it too
    "reset_headers",  # connection reset in the middle of the response's headers
    "reset_body",  # connection reset in the middle of the body
    "slow",  # answered after `slow_seconds`
    "hang",  # never answered
    "broken_json",  # 200, and a body that stops in the middle
]
VerdictFault = Literal[
    "fences",
    "text_around",
    "thinking",
    "trailing_comma",
    "strings",  # numbers as strings
    "empty",
    "length",  # cut, finish_reason "length"
    "same",  # best == worst
    "out_of_range",
]
FAULTS, VERDICT_FAULTS = get_args(Fault), get_args(VerdictFault)
T = TypeVar("T", bound=str)


@dataclass(frozen=True)
class Outage:
    """From the `after`-th chat request on, for `seconds`: no connection ("refuse"), "503", or no answer ("hang")."""

    after: int
    seconds: float
    kind: str = "refuse"


class Plan(BaseModel):
    """All that a fake endpoint does; the defaults are a healthy, instant one.

    Faults are shares of attempts (name: probability). Which attempt is hit depends only on `seed`, the request's body
    and how often that body has come before.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: int = 0
    samplers: tuple[str, ...] = ("sampler", "sft", "dpo")
    max_model_len: int = 8192
    base: str | None = None  # folder of the served model, whose tokenizer and chat template /tokenize speaks with
    key: str | None = None  # the only accepted API key; None: any or none
    latency_ms: float = 0.0  # median of a log-normal
    latency_sigma: float = 0.5
    faults: Mapping[Fault, float] = {}
    max_faults: int | None = None  # attempts at one body after which it is answered
    retry_after: float = 1.0
    burst: int = 0
    slow_seconds: float = 2.0
    outage: Outage | None = None
    verdict_faults: Mapping[VerdictFault, float] = {}
    max_in_flight: int | None = None  # more get a 503
    limit_requests: int | None = None  # more in `limit_seconds` get a 429 with Retry-After
    limit_seconds: float = 60.0
    context_marker: str = "TOO-LONG-FOR-THE-CONTEXT"
    filter_marker: str = "WITHHELD-BY-THE-FILTER"
    poison_marker: str = "ALWAYS-FAILS"  # 500 at every attempt
    oracle_word: str = "ORACLE"
    oracle_every: int = 0  # one of this many samples with consecutive seeds holds `oracle_word`; 0: none
    list_models: bool = True
    gemini_names: bool = False  # ids in /models as models/NAME
    thinking_tokens: int = 0
    runtime_lora: bool = True
    max_lora_rank: int = 64
    wants_weights: bool = False  # an adapter without weights is refused, as vLLM does
    # Where the adapters that are loaded really lie: a folder of the server's to another folder, or to the objects of a
    # bucket (http://host/storage/v1/b/BUCKET/o/PREFIX).
    mounts: Mapping[str, str] = {}

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of `base`, None without one; read when first asked for, so the folder may be written later."""
        if self.base is None:
            return None
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.base)

    def tokens(self, body: Mapping[str, Any]) -> list[int]:
        """Return what vLLM's /tokenize answers to messages or a text; without `base`, something of a likely length."""
        messages = body.get("messages")
        if self.tokenizer is None:
            contents = [message["content"] for message in messages or [{"content": body["prompt"]}]]
            return list(range(sum(len(content) for content in contents) // 4 + 1))
        text = body.get("prompt")
        if messages:
            settings = body.get("chat_template_kwargs") or {}
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=body["add_generation_prompt"], **settings
            )
        return list(self.tokenizer.encode(text, add_special_tokens=body.get("add_special_tokens", False)))

    def read_mounted(self, path: str) -> bytes | None:
        """Return the content of a file that the server sees at `path`, or None if there is none."""
        for folder, place in self.mounts.items():
            if path.startswith(f"{folder}/"):
                path = place + path.removeprefix(folder)
        if not path.startswith("http://"):
            return Path(path).read_bytes() if Path(path).exists() else None
        bucket, _, name = path.partition("/o/")
        try:
            with urllib.request.urlopen(f"{bucket}/o/{urllib.parse.quote(name, safe='')}?alt=media") as reply:
                return bytes(reply.read())
        except urllib.error.HTTPError:
            return None

    def fault(self, body_sha: str, attempt: int) -> str | None:
        """Return what goes wrong at the `attempt`-th (from 0) attempt at a body, or None."""
        if not self.faults or (self.max_faults is not None and attempt >= self.max_faults):
            return None
        return pick(self.faults, self._draw("fault", body_sha, attempt))

    def verdict_fault(self, body_sha: str, attempt: int) -> str | None:
        return pick(self.verdict_faults, self._draw("verdict", body_sha, attempt)) if self.verdict_faults else None

    def latency(self, body_sha: str, attempt: int) -> float:
        if not self.latency_ms:
            return 0.0
        draw = random.Random(f"{self.seed}:latency:{body_sha}:{attempt}")
        return self.latency_ms / 1000 * draw.lognormvariate(0, self.latency_sigma)

    def _draw(self, what: str, body_sha: str, attempt: int) -> float:
        digest = hashlib.sha256(f"{self.seed}:{what}:{body_sha}:{attempt}".encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64


def pick(shares: Mapping[T, float], draw: float) -> T | None:
    for name, share in shares.items():
        draw -= share
        if draw < 0:
            return name
    return None
