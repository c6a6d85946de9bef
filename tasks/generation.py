"""Sampling N completions for every prompt from an OpenAI-compatible endpoint."""

import hashlib
import json
import logging
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
from prefect import task
from pydantic import BaseModel, ConfigDict

from tasks.caching import stage_key
from tasks.config import GenerationConfig
from tasks.endpoint import Endpoint, RequestRefused, resolve_secret
from tasks.errors import PreflowError
from tasks.shards import (
    MergeCounts,
    Outcome,
    Row,
    RowStore,
    ShardRef,
    ShardWorker,
    Slice,
    Tally,
    merge_shards,
    slice_rows,
)
from tasks.stages import SHARD_POLICY, run_shards
from tasks.storage import CompletionsRef, PromptsRef, Workspace, folder_digest, package_versions

VERSION = 1
logger = logging.getLogger(__name__)


class GenerationPlan(BaseModel):
    """What a generation will do: its shards, and the key of the settings that its rows depend on."""

    model_config = ConfigDict(frozen=True)

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
        return Workspace(self.workspace).find_finished(f"{self.folder}/manifest.json", CompletionsRef)

    def shard_key(self, part: Slice) -> str:
        """Return the content key of one shard."""
        return stage_key("generate-shard", VERSION, settings=self.settings_key, rows=part.sha256)


