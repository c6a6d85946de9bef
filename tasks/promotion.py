"""The gate, the pointer to what is served, and loading an adapter into a running vLLM."""

import hashlib
import logging
import posixpath
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tasks.config import EndpointConfig, PromotionConfig
from tasks.endpoint import Endpoint, resolve_secret
from tasks.errors import PreflowError
from tasks.storage import AdapterRef, EvaluationRef, PromotionRef, Workspace, indented_json, server_path

logger = logging.getLogger(__name__)


class PromotionRefused(PreflowError):
    """The adapter did not win by enough; what was served before is still served."""


def check_gate(adapter: AdapterRef, evaluation: EvaluationRef, bar: float) -> None:
    """Refuse an adapter whose evaluation is not its own, or whose lower bound is not over the bar.

    Raises:
        PromotionRefused: with the figures and what to try.
    """
    if evaluation.adapter_sha256 != adapter.sha256:
        raise PromotionRefused(
            f"the evaluation {evaluation.uri} is of adapter {evaluation.adapter_sha256[:12]}, not of "
            f"{adapter.sha256[:12]}: evaluate this adapter first"
        )
    if not evaluation.beats(bar):
        raise PromotionRefused(
            f"not promoted: win rate {evaluation.win_rate:.3f}, interval [{evaluation.lower:.3f}, "
            f"{evaluation.upper:.3f}]; its lower bound must be over min_win_rate ({bar}). What was served before is "
            "still served. More held-out prompts narrow the interval; a lower training.beta moves the adapter further."
        )


def install_adapter(adapter: AdapterRef, workspace: str, name: str) -> str:
    """Copy a finished adapter to `adapters/<name>/<digest>/` and return that uri; a copy that is whole is kept."""
    store = Workspace(workspace)
    target = store.uri("adapters", name, adapter.sha256[:16])
    if store.exists(posixpath.join(target, "COMMITTED.json")):
        store.verify_folder(target)
        return target
    with TemporaryDirectory() as scratch:
        local = Workspace.holding(adapter.uri).fetch_folder(adapter.uri, Path(scratch))
        store.commit_folder(local, target)
    return target


def pointer_uri(workspace: str, name: str) -> str:
    """Return where the pointer of a served name lies."""
    return Workspace(workspace).uri("adapters", name, "CURRENT.json")


def read_pointer(workspace: str, name: str) -> dict[str, Any] | None:
    """Return what is served under `name`, with the history to roll back to; None before the first promotion."""
    try:
        pointer: dict[str, Any] = Workspace(workspace).read_json(pointer_uri(workspace, name))
    except FileNotFoundError:
        return None
    return pointer


async def serve_adapter(uri: str, workspace: str, promotion: PromotionConfig) -> None:
    """Load an adapter into vLLM under its served name, in place of the one there, and see that it answers.

    Without `promotion.endpoint` nothing is loaded.

    Raises:
        PreflowError: vLLM refused it, or does not answer under the name.
    """
    if promotion.endpoint is None:
        return
    path = server_path(uri, workspace, promotion.adapter_root)
    config = EndpointConfig(
        endpoint=promotion.endpoint, model=promotion.name, api_key=promotion.api_key, max_outage_seconds=60
    )
    async with Endpoint(config, await resolve_secret(promotion.api_key, "promotion.api_key")) as server:
        await server.load_adapter(promotion.name, path, replace=True)
        answer = await server.chat([{"role": "user", "content": "Say something."}], max_tokens=8, temperature=0)
    if not answer.choices:
        raise PreflowError(f"vLLM loaded {promotion.name!r} from {path} but gives no answer under it; see vLLM's log")


def move_pointer(
    adapter: AdapterRef, evaluation: EvaluationRef, uri: str, workspace: str, promotion: PromotionConfig
) -> PromotionRef:
    """Make `CURRENT.json` name the adapter; what it named before goes to the head of its history."""
    current: dict[str, Any] = {
        "adapter_sha256": adapter.sha256,
        "uri": uri,
        "evaluation": {
            "uri": evaluation.uri,
            "win_rate": evaluation.win_rate,
            "lower": evaluation.lower,
            "upper": evaluation.upper,
        },
    }

    def move(before: dict[str, Any] | None) -> dict[str, Any] | None:
        if before is not None and before["current"]["adapter_sha256"] == adapter.sha256:
            return None
        history = [before["current"], *before["history"]] if before else []
        moved = {**current, "promoted_at": datetime.now(UTC).isoformat(timespec="seconds")}
        return {"name": promotion.name, "current": moved, "history": history}

    pointer = Workspace(workspace).update_json(pointer_uri(workspace, promotion.name), move)
    logger.info("%s is now adapter %s (%s)", promotion.name, adapter.sha256[:12], uri)
    return _refer(workspace, pointer)


def find_promotion(adapter: AdapterRef, workspace: str, promotion: PromotionConfig) -> PromotionRef | None:
    """Return the pointer if it names `adapter` already."""
    pointer = read_pointer(workspace, promotion.name)
    if pointer is None or pointer["current"]["adapter_sha256"] != adapter.sha256:
        return None
    logger.info("%s is adapter %s already", promotion.name, adapter.sha256[:12])
    return _refer(workspace, pointer)


def _refer(workspace: str, pointer: dict[str, Any]) -> PromotionRef:
    content, name = indented_json(pointer), str(pointer["name"])
    return PromotionRef(
        uri=pointer_uri(workspace, name),
        sha256=hashlib.sha256(content).hexdigest(),
        size=len(content),
        rows=1 + len(pointer["history"]),
        name=name,
        adapter_sha256=pointer["current"]["adapter_sha256"],
    )
