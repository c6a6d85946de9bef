"""The deployments on a Prefect server of this machine, and those named `demo`, whose defaults are the demo's."""

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
    WorkPoolFilter,
    WorkPoolFilterName,
)
from prefect.client.schemas.objects import StateType
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Crashed

from tasks.config import PipelineConfig, StageConfig
from tasks.errors import PreflowError

ROOT = Path(__file__).parents[2]
SECONDS = 600.0
logger = logging.getLogger(__name__)


def register_all(api: str, log: Path, config: PipelineConfig) -> None:
    """Make the work pools and all deployments on the server at `api`; a `demo` one beside each `local` one.

    Raises:
        PreflowError: with the end of the log, where the command of deployments/register.sh fails.
    """
    environment = {"PREFECT_API_URL": api, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with log.open("w") as out:
        done = subprocess.run(
            ["deployments/register.sh"],
            cwd=ROOT,
            env={**os.environ, **environment},
            stdout=out,
            stderr=out,
            timeout=SECONDS,
        )
    if done.returncode:
        raise PreflowError(f"the deployments could not be registered; the end of {log}:\n{log.read_text()[-2000:]}")
    with temporary_settings({PREFECT_API_URL: api}), get_client(sync_client=True) as client:
        for flow, parameters in demo_parameters(config).items():
            _register_demo(client, flow, parameters)


def demo_parameters(config: PipelineConfig) -> dict[str, dict[str, Any]]:
    """Return the demo's parameters for each flow; what another stage makes is left for the user to name."""
    whole, config = _changed(config), config.filled()
    stage = {"workspace": config.workspace}
    return {
        "dpo-pipeline": {"config": whole},
        "dpo-sweep": {"config": whole, "sweep": {"grid": {"training.beta": [0.03, 0.1, 0.3]}}},
        "generate-completions": {**stage, "prompts": config.prompts, "generation": _changed(config.generation)},
        "judge-preferences": {**stage, "judging": _changed(config.judging)},
        "train-dpo": {**stage, "training": _changed(config.training)},
        "evaluate-adapter": {**stage, "prompts": config.eval_prompts, "evaluation": _changed(config.evaluation)},
        "promote-adapter": {**stage, "promotion": _changed(config.promotion)},
        "rollback-adapter": {**stage, "promotion": _changed(config.promotion)},
        "reconcile-served": {**stage, "promotion": _changed(config.promotion)},
    }


def _changed(config: StageConfig) -> dict[str, Any]:
    """Return the settings that are not the defaults, which the form shows anyway."""
    return config.model_dump(mode="json", exclude_defaults=True)


def _register_demo(client: SyncPrefectClient, flow: str, parameters: dict[str, Any]) -> None:
    local = client.read_deployment_by_name(f"{flow}/local")
    limit = local.global_concurrency_limit
    client.create_deployment(
        flow_id=local.flow_id,
        name="demo",
        description="As `local`, with the values of `make demo`: a tiny model, its prompts and a judge of rules, "
        f"all on this machine.\n\n{local.description}",
        parameters=parameters,
        tags=[*local.tags, "demo"],
        entrypoint=local.entrypoint,
        pull_steps=local.pull_steps,
        work_pool_name=local.work_pool_name,
        parameter_openapi_schema=local.parameter_openapi_schema,
        enforce_parameter_schema=local.enforce_parameter_schema,
        concurrency_limit=limit.limit if limit else None,
        concurrency_options=local.concurrency_options,
    )


def end_lost_runs(api: str) -> None:
    """Take runs for crashed that an earlier worker of this machine has left running: after a reboot, or a `kill -9`.

    The automation preflow-restart-crashed then starts them again.
    """
    running = FlowRunFilterStateType(any_=[StateType.RUNNING, StateType.PENDING])
    lost = FlowRunFilter(state=FlowRunFilterState(type=running))
    pool = WorkPoolFilter(name=WorkPoolFilterName(any_=["local"]))
    with temporary_settings({PREFECT_API_URL: api}), get_client(sync_client=True) as client:
        for run in client.read_flow_runs(flow_run_filter=lost, work_pool_filter=pool):
            logger.info("%s was running when its worker went away", run.name)
            client.set_flow_run_state(run.id, Crashed(message="Its worker went away."), force=True)
