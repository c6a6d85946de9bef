"""The stages in a process of their own, to be killed at any moment."""

import asyncio
import os
from pathlib import Path
from typing import Any


def run_stages(order: dict[str, Any]) -> None:
    """Sample, judge and evaluate as `order` says, as a flow process would; exit code 0 if all of it succeeded."""
    from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings

    os.setsid()
    log = os.open(order["log"], os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    with temporary_settings({PREFECT_API_URL: order["api"], PREFECT_HOME: Path(order["home"])}):
        asyncio.run(_run(order))


async def _run(order: dict[str, Any]) -> None:
    from flows.evaluate import evaluate_adapter
    from flows.generate import generate_completions
    from flows.judge import judge_preferences
    from tasks.config import EvaluationConfig, GenerationConfig, JudgingConfig
    from tasks.store.workspace import AdapterRef

    generation = GenerationConfig.model_validate(order["generation"])
    judging = JudgingConfig.model_validate(order["judging"])
    workspace = order["workspace"]
    completions = await generate_completions(order["prompts"], workspace, generation)
    await judge_preferences(completions, workspace, judging)
    evaluation = EvaluationConfig(num_samples=2, max_prompts=30, generation=generation, judging=judging)
    adapter = AdapterRef(uri=order["adapter"], sha256="a" * 64, size=1, rows=1)
    await evaluate_adapter(adapter, order["held_out"], workspace, evaluation)
