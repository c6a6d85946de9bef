"""The chat template: chosen in one place and rendered without a clock, for sampling, training and serving alike."""

import json
import logging
import posixpath
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, lru_cache, partial
from pathlib import Path

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from tasks.config import ChatSettings, TrainingConfig
from tasks.config.base import resolve_location
from tasks.errors import PreflowError
from tasks.llm.choose_template import CONFIG, choose
from tasks.store.records import PromptRow, number_rows
from tasks.store.workspace import Workspace, digest

logger = logging.getLogger(__name__)

Messages = Sequence[Mapping[str, str]]
TOKENIZER = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt",
)  # fmt: skip
# In no template, and nothing that one would change.
ANSWER = "QxAnswerxQ"
# What a template may do to an answer without changing what it says: white space, and the thinking that it drops.
_UNSEEN = re.compile(r"<think>.*?</think>|</?think>|\s+", re.DOTALL)


class TemplateRefused(PreflowError):
    """The chat template does not take these messages."""


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template and what it is handed: special tokens by name (None: the tokenizer has it not), and settings."""

    text: str
    source: str
    special_tokens: Mapping[str, str | None]
    settings: ChatSettings

    def render(self, messages: Messages, prompt: bool = False) -> str:
        """Return the text of a conversation; `prompt`: up to where the assistant's answer begins.

        Raises `TemplateRefused`, in the template's own words.
        """
        try:
            return _compile(self.text, self.settings.date_string).render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=prompt,
                **{name: token for name, token in self.special_tokens.items() if token is not None},
                **self.settings.template_kwargs(),
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, RecursionError) as error:
            roles = ", ".join(message["role"] for message in messages)
            raise TemplateRefused(f"the chat template of {self.source} refuses messages of {roles}: {error}") from error

    @cached_property
    def around_answer(self) -> tuple[str, str]:
        """What stands between prompt and answer (white space at most), and after the answer: its end of turn.

        Raises `TemplateRefused` if it takes no answer, or drops it.
        """
        question, answer = [{"role": "user", "content": "Q"}], {"role": "assistant", "content": ANSWER}
        try:
            whole = self.render([*question, answer])
        except TemplateRefused as refused:  # some ask for a system message
            question.insert(0, {"role": "system", "content": "S"})
            try:
                whole = self.render([*question, answer])
            except TemplateRefused:
                raise refused from None
        before, found, end = whole.rpartition(ANSWER)
        if not found:
            raise TemplateRefused(f"the chat template of {self.source} drops the assistant's answer")
        prompt = self.render(question, prompt=True)
        lead = before.removeprefix(prompt)
        return (lead if before.startswith(prompt) and lead.isspace() else ""), end

    @property
    def is_complete(self) -> bool:
        """Whether the special tokens that it writes are known: an adapter without a tokenizer does not tell them."""
        return set(re.findall(r"\b(?:bos|eos|pad|unk)_token\b", self.text)) <= set(self.special_tokens)

    @property
    def has_clock(self) -> bool:
        """Whether a server that renders it writes its own date, whatever it is handed."""
        return "strftime_now" in self.text and "date_string" not in self.text

    def identity(self) -> dict[str, object]:
        """Return what decides the rendered text, JSON-ready, for content keys."""
        kwargs, stop = self.settings.template_kwargs(), list(self.settings.stop)
        return {"text": digest(self.text), "special": dict(self.special_tokens), "kwargs": kwargs, "stop": stop}


def same_words(text: str, other: str) -> bool:
    """Tell whether two texts differ in white space and dropped thinking at most."""
    return _UNSEEN.sub("", text) == _UNSEEN.sub("", other)


class _Generation(Extension):
    """`{% generation %}`, with which training templates mark the answers: its content is printed as it is."""

    tags = {"generation"}  # noqa: RUF012  # jinja's own way

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(maxsize=16)
def _compile(text: str, date: str) -> jinja2.Template:
    """Compile as transformers does, but for the clock, which stands at `date`."""

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    environment.globals.update(raise_exception=refuse, strftime_now=datetime.strptime(date, "%d %b %Y").strftime)
    return environment.from_string(text)


def choose_template(
    settings: ChatSettings, adapter: str | None, base: str | None = None, revision: str | None = None
) -> ChatTemplate | None:
    """Return the chat template that counts: that of the settings, else the adapter's, else the base model's.

    `base` is a folder or a hub's name, then of `revision`. Raises `PreflowError` if the file that the settings name is
    not there.
    """
    read = partial(read_model_file, revision=revision)
    folders = [source for source in (adapter, base) if source]
    if settings.chat_template is not None:
        source, store = settings.chat_template, Workspace.holding(settings.chat_template)
        if not store.exists(source):
            raise PreflowError(f"chat_template {source}: no such file")
        content = _as_text(source, store.read_bytes(source))
    elif found := choose(folders, read):
        source, content = "/".join(found[:2]), found[2]
    else:
        return None
    tokens: dict[str, str | None] = {}
    if owner := next((folder for folder in folders if read(folder, CONFIG)), None):  # the first with a tokenizer
        entries = json.loads(read(owner, "special_tokens_map.json") or "{}") | json.loads(read(owner, CONFIG) or "{}")
        texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in entries.items()}
        tokens = {n: text for n, text in texts.items() if n.endswith("_token") and isinstance(text, str | None)}
    return ChatTemplate(content, source, tokens, settings)


def template_of(training: TrainingConfig, adapter: str | None = None, base: str | None = None) -> ChatTemplate:
    """Return the chat template of a training; `adapter` and `base` are local copies of the two folders.

    Raises `PreflowError` if there is none.
    """
    adapter, base = adapter or training.sft_adapter, base or training.base_model
    found = choose_template(training, adapter, base, training.base_revision)
    if found is None:
        raise PreflowError(
            f"no chat template in {training.base_model} nor in {training.sft_adapter}: pairs are conversations and "
            "need one. Put the template of the SFT training into chat_template.jinja in the adapter's folder."
        )
    return found


def fast_tokenizer(training: TrainingConfig) -> Tokenizer | None:
    """Return the tokenizer that is trained with; None where its tokenizer.json cannot be read here."""
    for folder in (training.sft_adapter, training.base_model):
        if read_model_file(folder, CONFIG, training.base_revision):
            text = read_model_file(folder, "tokenizer.json", training.base_revision)
            return Tokenizer.from_str(text) if text else None
    return None


def tokenizer_digests(adapter: str, base: str) -> dict[str, str]:
    """Return the digests of the tokenizer's files: the adapter's where it brings one, else those of a base folder."""
    for folder in [adapter, *([base] if Path(base).expanduser().is_dir() else [])]:
        files = Workspace.holding(folder).digests(resolve_location(folder), TOKENIZER)
        if CONFIG in files:
            return files
    return {}


def read_model_file(source: str, name: str, revision: str | None = None) -> str | None:
    """Return the text of a model's file, None where it is absent: of a folder, a gs:// address, or a hub's local cache.

    Preflight and trainer have fetched a hub's small files before; nothing is asked here.
    """
    if "://" in source or Path(source).expanduser().is_dir() or source.startswith((".", "/", "~")):
        store, uri = Workspace.holding(source), f"{resolve_location(source)}/{name}"
        return _as_text(uri, store.read_bytes(uri)) if store.exists(uri) else None
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(source, name, revision=revision)
    except ValueError:  # no name that a hub could have
        return None
    return _as_text(found, Path(found).read_bytes()) if isinstance(found, str) else None


def _as_text(uri: str, content: bytes) -> str:
    """Return a model's file as text; the small ones of a tokenizer must be JSON objects."""
    try:
        text = content.decode()
        if text.startswith("\ufeff"):
            raise ValueError("it begins with a byte order mark, which would stand before every prompt")
        if posixpath.basename(uri) in (CONFIG, "special_tokens_map.json") and not isinstance(json.loads(text), dict):
            raise ValueError("no JSON object")
    except ValueError as error:
        raise PreflowError(f"{uri}: damaged ({error}); copy or save it again as UTF-8") from error
    return text


def check_prompts(uri: str, template: ChatTemplate) -> None:
    """Render every prompt of a file, so that one that the template refuses is known before anything is paid.

    Raises `PreflowError` with file and line, in the template's words.
    """
    for place, row in number_rows(PromptRow, uri, Workspace.holding(uri)):
        try:
            template.render([message.model_dump() for message in row.prompt], prompt=True)
        except TemplateRefused as error:
            raise PreflowError(
                f"{place}: {error}. Change the messages (put a system message into the first user message, join "
                "messages of one role), or give another chat_template."
            ) from error
