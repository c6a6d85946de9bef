"""`preflow chat`."""

import os
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from tasks.config import EndpointConfig

# `vllm chat` alone: the whole command would look its version up as "vllm", which the CPU build does not have.
START = """
import argparse
from vllm.entrypoints.cli.openai import ChatCommand
parser = argparse.ArgumentParser()
ChatCommand.add_cli_args(parser)
ChatCommand.cmd(parser.parse_args())
"""
GREETING = "{model} at {endpoint}; Ctrl-D ends it. The demo's adapters only write scenes: try [BARNABY] Aye, crew."


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
    import asyncio
    import sys

    from tasks.demo.local import VLLM_PYTHON
    from tasks.errors import PreflowError
    from tasks.llm.secrets import resolve_secret

    address = endpoint or f"http://127.0.0.1:{os.environ.get('VLLM_PORT', '8000')}/v1"
    config = EndpointConfig(endpoint=address, model=model or "any", api_key=api_key)
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
    from tasks.errors import PreflowError
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
