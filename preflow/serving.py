"""The process that serves every flow as a deployment on this machine: `python -m preflow.serving FOLDER`.

It registers them with the defaults that FOLDER/run/serving.json names, and runs what is started, each in a process of
its own. Started again after a crash, it first ends the runs that its predecessor has left without anybody to watch.
"""

import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from prefect import Flow
from prefect.client.orchestration import get_client
from prefect.client.schemas import filters
from prefect.client.schemas.actions import DeploymentUpdate
from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy, StateType
from prefect.deployments.runner import RunnerDeployment
from prefect.runner import Runner
from prefect.states import Crashed
from prefect.types.entrypoint import EntrypointType

from flows.evaluate import evaluate_adapter
from flows.generate import generate_completions
from flows.judge import judge_preferences
from flows.pipeline import dpo_pipeline
from flows.promote import promote_adapter, reconcile_served
from flows.rollback import rollback_adapter
from flows.rounds import dpo_rounds
from flows.sweep import dpo_sweep
from flows.train import train_dpo
from tasks.config import PipelineConfig, StageConfig
from tasks.demo.up import Up

# A crashed run of these is not started again by itself, see deployments/automations.yaml.
LEFT_ALONE = ("train", "rollback")
ROOT = Path(__file__).parents[1]
# One GPU and one served name: the second run waits for the first one.
ALONE = ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.ENQUEUE)
# The verb behind the configuration's name in a deployment's, and whether two of it would harm each other.
FLOWS: dict[Flow[..., Any], tuple[str, bool]] = {
    dpo_pipeline: ("", True),
    dpo_sweep: ("sweep", True),
    dpo_rounds: ("rounds", True),
    generate_completions: ("generate", False),
    judge_preferences: ("judge", False),
    train_dpo: ("train", True),
    evaluate_adapter: ("evaluate", False),
    promote_adapter: ("promote", True),
    rollback_adapter: ("rollback", True),
    reconcile_served: ("reconcile", True),
}


def parameters_of(config: PipelineConfig, sweep: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return each flow's parameters for a configuration; what another stage makes is left for the user to name."""
    whole, config = changed(config), config.filled()
    common, held_out = {"workspace": config.workspace}, config.eval_prompts or config.prompts
    promotion = {**common, "promotion": changed(config.promotion)}
    return {
        "dpo-pipeline": {"config": whole},
        "dpo-sweep": {"config": whole, "sweep": sweep},
        "dpo-rounds": {"config": whole, "rounds": {}},
        "generate-completions": {**common, "prompts": config.prompts, "generation": changed(config.generation)},
        "judge-preferences": {**common, "judging": changed(config.judging)},
        "train-dpo": {**common, "training": changed(config.training)},
        "evaluate-adapter": {**common, "prompts": held_out, "evaluation": changed(config.evaluation)},
        "promote-adapter": promotion,
        "rollback-adapter": promotion,
        "reconcile-served": promotion,
    }


def changed(config: StageConfig) -> dict[str, Any]:
    """Return the settings that are not the defaults, which the form shows anyway."""
    return config.model_dump(mode="json", exclude_defaults=True)


def deployments(name: str, config: PipelineConfig, sweep: dict[str, Any]) -> list[RunnerDeployment]:
    """Return the deployments: NAME for the whole run, NAME-sweep and so on for the other flows."""
    given = parameters_of(config, sweep)
    made: Any = [
        flow.to_deployment(
            f"{name}-{verb}" if verb else name, parameters=given[flow.name],
            tags=["preflow", name, *([] if verb in LEFT_ALONE else ["restarted"])],
            concurrency_limit=ALONE if alone else None, entrypoint_type=EntrypointType.MODULE_PATH,
        )
        for flow, (verb, alone) in FLOWS.items()
    ]  # fmt: skip
    return list(made)


def end_lost_runs(up: Up, made: list[RunnerDeployment]) -> None:
    """End runs whose watcher went away, and take them for crashed: an automation then starts them again."""
    for process in up.leftovers(naming="prefect.engine"):
        process.kill()
    mine = filters.DeploymentFilter(name=filters.DeploymentFilterName(any_=[deployment.name for deployment in made]))
    running = filters.FlowRunFilterStateType(any_=[StateType.RUNNING, StateType.PENDING])
    lost = filters.FlowRunFilter(state=filters.FlowRunFilterState(type=running))
    with get_client(sync_client=True) as client:
        for run in client.read_flow_runs(flow_run_filter=lost, deployment_filter=mine):
            client.set_flow_run_state(run.id, Crashed(message="The process that watched it went away."), force=True)


def wait_for_server(seconds: float = 600) -> None:
    """Wait until the Prefect server answers; it was started at the same time."""
    deadline = time.monotonic() + seconds
    with get_client(sync_client=True) as client:
        while (problem := client.api_healthcheck()) is not None:
            if time.monotonic() > deadline:
                raise problem
            time.sleep(0.5)


async def serve(up: Up, made: list[RunnerDeployment]) -> None:
    """Register the deployments and run what is started, until SIGTERM."""
    runner = Runner(name="preflow")
    async with get_client() as client:
        for deployment in made:
            id = await runner.aadd_deployment(deployment)
            schema = (await client.read_deployment(id)).parameter_openapi_schema or {}
            # Quick run opens the whole form where anything is required, given or not.
            schema["required"] = [name for name in schema.get("required", []) if name not in deployment.parameters]
            await client.update_deployment(id, DeploymentUpdate(parameter_openapi_schema=schema))
    up.served.write_text(str(len(made)))
    await runner.start()


def main(folder: str) -> None:
    """Serve what FOLDER/run/serving.json says."""
    up = Up(Path(folder))
    wait_for_server()
    told = json.loads((up.run / "serving.json").read_text())
    made = deployments(told["name"], PipelineConfig.model_validate(told["config"]), told["sweep"])
    subprocess.run([sys.executable, str(ROOT / "deployments" / "automations.py")], check=True)
    end_lost_runs(up, made)
    asyncio.run(serve(up, made))


if __name__ == "__main__":
    main(sys.argv[1])
