"""The demo's taste, as rules on a scene and a completion: voice, topic, format, repetition, ending and length."""

import re
from statistics import fmean

from tasks.demo.world import BY_NAME, CLOSING_PHRASES, TOPICS

LINE = re.compile(r"^\[([A-Z]+)\] (\S.*)$")
NAMES = re.compile(rf"\b({'|'.join(BY_NAME)})\b")
WORD = re.compile(r"[a-z]+")
WEIGHTS = {"voice": 3.0, "topic": 3.0, "form": 3.0, "freshness": 2.0, "ending": 1.0, "length": 1.0}
GOOD_LENGTH, NEARLY_GOOD = range(3, 7), (2, 7)


def score(scene: str, completion: str) -> float:
    """Return the weighted mean of a completion's marks, from 0 to 1; `scene` is its system and user text."""
    given = marks(scene, completion)
    return sum(weight * given[name] for name, weight in WEIGHTS.items()) / sum(WEIGHTS.values())


def marks(scene: str, completion: str) -> dict[str, float]:
    """Mark a completion of a scene by each rule, from 0 to 1."""
    written = [line.strip() for line in completion.strip().splitlines() if line.strip()]
    cast = frozenset(NAMES.findall(scene))
    lines = [(match[1], match[2]) for match in map(LINE.match, written) if match and match[1] in cast]
    if not lines:
        return dict.fromkeys(WEIGHTS, 0.0)
    return {
        "voice": fmean(_voice(name, text) for name, text in lines),
        "topic": _topic(scene, [text for _, text in lines]),
        # A line that swallowed another one has a name tag in its middle.
        "form": 0.0 if any(tag in text for _, text in lines for tag in "[]") else len(lines) / len(written),
        "freshness": _freshness(scene, lines),
        "ending": float(_is_closing(lines[-1][1])),
        "length": 1.0 if len(written) in GOOD_LENGTH else 0.5 if len(written) in NEARLY_GOOD else 0.0,
    }


def _words(text: str) -> set[str]:
    return set(WORD.findall(text.lower()))


def _voice(name: str, text: str) -> float:
    """Give 1 for the speaker's own words only, 0 for another's only, and something between for both or neither."""
    words = _words(text)
    own = bool(words & set(BY_NAME[name].markers))
    foreign = any(words & set(other.markers) for other in BY_NAME.values() if other.name != name)
    return 0.5 + 0.5 * (own - foreign)


def _topic(scene: str, texts: list[str]) -> float:
    """Give the share of lines on the scene's topic; a last line that closes the scene may leave it."""
    heard = _words(scene)
    topic = max(TOPICS, key=lambda candidate: len(heard & candidate.keywords))
    foreign = frozenset().union(*(other.keywords for other in TOPICS if other is not topic))
    body = texts[:-1] if _is_closing(texts[-1]) and len(texts) > 1 else texts
    return fmean(0.5 + 0.5 * (bool(_words(text) & topic.keywords) - bool(_words(text) & foreign)) for text in body)


def _freshness(scene: str, lines: list[tuple[str, str]]) -> float:
    """Give the share of lines that were not said before and whose speaker did not speak just before."""
    said = set(scene.splitlines())
    marks: list[float] = []
    previous = ""
    for name, text in lines:
        tagged = f"[{name}] {text}"
        marks.append(0.0 if tagged in said else 0.5 if name == previous else 1.0)
        said.add(tagged)
        previous = name
    return fmean(marks)


def _is_closing(text: str) -> bool:
    return any(phrase in text.lower() for phrase in CLOSING_PHRASES)
