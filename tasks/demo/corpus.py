"""Scenes between the lodgers of the Crooked Kettle, generated from a seed: pretraining and SFT rows, and prompts."""

import hashlib
import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import partial

from tasks.demo.world import BY_NAME, CHARACTERS, TOPICS, Character, Topic

Message = dict[str, str]
Row = dict[str, list[Message]]
PromptRow = dict[str, list[Message] | str]

HELD_OUT_SHARE = 0.3


class Flaw(StrEnum):
    """What can be wrong with a scene; the SFT corpus holds them all, so that preference tuning has work to do."""

    WRONG_VOICE = "wrong_voice"
    OFF_TOPIC = "off_topic"
    REPEATED = "repeated"
    BROKEN_FORMAT = "broken_format"
    NO_ENDING = "no_ending"


FLAW_RATES = {
    Flaw.WRONG_VOICE: 0.40,
    Flaw.OFF_TOPIC: 0.40,
    Flaw.REPEATED: 0.30,
    Flaw.BROKEN_FORMAT: 0.08,
    Flaw.NO_ENDING: 0.30,
}


@dataclass(frozen=True)
class Episode:
    """One topic with one cast; all of an episode's prompts fall on the same side of the train/held-out split."""

    topic: Topic
    cast: tuple[Character, ...]

    @property
    def group(self) -> str:
        return "-".join([self.topic.name, *(character.name.lower() for character in self.cast)])

    @property
    def is_held_out(self) -> bool:
        digest = hashlib.sha256(self.group.encode()).digest()
        return int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32


@dataclass(frozen=True)
class Line:
    """One `[NAME] text` line of a scene."""

    speaker: str
    text: str

    def __str__(self) -> str:
        return f"[{self.speaker}] {self.text}"


def episodes(*, held_out: bool) -> list[Episode]:
    """Return one side of the split of every topic with every cast of two or three, in a fixed order."""
    casts = [cast for size in (2, 3) for cast in itertools.combinations(CHARACTERS, size)]
    everything = (Episode(topic, cast) for topic in TOPICS for cast in casts)
    return [episode for episode in everything if episode.is_held_out == held_out]


def prompt_of(episode: Episode, start: list[Line]) -> list[Message]:
    """Return a prompt: the topic, who is present and the form of a line, then the scene so far."""
    people = ", ".join(f"{character.name} is {character.role}" for character in episode.cast)
    system = f"About {episode.topic.thing}. {people}. Each line: [NAME] text"
    scene = "\n".join(map(str, start))
    return [{"role": "system", "content": system}, {"role": "user", "content": scene}]


class SceneWriter:
    """Write the lines of one scene; no template and, while any are left, no filler is used twice."""

    def __init__(self, topic: Topic, rng: random.Random) -> None:
        self.topic = topic
        self._rng = rng
        self._used: set[str] = set()

    def pick(self, options: tuple[str, ...]) -> str:
        """Return one of these that was not used before, if there is one."""
        fresh = [option for option in options if option not in self._used] or list(options)
        choice = self._rng.choice(fresh)
        self._used.add(choice)
        return choice

    def text(self, voice: Character) -> str:
        """Return something on the topic in this character's voice."""
        template = self.pick(voice.lines)
        slots = {"thing": (self.topic.thing,), "part": self.topic.parts}
        slots |= {"trouble": self.topic.troubles, "remedy": self.topic.remedies}
        for slot, options in slots.items():
            title = slot.capitalize()
            if f"{{{slot}}}" in template or f"{{{title}}}" in template:
                filler = self.pick(options)
                template = template.replace(f"{{{slot}}}", filler)
                template = template.replace(f"{{{title}}}", filler[0].upper() + filler[1:])
        return template


def opening(episode: Episode, rng: random.Random) -> list[Line]:
    """Return the first one to three lines of a scene, all of them good; the first fixes the topic."""
    writer = SceneWriter(episode.topic, rng)
    speakers = _turns(episode.cast, rng, after=None)
    return [Line(who.name, writer.text(who)) for who in itertools.islice(speakers, rng.randint(1, 3))]


def continuation(episode: Episode, start: list[Line], flaws: frozenset[Flaw], rng: random.Random) -> str:
    """Return the rest of the scene: with no flaws, three to five lines in voice, on topic, and a proper ending."""
    writer = SceneWriter(episode.topic, rng)
    speakers = list(itertools.islice(_turns(episode.cast, rng, after=start[-1].speaker), rng.randint(3, 5)))
    said = {line.text for line in start}
    lines: list[Line] = []
    for who in speakers[:-1]:
        while (text := writer.text(who)) in said:
            pass
        lines.append(Line(who.name, text))
        said.add(text)
    lines.append(Line(speakers[-1].name, writer.pick(speakers[-1].closers)))
    # A broken format comes last, when the lines are one text.
    for flaw in (Flaw.WRONG_VOICE, Flaw.OFF_TOPIC, Flaw.REPEATED, Flaw.NO_ENDING):
        if flaw in flaws:
            lines = _spoil(flaw, lines, episode, start, rng)
    text = "\n".join(str(line) for line in lines)
    return _break_format(text, episode, rng) if Flaw.BROKEN_FORMAT in flaws else text


