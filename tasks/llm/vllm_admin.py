"""What an endpoint serves: its models, and the LoRA adapters that vLLM takes in while it runs."""

import asyncio
import contextlib
import json
import logging
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypedDict, Unpack
from urllib.parse import urlsplit, urlunsplit

from tasks.errors import PreflowError
from tasks.llm.connection import Connection
from tasks.llm.responses import KeyRefused, ModelInfo, NotPermitted, RequestRefused, Transient

log = logging.getLogger(__name__)

CHECK_SECONDS = 10.0
CHECK_ATTEMPTS = 4
ADAPTER_SECONDS = 120.0
TRIAL = "preflow-trial"
# A mount that reads a bucket shows a new file that late.
MOUNT_SECONDS, MOUNT_PAUSE = 60.0, 5.0


class Template(TypedDict):
    """The chat template that turns messages into tokens, where it is not the server's own, and what it is handed."""

    chat_template: NotRequired[str | None]
    chat_template_kwargs: NotRequired[Mapping[str, Any] | None]


class Administration(Connection, ABC):
    """What an endpoint tells about its models, and what vLLM is told about adapters."""

    @abstractmethod
    async def ping(self) -> object:
        """Send one short request, once; raise what became of it."""

    async def models(self) -> list[ModelInfo]:
        """Return the models that the endpoint serves, LoRA adapters included.

        Raises what `_call` raises, and `Transient` for an answer that is no list.
        """
        content = await self._call(f"{self.base_url}/models", None, CHECK_SECONDS)
        try:
            listed = json.loads(content)
            return [_model(item) for item in (listed if isinstance(listed, list) else listed["data"] or [])]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise Transient("the answer of /models is not a list of models") from error

    async def check_model(self) -> ModelInfo:
        """Return the configured model, after at most about 10 s; one that is not listed is asked a short question.

        Raises `PreflowError`: it cannot be used: not reachable, not an OpenAI address, model not served, key refused.
        """
        config = self.config
        try:
            models = await self._list_patiently()
        except NotPermitted as refused:  # there are keys that may ask and may not list
            return await self._try_unlisted(f"did not list its models ({refused})")
        except Transient as failure:
            raise PreflowError(
                f"{config.endpoint} is not usable: {failure}. Check that the server is up, that the address is right "
                f"(it usually ends in /v1), and that it can be reached from here: curl {self.base_url}/models"
            ) from failure
        except RequestRefused as refused:
            if refused.status not in (404, 405, 501):
                message = f"{config.endpoint} did not list its models: {refused}; check the address"
                raise PreflowError(message) from refused
            if not self.base_url.endswith("/v1"):
                with contextlib.suppress(Transient, RequestRefused):
                    await self._call(f"{self.base_url}/v1/models", None, CHECK_SECONDS)
                    raise PreflowError(
                        f"{config.endpoint} is not the API's base address: set endpoint to {self.base_url}/v1"
                    ) from refused
            return await self._try_unlisted("does not list its models (is the address right?)")
        for model in models:
            # Gemini lists its models as models/NAME and takes both names.
            if config.model in (model.id, f"models/{model.id}", model.id.removeprefix("models/")):
                return model
        names = ", ".join(sorted(model.id for model in models)[:30]) or "none at all"
        return await self._try_unlisted(f"lists other models: {names}")

    async def _list_patiently(self) -> list[ModelInfo]:
        failure = Transient(f"no answer within {CHECK_SECONDS:g} s")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CHECK_SECONDS):
                for attempt in range(CHECK_ATTEMPTS):
                    try:
                        return await self.models()
                    except Transient as caught:
                        failure = caught
                    await asyncio.sleep(0.25 * 2**attempt)
        raise failure

    async def _try_unlisted(self, why: str) -> ModelInfo:
        try:
            await self.ping()
        except RequestRefused as refused:
            if refused.reason == "not_found" or (refused.reason == "bad_request" and "model" in refused.text.lower()):
                raise self.not_served(refused, why) from refused
        except Transient as failure:
            log.info("%s: a short question was not answered either: %s", self.config.endpoint, failure)
        log.warning("%s %s; %s is asked all the same", self.config.endpoint, why, self.config.model)
        return ModelInfo(id=self.config.model)

    def not_served(self, refused: RequestRefused, why: str = "") -> PreflowError:
        """Return the error for a model that the endpoint does not answer for, listed or not."""
        remedy = f"set model to one it has: it {why}" if why else "set model to one it has, and check the address"
        return PreflowError(
            f"{self.config.endpoint} does not serve the model {self.config.model!r}: {refused}; {remedy}"
        )

    @property
    def _server(self) -> str:
        return self.base_url.removesuffix("/v1")

    async def _order(self, action: str, body: Mapping[str, Any]) -> list[Transient | RequestRefused]:
        """Send an order about adapters to every replica at once, and return the failures of those that fail."""
        urls = [f"{address}/v1/{action}_lora_adapter" for address in await replicas(self._server)]
        calls = (self._call(url, dict(body), ADAPTER_SECONDS) for url in urls)
        failures = list[Transient | RequestRefused]()
        for outcome in await asyncio.gather(*calls, return_exceptions=True):
            if isinstance(outcome, Transient | RequestRefused):
                failures.append(outcome)
            elif isinstance(outcome, BaseException):
                raise outcome
        return failures

    async def load_adapter(self, name: str, path: str, replace: bool) -> None:
        """Have vLLM serve the LoRA adapter in the folder `path`, as the server sees it, under `name`.

        With `replace`, an adapter already served under that name is exchanged. Raises `PreflowError`; other replicas
        than the one that failed then have the adapter all the same.
        """
        for failure in await self._order("load", {"lora_name": name, "lora_path": path, "load_inplace": replace}):
            raise self._not_done(f"load the adapter {name} from {path}", failure) from failure

    def _not_done(self, what: str, failure: Transient | RequestRefused) -> PreflowError:
        return PreflowError(f"{self.config.endpoint} did not {what}: {failure}. {_remedy(failure)}")

    async def check_would_load(self, folder: str) -> None:
        """See that vLLM will load an adapter with the configuration that lies, alone, in the folder `folder`.

        It holds rank and kind against its own settings before it looks for the weights. Every replica is asked; one
        that does not see the folder yet is asked again, for up to a minute. Raises `PreflowError`.
        """
        order, until = {"lora_name": TRIAL, "lora_path": folder, "load_inplace": True}, time.monotonic() + MOUNT_SECONDS
        while failures := await self._order("load", order):
            problems = [failure for failure in failures if "contain tensors" not in str(failure)]
            if not problems:
                return
            other = [failure for failure in problems if "No adapter found" not in str(failure)]
            if other or time.monotonic() >= until:
                failure = (other or problems)[0]
                raise self._not_done(f"load the adapter {TRIAL} from {folder}", failure) from failure
            log.info("%s does not see %s yet: asking again", self.config.endpoint, folder)
            await asyncio.sleep(MOUNT_PAUSE)
        await self.unload_adapter(TRIAL)

    async def unload_adapter(self, name: str) -> None:
        """Have vLLM no longer serve the LoRA adapter `name`; one it does not serve is left at that."""
        for failure in await self._order("unload", {"lora_name": name}):
            if "cannot be found" not in str(failure):
                raise self._not_done(f"unload the adapter {name}", failure) from failure
            log.info("%s does not serve the adapter %s: nothing to unload", self.config.endpoint, name)

    async def tokenize(
        self, prompt: Sequence[Mapping[str, str]] | str, **template: Unpack[Template]
    ) -> list[int] | None:
        """Return the tokens of messages, or of a text as it stands, as vLLM sees them; None where it does not tell."""
        url, given = f"{self._server}/tokenize", {name: value for name, value in template.items() if value is not None}
        body: dict[str, Any] = {"model": self.config.model, "prompt": prompt, "add_special_tokens": False}
        if not isinstance(prompt, str):
            body = {"model": self.config.model, "messages": list(prompt), "add_generation_prompt": True, **given}
        try:
            return [int(token) for token in json.loads(await self._call(url, body, 3 * CHECK_SECONDS))["tokens"]]
        except (Transient, RequestRefused, KeyRefused, ValueError, KeyError, TypeError) as error:
            if "chat_template" in body:  # the server has its own, and takes none from a request
                return await self.tokenize(prompt, chat_template_kwargs=template.get("chat_template_kwargs"))
            log.info("%s is of no use (%s): prompts are not checked there", url, error)
            return None

    async def token_log_prob(self, prefix: Sequence[int], token: int) -> float:
        """Return the log-prob (nats) that the model gives `token` after the token ids `prefix`; vLLM alone tells it.

        Raises `PreflowError`.
        """
        # Not `prompt_logprobs`: in one batch with other requests that ends vLLM's CPU engine (0.32).
        body = {
            "model": self.config.model, "prompt": list(prefix), "max_tokens": 1, "temperature": 0, "logprobs": 1,
            "allowed_token_ids": [token],
        }  # fmt: skip
        where = f"{self.config.endpoint} gave no log-probs of {self.config.model}"
        try:
            content = await self._call(f"{self.base_url}/completions", body, ADAPTER_SECONDS)
            return float(json.loads(content)["choices"][0]["logprobs"]["token_logprobs"][0])
        except (Transient, RequestRefused) as failure:
            raise PreflowError(f"{where}: {failure}") from failure
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise PreflowError(
                f"{where} ({type(error).__name__}): it must be a vLLM, which takes token ids and allowed_token_ids on "
                "/v1/completions"
            ) from error


