"""The gate, and the pointer to what is served: moved by a promotion, moved back by a rollback."""

import hashlib
import logging
import posixpath
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

from prefect.runtime import flow_run
from pydantic import BaseModel, ValidationError

from tasks.config import PromotionConfig
from tasks.errors import PreflowError
from tasks.promote.vllm import PROBE, is_served, swap_adapter
from tasks.report.page import ReportSection, Table
from tasks.report.run import publish
from tasks.store import measures
from tasks.store.measures import Evaluation, percent
from tasks.store.workspace import COMMITTED, AdapterRef, EvaluationRef, PromotionRef, Workspace, indented_json

# Loads of one reconciliation: each after the first because the pointer moved, or the server changed, meanwhile.
ATTEMPTS = 5
MIN_PREFIX = 6
logger = logging.getLogger(__name__)


class PromotionRefused(PreflowError):
    """The adapter did not win by enough; what was served before is still served."""


class Won(BaseModel, frozen=True):
    """The evaluation that an adapter was promoted by, and the bars that it passed."""

    uri: str
    win_rate: float
    lower: float
    upper: float
    min_win_rate: float = 0.5
    min_agreement: float = 0.0


class Entry(BaseModel, frozen=True):
    """One adapter that is or was served under a name: a promotion of it, or a rollback to it, by a flow run."""

    adapter_sha256: str
    uri: str
    evaluation: Won
    promoted_at: str
    rolled_back_at: str | None = None
    restored_at: str | None = None
    restored_from: str | None = None
    restored_by: str | None = None


class Pointer(BaseModel, frozen=True):
    """`CURRENT.json`: what is served under a name, and what was before, the newest first."""

    name: str
    current: Entry
    history: tuple[Entry, ...] = ()


def check_gate(adapter: AdapterRef, evaluation: EvaluationRef, bar: float, min_agreement: float = 0.0) -> None:
    """Refuse an adapter whose evaluation is not its own, or does not prove that it is better.

    Both lower bounds, the raw one and that with length taken out, must be over the bar, and the SFT adapter against
    itself must come out even. Where `min_agreement` is not 0, a person's labels must agree with the judge. What counts
    is what the evaluation's files say, not the reference.

    Raises:
        PromotionRefused: with the figures and what to try.
    """
    found = read_evaluation(evaluation)
    if found.adapter_sha256 != adapter.sha256:
        raise PromotionRefused(
            f"the evaluation {evaluation.uri} is of adapter {found.adapter_sha256[:12]}, not of {adapter.sha256[:12]}: "
            "evaluate this adapter first, or promote that one, if evaluation.checkpoints chose it"
        )
    if refusal := found.refusal(bar, min_agreement):
        raise PromotionRefused(f"not promoted: {refusal} What was served before is still served.")


def read_evaluation(evaluation: EvaluationRef) -> Evaluation:
    """Return what an evaluation found.

    Raises:
        PromotionRefused: its file is gone, or was written by another version of preflow.
    """
    try:
        return measures.read_evaluation(evaluation)
    except (FileNotFoundError, ValidationError) as error:
        raise PromotionRefused(
            f"{evaluation.uri}: not there, or not as this version writes it ({type(error).__name__}); run "
            "evaluate-adapter again: everything that was paid for is kept"
        ) from error


def install_adapter(adapter: AdapterRef, workspace: str, name: str) -> str:
    """Copy a finished adapter to `adapters/<name>/<digest>/` and return that uri; a copy that is whole is kept.

    The log-probs by which it is known, which training left next to it, lie in the copy as `probe.json`.

    Raises:
        PreflowError: the folder is not whole, or holds another adapter than the reference says.
    """
    store = Workspace(workspace)
    target = store.uri("adapters", name, adapter.sha256[:16])
    probe = adapter.sibling(PROBE)
    origin = Workspace.holding(adapter.uri)
    if origin.exists(probe):
        store.write_bytes(posixpath.join(target, PROBE), origin.read_bytes(probe))
    if store.exists(posixpath.join(target, COMMITTED)):
        store.verify_folder(target)
        return target
    if (there := origin.committed_files(adapter.uri)[COMMITTED].sha256) != adapter.sha256:
        raise PreflowError(
            f"{adapter.uri}: holds adapter {there[:12]}, not {adapter.sha256[:12]}, which won: evaluate what is there"
        )
    with TemporaryDirectory() as scratch:
        local = origin.fetch_folder(adapter.uri, Path(scratch))
        store.commit_folder(local, target)
    return target


