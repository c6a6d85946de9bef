"""The models of the fake endpoint: a seeded sampler of scenes, and judges with a known taste."""

import hashlib
import json
import re
from collections.abc import Callable
from typing import Any

# Every first with every second half makes a word: 256 of them, one for a byte.
FIRST = ["ba", "che", "do", "fa", "gar", "ho", "ja", "ki", "lau", "mo", "nei", "pa", "re", "soo", "ta", "um"]
SECOND = ["bble", "ck", "dger", "ffle", "ly", "mb", "nder", "nny", "pper", "rket", "rry", "sel", "ther", "ve", "w", "z"]
SPEAKERS = ("JERRY", "GEORGE", "ELAINE", "KRAMER")

CONFIDENCES = (3, 4, 5)


def sample(identity: str, seed: int, oracle: str | None) -> str:
    """Return a scene of two to five lines, a function of `identity` and `seed`; `oracle` is a word to put in it."""
    stream = b"".join(hashlib.sha256(f"{identity}:{seed}:{part}".encode()).digest() for part in range(3))
    lines, at = [], 1
    for line in range(2 + stream[0] % 4):
        words = [FIRST[byte >> 4] + SECOND[byte & 15] for byte in stream[at : at + 3 + (stream[at] + line) % 12]]
        at += len(words) + 1
        lines.append(f"[{SPEAKERS[stream[at] % len(SPEAKERS)]}] {' '.join(words).capitalize()}.")
    if oracle:
        lines[-1] += f" {oracle}!"
    return "\n".join(lines)


def text_sha(text: str) -> str:
    """Return the sha256 of a completion as the judges see it, without white space at the ends."""
    return hashlib.sha256(text.strip().encode()).hexdigest()


def read_completions(prompt: str) -> list[str]:
    """Return the completions in a judge's prompt, in order; empty if it is none."""
    opening = re.search(r"^<<<SCENE ([0-9a-f]+)>>>$", prompt, re.MULTILINE)
    if opening is None:
        return []
    _, _, rest = prompt.partition(f"\n<<<END SCENE {opening.group(1)}>>>")
    first = re.search(r"^<<<COMPLETION 1 ([0-9a-f]+)>>>$", rest, re.MULTILINE)
    mark = first.group(1) if first else "none"
    found = re.findall(
        rf"^<<<COMPLETION (\d+) {mark}>>>\n(.*?)\n?^<<<END COMPLETION \1 {mark}>>>$", rest, re.MULTILINE | re.DOTALL
    )
    if [int(number) for number, _ in found] != list(range(1, len(found) + 1)):
        return []
    return [text.strip() for _, text in found]


def _by(key: Callable[[str], Any], texts: list[str]) -> tuple[int, int]:
    ranked = sorted(range(len(texts)), key=lambda index: (key(texts[index]), text_sha(texts[index])))
    return ranked[-1], ranked[0]


def _judge_oracle(texts: list[str], word: str) -> tuple[int, int]:
    marked = [index for index, text in enumerate(texts) if word in text]
    best = marked[0] if marked else _by(text_sha, texts)[0]
    others = [index for index in range(len(texts)) if index != best]
    return best, min(others, key=lambda index: text_sha(texts[index]))


JUDGES: dict[str, Callable[[list[str], str], tuple[int, int]]] = {
    "judge-oracle": _judge_oracle,
    "judge-last": lambda texts, word: (len(texts) - 1, 0),
    "judge-first": lambda texts, word: (0, len(texts) - 1),
    "judge-length": lambda texts, word: _by(len, texts),
    "judge-hash": lambda texts, word: _by(text_sha, texts),
}


def verdict(model: str, prompt: str, oracle_word: str) -> dict[str, int] | None:
    """Return the 1-based verdict of judge `model` on the completions in `prompt`; None if there are not two."""
    texts = read_completions(prompt)
    if len(texts) < 2:
        return None
    best, worst = JUDGES[model](texts, oracle_word)
    confidence = CONFIDENCES[int(text_sha("\n".join(sorted(texts)))[:4], 16) % len(CONFIDENCES)]
    return {"best": best + 1, "worst": worst + 1, "confidence": confidence}


def spoil(verdict: dict[str, int], fault: str | None) -> tuple[str, str]:
    """Return a verdict as text, spoilt as `fault` says, and its finish reason."""
    text = json.dumps(verdict)
    swapped = {**verdict, "best": verdict["worst"], "worst": verdict["best"]}
    spoilt = {
        "fences": f"```json\n{text}\n```",
        "text_around": f"Here is what I think of them.\n\n{text}\n\nI hope this helps!",
        "thinking": f"<think>At first sight {json.dumps(swapped)} would do, but no.</think>\n{text}",
        "trailing_comma": text.replace("}", ",}"),
        "strings": json.dumps({name: str(value) for name, value in verdict.items()}),
        "empty": "",
        "length": text[: text.index('"worst"') + 4],
        "same": json.dumps({**verdict, "worst": verdict["best"]}),
        "out_of_range": json.dumps({**verdict, "best": 99}),
    }
    return spoilt.get(fault or "", text), "length" if fault == "length" else "stop"
