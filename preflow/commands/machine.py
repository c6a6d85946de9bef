"""What runs on this machine: `preflow demo`, `up`, `down`, `drill`."""

import asyncio
import json
import os
import secrets
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from preflow.cli import Exit
from preflow.options import Folder, JudgePort, Switch, TrainingChanges, UiPort, VllmPort
from preflow.settings import load_settings, parse_change
from tasks.config import PromotionConfig
from tasks.demo import DemoModel
from tasks.demo.services import Service, judge_server, prefect_server
from tasks.demo.up import Places, Ports, Up, require_free
from tasks.errors import PreflowError


def demo(*, model: DemoModel = "tiny", sweep: Switch = False, folder: Folder = Path(".demo")) -> int:
    """Take a tiny SFT adapter to a better one through every stage, offline: no GPU, no key.

    The first time about 10 minutes on 2 cores; then everything is known, and it takes seconds. It starts a real vLLM
    (on CPU) and a judge whose taste is a set of rules. Stop it with Ctrl-C: the next one continues where it was.

    Parameters
    ----------
    model
        smollm2: a real language model of 135M parameters (`make .venv/smollm2` installs it); up to 30 minutes.
    sweep
        Try three betas against each other.
    """
    from preflow.terminal import POINTS, STAGES, shown

    if sweep and model != "tiny":
        raise PreflowError("--sweep tries its betas with the tiny model: leave --model out")
    with shown(Places.below(str(folder), model).root, "demo", POINTS if sweep else STAGES):
        from flows.demo import demo as demo_flow
        from flows.demo import demo_sweep
        from tasks.demo.summary import show_result

        if sweep:
            asyncio.run(demo_sweep(str(folder)))
            return Exit.DONE
        config, result = asyncio.run(demo_flow(str(folder), model))
    show_result(result, config)
    return Exit.DONE if result.promotion is not None else Exit.NOT_BETTER


def up(
    file: Path | None = None,
    /,
    *,
    folder: Folder = Path(".demo"),
    ui_port: UiPort = 4200,
    vllm_port: VllmPort = 8000,
    judge_port: JudgePort = 8001,
) -> None:
    """Start Prefect with its UI in the background, and every flow as a deployment.

    Without a configuration, those of the demo: then vLLM and the demo's judge start too. Keys that runs need must be
    exported before.

    Parameters
    ----------
    file
        A config.yaml whose settings are the deployments' defaults.
    """
    running, ports = Up.of(file, folder), Ports(ui_port, vllm_port, judge_port)
    settings = load_settings(file) if file else None
    told = {"name": settings.config.promotion.name, **settings.parameters(sweep=True)} if settings else None
    with running.alone():
        if api := running.api():
            changed = told is not None and told != json.loads((running.run / "serving.json").read_text())
            print("it runs already" + (", with other settings: `preflow down` first" if changed else "") + ":")
        else:
            api = ports.api
            running.stop()  # what one that was killed has left
            if told is None:
                start_demo(running, ports)
            else:
                require_free(ports, ["ui"])
                start(running, ports, [], told)
        running.wait()
    show(running, api, file)


def start_demo(running: Up, ports: Ports) -> None:
    """Make the demo's materials if they are not there, and start everything that its runs need."""
    from flows.demo import BETAS
    from tasks.demo.local import JUDGE_KEY, demo_config, vllm_launcher
    from tasks.demo.materials import ensure_materials, locate_materials

    require_free(ports, ["ui", "vllm", "judge"])
    materials = locate_materials(running.root)
    ensure_materials(materials)
    os.environ[JUDGE_KEY] = secrets.token_hex(16)
    judge, vllm = judge_server(running.logs, os.environ[JUDGE_KEY], ports.judge), vllm_launcher(running, ports.vllm)
    config = demo_config(running, materials, vllm.base_url, judge.base_url)
    sweep = BETAS.model_dump(mode="json", exclude_defaults=True)
    start(running, ports, [judge, vllm], {"name": "demo", "config": config.model_dump(mode="json"), "sweep": sweep})


