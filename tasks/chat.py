"""Talk to a served model or adapter in the terminal: `make chat`, or `python -m tasks.chat --help`."""

import argparse
import asyncio
import os
import readline  # noqa: F401  # gives input() its line editing and history
import sys
from collections.abc import Iterator

import httpx2
from openai import APIError, APIStatusError, OpenAI, omit
from openai.types.chat import ChatCompletionMessageParam

from tasks.config import EndpointConfig
from tasks.errors import PreflowError
from tasks.llm.client import Endpoint, RequestRefused, resolve_secret
from tasks.llm.responses import Transient

HELP = "Enter sends; /new starts afresh, /model NAME asks another one; Ctrl-C stops an answer, Ctrl-D ends."
NO_SERVER = "Start the demo's models with `make up`, or give the address of yours: --endpoint http://HOST:8000/v1"


class Chat:
    """One conversation with one model; the whole of it is sent with every question.

    Args:
        client: of the endpoint.
        model: name of the served model or adapter; may be changed between questions.
        temperature: of the sampling.
        max_tokens: longest answer, in tokens; None: as long as the model's context allows.
    """

    def __init__(self, client: OpenAI, model: str, temperature: float, max_tokens: int | None) -> None:
        self._client = client
        self.model = model
        self._temperature = temperature
        self._max_tokens = max_tokens
        self._turns: list[ChatCompletionMessageParam] = []

    def forget(self) -> None:
        """Start a new conversation."""
        self._turns.clear()

    def ask(self, text: str) -> Iterator[str]:
        """Yield the answer piece by piece; question and answer are remembered, also an answer that was stopped.

        Raises:
            APIError: the server refused, or broke off; the question is forgotten.
        """
        pieces: list[str] = []
        question: ChatCompletionMessageParam = {"role": "user", "content": text}
        stream = self._client.chat.completions.create(
            model=self.model, messages=[*self._turns, question], temperature=self._temperature,
            max_tokens=self._max_tokens or omit, stream=True,
        )  # fmt: skip
        try:
            for event in stream:
                if event.choices and (piece := event.choices[0].delta.content):
                    pieces.append(piece)
                    yield piece
        except (KeyboardInterrupt, GeneratorExit):
            stream.close()  # else vLLM writes on to the end
            self._remember(question, pieces)
            raise
        self._remember(question, pieces)

    def _remember(self, question: ChatCompletionMessageParam, pieces: list[str]) -> None:
        self._turns += [question, {"role": "assistant", "content": "".join(pieces)}]


async def choose_model(config: EndpointConfig, named: bool, api_key: str | None) -> str:
    """Return the model to talk to: the one named, else the last adapter that is served, else the base model.

    Raises:
        PreflowError: the endpoint does not answer, or does not serve that model.
    """
    async with Endpoint(config, api_key) as server:
        if named:
            return (await server.check_model()).id
        try:
            served = await server.models()
        except (Transient, RequestRefused) as failure:
            raise PreflowError(f"{config.endpoint} is not usable: {failure}") from failure
    if not served:
        raise PreflowError(f"{config.endpoint} serves no model at all")
    print("served here: " + ", ".join(info.id for info in served))
    return served[-1].id  # vLLM lists the base first and adapters as they came: the promoted one came last


def converse(chat: Chat) -> None:
    """Ask and answer until the input ends."""
    while True:
        try:
            text = input(f"\n{_bold('you', prompt=True)}  ").strip()
        except EOFError:
            print("\nbye")
            return
        except KeyboardInterrupt:
            print("\nbye (Ctrl-D does it too)")
            return
        if text.startswith("/"):
            print(_command(chat, text))
        elif text:
            _answer(chat, text)


def _command(chat: Chat, text: str) -> str:
    name, _, argument = text.partition(" ")
    if name == "/new":
        chat.forget()
        return "a new conversation"
    if name == "/model" and argument.strip():
        chat.model = argument.strip()
        return f"from now on {chat.model} answers; the conversation goes on"
    return HELP


def _answer(chat: Chat, text: str) -> None:
    print(f"{_bold(chat.model)}  ", end="", flush=True)
    try:
        for piece in chat.ask(text):
            print(piece, end="", flush=True)
        print()
    except KeyboardInterrupt:
        print(" [stopped]")
    except APIStatusError as error:
        remedy = "/model NAME asks another one" if error.status_code == 404 else "/new starts a shorter conversation"
        print(f"\nrefused ({error.status_code}): {_reason(error)}. {remedy}.")
    except (APIError, httpx2.HTTPError) as error:
        print(f"\nthe server went away ({type(error).__name__}): start it again and repeat the question")


def _reason(error: APIStatusError) -> str:
    body = error.body if isinstance(error.body, dict) else {}
    return str(body.get("message") or error.message).rstrip(".")[:300]


def _bold(text: str, prompt: bool = False) -> str:
    if not sys.stdout.isatty():
        return f"{text}>"
    on, off = "\033[1m", "\033[0m"
    if prompt:  # readline counts a prompt's characters; between \001 and \002 it does not
        on, off = f"\001{on}\002", f"\001{off}\002"
    return f"{on}{text}>{off}"


def main() -> int:
    """Talk to a served model; Ctrl-D ends it."""
    parser = argparse.ArgumentParser(prog="python -m tasks.chat", description=main.__doc__, epilog=HELP)
    local = f"http://127.0.0.1:{os.environ.get('VLLM_PORT', '8000')}/v1"
    parser.add_argument("--endpoint", default=local, help=f"base URL of an OpenAI-compatible endpoint ({local})")
    parser.add_argument("--model", help="name of the served model or adapter (the adapter promoted last)")
    parser.add_argument("--api-key", help="where the key is: env:NAME or the name of a Prefect Secret block")
    parser.add_argument("--temperature", type=float, default=0.7, help="sampling temperature (0.7)")
    parser.add_argument("--max-tokens", type=int, help="longest answer, in tokens (as long as the context allows)")
    options = parser.parse_args()
    try:
        config = EndpointConfig(endpoint=options.endpoint, model=options.model or "any", api_key=options.api_key)
        key = asyncio.run(resolve_secret(options.api_key, "--api-key"))
        model = asyncio.run(choose_model(config, options.model is not None, key))
    except (PreflowError, ValueError) as error:
        print(f"{error}\n{NO_SERVER}", file=sys.stderr)
        return 1
    with OpenAI(base_url=options.endpoint, api_key=key or "none") as client:
        print(f"{model} at {options.endpoint}. {HELP}")
        converse(Chat(client, model, options.temperature, options.max_tokens))
    return 0


if __name__ == "__main__":
    sys.exit(main())