def pointer_uri(workspace: str, name: str) -> str:
    """Return where the pointer of a served name lies."""
    return Workspace(workspace).uri("adapters", name, "CURRENT.json")


def read_pointer(workspace: str, name: str) -> Pointer | None:
    """Return what is served under `name`, with the history to roll back to; None before the first promotion."""
    uri = pointer_uri(workspace, name)
    try:
        return _parse(uri, Workspace(workspace).read_json(uri))
    except FileNotFoundError:
        return None


def read_promoted(workspace: str, name: str, otherwise: str) -> Pointer:
    """Return what is served under `name`.

    Raises:
        PreflowError: nothing was promoted; says what that means.
    """
    if (pointer := read_pointer(workspace, name)) is not None:
        return pointer
    raise PreflowError(f"nothing was ever promoted as {name!r} in {workspace}: {otherwise}")


def _parse(uri: str, value: object) -> Pointer:
    try:
        return Pointer.model_validate(value)
    except ValidationError as error:
        raise PreflowError(f"{uri}: damaged ({error.errors()[0]['loc']}); delete it, and promote again") from error


def _move(workspace: str, name: str, change: Callable[[Pointer | None], Pointer | None]) -> PromotionRef:
    """Replace the pointer by what `change` makes of it, losing nobody's change; None leaves it."""
    uri = pointer_uri(workspace, name)

    def change_json(value: object) -> object:
        changed = change(None if value is None else _parse(uri, value))
        return None if changed is None else changed.model_dump(mode="json", exclude_none=True)

    return _refer(workspace, _parse(uri, Workspace(workspace).update_json(uri, change_json)))


async def serve_adapter(uri: str, workspace: str, promotion: PromotionConfig) -> None:
    """Load an adapter into vLLM in place of the one there, and verify that it is what is served.

    Raises:
        PreflowError: vLLM refused it, or serves something else; what the pointer names has been put back.
    """
    before = read_pointer(workspace, promotion.name)
    try:
        await swap_adapter(uri, before.current.uri if before else None, workspace, promotion)
    except PreflowError:
        if read_pointer(workspace, promotion.name) != before:  # moved by another flow, and what was there is back
            await ensure_pointer_is_served(workspace, promotion)
        raise


def move_pointer(
    adapter: AdapterRef, evaluation: EvaluationRef, uri: str, workspace: str, promotion: PromotionConfig
) -> PromotionRef:
    """Make `CURRENT.json` name the adapter; what it named before goes to the head of its history."""
    won = Won(
        **evaluation.model_dump(include={"uri", "win_rate", "lower", "upper"}),
        **promotion.model_dump(include={"min_win_rate", "min_agreement"}),
    )

    def move(before: Pointer | None) -> Pointer | None:
        if before is not None and before.current.adapter_sha256 == adapter.sha256:
            return None
        now = datetime.now(UTC).isoformat(timespec="seconds")
        current = Entry(adapter_sha256=adapter.sha256, uri=uri, evaluation=won, promoted_at=now)
        history = (before.current, *before.history) if before else ()
        return Pointer(name=promotion.name, current=current, history=history)

    moved = _move(workspace, promotion.name, move)
    logger.info("%s is now adapter %s (%s)", promotion.name, adapter.sha256[:12], uri)
    return moved