def start(running: Up, ports: Ports, models: list[Service], told: dict[str, Any]) -> None:
    """Start the server, models, and the process that serves the deployments as `told`."""
    environment = {
        "PREFECT_API_URL": ports.api, "PREFECT_HOME": str(running.prefect_home), "DO_NOT_TRACK": "1",
        "PREFECT_RUNNER_POLL_FREQUENCY": "2",
        # A server that is away is waited for: 2, 4, ... 256 s between the attempts, 8 minutes in all.
        "PREFECT_CLIENT_MAX_RETRIES": "8",
    }  # fmt: skip
    command = [sys.executable, "-m", "preflow.serving", str(running.root)]
    deployments = Service("deployments", command, 0, "", running.logs / "deployments.log", environment)
    (running.run / "serving.json").write_text(json.dumps(told))
    running.start([prefect_server(running.prefect_home, ports.ui), *models, deployments], ports.api)


def show(running: Up, api: str, file: Path | None) -> None:
    """Say where to look and what to press."""
    told = json.loads((running.run / "serving.json").read_text())
    name, served = told["name"], PromotionConfig.model_validate(told["config"].get("promotion", {}))
    chat = "preflow chat"
    if served.endpoint not in (None, PromotionConfig().endpoint):
        chat += f" --endpoint {served.endpoint}"
    if served.api_key:
        chat += f" --api-key {served.api_key}"
    print(f"Prefect UI:  {api.removesuffix('/api')}/v2/deployments: choose {name} (dpo-pipeline), then Run > Quick run")
    print(f"Terminal:    export PREFECT_API_URL={api}; preflow run {file or 'CONFIG'} --on dpo-pipeline/{name}")
    print(f"Logs:        {running.logs}")
    print(f"`{chat}` talks to what is served; `preflow down{f' {file}' if file else ''}` ends it all.")


def down(file: Path | None = None, /, *, folder: Folder = Path(".demo")) -> None:
    """End everything that `preflow up` started; a run that this interrupts continues at the next `preflow up`.

    Parameters
    ----------
    file
        The config.yaml that `up` was given, if any.
    """
    print("ended" if Up.of(file, folder).stop() else "nothing runs")


def drill(
    *,
    workspace: str = ".drill",
    deployment: str | None = None,
    preemptions: int = 4,
    steps: int = 40,
    seed: int = 42,
    grace_seconds: float = 15.0,
    pairs: str | None = None,
    changes: TrainingChanges = (),
) -> int:
    """Preempt a training on purpose, here or on the cluster, and compare its bytes with those of one left alone.

    SIGTERM and SIGKILL in turn. On Kubernetes the first is an eviction, the second kills what runs in the container.

    Parameters
    ----------
    workspace
        Where everything is kept: a folder or gs:// address.
    deployment
        A deployment on a pool of type kubernetes, such as train-dpo/l4-spot, on the Prefect server of PREFECT_API_URL
        or of `preflow up`; else a child process here.
    preemptions
        Times that it is preempted.
    steps
        Optimizer steps of the training.
    seed
        Seed of the steps at which it is preempted.
    grace_seconds
        Seconds from SIGTERM to SIGKILL; GKE spot gives 15.
    pairs
        Preference pairs, a train.jsonl; else a few, and a tiny model, are made.
    """
    from tasks.demo.api import pointed_at, running_api
    from tasks.drill.drill import Drill, run_drill

    training = dict(parse_change(change, "beta=0.05") for change in changes)
    order = Drill(workspace, deployment, preemptions, steps, seed, grace_seconds, pairs, training)
    order.plan()
    # A child of this process needs no server, and a server of our own would have no deployment.
    with pointed_at(running_api(Path(".demo").absolute())) if deployment else nullcontext():
        result = asyncio.run(run_drill(order))
    print(f"\n{result.text()}", flush=True)
    return Exit.DONE if result.is_exact else Exit.NOT_BETTER
