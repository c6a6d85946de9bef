"""Pairs as tokens: the same as TRL's, measured, refused where nothing can be learned, grouped without randomness."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, load_dataset
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer

from tasks.config import ChatSettings
from tasks.errors import PreflowError
from tasks.llm.chat_template import choose_template
from tasks.store.records import PairRow
from tasks.store.workspace import Workspace
from tasks.trainer.data import (
    LengthReport,
    MicroBatchSampler,
    PairData,
    PairTokenizer,
    TokenPair,
    as_dataset,
    load_pairs,
    make_micro_batches,
)
from tasks.trainer.model import probe_texts
from tests.fakes.chat import FAMILIES, Family
from tests.fakes.tiny_training import build_base, pairs, write_preferences


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoTokenizer.from_pretrained(build_base(tmp_path_factory.mktemp("model") / "base"))


def token_pair(prompt: int, chosen: list[int], rejected: list[int]) -> TokenPair:
    return TokenPair(1, "0" * 64, list(range(prompt)), chosen, rejected)


def test_tokens_are_those_of_trl(tokenizer: Any) -> None:
    rows = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in pairs(6, 0)]
    trainer = object.__new__(DPOTrainer)
    trainer._tokenizer = tokenizer
    config = DPOConfig(output_dir="unused", use_cpu=True, bf16=False, max_length=128)
    theirs = trainer._prepare_dataset(Dataset.from_list(rows), tokenizer, config, "train")
    reader = PairTokenizer(tokenizer)
    ours = as_dataset(reader.tokenize([("f:1", PairRow(**row)) for row in rows], LengthReport()))
    for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert list(ours[name]) == list(theirs[name])


def conversation(good: str, bad: str, **columns: Any) -> dict[str, Any]:
    sides = {"chosen": good, "rejected": bad}
    return {
        "prompt": [{"role": "user", "content": "the cat"}],
        **{side: [{"role": "assistant", "content": text}] for side, text in sides.items()},
        **columns,
    }


def load_as(family: Family, folder: Path, rows: list[dict[str, Any]], **settings: Any) -> tuple[Any, PairData]:
    tokenizer = family.build_tokenizer(folder / "model")
    chat = ChatSettings(chat_template_kwargs=dict(family.kwargs), **settings)
    template = choose_template(chat, None, str(folder / "model"))
    preferences = write_preferences(folder, rows, [])
    return tokenizer, load_pairs(preferences.uri, Workspace(folder), tokenizer, 512, template)


def sampled_prompt(family: Family, tokenizer: Any) -> list[int]:
    ids: list[int] = tokenizer.apply_chat_template(
        [{"role": "user", "content": "the cat"}], add_generation_prompt=True, return_dict=True,
        date_string="26 Jul 2024", **dict(family.kwargs),
    )["input_ids"]  # fmt: skip
    return ids


# White space that a template trims, thinking that it drops, a text that ends in the middle of a word.
TEXTS = ("  \n the cat \n\n", "hm\n</think>\n\nthe dog", "<think>\nhm\n</think>\n\nbig", "small qui")


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_rendered_pairs_are_prompt_text_and_end_of_turn(family: Family, text: str, tmp_path: Path) -> None:
    tokenizer, data = load_as(
        family, tmp_path, [conversation(text, "red", rejected_finish_reason="length", prompt_token_ids=[])]
    )
    (pair,) = data.pairs
    assert pair.prompt_ids == sampled_prompt(family, tokenizer), "the prompt is that of sampling, to its last token"
    assert data.report.other_prompts == 0
    *answer, end = pair.chosen_ids
    assert tokenizer.decode(answer).removeprefix(" " * (family.name == "mistral" and text[0] != " ")) == text
    assert tokenizer.decode([end]) == family.eos, "it ends with the end of turn and nothing after it"
    assert tokenizer.decode(pair.rejected_ids).strip() == "red", "a cut side has no end of turn"
    assert (data.report.unfinished, data.report.exact) == (1, 0)


@pytest.mark.parametrize(
    ("reason", "end"),
    [*((reason, "<|im_end|>") for reason in (None, "", "stop", "STOP", "eos", "end_turn", "unknown", "tool_calls",
                                             "tool_use", "function_call")),
     *((reason, "") for reason in ("length", "max_tokens", "MAX_TOKENS", "content_filter", "abort"))],
)  # fmt: skip
def test_only_an_answer_that_ended_by_itself_gets_an_end_of_turn(reason: str | None, end: str, tmp_path: Path) -> None:
    tokenizer, data = load_as(QWEN, tmp_path, [conversation("cat", "dog", chosen_finish_reason=reason)])
    assert tokenizer.decode(data.pairs[0].chosen_ids) == f"cat{end}"
    assert data.report.unfinished == (not end)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_texts_together_give_the_tokens_of_each_alone(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [conversation(text, f"{text} dog", chosen_finish_reason="length") for text in (*TEXTS, *TEXTS[::-1])]
    tokenizer, together = load_as(family, tmp_path, rows)
    monkeypatch.setattr(
        PairTokenizer, "_encode", lambda _, texts: [tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts]
    )
    _, alone = load_as(family, tmp_path, rows)
    assert together == alone
    assert len(together.pairs) == 8


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_sampled_tokens_are_trained_on_as_they_are(family: Family, tmp_path: Path) -> None:
    tokenizer = family.build_tokenizer(tmp_path / "model")
    end = tokenizer.convert_tokens_to_ids(family.eos)
    # As no tokenizer would cut the text: letter by letter.
    good, bad = (tokenizer.convert_tokens_to_ids(list(word)) for word in ("cat", "dog"))
    row = conversation(
        "cat", "dog", prompt_token_ids=sampled_prompt(family, tokenizer), chosen_token_ids=[*good, end],
        rejected_token_ids=bad, chosen_finish_reason="stop", rejected_finish_reason="length",
    )  # fmt: skip
    _, data = load_as(family, tmp_path, [row])
    (pair,) = data.pairs
    assert (pair.chosen_ids, pair.rejected_ids) == ([*good, end], bad)
    assert data.report.exact_share == 1.0
    assert (data.report.other_prompts, data.report.foreign, data.report.unfinished) == (0, 0, 1)


LLAMA, MISTRAL, QWEN, VICUNA = (
    next(f for f in FAMILIES if f.name == name) for name in ("llama3.2", "mistral", "qwen3", "vicuna")
)


@pytest.mark.parametrize("wrong", [1_000_000, -5])
def test_a_pair_with_a_token_that_has_no_embedding_is_left_out(tmp_path: Path, wrong: int) -> None:
    """The model could not even be asked; where there are more of them, they are of another tokenizer."""
    row = conversation("cat", "dog", prompt_token_ids=[1], chosen_token_ids=[wrong], rejected_token_ids=[2])
    _, data = load_as(QWEN, tmp_path, [row, *([conversation("cat", "dog")] * 50)])
    assert len(data.pairs) == data.report.used == 50
    assert data.report.refused[1].startswith(f"tokens from {wrong} to {wrong}, the model's go from 0 to ")
    with pytest.raises(PreflowError, match="1 of 4 completions have sampled tokens that do not read as their text"):
        load_as(QWEN, tmp_path, [conversation("cat", "dog"), row])


def test_a_text_that_spells_a_token_beyond_the_models_rows_costs_its_pair_alone(tmp_path: Path) -> None:
    tokenizer = QWEN.build_tokenizer(tmp_path / "model")
    rows = tokenizer.add_tokens("<image>", special_tokens=True) and tokenizer.convert_tokens_to_ids("<image>")
    pairs = [conversation("cat <image>", "dog"), conversation("cat", "dog")]
    preferences = write_preferences(tmp_path, pairs, [])
    data = load_pairs(preferences.uri, Workspace(tmp_path), tokenizer, 512, rows=rows)
    assert [pair.line for pair in data.pairs] == [2]
    assert data.report.refused[1].endswith(f" to {rows}, the model's go from 0 to {rows - 1}")
    assert data.report.foreign == 0


STRICT = (
    "{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
SHOUTING = STRICT[STRICT.index("{% for") :].replace("m.content", "m.content.replace('cat', 'CAT')")
SPOKEN = conversation("cat", "dog")
TWICE = SPOKEN | {"prompt": SPOKEN["prompt"] * 2}
NO_ANSWER = SPOKEN | {"chosen": [{"role": "user", "content": "cat"}]}


@pytest.mark.parametrize(
    ("family", "template", "rows", "said"),
    [
        (VICUNA, "", [SPOKEN | {"prompt_token_ids": [5], "chosen_token_ids": [7, 8], "rejected_token_ids": [9]}],
         "2 of 2 completions have sampled tokens that do not read as their text"),
        (VICUNA, STRICT, [SPOKEN], r"train\.jsonl:1: the chat template of .* refuses messages of user"),
        (VICUNA, SHOUTING, [SPOKEN], "1 of 2 answers would be changed by the chat template"),
        (LLAMA, "", [SPOKEN | {"prompt_token_ids": [5, 6]}],
         "1 of 1 prompts were sampled with other tokens than the chat template"),
        (MISTRAL, "", [SPOKEN, TWICE], r"train\.jsonl:2: the chat template of .* must alternate"),
        (QWEN, "", [SPOKEN, NO_ANSWER], r"train\.jsonl:2: chosen: .* not one answer of the assistant"),
    ],
)  # fmt: skip
def test_pairs_in_other_words_than_the_models_are_refused_with_their_line(
    family: Family, template: str, rows: list[dict[str, Any]], said: str, tmp_path: Path
) -> None:
    (tmp_path / "own.jinja").write_text(template)
    settings = {"chat_template": str(tmp_path / "own.jinja")} if template else {}
    with pytest.raises(PreflowError, match=said):
        load_as(family, tmp_path, rows, **settings)


def test_a_template_that_asks_for_a_system_message_is_taken(tmp_path: Path) -> None:
    (tmp_path / "strict.jinja").write_text(STRICT)
    row = conversation("cat", "dog")
    row["prompt"].insert(0, {"role": "system", "content": "S"})
    tokenizer, data = load_as(VICUNA, tmp_path, [row], chat_template=str(tmp_path / "strict.jinja"))
    assert tokenizer.decode(data.pairs[0].chosen_ids) == f"cat{VICUNA.eos}"


def test_nothing_after_an_end_of_turn_in_the_text_is_trained_on(tmp_path: Path) -> None:
    tokenizer, data = load_as(QWEN, tmp_path, [conversation("cat<|im_end|>\n<|im_start|>user\ndog", "dog")])
    assert tokenizer.decode(data.pairs[0].chosen_ids) == "cat<|im_end|>"
    assert data.report.ended_early == 1


def test_where_sampling_ended_at_other_texts_no_end_of_turn_is_made_up(tmp_path: Path) -> None:
    for stop, ended in (("\n", "cat"), ("<|im_end|>", "cat<|im_end|>")):
        tokenizer, data = load_as(QWEN, tmp_path, [conversation("cat", "dog")], stop=(stop,))
        assert tokenizer.decode(data.pairs[0].chosen_ids) == ended


def test_the_whole_conversation_on_each_side_is_the_same_pair(tmp_path: Path) -> None:
    """UltraFeedback's form: what both sides begin with is the prompt, and only the answers are trained on."""
    plain, whole = conversation("cat", "dog"), conversation("cat", "dog")
    whole |= {side: whole["prompt"] + whole[side] for side in ("chosen", "rejected")}
    _, data = load_as(QWEN, tmp_path, [plain, whole])
    first, second = data.pairs
    assert (first.prompt_ids, first.chosen_ids, first.rejected_ids) == (
        second.prompt_ids, second.chosen_ids, second.rejected_ids,
    )  # fmt: skip