def choose_rollback(workspace: str, name: str, to: str | None) -> Entry:
    """Return the entry of the history to go back to: the newest that was not itself rolled back, or the one named.

    It is named by the start of its adapter's digest, at least 6 characters.

    Raises:
        PreflowError: there is no such entry, or it is no longer whole; says which there are.
    """
    pointer = read_promoted(workspace, name, "there is nothing to roll back")
    current, run = pointer.current.adapter_sha256, flow_run.id
    if run is not None and pointer.current.restored_by == run:
        return pointer.current  # this run has moved the pointer already, and was then killed
    latest: dict[str, Entry] = {}
    for entry in pointer.history:
        latest.setdefault(entry.adapter_sha256, entry)
    latest.pop(current, None)
    if to is not None:
        found = [entry for digest, entry in latest.items() if len(to) >= MIN_PREFIX and digest.startswith(to)]
    else:
        found = [entry for entry in latest.values() if entry.rolled_back_at is None][:1]
    if len(found) == 1:
        Workspace(workspace).verify_folder(found[0].uri)
        return found[0]
    there = ", ".join(
        f"{entry.adapter_sha256[:12]} (promoted {entry.promoted_at}"
        + (f", rolled back {entry.rolled_back_at})" if entry.rolled_back_at else ")")
        for entry in latest.values()
    )
    listed = f"its history has: {there}; name one of them with `to`" if there else "its history is empty"
    if to is not None and current.startswith(to):
        raise PreflowError(f"{name!r} is adapter {current[:12]} already; {listed}")
    wanted = f"no one adapter {to!r} (at least {MIN_PREFIX} characters of its digest)" if to else "no earlier adapter"
    raise PreflowError(f"{name!r} is adapter {current[:12]}, and there is {wanted} to roll back to: {listed}")


def roll_back_pointer(entry: Entry, workspace: str, name: str) -> PromotionRef:
    """Make `CURRENT.json` name an entry of its history again; the one rolled back stays in the history, marked so."""

    def move(before: Pointer | None) -> Pointer | None:
        if before is None:
            raise PreflowError(
                f"{pointer_uri(workspace, name)} was deleted during the rollback: promote an adapter again"
            )
        now, withdrawn = datetime.now(UTC).isoformat(timespec="seconds"), before.current
        if withdrawn.adapter_sha256 == entry.adapter_sha256:
            return None  # another rollback came first
        restored = {
            "rolled_back_at": None, "restored_at": now, "restored_from": withdrawn.adapter_sha256,
            "restored_by": flow_run.id,
        }  # fmt: skip
        history = (withdrawn.model_copy(update={"rolled_back_at": now}), *before.history)
        return Pointer(name=name, current=entry.model_copy(update=restored), history=history)

    moved = _move(workspace, name, move)
    logger.info("%s is adapter %s again (%s)", name, entry.adapter_sha256[:12], entry.uri)
    return moved


async def report_rollback(workspace: str, promotion: PromotionConfig) -> None:
    """Say, in the log and as a page in the UI, from which adapter to which the name went back."""
    pointer = read_pointer(workspace, promotion.name)
    if pointer is None or not pointer.history:
        return  # somebody deleted it in this very moment
    changed = (("served until now", pointer.history[0]), ("served again", pointer.current))
    rows = tuple(
        (name, f"{one.adapter_sha256[:12]} (win rate {percent(one.evaluation.win_rate)})", one.promoted_at)
        for name, one in changed
    )
    where = (
        f"{promotion.endpoint} serves it" if promotion.endpoint else "promotion.endpoint is empty: no server was told"
    )
    change = f"{rows[0][1]} -> {rows[1][1]}"
    logger.info("%s: %s; %s", promotion.name, change, where)
    table = Table("What is served", ("", "adapter", "promoted"), rows)
    await publish(ReportSection("Rollback", f"{promotion.name} was rolled back: {change}; {where}.", tables=(table,)))


