"""The whole pipeline in a process of its own, to be killed at any moment."""

import asyncio
import os
import tempfile
from pathlib import Path
from typing import Any


def run_pipeline(order: dict[str, Any]) -> None:
    """Run `dpo_pipeline` on the configuration in `order`, as a flow process would; exit code 0 if it succeeded."""
    os.setsid()
    log = os.open(order["log"], os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(order["environment"])
    tempfile.tempdir = None  # the forking parent has looked it up already
    from prefect.settings import PREFECT_API_URL, PREFECT_HOME, PREFECT_LOGGING_TO_API_ENABLED, temporary_settings

    settings = {PREFECT_API_URL: order["api"], PREFECT_HOME: Path(order["home"]), PREFECT_LOGGING_TO_API_ENABLED: True}
    with temporary_settings(settings):
        asyncio.run(_run(order))


async def _run(order: dict[str, Any]) -> None:
    from flows.pipeline import dpo_pipeline
    from tasks.config import PipelineConfig

    await dpo_pipeline(PipelineConfig.model_validate(order["config"]))
