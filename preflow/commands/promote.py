"""`preflow promote`."""

import asyncio
from typing import Any

from preflow.options import CONFIG, Changes, File


def promote(
    file: File = CONFIG,
    /,
    *,
    changes: Changes = (),
    adapter: str | None = None,
    evaluation: str | None = None,
) -> None:
    """Serve the adapter of a finished run under its name, if it won; what was served before stays in the history.

    Parameters
    ----------
    changes
        The changes that the run was made with, such as those of a sweep's best point.
    adapter
        Another adapter: its folder in the workspace.
    evaluation
        Its evaluation: the folder in the workspace.
    """
    from flows.promote import promote_adapter
    from preflow.settings import load_settings
    from preflow.terminal import shown
    from tasks.errors import PreflowError
    from tasks.run.preflight import find_result

    settings = load_settings(file, changes)
    config, made = settings.config, (adapter, evaluation)
    if adapter is None or evaluation is None:
        result = find_result(config)
        if result is None:
            raise PreflowError(f"no run with these settings has finished: preflow run {file}; or name both folders")
        made = (result.adapter.model_dump_json(), result.evaluation.model_dump_json())
    with shown(settings.folder, "promote"):
        flow: Any = promote_adapter  # it takes references, and text that names them
        promoted = asyncio.run(flow(*made, config.workspace, config.promotion))
    print(f"{promoted.name} is adapter {promoted.adapter_sha256[:12]}")
