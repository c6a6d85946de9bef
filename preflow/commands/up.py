"""`preflow up`."""

import json
import sys
from pathlib import Path
from typing import Any

from preflow.options import Folder
from tasks.demo.up import Ports, Up


def up(file: Path | None = None, /, *, folder: Folder = Path(".demo")) -> None:
    """Start Prefect with its UI in the background, and every flow as a deployment.

    Without a configuration, those of the demo: then vLLM and the demo's judge start too. UI_PORT, VLLM_PORT and
    JUDGE_PORT choose other ports than 4200, 8000 and 8001. Keys that runs need must be exported before.

    Parameters
    ----------
    file
        A config.yaml whose settings are the deployments' defaults.
    """
    root = (file.absolute().parent / ".preflow") if file else folder.absolute()
    running, ports = Up(root), Ports.from_environment()
    if api := running.api():
        print("it runs already:")
        show(running, api, file)
        return
    running.stop()  # what one that was killed has left
    if file:
        start_for(running, file, ports)
    else:
        start_demo(running, ports)
    show(running, ports.api, file)


def start_for(running: Up, file: Path, ports: Ports) -> None:
    """Start the server and the deployments of a config.yaml."""
    from preflow.settings import load_settings
    from tasks.demo.services import prefect_server
    from tasks.demo.up import require_free

    settings = load_settings(file)
    require_free(ports, ["ui"])
    given = settings.parameters(sweep=True)
    tell(running, {"name": settings.config.promotion.name, **given})
    server = prefect_server(running.root / "prefect", ports.ui)
    running.start([server, flow_server(running, ports)], ports.api)
    running.wait({"Prefect": server.is_healthy, "deployments": running.served.exists})


def start_demo(running: Up, ports: Ports) -> None:
    """Make the demo's materials if they are not there, and start everything that its runs need."""
    import os
    import secrets

    from flows.demo import BETAS
    from tasks.demo.local import JUDGE_KEY, Places, demo_config, vllm_launcher
    from tasks.demo.materials import ensure_materials, locate_materials
    from tasks.demo.services import judge_server, prefect_server
    from tasks.demo.up import require_free

    require_free(ports, ["ui", "vllm", "judge"])
    places, materials = Places(running.root), locate_materials(running.root)
    ensure_materials(materials)
    os.environ[JUDGE_KEY] = secrets.token_hex(16)
    config = demo_config(places, materials, ports.url("vllm"), ports.url("judge"))
    sweep = BETAS.model_dump(mode="json", exclude_defaults=True)
    tell(running, {"name": "demo", "config": config.model_dump(mode="json"), "sweep": sweep})
    server = prefect_server(places.prefect_home, ports.ui)
    judge = judge_server(places.logs, os.environ[JUDGE_KEY], ports.judge)
    vllm = vllm_launcher(places, ports.vllm)
    running.start([server, judge, vllm, flow_server(running, ports)], ports.api)
    ready = {"Prefect": server.is_healthy, "judge": judge.is_healthy, "deployments": running.served.exists}
    running.wait({**ready, "vLLM": vllm.is_healthy})


def tell(running: Up, told: dict[str, Any]) -> None:
    """Write down what the process that serves the deployments reads."""
    running.run.mkdir(parents=True, exist_ok=True)
    (running.run / "serving.json").write_text(json.dumps(told))


def flow_server(running: Up, ports: Ports) -> Any:
    """Return the process that serves the deployments; it waits for the server by trying again."""
    from tasks.demo.services import Service

    environment = {
        "PREFECT_API_URL": ports.api, "PREFECT_HOME": str(running.root / "prefect"), "DO_NOT_TRACK": "1",
        "PREFECT_RUNNER_POLL_FREQUENCY": "2",
        # A server that is away is waited for: 2, 4, ... 256 s between the attempts, 8 minutes in all.
        "PREFECT_CLIENT_MAX_RETRIES": "8",
    }  # fmt: skip
    command = [sys.executable, "-m", "preflow.serving", str(running.root)]
    return Service("deployments", command, 0, "", running.logs / "deployments.log", environment)


def show(running: Up, api: str, file: Path | None) -> None:
    """Say where to look and what to press."""
    name = json.loads((running.run / "serving.json").read_text())["name"]
    print(f"Prefect UI:  {api.removesuffix('/api')}/v2/deployments: choose {name} (dpo-pipeline), then Run > Quick run")
    print(f"Terminal:    export PREFECT_API_URL={api}; preflow run {file or 'CONFIG'} --on dpo-pipeline/{name}")
    print(f"Logs:        {running.logs}")
    print(f"`preflow chat` talks to what is served; `preflow down{f' {file}' if file else ''}` ends it all.")