def test_plain_trl_reads_the_pairs_with_their_extra_columns(tmp_path: Path) -> None:
    rows = [conversation("cat", "dog", prompt_token_ids=[1], chosen_token_ids=[2, 3], chosen_finish_reason="stop"),
            conversation("dog", "cat", confidence=5.0)]  # fmt: skip
    preferences = write_preferences(tmp_path, rows, [])
    tokenizer = QWEN.build_tokenizer(tmp_path / "model")
    trainer = object.__new__(DPOTrainer)
    trainer._tokenizer = tokenizer
    config = DPOConfig(output_dir="unused", use_cpu=True, bf16=False, max_length=128)
    dataset = load_dataset("json", data_files=preferences.uri, split="train", cache_dir=str(tmp_path / "cache"))
    theirs = trainer._prepare_dataset(dataset, tokenizer, config, "train")
    assert [tokenizer.decode(row["chosen_ids"]).split("</think>")[-1].split() for row in theirs] == [
        ["cat<|im_end|>"], ["dog<|im_end|>"],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("pair", "reason"),
    [
        (token_pair(10, [1, 2], [1, 3]), None),
        (token_pair(10, [1, 2], [1, 2]), "chosen and rejected are equal"),
        (token_pair(14, [1, 2, 3], [1, 2, 4]), "chosen and rejected are equal up to the cut"),
        (token_pair(16, [1], [2]), "the prompt alone has 16 tokens"),
        (replace(token_pair(10, [1, 2], [1, 2]), sft_only=True), None),
        (replace(token_pair(10, [], []), sft_only=True), "a side is empty"),
    ],
)
def test_pairs_that_teach_nothing_are_refused(pair: TokenPair, reason: str | None) -> None:
    assert pair.refusal(max_length=16) == reason


