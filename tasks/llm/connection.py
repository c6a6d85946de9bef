"""The connection to an OpenAI-compatible endpoint: one HTTP session, and every failure as what helps against it."""

import asyncio
import json
from collections.abc import Mapping
from typing import Any, Self
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp

from tasks.config import EndpointConfig
from tasks.errors import PreflowError
from tasks.llm.responses import (
    CreditUsedUp,
    Failure,
    KeyRefused,
    QuotaUsedUp,
    RequestRefused,
    Transient,
    classify,
)
from tasks.llm.secrets import resolve_secret

SHORTEST_SECRET = 8


class Connection:
    """An HTTP session with one endpoint. Use as an async context manager, in one event loop.

    aiohttp by itself: a client on top of it takes as much CPU a request as all the rest.

    Args:
        config: says where and within which limits.
        api_key: the key itself (see `resolve_secret`).
        headers: further ones. Neither they nor the key appear in a message.
    """

    _session: aiohttp.ClientSession

    def __init__(self, config: EndpointConfig, api_key: str | None, headers: Mapping[str, str] | None = None) -> None:
        self.config = config
        self._key = api_key
        key = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._headers = {"Content-Type": "application/json", **key, **(headers or {})}
        # A shorter one, such as a local server's "none", is no secret, and may stand in any text.
        values = (api_key or "", *key.values(), *(headers or {}).values())
        self._secrets = [value.encode() for value in values if len(value) >= SHORTEST_SECRET]
        address, mark, query = config.endpoint.partition("?")
        # Many pages show the whole address of a chat request.
        self.base_url = address.rstrip("/").removesuffix("/chat/completions")
        self._query = mark + query

    @classmethod
    async def connect(cls, config: EndpointConfig, field: str) -> Self:
        """Return the endpoint with its key and headers looked up; `field` names the configuration in messages.

        Raises `PreflowError`: a secret is missing.
        """
        key = await resolve_secret(config.api_key, f"{field}.api_key")
        names = config.extra_headers.items()
        headers = {name: await resolve_secret(value, f"{field}.extra_headers.{name}") or "" for name, value in names}
        return cls(config, key, headers)

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),  # the window of requests is the limit
            timeout=aiohttp.ClientTimeout(sock_connect=min(30.0, self.config.request_timeout_seconds)),
            headers=self._headers,
            proxy=_proxy_of(self.base_url),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def _call(self, url: str, body: Mapping[str, Any] | None, seconds: float) -> bytes:
        """Return what comes back for a POST of `body`, or a GET without one.

        Every failure is raised as Transient, RequestRefused or StageStopped.
        """
        method, data = ("GET", None) if body is None else ("POST", json.dumps(body).encode())
        # A POST that is sent on may arrive as a GET, and without its key.
        request = self._session.request(method, url + self._query, data=data, allow_redirects=False)
        try:
            async with asyncio.timeout(seconds), request as response:
                content = await response.read()
        except aiohttp.ClientError as error:
            sent = not isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError)
            raise Transient(f"{type(error).__name__}: {error}", maybe_billed=sent) from None
        except TimeoutError:
            raise Transient(f"no answer within {seconds:g} s", maybe_billed=True) from None
        if response.status < 300:
            return content
        if response.status < 400:
            text = f"{url} has moved to {response.headers.get('Location')}: set endpoint to where that is"
            raise RequestRefused(response.status, "moved", text)
        raise self._explained(classify(response.status, response.headers, self.conceal(content)))

    def conceal(self, content: bytes) -> bytes:
        """Return an error without the key and the headers' values, which some servers repeat."""
        for secret in self._secrets:
            for written in (secret, secret.replace(b"/", b"\\/")):
                content = content.replace(written, b"***")
        return content

    def _explained(self, failure: Failure) -> Failure:
        """Return a failure; one that stops the stage with where, which key and what to do."""
        name, where = self.config.api_key, f"{self.config.endpoint} (model {self.config.model})"
        which, kept = f"the key {name}" if name else "a request without a key", "Everything answered so far is kept"
        if isinstance(failure, CreditUsedUp):
            return CreditUsedUp(f"{where}: {which} has no credit left: {failure}. {kept}: top it up, then run again")
        if isinstance(failure, QuotaUsedUp):
            used = f"{where}: the quota of {which} is used up: {failure}"
            return QuotaUsedUp(f"{used}. {kept}: run again after that")
        if not isinstance(failure, KeyRefused):
            return failure
        if name is None:
            remedy = "it wants a key: set api_key to env:NAME (and export NAME=...) or to a Prefect Secret block's name"
        else:
            change = f"change the Prefect Secret block {name!r}"
            if name.startswith("env:"):
                change = f"export {name.removeprefix('env:')}=... where the flow runs"
            remedy = f"check the key and its account, and {change}"
        return type(failure)(f"{self.config.endpoint} refused {which} for {self.config.model}: {failure}; {remedy}")


def _proxy_of(address: str) -> str | None:
    """Return the proxy that the environment names for an address; aiohttp would look, in a thread, at each request."""
    parts, proxies = urlsplit(address), getproxies()
    proxy = None if proxy_bypass(parts.netloc) else proxies.get(parts.scheme, proxies.get("all"))
    if proxy is None or proxy.startswith(("http://", "https://")):
        return proxy
    kind, mark, _ = proxy.partition("://")
    if mark:
        raise PreflowError(
            f"the environment names a {kind} proxy for {parts.netloc}, and only http and https ones are taken: name "
            f"such a one in {parts.scheme}_proxy, or put the host into no_proxy"
        )
    return f"http://{proxy}"
