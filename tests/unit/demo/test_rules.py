"""The demo's taste: what is good, what each flaw costs, and what it does not reward."""

import random
import statistics

import pytest

from tasks.demo import rules
from tasks.demo.corpus import Flaw, continuation, episodes, opening, prompt_of
from tasks.demo.rules import score

SCENE = """[system]
About the goose. BARNABY is an old ferry captain, GRUM is a gloomy gardener. Each line: [NAME] text
[user]
[BARNABY] Aye, the goose and me, we go back forty tides."""
GOOD = """[GRUM] Hm. The goose bites the postman. So did my turnips.
[BARNABY] On my old ferry we would warm the egg before breakfast.
[GRUM] Hm. That settles it. Back to the mud."""


def marks(flaws: frozenset[Flaw], count: int = 150) -> list[float]:
    found = []
    for index, episode in zip(range(count), episodes(held_out=False), strict=False):
        rng = random.Random(index)
        start = opening(episode, rng)
        scene = "\n".join(message["content"] for message in prompt_of(episode, start))
        found.append(score(scene, continuation(episode, start, flaws, rng)))
    return found


@pytest.mark.parametrize("flaw", Flaw)
def test_each_flaw_costs_something(flaw: Flaw) -> None:
    assert set(marks(frozenset())) == {1.0}
    spoiled = marks(frozenset([flaw]))
    assert statistics.mean(spoiled) < 0.97
    if flaw is not Flaw.BROKEN_FORMAT:  # an absent name is put in for a lodger who may not have a line
        assert max(spoiled) < 1.0


@pytest.mark.parametrize(
    ("completion", "field"),
    [
        (GOOD.replace("Hm. The goose bites the postman. So did my turnips.", "Darling, sing to the goose."), "voice"),
        (GOOD.replace("warm the egg", "tune the piano"), "topic"),
        (GOOD.replace("[BARNABY]", "BARNABY:"), "form"),
        (GOOD.replace("[BARNABY]", "[PIPPA]"), "form"),
        (GOOD.replace("\n", " "), "form"),
        (GOOD.replace("[BARNABY] On", "[GRUM] Hm. On"), "freshness"),
        (SCENE.splitlines()[-1] + "\n" + GOOD, "freshness"),
        (GOOD.rsplit("\n", 1)[0] + "\n[GRUM] First count the feathers. Then frost. Always frost.", "ending"),
        ("\n".join(GOOD.splitlines()[-1:]), "length"),
    ],
)
def test_the_flaw_shows_in_its_own_mark(completion: str, field: str) -> None:
    assert rules.marks(SCENE, completion)[field] < rules.marks(SCENE, GOOD)[field]
    assert score(SCENE, completion) < score(SCENE, GOOD)


def test_longer_is_not_better() -> None:
    middle = ["[BARNABY] Drop anchor by the beak and count the feathers.", "[GRUM] Hm. The egg is frost, I say."]
    first, *rest = GOOD.splitlines()
    long = "\n".join([first, *middle, *rest])
    too_long = "\n".join([first, *middle, *(line.replace("the", "that", 1) for line in middle), *middle, *rest])
    assert score(SCENE, long) == score(SCENE, GOOD) == 1.0
    assert score(SCENE, too_long) < 1.0


@pytest.mark.parametrize("completion", ["", "   \n ", "no names here", "[NOBODY] Aye."])
def test_what_holds_no_line_of_the_cast_gets_nothing(completion: str) -> None:
    assert score(SCENE, completion) == 0.0