def test_refused_pairs_are_counted_and_named(tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = pairs(5, 0)
    rows[2]["rejected"] = rows[2]["chosen"]
    rows[4]["chosen"] = [{"role": "assistant", "content": " \n"}]
    rows[3] |= {"rejected": rows[3]["chosen"], "sft_only": True}
    preferences = write_preferences(tmp_path, rows, [])
    data = load_pairs(preferences.uri, Workspace(tmp_path), tokenizer, 128)
    assert [pair.line for pair in data.pairs] == [1, 2, 4]
    assert data.report.pairs == 5
    assert data.report.refused == {3: "chosen and rejected are equal", 5: "chosen is empty, which would teach silence"}
    assert "2 pairs refused and left out: line 3: chosen and rejected are equal; line 5: chosen is" in caplog.text


def test_an_adapter_is_probed_with_no_more_tokens_than_it_was_trained_on() -> None:
    assert [len(ids) for ids in probe_texts([token_pair(10, [1] * 9, [2] * 3)], max_length=16)] == [16, 13]


def test_nothing_left_is_an_error_that_names_the_file(tokenizer: Any, tmp_path: Path) -> None:
    preferences = write_preferences(tmp_path, pairs(2, 0), [])
    with pytest.raises(PreflowError, match=r"train\.jsonl: none of its 2 pairs .*line 1: the prompt alone"):
        load_pairs(preferences.uri, Workspace(tmp_path), tokenizer, 4)


def test_the_report_says_what_is_cut() -> None:
    report, known = LengthReport(), (True, True)
    report.add(replace(token_pair(10, [1] * 10, [1] * 2), sampled=known), max_length=16)
    report.add(token_pair(2, [1] * 2, [1] * 2), max_length=16)
    assert (report.pairs, report.longest, report.longest_prompt) == (2, 20, 10)
    assert (report.cut_sides, report.cut_tokens) == (1, 4)
    assert report.exact == 1, "a side that is cut is not trained on as it was sampled"
    assert report.mean == pytest.approx((16 + 4) / 2)


def test_micro_batches_hold_pairs_of_like_length_and_every_pair_once() -> None:
    lengths = [5, 9, 1, 7, 7]
    assert make_micro_batches(lengths, 2, group_by_length=True, seed=0) == [[1, 3], [4, 0], [2]]
    shuffled = make_micro_batches(lengths, 2, group_by_length=False, seed=0)
    assert sorted(row for batch in shuffled for row in batch) == [0, 1, 2, 3, 4]
    assert shuffled != make_micro_batches(lengths, 2, group_by_length=False, seed=1)


def test_epochs_shuffle_micro_batches_but_keep_their_pairs() -> None:
    batches = make_micro_batches(list(range(21)), 2, group_by_length=True, seed=0)
    sampler = MicroBatchSampler(batches, seed=7)
    first, second = sampler.order(0), sampler.order(1)
    assert first != second
    assert sorted(first) == sorted(second) == sorted(batches)
    assert first[0] == batches[0], "the longest comes first: memory runs out at once or never"
    assert first[-1] == second[-1] == [0], "the smaller one comes last, or it would shift the others"
    sampler.set_epoch(1)
    assert list(sampler) == [row for batch in second for row in batch]
    assert len(sampler) == 21
    assert MicroBatchSampler(batches, seed=8).order(1) != second