def sampling_identity(generation: GenerationConfig) -> dict[str, Any]:
    """Return what determines a completion: the sampling settings and the model's digest (its name if there is none).

    Raises:
        PreflowError: the adapter's folder is missing or holds no weights.
    """
    settings = generation.identity()
    if generation.adapter:
        settings["model"] = f"sha256:{folder_digest(generation.adapter)}"
    else:
        logger.warning(
            "generation.adapter is empty: the name %r must identify the model; a new model under the same name will "
            "be taken for the old one", generation.model,
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


class Sampler:
    """Samples the completions of one prompt."""

    def __init__(self, endpoint: Endpoint, generation: GenerationConfig) -> None:
        self._endpoint, self._config = endpoint, generation
        self._keep = re.compile(generation.keep_lines) if generation.keep_lines else None

    async def sample(self, prompt: Row) -> Outcome:
        """Return the completions of `prompt`, or why the endpoint will never give them."""
        config = self._config
        messages = [{"role": m["role"], "content": m["content"]} for m in prompt["prompt"]]
        try:
            answer = await self._endpoint.chat(
                messages,
                n=config.num_completions,
                temperature=config.temperature,
                top_p=config.top_p,
                max_tokens=config.max_tokens,
                frequency_penalty=config.frequency_penalty,
                seed=sample_seed(config.seed, prompt["id"]),
            )
        except RequestRefused as refused:
            return Outcome(error={"id": prompt["id"], "reason": refused.reason, "detail": str(refused)})
        texts = [self._kept(choice.text) for choice in answer.choices]
        usage = answer.usage.model_dump()
        problem = self._find_problem(texts)
        if problem:
            return Outcome(error={"id": prompt["id"], "reason": "empty_completion", "detail": problem}, usage=usage)
        reasons = [choice.finish_reason for choice in answer.choices]
        return Outcome(
            row={"id": prompt["id"], "completions": texts, "finish_reasons": reasons}, usage=usage
        )

    def _kept(self, text: str) -> str:
        if self._keep is None:
            return text
        return "\n".join(line for line in text.splitlines() if self._keep.search(line))

    def _find_problem(self, texts: list[str]) -> str | None:
        if len(texts) != self._config.num_completions:
            return f"the endpoint returned {len(texts)} of {self._config.num_completions} completions"
        empty = sum(not text.strip() for text in texts)
        return f"{empty} of {len(texts)} completions are empty" if empty else None


async def collect_completions(plan: GenerationPlan) -> CompletionsRef:
    """Return the completions of every prompt, sampling those that are not known yet."""
    return plan.find_finished() or merge_completions(plan, await sample_shards(plan))


async def sample_shards(plan: GenerationPlan) -> list[ShardRef]:
    """Sample what is missing, each shard a cached Prefect task, all sharing one window of requests.

    Raises:
        PreflowError: before the first request: the endpoint does not answer, does not know the model, refuses the key,
            or has too small a context; later: it is down for too long, or the budget is used up.
    """
    config, rows = plan.generation, plan.rows()
    key = await resolve_secret(config.api_key, "generation.api_key")
    async with Endpoint(config, key) as endpoint:
        tally = Tally(total=plan.prompts.rows)
        worker = ShardWorker(rows, lambda row: str(row["id"]), Sampler(endpoint, config).sample, tally)
        if not rows.lacks(plan.slices):
            return await run_shards(generate_shard, plan, worker, config.max_concurrency)
        async with adapter_loaded(endpoint, config):
            await check_endpoint(endpoint, plan)
            return await run_shards(generate_shard, plan, worker, config.max_concurrency)


@asynccontextmanager
async def adapter_loaded(endpoint: Endpoint, config: GenerationConfig) -> AsyncIterator[None]:
    """Have vLLM serve `serve_from` under `model` for the time of the block, if the configuration asks for it."""
    if config.serve_from is None:
        yield
        return
    await endpoint.load_adapter(config.model, config.serve_from, replace=True)
    try:
        yield
    finally:
        await endpoint.unload_adapter(config.model)


@task(name="generate-shard", task_run_name="generate {label}", **SHARD_POLICY)
async def generate_shard(label: str, part: Slice, worker: ShardWorker) -> dict[str, Any]:
    """Sample the completions of one shard."""
    return (await worker.run(part)).model_dump()


async def check_endpoint(endpoint: Endpoint, plan: GenerationPlan) -> None:
    """See that the endpoint answers, knows the model and has room for the longest prompt and its completion.

    Raises:
        PreflowError: it does not; nothing was sampled.
    """
    info = await endpoint.check_model()
    if info.max_model_len is None:
        return
    longest: Row = {}
    for line in Workspace(plan.workspace).lines(plan.prompts.uri):
        row = json.loads(line)
        if sum(len(m["content"]) for m in row["prompt"]) > sum(len(m["content"]) for m in longest.get("prompt", [])):
            longest = row
    tokens = await _count_tokens(plan.generation, longest["prompt"])
    needed = (tokens or 0) + plan.generation.max_tokens
    if needed > info.max_model_len:
        raise PreflowError(
            f"prompt {longest['id'][:12]} has {tokens} tokens; with generation.max_tokens {plan.generation.max_tokens} "
            f"it does not fit {info.id}'s context of {info.max_model_len}. Lower max_tokens, drop the longest prompts, "
            "or serve the model with a larger --max-model-len."
        )


async def _count_tokens(generation: GenerationConfig, messages: list[dict[str, str]]) -> int | None:
    """Return a prompt's tokens as vLLM counts them; None where the endpoint has no /tokenize."""
    base = generation.endpoint.rstrip("/").removesuffix("/v1")
    key = await resolve_secret(generation.api_key, "generation.api_key")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    async with httpx.AsyncClient(timeout=30, headers=headers) as client:
        reply = await client.post(f"{base}/tokenize", json={"model": generation.model, "messages": messages})
    return int(reply.json()["count"]) if reply.is_success else None


def merge_completions(plan: GenerationPlan, shards: list[ShardRef]) -> CompletionsRef:
    """Put the shards together in input order as `completions.jsonl`, with `failures.jsonl` and a manifest beside it.

    Raises:
        PreflowError: more than `max_failure_ratio` of the prompts failed for good.
    """
    store, rows = Workspace(plan.workspace), plan.rows()
    folder = plan.folder
    counts, cut = MergeCounts(), 0
    with store.writing(f"{folder}/failures.jsonl") as failures, store.writing(f"{folder}/completions.jsonl") as out:
        for prompt, outcome in merge_shards(plan.slices, shards, rows, failures):
            counts.add(outcome)
            if outcome.row is not None:
                cut += outcome.row["finish_reasons"].count("length")
                out.write_row({**prompt, **outcome.row})
    check_failures(counts, plan.generation.max_failure_ratio, "prompts", f"{folder}/failures.jsonl")
    artifact = CompletionsRef(uri=f"{folder}/completions.jsonl", manifest=f"{folder}/manifest.json", **out.facts())
    total = counts.rows * plan.generation.num_completions
    logger.info(
        "completions: %d prompts x %d, %d failed, %d of %d cut at max_tokens", counts.rows,
        plan.generation.num_completions, counts.failed, cut, total,
    )
    store.write_json(
        f"{folder}/manifest.json",
        {
            "artifact": artifact.model_dump(),
            "key": plan.key,
            "stage": "generation",
            "version": VERSION,
            "config": plan.generation.model_dump(mode="json"),
            "settings": sampling_identity(plan.generation),
            "upstream": [plan.prompts.model_dump()],
            "packages": package_versions(),
            "counts": {"prompts": counts.rows, "failed": counts.failed, "cut": cut},
            "usage": counts.usage,
        },
    )
    return artifact


def check_failures(counts: MergeCounts, allowed: float, what: str, where: str) -> None:
    """Refuse a stage in which too much failed for good.

    Raises:
        PreflowError: with the share, where the reasons are, and what to do.
    """
    total = counts.rows + counts.failed
    if counts.failed > allowed * total or not counts.rows:
        raise PreflowError(
            f"{counts.failed} of {total} {what} failed for good, over max_failure_ratio ({allowed:.1%}); why is in "
            f"{where}. What succeeded is kept. Mend the cause, or raise max_failure_ratio to go on without them."
        )
