"""The demo's corpus: deterministic, split by episode, and every voice and topic told apart by its words."""

import re

import pytest

from tasks.demo.corpus import heldout_prompts, pretraining_rows, sft_rows, training_prompts
from tasks.demo.world import CHARACTERS, TOPICS
from tasks.store.workspace import digest


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text.lower()))


def test_the_seed_decides_and_more_rows_begin_with_the_same() -> None:
    assert sft_rows(30, seed=1) == sft_rows(60, seed=1)[:30]
    assert training_prompts(30, seed=1) == training_prompts(80, seed=1)[:30]
    assert sft_rows(30, seed=1) != sft_rows(30, seed=2)
    assert heldout_prompts(30, seed=1) != heldout_prompts(30, seed=2)
    assert not {str(row) for row in sft_rows(200, seed=0)} & {str(row) for row in pretraining_rows(200, seed=0)}


def test_the_corpus_is_that_of_the_figures_in_the_readme() -> None:
    """The demo's figures were learned from these very rows, so what is good and bad in them is no test's business."""
    rows = [training_prompts(240, 7), heldout_prompts(200, 7), sft_rows(300, 7), pretraining_rows(300, 7)]
    assert digest(rows)[:16] == "3ef9b65ed6b986d2"


@pytest.mark.parametrize(("training_seed", "heldout_seed"), [(0, 0), (0, 1), (7, 3)])
def test_held_out_prompts_share_no_group_and_no_prompt_with_training(training_seed: int, heldout_seed: int) -> None:
    training, heldout = training_prompts(700, training_seed), heldout_prompts(300, heldout_seed)
    assert len({str(row["prompt"]) for row in training}) == 700
    assert not {row["group"] for row in training} & {row["group"] for row in heldout}
    assert not {str(row["prompt"]) for row in training} & {str(row["prompt"]) for row in heldout}


def test_every_line_holds_a_marker_of_its_own_character_and_of_no_other() -> None:
    for character in CHARACTERS:
        foreign = {marker for other in CHARACTERS if other is not character for marker in other.markers}
        for line in (*character.lines, *character.closers):
            assert words(line) & set(character.markers), line
            assert not words(line) & foreign, line


def test_topics_keep_to_their_own_words() -> None:
    markers = {marker for character in CHARACTERS for marker in character.markers}
    spoken = {word for character in CHARACTERS for line in character.lines for word in words(line)}
    for topic in TOPICS:
        foreign = {word for other in TOPICS if other is not topic for word in other.keywords}
        assert not topic.keywords & spoken
        for filler in (topic.thing, *topic.parts, *topic.troubles, *topic.remedies):
            assert words(filler) & topic.keywords, filler
            assert not words(filler) & (foreign | markers), filler
