"""Sampling N completions for every prompt from an OpenAI-compatible endpoint."""

import asyncio
import hashlib
import heapq
import json
import logging
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

from pydantic import BaseModel
from tokenizers import Tokenizer

from tasks.batch.caching import find_finished
from tasks.batch.costs import CostLog, write_manifest
from tasks.batch.progress import run_shards, try_question
from tasks.batch.rows import Outcome, RowStore, ShardRef, Slice, slice_rows, writable
from tasks.batch.shards import MergeCounts, ShardWorker, Tally, merge_shards
from tasks.config import GenerationConfig
from tasks.errors import PreflowError
from tasks.llm.chat_template import ChatTemplate, check_prompts, choose_template
from tasks.llm.client import Endpoint
from tasks.llm.responses import PERMANENT, Answer, RequestRefused, price
from tasks.llm.vllm_admin import Template
from tasks.store.forms import ended_by_itself
from tasks.store.workspace import (
    MANIFEST,
    CompletionsRef,
    Manifest,
    Origin,
    PromptsRef,
    Row,
    Workspace,
    folder_digest,
    stage_key,
)

VERSION = 3
# So many of the longest prompts are held against the model's context.
LONGEST = 5
# As the pairs' quality page has it: more cut completions than this are worth a word.
MOST_CUT = 0.1
logger = logging.getLogger(__name__)


class GenerationPlan(BaseModel, frozen=True):
    """What a generation will do: its shards, and the key of the settings that its rows depend on."""

    workspace: str
    prompts: PromptsRef
    generation: GenerationConfig
    settings_key: str
    key: str
    slices: list[Slice]

    def rows(self) -> RowStore:
        """Open the rows made under these settings."""
        return RowStore(self.workspace, "completions", self.settings_key)

    @property
    def folder(self) -> str:
        """Where the finished artifact lies."""
        return Workspace(self.workspace).uri("completions", self.key)

    def find_finished(self) -> CompletionsRef | None:
        """Return the completions if an equal generation has finished."""
        return find_finished(Workspace(self.workspace), self.folder, CompletionsRef)


def sampling_identity(generation: GenerationConfig) -> dict[str, object]:
    """Return what determines a completion: the sampling settings and the model's digest (its name if there is none).

    Raises:
        PreflowError: the adapter's folder is missing or holds no weights.
    """
    settings: dict[str, object] = dict(generation.identity())
    if template := choose_template(generation, generation.adapter):
        settings["chat_template"] = template.identity()
    if generation.adapter:
        settings["model"] = f"sha256:{folder_digest(generation.adapter)}"
    else:
        logger.warning(
            "generation.adapter is empty: the name %r must identify the model; a new model under the same name will "
            "be taken for the old one",
            generation.model,
        )
    return settings


def plan_generation(prompts: PromptsRef, workspace: str, generation: GenerationConfig) -> GenerationPlan:
    """Cut the prompts into shards and work out the keys; nothing is requested."""
    settings_key = stage_key("generation", VERSION, settings=sampling_identity(generation))
    return GenerationPlan(
        workspace=workspace,
        prompts=prompts,
        generation=generation,
        settings_key=settings_key,
        key=stage_key("completions", VERSION, settings=settings_key, prompts=prompts.sha256),
        slices=slice_rows(Workspace(workspace), prompts, generation.shard_size),
    )