async def reconcile(workspace: str, promotion: PromotionConfig) -> PromotionRef:
    """Have vLLM serve what `CURRENT.json` names, if it does not: after a restart, or a promotion that was cut off.

    Raises:
        PreflowError: nothing was promoted, there is no server, or the adapter does not pass its probe.
    """
    pointer = read_promoted(workspace, promotion.name, "there is nothing to serve")
    if promotion.endpoint is None:
        raise PreflowError("promotion.endpoint is empty: give the address of the vLLM that is to serve the adapter")
    for _ in range(ATTEMPTS):
        uri = pointer.current.uri
        if await is_served(uri, workspace, promotion):
            logger.info("%s is served as %s names it", promotion.name, pointer_uri(workspace, promotion.name))
            return _refer(workspace, pointer)
        await swap_adapter(uri, uri, workspace, promotion)
        pointer = read_pointer(workspace, promotion.name) or pointer  # a promotion may have moved it meanwhile
    raise PreflowError(
        f"{promotion.name!r}: {promotion.endpoint} does not keep what {pointer_uri(workspace, promotion.name)} names, "
        f"though it was loaded {ATTEMPTS} times: does something else load adapters under this name?"
    )


async def ensure_pointer_is_served(workspace: str, promotion: PromotionConfig) -> None:
    """See, after the pointer was moved, that vLLM serves what it names: another flow may have put the old one back.

    Whoever changes what is served looks at the pointer last, and whoever moves the pointer at what is served: so
    promotions, rollbacks and reconciliations of one name that overlap end with server and pointer in agreement.

    Raises:
        PreflowError: as `reconcile`.
    """
    if promotion.endpoint is None:
        return
    try:
        await reconcile(workspace, promotion)
    except PreflowError as error:
        moved = f"{pointer_uri(workspace, promotion.name)} was moved, but is not served"
        raise type(error)(f"{moved}: {error}. When vLLM answers, run reconcile-served") from error


def find_promotion(adapter: AdapterRef, workspace: str, promotion: PromotionConfig) -> PromotionRef | None:
    """Return the pointer if it names `adapter` already."""
    pointer = read_pointer(workspace, promotion.name)
    if pointer is None or pointer.current.adapter_sha256 != adapter.sha256:
        return None
    logger.info("%s is adapter %s already", promotion.name, adapter.sha256[:12])
    return _refer(workspace, pointer)


def find_rollback(adapter: AdapterRef, workspace: str, promotion: PromotionConfig) -> str | None:
    """Return why `adapter` is not promoted again if it was rolled back; None if it was not.

    A pipeline that is run again must not undo a rollback; promote-adapter, started by hand, may.
    """
    pointer = read_pointer(workspace, promotion.name)
    entries = (pointer.current, *pointer.history) if pointer else ()
    latest = next((entry for entry in entries if entry.adapter_sha256 == adapter.sha256), None)
    if latest is None or latest.rolled_back_at is None:
        return None
    return f"it was rolled back at {latest.rolled_back_at}; run promote-adapter to serve it again"


def find_disagreement(
    evaluation: EvaluationRef, promotion: PromotionConfig, promoted: PromotionRef | None = None
) -> str | None:
    """Return why an adapter that won waits for a person's labels, or is refused by them; None if it does not.

    One that is promoted already stays so.
    """
    if promoted is not None or not promotion.min_agreement or not evaluation.beats(promotion.min_win_rate):
        return None
    return read_evaluation(evaluation).disagreement(promotion.min_agreement)


def _refer(workspace: str, pointer: Pointer) -> PromotionRef:
    content = indented_json(pointer.model_dump(mode="json", exclude_none=True))
    return PromotionRef(
        uri=pointer_uri(workspace, pointer.name),
        sha256=hashlib.sha256(content).hexdigest(),
        size=len(content),
        rows=1 + len(pointer.history),
        name=pointer.name,
        adapter_sha256=pointer.current.adapter_sha256,
    )
