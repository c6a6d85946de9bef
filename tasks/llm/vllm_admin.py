"""What an endpoint serves: its models, and the LoRA adapters that vLLM takes in while it runs."""

import asyncio
import logging
import re
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import httpx2

from tasks.config import EndpointConfig
from tasks.errors import PreflowError
from tasks.llm.responses import KeyRefused, ModelInfo, NotPermitted, RequestRefused, Transient

log = logging.getLogger(__name__)

# Path or URL, JSON body (None: GET), seconds; raises Transient, RequestRefused and KeyRefused.
Call = Callable[[str, dict[str, Any] | None, float], Awaitable[httpx2.Response]]

CHECK_SECONDS = 10.0
CHECK_ATTEMPTS = 4
ADAPTER_SECONDS = 120.0


async def list_models(call: Call) -> list[ModelInfo]:
    """Return the models of the endpoint. Raises what `call` raises, and `Transient` for an answer that is no list."""
    response = await call("/models", None, CHECK_SECONDS)
    try:
        return [_model(item) for item in response.json()["data"]]
    except (ValueError, KeyError, TypeError) as error:
        raise Transient("the answer of /models is not a list of models") from error


def _model(item: dict[str, Any]) -> ModelInfo:
    length = item.get("max_model_len") or item.get("context_length")  # vLLM's name, and OpenRouter's
    return ModelInfo(
        id=str(item["id"]),
        max_model_len=int(length) if length else None,
        root=item.get("root"),
        parent=item.get("parent"),
    )


async def check_model(call: Call, config: EndpointConfig, ping: Callable[[], Awaitable[object]]) -> ModelInfo:
    """Return the configured model if the endpoint answers and serves it; a model that is not listed is asked (`ping`).

    Raises `PreflowError` with what to do: not reachable, not an OpenAI address, model not served, key refused.
    """
    try:
        models = await _list_patiently(call)
    except NotPermitted as refused:  # there are keys that may ask and may not list
        return await _try_unlisted(config, ping, f"did not list its models ({refused})")
    except Transient as failure:
        raise PreflowError(
            f"{config.endpoint} is not usable: {failure}. Check that the server is up, that the address is right (it "
            "usually ends in /v1), and that it can be reached from here: "
            f"curl {base_url(config)}/models"
        ) from failure
    except RequestRefused as refused:
        if refused.status not in (404, 405, 501):
            raise PreflowError(f"{config.endpoint} did not list its models: {refused}; check the address") from refused
        return await _without_list(call, config)
    for model in models:
        # Gemini lists its models as models/NAME and takes both names.
        if config.model in (model.id, f"models/{model.id}", model.id.removeprefix("models/")):
            return model
    names = ", ".join(sorted(model.id for model in models)[:30]) or "none at all"
    return await _try_unlisted(config, ping, f"lists other models: {names}")


async def _try_unlisted(config: EndpointConfig, ping: Callable[[], Awaitable[object]], why: str) -> ModelInfo:
    try:
        await ping()
    except RequestRefused as refused:
        if refused.reason == "not_found" or "model" in refused.text.lower():
            raise not_served(config, refused, why) from refused
    except Transient as failure:
        log.info("%s: a short question was not answered either: %s", config.endpoint, failure)
    log.warning("%s %s; %s is asked all the same", config.endpoint, why, config.model)
    return ModelInfo(id=config.model)


def not_served(config: EndpointConfig, refused: RequestRefused, why: str = "") -> PreflowError:
    """Return the error for a model that the endpoint does not answer for, listed or not."""
    remedy = f"set model to one it has: it {why}" if why else "set model to one it has, and check the address"
    return PreflowError(f"{config.endpoint} does not serve the model {config.model!r}: {refused}; {remedy}")


async def _list_patiently(call: Call) -> list[ModelInfo]:
    failure = Transient(f"no answer within {CHECK_SECONDS:g} s")
    try:
        async with asyncio.timeout(CHECK_SECONDS):
            for attempt in range(CHECK_ATTEMPTS):
                try:
                    return await list_models(call)
                except Transient as caught:
                    failure = caught
                await asyncio.sleep(0.25 * 2**attempt)
    except TimeoutError:
        raise failure from None
    raise failure


async def _without_list(call: Call, config: EndpointConfig) -> ModelInfo:
    base = base_url(config)
    if not base.endswith("/v1"):
        try:
            await call(f"{base}/v1/models", None, CHECK_SECONDS)
        except (Transient, RequestRefused) as absent:
            log.debug("%s/v1/models lists nothing either: %s", base, absent)
        else:
            raise PreflowError(f"{config.endpoint} is not the API's base address: set endpoint to {base}/v1")
    log.warning(
        "%s does not list its models, so it is not known whether it serves %s; if every request fails with 404, "
        "check the address (it usually ends in /v1) and the model's name",
        config.endpoint, config.model,
    )  # fmt: skip
    return ModelInfo(id=config.model)


def base_url(config: EndpointConfig) -> str:
    """Return the endpoint's address without its query and without a slash at its end."""
    return config.endpoint.partition("?")[0].rstrip("/")