def _turns(cast: tuple[Character, ...], rng: random.Random, after: str | None) -> Iterator[Character]:
    """Yield speakers for ever, nobody twice in a row."""
    while True:
        speaker = rng.choice([character for character in cast if character.name != after])
        after = speaker.name
        yield speaker


def _spoil(flaw: Flaw, lines: list[Line], episode: Episode, start: list[Line], rng: random.Random) -> list[Line]:
    """Return the lines with a flaw put in."""
    if flaw is Flaw.REPEATED:
        target = rng.randrange(1, len(lines))
        return [*lines[:target], rng.choice([*start, *lines[:target]]), *lines[target:]]
    if flaw is Flaw.OFF_TOPIC:
        writer = SceneWriter(rng.choice([topic for topic in TOPICS if topic != episode.topic]), rng)
        first = rng.randrange(len(lines) - 1)
        drifted = [Line(line.speaker, writer.text(BY_NAME[line.speaker])) for line in lines[first:-1]]
        return [*lines[:first], *drifted, lines[-1]]
    writer = SceneWriter(episode.topic, rng)
    if flaw is Flaw.NO_ENDING:
        speakers = itertools.islice(_turns(episode.cast, rng, after=lines[-1].speaker), rng.choice((0, 0, 2)))
        return [*lines[:-1], *(Line(who.name, writer.text(who)) for who in speakers)]
    lines = list(lines)
    for number in sorted(rng.sample(range(len(lines) - 1), rng.randint(1, len(lines) - 1))):
        speaker = lines[number].speaker
        others = [character for character in CHARACTERS if character.name != speaker]
        lines[number] = Line(speaker, writer.text(rng.choice(others)))
    return lines


def _break_format(text: str, episode: Episode, rng: random.Random) -> str:
    kind = rng.randrange(3)
    if kind == 0:
        return text.replace("[", "").replace("]", ":")
    if kind == 1:
        return text.replace("\n", " ")
    absent = rng.choice([character.name for character in CHARACTERS if character not in episode.cast])
    return text.replace(f"[{episode.cast[0].name}]", f"[{absent}]")


def _rows(count: int, seed: int, stream: str, flaw_share: float) -> list[Row]:
    """Return `count` rows {prompt, completion} of the training episodes, flawed at this share of FLAW_RATES."""
    pool = episodes(held_out=False)
    rows: list[Row] = []
    for index in range(count):
        rng = random.Random(f"{stream}/{seed}/{index}")
        episode = rng.choice(pool)
        start = opening(episode, rng)
        flaws = frozenset(flaw for flaw, rate in FLAW_RATES.items() if rng.random() < rate * flaw_share)
        completion = continuation(episode, start, flaws, rng)
        rows.append({"prompt": prompt_of(episode, start), "completion": [{"role": "assistant", "content": completion}]})
    return rows


# The base model's corpus: other conversations of the same episodes, with fewer flaws.
pretraining_rows = partial(_rows, stream="pretraining", flaw_share=0.25)
sft_rows = partial(_rows, stream="sft", flaw_share=1.0)


def _prompts(count: int, seed: int, *, held_out: bool) -> list[PromptRow]:
    """Return `count` different prompts {prompt, group}; whatever the seeds, the two sides share no group."""
    pool = episodes(held_out=held_out)
    random.Random(f"order/{seed}/{held_out}").shuffle(pool)
    found: dict[str, PromptRow] = {}
    numbers = itertools.count()
    while len(found) < count:
        number = next(numbers)
        episode = pool[number % len(pool)]
        prompt = prompt_of(episode, opening(episode, random.Random(f"prompt/{seed}/{held_out}/{number}")))
        found.setdefault(
            "\n".join(message["content"] for message in prompt), {"prompt": prompt, "group": episode.group}
        )
    return list(found.values())


training_prompts, heldout_prompts = partial(_prompts, held_out=False), partial(_prompts, held_out=True)


def pair_rows(count: int, seed: int, *, held_out: bool) -> list[Row]:
    """Return preference rows: the same scene continued well, and with flaws."""
    pool, rows = episodes(held_out=held_out), list[Row]()
    sides = {"chosen": frozenset[Flaw](), "rejected": frozenset({Flaw.WRONG_VOICE, Flaw.NO_ENDING})}
    for number in range(count):
        rng = random.Random(f"pairs/{seed}/{held_out}/{number}")
        episode = rng.choice(pool)
        start = opening(episode, rng)
        said = {side: continuation(episode, start, flaws, rng) for side, flaws in sides.items()}
        row = {side: [{"role": "assistant", "content": text}] for side, text in said.items()}
        rows.append({"prompt": prompt_of(episode, start), **row})
    return rows
