"""`preflow drill`."""

import asyncio
from pathlib import Path

from preflow.options import Changes


def drill(*, workspace: str = ".drill", changes: Changes = ()) -> int:
    """Preempt a training on purpose, here or on the cluster, and compare its bytes with those of one left alone.

    Parameters
    ----------
    workspace
        Where everything is kept: a folder or gs:// address.
    """
    from pydantic import ValidationError

    from flows.drill import preemption_drill
    from preflow.settings import parse_change
    from tasks.config import DrillConfig
    from tasks.demo.local import Places, prefect_api
    from tasks.errors import PreflowError

    try:
        config = DrillConfig.model_validate(dict(parse_change(change) for change in changes))
    except ValidationError as error:
        raise PreflowError("\n".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())) from error
    with prefect_api(Places(Path(".drill").absolute())):
        return 0 if asyncio.run(preemption_drill(workspace, config)).is_exact else 1