def sample_seed(seed: int, identity: str) -> int:
    """Return the seed of a prompt's first completion (the i-th has seed + i), independent of any order."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{identity}".encode()).digest()[:4], "big") % 2**30


def template_settings(generation: GenerationConfig) -> Template:
    """Return what a request says about the chat template; the template itself only where the settings name one."""
    named = choose_template(generation, None) if generation.chat_template else None
    return Template(chat_template=named.text if named else None, chat_template_kwargs=generation.template_kwargs())


class Sampler:
    """Samples the completions of one prompt."""

    def __init__(self, endpoint: Endpoint, generation: GenerationConfig) -> None:
        self._endpoint, self._config = endpoint, generation
        self._keep = re.compile(generation.keep_lines) if generation.keep_lines else None
        self._spoken = template_settings(generation)

    async def sample(self, prompt: Row) -> Outcome:
        """Return the completions of `prompt`, or why the endpoint will never give them."""
        config = self._config
        messages = [{"role": m["role"], "content": m["content"]} for m in prompt["prompt"]]
        try:
            answer = await self._endpoint.chat(
                messages, n=config.num_completions, temperature=config.temperature, top_p=config.top_p,
                max_tokens=config.max_tokens, frequency_penalty=config.frequency_penalty,
                seed=sample_seed(config.seed, prompt["id"]), stop=config.stop or None, return_token_ids=True,
                **self._spoken,
            )  # fmt: skip
        except RequestRefused as refused:
            error = {"id": prompt["id"], "reason": refused.reason, "detail": str(refused)}
            final = refused.reason in PERMANENT or None
            return Outcome(final=final, error=error, usage=refused.usage)
        return self._outcome(prompt["id"], answer)

    def _outcome(self, identity: str, answer: Answer) -> Outcome:
        choices, texts = answer.choices, [writable(choice.text) for choice in answer.choices]
        if (keep := self._keep) is not None:
            texts = ["\n".join(line for line in text.splitlines() if keep.search(line)) for text in texts]
        if not self._config.keep_empty and not any(text.strip() for text in texts):
            cause = "; ".join(sorted({choice.note for choice in choices if choice.note}))
            cause = (
                f"all {len(texts)} completions are empty: {cause or 'no line of them matches generation.keep_lines'}"
            )
            error = {"id": identity, "reason": "empty_completions", "detail": cause}
            return Outcome(error=error, usage=answer.usage)
        pairs = zip(choices, texts, strict=True)
        row = {
            "id": identity,
            "completions": texts,
            "finish_reasons": [choice.finish_reason for choice in choices],
            "prompt_token_ids": answer.prompt_token_ids,
            # A text of which lines were left out is not its tokens' any more.
            "token_ids": [choice.token_ids if text == writable(choice.text) else None for choice, text in pairs],
        }
        return Outcome(row=row, usage=answer.usage, refused=answer.refused)


async def collect_completions(plan: GenerationPlan) -> CompletionsRef:
    """Return the completions of every prompt, sampling those that are not known yet."""
    if known := plan.find_finished():
        logger.info("completions: %d prompts are sampled already, in %s", known.rows, known.uri)
        return known
    return merge_completions(plan, await sample_shards(plan))


async def sample_shards(plan: GenerationPlan) -> list[ShardRef]:
    """Sample what is missing, each shard a cached Prefect task, all sharing one window of requests.

    Raises:
        PreflowError: before the first request: the endpoint does not answer, does not know the model, refuses the key,
            or has too small a context; later: it is down for too long, the budget is used up, or too much failed.
    """
    config = plan.generation
    costs = CostLog(plan.workspace, plan.folder, config.model)
    async with AsyncExitStack() as stack:
        endpoint = await stack.enter_async_context(await Endpoint.connect(costs.left_of(config), "generation"))

        async def prepare() -> None:
            await stack.enter_async_context(adapter_loaded(endpoint, config))
            await check_endpoint(endpoint, plan)

        worker = ShardWorker(
            rows=plan.rows(),
            units_of=prompt_unit,
            work=Sampler(endpoint, config).sample,
            tally=Tally(rows=plan.prompts.rows, allowed=config.max_failure_ratio),
            concurrency=config.max_concurrency,
            prepare=prepare,
        )
        return await run_shards("generate", plan.slices, worker, endpoint, costs)


def prompt_unit(prompt: Row) -> dict[str, Row]:
    """Return a prompt as the one unit of work that it is, under its key."""
    return {str(prompt["id"]): prompt}


@asynccontextmanager
async def adapter_loaded(endpoint: Endpoint, config: GenerationConfig) -> AsyncIterator[None]:
    """Have vLLM serve `serve_from` under `model` for the time of the block, if the configuration asks for it."""
    if config.serve_from is None:
        yield
        return
    await endpoint.load_adapter(config.model, config.serve_from, replace=True)
    try:
        yield
    except BaseException:
        try:
            await endpoint.unload_adapter(config.model)
        except PreflowError as error:  # what ended the block is what the user must see
            logger.warning("%s", error)
        raise
    await endpoint.unload_adapter(config.model)


async def check_endpoint(endpoint: Endpoint, plan: GenerationPlan) -> None:
    """See that the endpoint answers, knows the model and has room for the longest prompt and its completion.

    Raises:
        PreflowError: it does not; nothing was sampled.
    """
    config, store = plan.generation, Workspace(plan.workspace)
    info = await endpoint.check_model()
    template = choose_template(config, config.adapter)
    if template is not None and template.is_complete:
        check_prompts(plan.prompts.uri, template)
    longest = longest_prompts(store, plan.prompts)
    counted = await asyncio.gather(*(endpoint.tokenize(p["prompt"], **template_settings(config)) for p in longest))
    for prompt, tokens in zip(longest, counted, strict=True):
        if tokens is not None and info.max_model_len and len(tokens) + config.max_tokens > info.max_model_len:
            raise PreflowError(
                f"prompt {prompt['id'][:12]} has {len(tokens)} tokens; with generation.max_tokens {config.max_tokens} "
                f"it does not fit {info.id}'s context of {info.max_model_len}. Lower max_tokens, drop the longest "
                "prompts, or serve the model with a larger --max-model-len."
            )
    if template is not None and template.is_complete:
        await check_same_template(endpoint, config, template, [prompt["prompt"] for prompt in longest])


def longest_prompts(store: Workspace, prompts: PromptsRef) -> list[Row]:
    """Return the few prompts that may have the most tokens: the longest in bytes and in characters."""
    by_bytes = heapq.nlargest(LONGEST, store.lines(prompts.uri), key=len)
    by_characters = heapq.nlargest(LONGEST, store.lines(prompts.uri), key=lambda line: len(line.decode()))
    return [json.loads(line) for line in dict.fromkeys([*by_bytes, *by_characters])]


async def check_same_template(
    endpoint: Endpoint,
    generation: GenerationConfig,
    template: ChatTemplate,
    prompts: Sequence[list[dict[str, str]]],
    tokenizer: Tokenizer | None = None,
) -> None:
    """See that a vLLM server turns prompts into the tokens that are trained on; other servers do not tell.

    Args:
        endpoint: of the server.
        generation: says what a request hands to the template.
        template: the chat template of the training.
        prompts: some, as messages.
        tokenizer: that of the training; None: the server's own is taken for it.

    Raises:
        PreflowError: it does not: what it samples and serves would be other words than are trained on.
    """
    for messages in prompts:
        text = template.render(messages, prompt=True)
        theirs = await endpoint.tokenize(messages, **template_settings(generation))
        ours = tokenizer.encode(text, add_special_tokens=False).ids if tokenizer else await endpoint.tokenize(text)
        if theirs is None or ours is None or theirs == ours:
            continue
        if template.has_clock:
            logger.warning("the chat template of %s writes the server's date, another one from day to day, in serving "
                           "too: take a template that is handed date_string", template.source)  # fmt: skip
            return
        same = next((i for i, pair in enumerate(zip(theirs, ours, strict=False)) if pair[0] != pair[1]), len(ours))
        raise PreflowError(
            f"{generation.endpoint} does not speak with the chat template of {template.source} and its tokenizer: a "
            f"prompt has other tokens there from token {same} of {len(theirs)} on. Start vLLM with --chat-template and "
            "that file (serve.sh does so), or name the server's own with generation.chat_template."
        )


TRIAL = {"id": "0" * 64, "prompt": [{"role": "user", "content": "Say hello."}]}


async def try_sampler(endpoint: Endpoint, generation: GenerationConfig) -> None:
    """Ask for completions of one short prompt, as the stage will; nothing of them is kept.

    Raises:
        PreflowError: there are none.
    """
    plain = generation.model_copy(update={"keep_lines": None, "keep_empty": True})  # silence is an answer too
    await try_question("generation", endpoint, Sampler(endpoint, plain).sample(TRIAL))


class SampleCounts(MergeCounts):
    """What a merge of completions found, with completions that were cut and such that ended up empty."""

    cut: int = 0
    empty: int = 0

    def add_row(self, row: Row) -> None:
        """Count one prompt's completions."""
        self.cut += sum(not ended_by_itself(reason) for reason in row["finish_reasons"])
        self.empty += sum(not text.strip() for text in row["completions"])

    def say(self, config: GenerationConfig) -> None:
        """Log what was sampled, and a warning where much of it is cut."""
        prompts, each = self.rows - self.failed, config.num_completions
        logger.info(
            "completions: %d prompts x %d; %d prompts failed; of %d completions %d were cut and %d are empty",
            prompts, each, self.failed, prompts * each, self.cut, self.empty,
        )  # fmt: skip
        if self.cut > MOST_CUT * prompts * each:
            logger.warning(
                "%.0f %% of the completions were cut and end in mid-sentence: raise generation.max_tokens (%d) if that "
                "cut them (finish_reasons says length), or leave out pairs with such a side (judging.leave_out_cut)",
                100 * self.cut / (prompts * each), config.max_tokens,
            )  # fmt: skip