async def replicas(endpoint: str) -> list[str]:
    """Return the address of every server behind an endpoint's name; adapters are loaded into each of them.

    A headless Service of Kubernetes has the addresses of all its pods. An https endpoint is one server: its name is in
    its certificate.
    """
    url = httpx2.URL(endpoint)
    if url.scheme != "http":
        return [endpoint]
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(url.host, url.port or 80, family=socket.AF_INET, type=socket.SOCK_STREAM)
    except OSError:  # whoever asks it next says so
        return [endpoint]
    hosts = sorted({str(address[0]) for *_, address in found})
    return [str(url.copy_with(host=host)) for host in hosts] if len(hosts) > 1 else [endpoint]


async def _admin_urls(config: EndpointConfig, action: str) -> list[str]:
    servers = await replicas(base_url(config))
    return [f"{server.removesuffix('/v1')}/v1/{action}_lora_adapter" for server in servers]


async def load_adapter(call: Call, config: EndpointConfig, adapter: dict[str, str], replace: bool) -> None:
    """Have vLLM load `adapter` (`lora_name`, `lora_path`); see `Endpoint.load_adapter`."""
    try:
        for url in await _admin_urls(config, "load"):
            await call(url, {**adapter, "load_inplace": replace}, ADAPTER_SECONDS)
    except (Transient, RequestRefused) as failure:
        where = f"{config.endpoint} did not load the adapter {adapter['lora_name']} from {adapter['lora_path']}"
        raise PreflowError(f"{where}: {failure}. {_remedy(failure)}") from failure


async def unload_adapter(call: Call, config: EndpointConfig, name: str) -> None:
    """Have vLLM unload the adapter `name`; see `Endpoint.unload_adapter`."""
    for url in await _admin_urls(config, "unload"):
        try:
            await call(url, {"lora_name": name}, ADAPTER_SECONDS)
        except (Transient, RequestRefused) as failure:
            if "cannot be found" not in str(failure):
                raise PreflowError(
                    f"{config.endpoint} did not unload the adapter {name}: {failure}. {_remedy(failure)}"
                ) from failure
            log.info("%s does not serve the adapter %s: nothing to unload", config.endpoint, name)


async def tokenize(
    call: Call, config: EndpointConfig, prompt: Sequence[Mapping[str, str]] | str, template: Mapping[str, Any]
) -> list[int] | None:
    """Return the tokens of messages or text; see `Endpoint.tokenize`."""
    url = f"{base_url(config).removesuffix('/v1')}/tokenize"
    body: dict[str, Any] = {"model": config.model, "prompt": prompt, "add_special_tokens": False}
    if not isinstance(prompt, str):
        body = {"model": config.model, "messages": list(prompt), "add_generation_prompt": True, **template}
    try:
        return [int(token) for token in (await call(url, body, 3 * CHECK_SECONDS)).json()["tokens"]]
    except (Transient, RequestRefused, KeyRefused, ValueError, KeyError, TypeError) as error:
        if "chat_template" in body:  # the server has its own, and takes none from a request
            own = {name: value for name, value in template.items() if name != "chat_template"}
            return await tokenize(call, config, prompt, own)
        log.info("%s is of no use (%s): prompts are not checked there", url, error)
        return None


async def token_log_prob(call: Call, config: EndpointConfig, prefix: Sequence[int], token: int) -> float:
    """Return the log-prob of one token after others; see `Endpoint.token_log_prob`."""
    # Not `prompt_logprobs`: in one batch with other requests that ends vLLM's CPU engine (0.32).
    body = {
        "model": config.model, "prompt": list(prefix), "max_tokens": 1, "temperature": 0, "logprobs": 1,
        "allowed_token_ids": [token],
    }  # fmt: skip
    try:
        response = await call("/completions", body, ADAPTER_SECONDS)
        return float(response.json()["choices"][0]["logprobs"]["token_logprobs"][0])
    except (Transient, RequestRefused) as failure:
        raise PreflowError(f"{config.endpoint} gave no log-probs of {config.model}: {failure}") from failure
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise PreflowError(
            f"{config.endpoint} gave no log-probs of {config.model} ({type(error).__name__}): it must be a vLLM, which "
            "takes token ids and allowed_token_ids on /v1/completions"
        ) from error


def _remedy(failure: Transient | RequestRefused) -> str:
    text = str(failure)
    if failure.status == 0:
        return "Check that the server is up and the address right"
    if "No adapter found" in text:
        return (
            "The folder must exist where the server runs, and hold adapter_config.json: mount the workspace there too, "
            "and set adapter_root to where the server sees it"
        )
    if failure.status in (404, 405):
        return "Start vLLM with --enable-lora and with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment"
    if "already been loaded" in text:
        return "Take another name, or replace what is served under this one"
    if re.search(r"max_lora_rank|rank", text):
        return "The adapter's rank is too high for this server: start vLLM with --max-lora-rank at least that"
    if failure.status >= 500:
        return "vLLM takes no DoRA, no modules_to_save and no bias in an adapter; its log says more"
    return "See the server's log"
