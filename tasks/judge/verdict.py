"""Reading a judge's verdict, strictly: never out of its thinking, and never out of a text that it quotes."""

import json
import re
from typing import Any

from json_repair import repair_json
from pydantic import BaseModel

# Objects in an answer that are tried as the verdict, from its end.
MOST_OBJECTS = 50
MOST_SCORE = 10
_THINKING = r"(?:\w+:)?(?:think(?:ing)?|thoughts?|reasoning|analysis|reflection|scratchpad)"
_CLOSING = re.compile(
    rf"[<\[◁]/{_THINKING}[>\]▷]|<\|end_(?:of_)?(?:thought|thinking)\|>|<\|channel\|>final[^{{]{{0,60}}<\|message\|>",
    re.IGNORECASE,
)
# In square brackets the other words are the heading of a section, such as [Analysis], which nothing closes.
_OPENING = re.compile(
    rf"[<◁]{_THINKING}[>▷]|\[(?:think(?:ing)?|thought|reasoning)\]"
    r"|<\|(?:begin_of|start)_(?:thought|thinking)\|>|<\|channel\|>analysis",
    re.IGNORECASE,
)
_FENCE = re.compile(r"\s*(?:```\w*\s*)?")
# An object without another in it; one that is not closed, too, unless the answer was cut.
_FLAT, _CLOSED = re.compile(r"\{[^{}]*\}?"), re.compile(r"\{[^{}]*\}")
# A string that is not closed is one, too: else each of its quotes would be tried as the beginning of another.
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*+"?|[{}]', re.DOTALL)


class Verdict(BaseModel):
    """A verdict in positions, 0-based, as shown; `scores`, where they were asked for, in the order shown."""

    best: int
    worst: int
    confidence: int | None = None
    scores: list[int] | None = None


class UnreadableVerdict(Exception):
    """The judge's answer holds no usable verdict; the message says why."""


def verdict_format(n: int, scored: bool = False) -> dict[str, Any]:
    """Return the `response_format` that forces a verdict over `n` completions, with a score of each if they are wanted.

    The numbers are strings: some endpoints take no enum of integers. Each score has a name: some take no list of a
    given length.
    """
    most = {f"score_{number}": MOST_SCORE for number in range(1, n + 1)} if scored else {}
    most |= {"best": n, "worst": n, "confidence": 5}
    numbers = {name: {"type": "string", "enum": [str(k) for k in range(1, top + 1)]} for name, top in most.items()}
    schema = {"type": "object", "properties": numbers, "required": list(most), "additionalProperties": False}
    return {"type": "json_schema", "json_schema": {"name": "verdict", "strict": True, "schema": schema}}


def read_verdict(text: str, n: int, cut: bool = False, scored: bool = False) -> Verdict:
    """Read a verdict over `n` completions from whatever the judge wrote around it.

    An answer that is one JSON object is that object. Else fences, text before and after, trailing commas and numbers as
    strings are accepted; of several objects the last with a `best` counts.

    Args:
        text: the judge's answer.
        n: how many completions it was shown.
        cut: the answer was cut at its token limit: what it began with counts, the rest may be thinking.
        scored: it was asked for a score of each as well.

    Raises `UnreadableVerdict`: nothing of the kind is there, a number is missing or out of range, or best equals worst.
    """
    try:
        is_whole = isinstance(json.loads(text.strip()), dict)
    except (ValueError, RecursionError):
        is_whole = False
    visible = text if is_whole else _OPENING.split(_CLOSING.split(text)[-1])[0]
    if not visible.strip():
        raise UnreadableVerdict("empty answer")
    found = [value for value in _objects(visible, cut) if "best" in value]
    if not found:
        raise UnreadableVerdict("no JSON object with a `best`")
    return _check_verdict(found[0] if cut else found[-1], n, scored)


def _objects(text: str, cut: bool) -> list[dict[str, Any]]:
    """Return the objects in a text from left to right; what stands inside one is not looked at by itself."""
    openings = [found.start() for found in re.finditer(r"\{", text)]
    if cut:
        start = _FENCE.match(text)
        openings = openings[:1] if start and openings and openings[0] == start.end() else []
    objects, end = [], 0
    for opening in openings[-MOST_OBJECTS:]:
        if opening >= end:
            value, length = _read_object(text, opening, cut)
            end = opening + length
            objects += _verdicts_in(value)
    return objects


def _read_object(text: str, opening: int, cut: bool) -> tuple[Any, int]:
    """Return the object that opens at `opening`, repaired if it must be, and its length; length 0 if there is none."""
    try:
        value, end = json.JSONDecoder().raw_decode(text, opening)
        return value, end - opening
    except (ValueError, RecursionError):
        flat = (_CLOSED if cut else _FLAT).match(text, opening)
        broken, depth = flat[0] if flat else "", 0
    for token in _TOKEN.finditer(text, opening):  # up to the brace that closes it, passing over strings
        depth += {"{": 1, "}": -1}.get(token[0], 0)
        if depth == 0:
            broken = text[opening : token.end()]
        if depth == 0 or depth > MOST_OBJECTS:
            break
    try:
        value = repair_json(broken, return_objects=True) if broken else None
    except (ValueError, RecursionError):
        return None, 0
    return (value, len(broken)) if isinstance(value, dict) else (None, 0)


def _verdicts_in(value: Any, depth: int = 3) -> list[dict[str, Any]]:
    """Return `value` if it has a `best`, else those of the objects in it that have one."""
    if not isinstance(value, dict):
        return []
    value = {str(name).strip().lower(): inner for name, inner in value.items()}
    if "best" in value or not depth:
        return [value]
    return [found for inner in value.values() for found in _verdicts_in(inner, depth - 1)]


def _check_verdict(value: dict[str, Any], n: int, scored: bool) -> Verdict:
    best, worst, confidence = (_whole_number(value.get(name)) for name in ("best", "worst", "confidence"))
    if best is None or worst is None:
        raise UnreadableVerdict("best or worst is not a number")
    if not (1 <= best <= n and 1 <= worst <= n):
        raise UnreadableVerdict(f"best or worst is not between 1 and {n}")
    if best == worst:
        raise UnreadableVerdict(f"best and worst are both {best}")
    scores = []
    for name in [f"score_{number}" for number in range(1, n + 1)] if scored else ():
        score = _whole_number(value.get(name))
        if score is None or not 1 <= score <= MOST_SCORE:
            raise UnreadableVerdict(f"{name} is not a whole number from 1 to {MOST_SCORE}")
        scores.append(score)
    sure = confidence if confidence is not None and 1 <= confidence <= 5 else None
    return Verdict(best=best - 1, worst=worst - 1, confidence=sure, scores=scores or None)


def _whole_number(value: Any) -> int | None:
    if isinstance(value, str):
        found = re.findall(r"(?:(?<!\w)-)?\d+(?:\.\d+)?", value)
        value = float(found[0]) if len(found) == 1 and len(found[0]) < 9 else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return int(value) if abs(value) < 1e9 and value == int(value) else None  # NaN is in no range