def merge_completions(plan: GenerationPlan, shards: list[ShardRef]) -> CompletionsRef:
    """Put the shards together in input order as `completions.jsonl`, with `failures.jsonl` and a manifest next to it.

    Raises:
        PreflowError: no prompt has completions.
    """
    store, folder, config, counts = Workspace(plan.workspace), plan.folder, plan.generation, SampleCounts()
    with store.writing(f"{folder}/failures.jsonl") as failures, store.writing(f"{folder}/completions.jsonl") as out:
        for prompt, outcomes in merge_shards(plan.slices, shards, plan.rows(), prompt_unit):
            counts.add(outcomes)
            for outcome in outcomes:
                if outcome.row is not None:
                    counts.add_row(outcome.row)
                    out.write_row({**prompt, **outcome.row})
                else:
                    failures.write_row(outcome.error or {})
    if not out.rows:
        raise PreflowError(f"no prompt has completions: all failed for good; why is in {folder}/failures.jsonl")
    counts.say(config)
    upstream: list[Origin] = [plan.prompts]
    if config.adapter:
        upstream.append(Origin(kind="sft_adapter", uri=config.adapter, sha256=folder_digest(config.adapter)))
    artifact = CompletionsRef(uri=f"{folder}/completions.jsonl", manifest=f"{folder}/{MANIFEST}", **out.facts())
    write_manifest(
        store,
        Manifest(
            artifact=artifact, stage="generation", version=VERSION, key=plan.key, config=config,
            upstream=tuple(upstream), files={"completions.jsonl": out.file, "failures.jsonl": failures.file},
            counts=counts.named("failed", "passing", "cut", "empty") | {"prompts": artifact.rows},
            cost=price(counts.usage, config),
        ),
    )  # fmt: skip
    return artifact
