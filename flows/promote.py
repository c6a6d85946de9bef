"""The gate, and serving what passed it."""

from prefect import flow

from tasks.config import Location, PromotionConfig
from tasks.promote.pointer import (
    check_gate,
    ensure_pointer_is_served,
    install_adapter,
    move_pointer,
    reconcile,
    serve_adapter,
)
from tasks.run.inputs import AdapterInput, EvaluationInput
from tasks.run.names import named
from tasks.store.workspace import PromotionRef, Workspace


@flow(name="promote-adapter", flow_run_name=named("promote to {promotion.name}"))
async def promote_adapter(
    adapter: AdapterInput, evaluation: EvaluationInput, workspace: Location, promotion: PromotionConfig
) -> PromotionRef:
    """Serve an adapter under its name if it won; refuse it otherwise.

    Args:
        adapter: The new adapter: its folder in the workspace, its training's manifest.json, or the reference itself.
        evaluation: Its evaluation: the folder in the workspace, its manifest.json, or the reference itself.
        workspace: Where everything is kept: a folder or gs:// address.
        promotion: The gate, and where it is served.
    """
    Workspace(workspace).check_writable()
    check_gate(adapter, evaluation, promotion.min_win_rate, promotion.min_agreement)
    uri = install_adapter(adapter, workspace, promotion.name)
    await serve_adapter(uri, workspace, promotion)
    promoted = move_pointer(adapter, evaluation, uri, workspace, promotion)
    await ensure_pointer_is_served(workspace, promotion)
    return promoted


@flow(name="reconcile-served", flow_run_name=named("serve what {promotion.name} is"))
async def reconcile_served(workspace: Location, promotion: PromotionConfig) -> PromotionRef:
    """Have vLLM serve what was promoted, if it does not: after a restart, or a promotion that was cut off.

    Args:
        workspace: Where everything is kept: a folder or gs:// address.
        promotion: What is served, and where; its bar is not looked at.
    """
    return await reconcile(workspace, promotion)
