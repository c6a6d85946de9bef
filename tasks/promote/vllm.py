"""Exchanging the adapter that vLLM serves under a name: loaded, probed, and put back where the probe fails."""

import asyncio
import logging
import math

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from tasks.config import EndpointConfig, PromotionConfig
from tasks.errors import PreflowError
from tasks.llm.client import Endpoint
from tasks.llm.responses import ModelInfo, RequestRefused, Transient
from tasks.llm.secrets import resolve_secret
from tasks.llm.vllm_admin import replicas
from tasks.store.measures import Probe, ProbeText
from tasks.store.workspace import Workspace, server_path

logger = logging.getLogger(__name__)
FloatArray = NDArray[np.float64]

PROBE = "probe.json"
# Mean difference of a log-prob, in nats. Measured with the demo's model, right adapter: below 1e-5 where both sides are
# fp32, 0.011 for bfloat16, 0.020 for a base trained on in 4 bits and served in bfloat16. A wrong adapter: 0.65.
TOLERANCE, TOLERANCE_4BIT = 0.1, 0.3
# Below this share of the tolerance, being nearer to another adapter is noise: the two are too much alike.
NOISE = 0.3
# Log-probs asked for in each text: 36 of three pairs.
POSITIONS = 6


class ProbeFailed(PreflowError):
    """What is served under the name is not the adapter that was loaded."""


def check_probe(probe: Probe, served: list[list[float]], served_base: list[list[float]]) -> float:
    """Compare what is served with what was trained, each relative to its own base model.

    Returns:
        The mean difference of a log-prob, in nats.

    Raises:
        ProbeFailed: it is nearer to the SFT adapter or to the bare base, or too far from all of them.
    """
    tolerance = TOLERANCE if probe.base_precision in ("float32", "bfloat16") else TOLERANCE_4BIT

    def effect(name: str) -> FloatArray:
        """Return what was added to the base's log-probs one way, `adapter`, `sft` or `base`, where they are asked."""
        added = [np.subtract(getattr(text, name), text.base)[positions(text)] for text in probe.texts]
        return np.concatenate(added)

    found = np.concatenate(served) - np.concatenate(served_base)
    distance = {name: float(np.abs(found - effect(name)).mean()) for name in ("adapter", "sft", "base")}
    told = ", ".join(f"{value:.4f} from {name}" for name, value in distance.items())
    if not math.isfinite(distance["adapter"]):
        raise ProbeFailed(f"it answers with log-probs that are no numbers ({told})")
    nearest = min(distance, key=lambda name: distance[name])
    if distance["adapter"] > tolerance:
        raise ProbeFailed(f"its log-probs differ by more than {tolerance} nats a token ({told})")
    if distance[nearest] < distance["adapter"]:
        if distance["adapter"] > NOISE * tolerance:
            raise ProbeFailed(f"its log-probs are nearer to those of the {nearest} than of the adapter ({told})")
        logger.warning("the adapter is so like the %s that the probe cannot tell them apart (%s)", nearest, told)
    return distance["adapter"]


