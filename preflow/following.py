"""A run of a deployment, started from here and followed to its end."""

import time
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.sorting import LogSort
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError

from preflow.cli import Exit
from preflow.outcome import tell
from preflow.settings import Settings
from tasks.demo.api import pointed_at, running_api
from tasks.errors import PreflowError
from tasks.run.preflight import find_result

POLL_SECONDS = 2.0
PATIENCE_SECONDS = 120.0
INFO = 20


def follow(name: str, settings: Settings, *, sweep: bool) -> int:
    """Start a deployment with these settings, print its log until it ends, and return the exit code."""
    api = running_api(settings.folder)
    with pointed_at(api), get_client(sync_client=True) as client:
        run = start(client, name, settings.parameters(sweep=sweep))
        where = f"{api.removesuffix('/api')}/v2/runs/flow-run/{run.id}"
        print(f"{run.name}: {where}", flush=True)
        try:
            ended = watch(client, run)
        except KeyboardInterrupt:
            print(f"not followed any more; the run continues: {where}")
            return Exit.INTERRUPTED
    state = ended.state
    if state is None or state.type is not StateType.COMPLETED:
        raise PreflowError(f"{ended.name} ended as {state.name if state else 'nothing'}: {where}")
    result = None if sweep else find_result(settings.config)
    return tell(settings.config, result) if result is not None else Exit.DONE


def start(client: SyncPrefectClient, name: str, parameters: dict[str, object]) -> FlowRun:
    """Start the deployment.

    Raises:
        PreflowError: there is none of that name, or it does not take these parameters.
    """
    try:
        deployment = client.read_deployment_by_name(name)
        return client.create_flow_run_from_deployment(deployment.id, parameters=parameters)
    except (ObjectNotFound, ValueError) as error:  # ValueError: a name without a slash
        flow = name.partition("/")[0]
        known = [f"{client.read_flow(item.flow_id).name}/{item.name}" for item in client.read_deployments()]
        near = [other for other in known if other.startswith(f"{flow}/")] or known
        raise PreflowError(f"there is no deployment {name!r} here; there are: {', '.join(sorted(near))}") from error
    except PrefectHTTPStatusError as error:
        raise PreflowError(f"{name} does not take these parameters: {error.response.text[:1000]}") from error


def watch(client: SyncPrefectClient, run: FlowRun) -> FlowRun:
    """Print what the run logs, and return it when it has ended."""
    printed: set[UUID] = set()
    chosen, heard = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run.id])), time.monotonic()
    while True:
        try:
            now = client.read_flow_run(run.id)
            lines = client.read_logs(chosen, sort=LogSort.TIMESTAMP_ASC, offset=len(printed))
            heard = time.monotonic()
        except httpx.TransportError as error:  # a server that is started again, or a lost port-forward
            if time.monotonic() - heard > PATIENCE_SECONDS:
                raise PreflowError(f"{client.api_url} does not answer: {error}; {run.name} may run on") from error
            time.sleep(POLL_SECONDS)
            continue
        for line in lines:
            if line.id not in printed and line.level >= INFO:
                print(f"{line.timestamp:%H:%M:%S} {line.message}", flush=True)
            printed.add(line.id)
        if now.state is not None and now.state.is_final():
            return now
        time.sleep(POLL_SECONDS)
