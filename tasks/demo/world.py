"""The demo's invented world, world.toml, as types."""

import tomllib
from pathlib import Path

from pydantic import BaseModel

FILE = Path(__file__).with_name("world.toml")


class Character(BaseModel, frozen=True):
    """A lodger with a voice: `markers` are words that only this character uses, lower case."""

    name: str
    role: str
    markers: tuple[str, ...]
    lines: tuple[str, ...]
    closers: tuple[str, ...]


class Topic(BaseModel, frozen=True):
    """A thing to talk about. Every trouble and remedy holds one of the topic's `keywords`."""

    name: str
    thing: str
    parts: tuple[str, ...]
    troubles: tuple[str, ...]
    remedies: tuple[str, ...]

    @property
    def keywords(self) -> frozenset[str]:
        return frozenset(phrase.split()[-1] for phrase in (self.thing, *self.parts))


_world = tomllib.loads(FILE.read_text(encoding="utf-8"))
CHARACTERS = tuple(Character.model_validate(entry) for entry in _world["characters"])
TOPICS = tuple(Topic.model_validate(entry) for entry in _world["topics"])
CLOSING_PHRASES = tuple(_world["closing_phrases"])
BY_NAME = {character.name: character for character in CHARACTERS}
