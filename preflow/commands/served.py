"""What is served: `preflow promote`, `rollback`, `chat`."""

import asyncio
import os
import sys
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from pydantic import ValidationError

from preflow.options import CONFIG, File, Made
from preflow.settings import PLAINER, load_settings
from tasks.config import EndpointConfig
from tasks.errors import PreflowError

# `vllm chat` alone: the whole command would look its version up as "vllm", which the CPU build does not have.
START = """
import argparse
from vllm.entrypoints.cli.openai import ChatCommand
parser = argparse.ArgumentParser()
ChatCommand.add_cli_args(parser)
ChatCommand.cmd(parser.parse_args())
"""
GREETING = "{model} at {endpoint}; Ctrl-D ends it. The demo's adapters only write scenes: try [BARNABY] Aye, crew."


def promote(
    file: File = CONFIG, /, *, changes: Made = (), adapter: str | None = None, evaluation: str | None = None
) -> None:
    """Serve the adapter of a finished run under its name, if it won; what was served before stays in the history.

    Parameters
    ----------
    adapter
        Another adapter: its folder in the workspace.
    evaluation
        Its evaluation: the folder in the workspace.
    """
    from preflow.terminal import shown
    from tasks.run.preflight import find_result

    settings = load_settings(file, changes)
    config, made = settings.config, (adapter, evaluation)
    if adapter is None or evaluation is None:
        result = find_result(config)
        if result is None:
            raise PreflowError(f"no run with these settings has finished: preflow run {file}; or name both folders")
        made = (result.adapter.model_dump_json(), result.evaluation.model_dump_json())
    with shown(settings.folder, "promote"):
        from flows.promote import promote_adapter

        flow: Any = promote_adapter  # it takes references, and text that names them
        promoted = asyncio.run(flow(*made, config.workspace, config.promotion))
    print(f"{promoted.name} is adapter {promoted.adapter_sha256[:12]}")


def rollback(file: File = CONFIG, /, *, to: str | None = None) -> None:
    """Serve the adapter before the present one again, or the one of the history that is named.

    Parameters
    ----------
    file
        The configuration; its `promotion` says what is served, and where.
    to
        The first characters, at least 6, of the digest of the adapter to go back to.
    """
    from preflow.terminal import shown

    settings = load_settings(file)
    with shown(settings.folder, "rollback"):
        from flows.rollback import rollback_adapter

        served = asyncio.run(rollback_adapter(settings.config.workspace, settings.config.promotion, to))
    print(f"{served.name} is adapter {served.adapter_sha256[:12]} again")


def chat(
    *,
    endpoint: str | None = None,
    model: Annotated[str | None, Parameter(show_default=False)] = None,
    api_key: str | None = None,
) -> None:
    """Talk to a served model or adapter, with `vllm chat`.

    Parameters
    ----------
    endpoint
        An OpenAI-compatible address (http://127.0.0.1:8000/v1).
    model
        What to talk to; otherwise the adapter that was loaded last.
    api_key
        Where the key is: env:NAME or the name of a Prefect Secret block.
    """
    from tasks.demo.local import VLLM_PYTHON
    from tasks.llm.secrets import resolve_secret

    address = endpoint or f"http://127.0.0.1:{os.environ.get('VLLM_PORT', '8000')}/v1"
    try:
        config = EndpointConfig(endpoint=address, model=model or "any", api_key=api_key)
    except ValidationError as error:
        ((name, *_), said) = error.errors()[0]["loc"], error.errors()[0]["msg"].removeprefix("Value error, ")
        # The error's own text may hold a key.
        raise PreflowError(f"--{str(name).replace('_', '-')}: {PLAINER.get(str(name), said)}") from None
    key = asyncio.run(resolve_secret(api_key, "--api-key"))
    chosen = asyncio.run(choose(config, model, key))
    python = VLLM_PYTHON if VLLM_PYTHON.exists() else Path(sys.executable)
    print(GREETING.format(model=chosen, endpoint=address), flush=True)
    command = [str(python), "-c", START, "--url", address, "--model-name", chosen]
    # Not as an argument, which every user of the machine can read; and never the key of another service.
    environment = {**os.environ, "OPENAI_API_KEY": key or "none", "DO_NOT_TRACK": "1", "VLLM_NO_USAGE_STATS": "1"}
    try:
        os.execve(command[0], command, environment)
    except OSError as error:
        raise PreflowError(f"{python} cannot be run: {error.strerror}; `pip install vllm` has `vllm chat`") from error


async def choose(config: EndpointConfig, named: str | None, key: str | None) -> str:
    """Return the model to talk to: the one named, else the adapter that was loaded last, else the base.

    Raises:
        PreflowError: the endpoint does not answer, or does not serve that model.
    """
    from tasks.llm.client import Endpoint
    from tasks.llm.responses import RequestRefused, Transient

    async with Endpoint(config, key) as server:
        try:
            served = [info.id for info in await server.models()]
        except (Transient, RequestRefused) as failure:
            remedy = "`preflow up` starts the demo's; --endpoint gives the address of yours"
            raise PreflowError(f"{config.endpoint} is not usable: {failure}. {remedy}") from failure
    if not served or (named is not None and named not in served):
        raise PreflowError(f"{config.endpoint} does not serve {named or 'any model'}; it has: {', '.join(served)}")
    return named or served[-1]  # vLLM lists the base first and adapters as they came
