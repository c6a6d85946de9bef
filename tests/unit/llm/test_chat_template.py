"""The chat template: which one counts, that it renders as transformers does but for the clock, what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest

from tasks.config import ChatSettings, GenerationConfig, PipelineConfig, TrainingConfig
from tasks.errors import PreflowError
from tasks.llm.chat_template import ChatTemplate, TemplateRefused, check_prompts, choose_template, same_words
from tasks.llm.choose_template import template_file
from tasks.store.workspace import PreferencesRef
from tasks.train.launch import training_key
from tests.fakes.chat import FAMILIES, Family

QUESTION = [{"role": "user", "content": "  the cat? "}]
FRENCH = "{{ messages[0]['content'] }} en francais"


def template(family: Family, folder: Path) -> tuple[ChatTemplate, Any]:
    tokenizer = family.build_tokenizer(folder)
    found = choose_template(ChatSettings(chat_template_kwargs=dict(family.kwargs)), None, str(folder))
    assert found is not None
    return found, tokenizer


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_text_is_that_of_transformers_with_the_date_that_was_set(family: Family, tmp_path: Path) -> None:
    ours, tokenizer = template(family, tmp_path)
    for messages, prompt in ((QUESTION, True), ([*QUESTION, {"role": "assistant", "content": "a dog"}], False)):
        theirs = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=prompt, date_string="26 Jul 2024", **dict(family.kwargs)
        )
        assert ours.render(messages, prompt=prompt) == theirs


def test_ends_of_turn_are_found() -> None:
    found = {}
    for family in FAMILIES:
        special = {"bos_token": family.bos or "", "eos_token": family.eos}
        found[family.name] = ChatTemplate(family.file.read_text(), "", special, ChatSettings()).around_answer
    assert found["llama3.2"] == ("", "<|eot_id|>")
    assert found["qwen3"] == found["smollm2"] == ("", "<|im_end|>\n")
    assert found["gemma"] == ("", "<end_of_turn>\n")
    assert found["mistral"] == (" ", "</s>"), "an answer begins with a blank that the prompt does not end in"
    assert found["vicuna"] == ("", "</s>")
    with pytest.raises(TemplateRefused, match="drops the assistant's answer"):
        _ = ChatTemplate(FRENCH, "f", {}, ChatSettings()).around_answer


def test_a_template_that_asks_for_the_time_gets_the_date_that_was_set() -> None:
    asks = ChatTemplate("{{ strftime_now('%Y-%m-%d') }}", "", {}, ChatSettings(date_string="03 Feb 2025"))
    assert asks.render(QUESTION) == "2025-02-03"
    assert asks.has_clock
    llama = ChatTemplate(FAMILIES[0].file.read_text(), "", {}, ChatSettings(date_string="03 Feb 2025"))
    assert "Today Date: 03 Feb 2025" in llama.render(QUESTION)
    assert not llama.has_clock, "it takes a date_string"


def test_the_adapters_template_comes_before_the_bases_and_a_file_before_an_entry(tmp_path: Path) -> None:
    adapter, base = tmp_path / "adapter", tmp_path / "base"
    for folder in (adapter, base):
        folder.mkdir()
    assert choose_template(ChatSettings(), str(adapter), str(base)) is None
    settings = ChatSettings(chat_template=str(tmp_path / "given.jinja"))
    with pytest.raises(PreflowError, match=r"given\.jinja: no such file"):
        choose_template(settings, str(adapter), str(base))
    places = [
        (base / "tokenizer_config.json", json.dumps({"chat_template": [{"name": "default", "template": "1"}]}), "1"),
        (base / "tokenizer_config.json", json.dumps({"chat_template": ["odd", {"default": "0"}]}), None),
        (base / "tokenizer_config.json", json.dumps({"chat_template": {"default": "1.5", "rag": "0"}}), "1.5"),
        (base / "chat_template.jinja", "2", "2"),
        (adapter / "tokenizer_config.json", json.dumps({"chat_template": "3", "eos_token": {"content": "</s>"}}), "3"),
        (adapter / "chat_template.jinja", "4", "4"),
    ]
    for file, content, text in places:
        file.write_text(content)
        found = choose_template(ChatSettings(), str(adapter), str(base))
        assert (found and found.text) == text
        if text is None:
            continue
        assert found is not None
        assert (found.text, found.source) == (text, str(file))
        served = template_file([str(adapter), str(base)])
        assert served is not None
        assert Path(served).read_text() == text, "the server takes the same one"
    assert found.special_tokens == {"eos_token": "</s>"}
    (tmp_path / "given.jinja").write_text("5")
    given = choose_template(settings, str(adapter), str(base))
    assert given is not None
    assert given.text == "5"


def test_a_refused_prompt_is_named_by_file_and_line(tmp_path: Path) -> None:
    family = next(family for family in FAMILIES if family.name == "mistral")
    ours, _ = template(family, tmp_path)
    rows = [{"prompt": QUESTION}, {"prompt": [*QUESTION, *QUESTION]}]
    (tmp_path / "prompts.jsonl").write_text("\n\n".join(json.dumps(row) for row in rows) + "\n")
    said = r"prompts\.jsonl:3: the chat template of .*refuses .*Conversation roles must alternate"
    with pytest.raises(PreflowError, match=said):
        check_prompts(str(tmp_path / "prompts.jsonl"), ours)


@pytest.mark.parametrize(
    "text", ["{% for m in messages %}", "{{ messages[9].content.x }}", "{{ 1 / 0 }}", "{{ 1 + 'a' }}"]
)
def test_a_broken_template_is_no_traceback(text: str) -> None:
    with pytest.raises(TemplateRefused, match="the chat template of f refuses"):
        ChatTemplate(text, "f", {}, ChatSettings()).render(QUESTION)


def test_a_template_without_its_tokenizer_is_not_held_against_a_server(tmp_path: Path) -> None:
    """A trained adapter brings its template, and not always a tokenizer: rendered without <s>, no prompt is right."""
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}")
    found = choose_template(ChatSettings(), str(tmp_path))
    assert found is not None
    assert not found.is_complete
    for value, rendered in (("<s>", "<s>a"), (None, "a")):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": value}))
        found = choose_template(ChatSettings(), str(tmp_path))
        assert found is not None
        assert found.is_complete
        assert found.render([{"role": "user", "content": "a"}]) == rendered


def test_thinking_and_white_space_are_no_words() -> None:
    assert same_words("a <think>\nb</think>\n\nc", "ac ")
    assert not same_words("a b", "a c")


def test_the_training_key_holds_what_decides_the_tokens_and_no_address(tmp_path: Path) -> None:
    base, adapter, given = tmp_path / "base", tmp_path / "adapter", tmp_path / "given.jinja"
    for file, content in (
        (base / "model.safetensors", "w"), (base / "tokenizer_config.json", json.dumps({"chat_template": "1"})),
        (base / "tokenizer.json", "{}"), (adapter / "adapter_model.safetensors", "a"), (given, FRENCH + "!"),
    ):  # fmt: skip
        file.parent.mkdir(exist_ok=True)
        file.write_text(content)
    preferences = PreferencesRef(uri=str(tmp_path / "train.jsonl"), sha256="0" * 64, size=1, rows=1)

    def key(**settings: Any) -> str:
        return training_key(preferences, TrainingConfig(base_model=str(base), sft_adapter=str(adapter), **settings))

    first = key()
    base = base.rename(tmp_path / "elsewhere")
    assert key() == first, "a base that was moved is the same base"
    keys = [key(chat_template_kwargs={"enable_thinking": False}), key(date_string="01 Jan 2026"), key(stop=("</s>",))]
    for file, content in (
        (base / "tokenizer.json", '{"a": 1}'), (base / "chat_template.jinja", FRENCH),
        (adapter / "chat_template.jinja", FRENCH + "!"),
    ):  # fmt: skip
        file.write_text(content)
        keys.append(key())
    assert key(chat_template=str(given)) == keys[-1]
    assert len({first, *keys}) == 7


def test_one_run_speaks_in_the_same_words_everywhere() -> None:
    config = PipelineConfig.model_validate({"generation": {"stop": ["\n"], "chat_template_kwargs": {"a": 1}}}).filled()
    assert config.training.stop == ("\n",)
    assert config.evaluation.generation is not None
    assert config.training.template_kwargs() == {"date_string": "26 Jul 2024", "a": 1}
    with pytest.raises(ValueError, match=r"training\.stop is not generation\.stop"):
        PipelineConfig.model_validate({"training": {"stop": ["\n"]}})
    with pytest.raises(ValueError, match=r"evaluation\.generation\.date_string is not generation\.date_string"):
        PipelineConfig.model_validate({"evaluation": {"generation": {"date_string": "01 Jan 2026"}}})
    assert GenerationConfig(chat_template="/a").identity() == GenerationConfig(chat_template="/b").identity()