async def replicas(endpoint: str) -> list[str]:
    """Return the address of every server behind an endpoint's name; adapters are loaded into each of them.

    A headless Service of Kubernetes has the addresses of all its pods. An https endpoint is one server: its name is in
    its certificate.
    """
    url = urlsplit(endpoint)
    if url.scheme != "http" or url.hostname is None:
        return [endpoint]
    port, loop = url.port or 80, asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(url.hostname, port, family=socket.AF_INET, type=socket.SOCK_STREAM)
    except OSError:  # whoever asks it next says so
        return [endpoint]
    hosts = sorted({str(address[0]) for *_, address in found})
    return [urlunsplit(url._replace(netloc=f"{host}:{port}")) for host in hosts] if len(hosts) > 1 else [endpoint]


def _model(item: dict[str, Any] | str) -> ModelInfo:
    if isinstance(item, str):
        return ModelInfo(id=item)
    length = item.get("max_model_len") or item.get("context_length")  # vLLM's name, and OpenRouter's
    return ModelInfo(
        id=str(item.get("id") or item["name"]),
        max_model_len=int(str(length)) if str(length).isdecimal() else None,
        root=item.get("root"),
        parent=item.get("parent"),
    )


# What is wrong with an adapter, by vLLM's words.
_REMEDIES = {
    "No adapter found": "The folder must exist where the server runs, and hold adapter_config.json: mount the "
    "workspace there too, and set adapter_root to where the server sees it",
    "already been loaded": "Take another name, or replace what is served under this one",
    "max_lora_rank": "The adapter's rank is too high for this server: start vLLM with --max-lora-rank of at least "
    "that, or train the SFT adapter with a lower r",
}


def _remedy(failure: Transient | RequestRefused) -> str:
    told = next((remedy for words, remedy in _REMEDIES.items() if words in str(failure)), "")
    if failure.status == 0:
        return "Check that the server is up and the address right"
    if failure.status in (404, 405) and "No adapter found" not in str(failure):
        return "Start vLLM with --enable-lora and with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment"
    if failure.status >= 500 and not told:
        return "vLLM takes no DoRA, no modules_to_save and no bias in an adapter; its log says more"
    return told or "See the server's log"