def positions(text: ProbeText) -> list[int]:
    """Return the indices of the log-probs that are asked for: spread over the text, the last one among them."""
    count = len(text.adapter)
    return list(range(count - 1, -1, -max(1, count // POSITIONS)))[:POSITIONS]


def read_probe(folder: str) -> Probe | None:
    """Return the probe next to an installed adapter; None for one whose training recorded none."""
    store = Workspace.holding(folder)
    uri = f"{folder}/{PROBE}"
    if not store.exists(uri):
        return None
    try:
        return Probe.model_validate(store.read_json(uri))
    except ValidationError as error:
        raise PreflowError(f"{uri}: damaged ({error.error_count()} fields); promote the adapter again") from error


async def swap_adapter(new: str, current: str | None, workspace: str, promotion: PromotionConfig) -> None:
    """Serve the adapter in the folder `new` under its name, and verify it; put `current` back where that fails.

    Without `promotion.endpoint` nothing is loaded; where `current` is None the name is taken away again. Where it is
    `new` itself, as in a reconciliation, there is nothing to put back.

    Raises:
        ProbeFailed: something else is served than was loaded.
        PreflowError: vLLM refused the adapter, or is not there.
    """
    if promotion.endpoint is None:
        return
    async with await _server(promotion) as server:
        try:
            path = server_path(new, workspace, promotion.adapter_root)
            await server.load_adapter(promotion.name, path, replace=True)
            for one in await _each_replica(promotion):
                async with await _server(one) as replica:
                    await verify_served(replica, new, one)
        except PreflowError as error:
            if new == current:
                again = "CURRENT.json still names it: fix the cause, then run reconcile-served"
                raise type(error)(f"{promotion.name!r} is not served from {new}: {error}. {again}") from error
            outcome = await _restore_previous(server, current, workspace, promotion)
            raise type(error)(f"{promotion.name!r} was not exchanged: {error}. {outcome}") from error


async def _server(promotion: PromotionConfig) -> Endpoint:
    config = EndpointConfig(
        endpoint=str(promotion.endpoint), model=promotion.name, api_key=promotion.api_key, max_outage_seconds=60
    )
    return Endpoint(config, await resolve_secret(promotion.api_key, "promotion.api_key"))


async def _each_replica(promotion: PromotionConfig) -> list[PromotionConfig]:
    return [promotion.model_copy(update={"endpoint": address}) for address in await replicas(str(promotion.endpoint))]


async def verify_served(server: Endpoint, uri: str, promotion: PromotionConfig) -> None:
    """See that what the server serves under the name is the adapter in the folder `uri`, by its log-probs.

    Raises:
        ProbeFailed: it is not.
    """
    probe = read_probe(uri)
    if probe is None:
        logger.warning(
            "%s has no %s (its training recorded none): it is NOT checked that vLLM serves this very adapter, only "
            "that it answers. An adapter trained by this version of preflow has one.", uri, PROBE,
        )  # fmt: skip
        await server.token_log_prob([1, 2], 3)
        return
    listed = (await _models(server)).get(promotion.name)
    base_name = listed.parent if listed else None
    if base_name is None:
        raise ProbeFailed(f"{server.config.endpoint} does not list it as an adapter of a base model")
    async with await _server(promotion.model_copy(update={"name": base_name})) as base:
        served, bare = await asyncio.gather(_ask(server, probe), _ask(base, probe))
    distance = check_probe(probe, served, bare)
    logger.info("%s serves the adapter in %s: log-probs differ by %.2g nats a token", promotion.name, uri, distance)


async def _ask(model: Endpoint, probe: Probe) -> list[list[float]]:
    asked = [[(text.token_ids[: at + 1], text.token_ids[at + 1]) for at in positions(text)] for text in probe.texts]
    found = await asyncio.gather(*(model.token_log_prob(*one) for text in asked for one in text))
    answers = iter(found)
    return [[next(answers) for _ in text] for text in asked]


async def _models(server: Endpoint) -> dict[str, ModelInfo]:
    try:
        return {model.id: model for model in await server.models()}
    except (Transient, RequestRefused) as failure:
        raise PreflowError(
            f"{server.config.endpoint} does not list its models: {failure}. Check that vLLM is up and the address right"
        ) from failure


async def _restore_previous(server: Endpoint, current: str | None, workspace: str, promotion: PromotionConfig) -> str:
    """Restore what was served and return what came of it, for the error."""
    again = "CURRENT.json names what it named before. Fix the cause, then promote again."
    try:
        if current is None:
            await server.unload_adapter(promotion.name)
            return f"Nothing was served under this name before, and nothing is now. {again}"
        await server.load_adapter(promotion.name, server_path(current, workspace, promotion.adapter_root), replace=True)
    except PreflowError as error:
        return (
            f"What was served before could not be put back either ({error}). CURRENT.json still names it: start vLLM, "
            "then promote again, or run reconcile-served to have it serve what CURRENT.json names."
        )
    return f"What was served before ({current}) is served again. {again}"


async def is_served(uri: str, workspace: str, promotion: PromotionConfig) -> bool:
    """Tell whether vLLM serves the adapter in the folder `uri` under its name; asks for log-probs, changes nothing."""
    path = server_path(uri, workspace, promotion.adapter_root)
    for one in await _each_replica(promotion):
        async with await _server(one) as server:
            listed = (await _models(server)).get(one.name)
            if listed is None or listed.root != path:
                return False
            try:
                await verify_served(server, uri, one)
            except ProbeFailed as error:
                logger.warning("vLLM lists %s from %s, but %s", one.name, path, error)
                return False
    return True
