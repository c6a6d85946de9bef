"""Going back to an adapter that was served before."""

from prefect import flow

from tasks.config import Location, PromotionConfig
from tasks.promote.pointer import (
    choose_rollback,
    ensure_pointer_is_served,
    report_rollback,
    roll_back_pointer,
    serve_adapter,
)
from tasks.run.names import named
from tasks.store.workspace import PromotionRef, Workspace


@flow(name="rollback-adapter", flow_run_name=named("roll {promotion.name} back"))
async def rollback_adapter(workspace: Location, promotion: PromotionConfig, to: str | None = None) -> PromotionRef:
    """Serve the adapter before the present one again, or the one whose digest begins with `to`.

    Args:
        workspace: Where everything is kept: a folder or gs:// address.
        promotion: What is served, and where; its bar is not looked at.
        to: First characters (at least 6) of the digest of the adapter to go back to; empty: the one before.
    """
    Workspace(workspace).check_writable()
    entry = choose_rollback(workspace, promotion.name, to)
    await serve_adapter(entry.uri, workspace, promotion)
    restored = roll_back_pointer(entry, workspace, promotion.name)
    await ensure_pointer_is_served(workspace, promotion)
    await report_rollback(workspace, promotion)
    return restored
