"""Blocks of prefect-gcp: made by register.sh's script, read from a Prefect server, used against Google at its wire."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent import futures
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import prefect_gcp.credentials
import pytest
from aiohttp import web
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from google.cloud import secretmanager
from google.cloud.secretmanager_v1.services.secret_manager_service.transports import SecretManagerServiceGrpcTransport

from tasks.errors import PreflowError
from tasks.llm.secrets import resolve_secret
from tasks.store import gcs
from tasks.store.workspace import Workspace
from tests.fakes.gcs import BUCKET, FakeGcs
from tests.fakes.http import served
from tests.fakes.process import ROOT

SECRET = "projects/p-1/secrets/judge-key/versions/latest"


@dataclass
class TokenServer:
    """Google's token endpoint: counts what it is asked for."""

    asked: int = 0
    url: str = ""

    async def give(self, request: web.Request) -> web.Response:
        self.asked += 1
        return web.json_response({"access_token": "token-1", "expires_in": 3600, "token_type": "Bearer"})


class SecretManager(grpc.GenericRpcHandler):
    """Secret Manager at its gRPC boundary: one secret, and NotFound for all others."""

    def service(self, call: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        if not call.method.endswith("/AccessSecretVersion"):
            return None
        return grpc.unary_unary_rpc_method_handler(
            self._access,
            request_deserializer=secretmanager.AccessSecretVersionRequest.deserialize,
            response_serializer=secretmanager.AccessSecretVersionResponse.serialize,
        )

    def _access(self, request: Any, context: grpc.ServicerContext) -> Any:
        if request.name != SECRET:
            context.abort(grpc.StatusCode.NOT_FOUND, f"Secret {request.name} not found.")
        return secretmanager.AccessSecretVersionResponse(name=SECRET, payload={"data": b"sk-of-the-judge\n"})


@pytest.fixture(autouse=True)
def own_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget at the end which bucket has a block: other tests have the bucket without one."""
    monkeypatch.setattr(gcs, "_blocks", {})


@pytest.fixture(scope="module")
def tokens() -> Iterator[TokenServer]:
    server, application = TokenServer(), web.Application()
    application.router.add_post("/token", server.give)
    with served(application) as address:
        server.url = f"{address}/token"
        yield server


@pytest.fixture(scope="module")
def blocks(prefect_server: str, tokens: TokenServer, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The blocks as `PREFLOW_GCP_... deployments/register.sh` makes them; returns what the script said."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()
    info = {
        "type": "service_account", "project_id": "p-1", "private_key_id": "1", "private_key": pem, "client_id": "1",
        "client_email": "preflow@p-1.iam.gserviceaccount.com", "token_uri": tokens.url,
    }  # fmt: skip
    file = tmp_path_factory.mktemp("key") / "key.json"
    file.write_text(json.dumps(info))
    asked = {
        "PREFLOW_GCP_CREDENTIALS": "team", "PREFLOW_GCP_KEY_FILE": str(file),
        "PREFLOW_GCP_SECRETS": "judge-key gone-key",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "deployments/gcp_blocks.py"], cwd=ROOT, env={**os.environ, **asked},
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "PRIVATE KEY" not in done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def secret_manager(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Google's own client, as prefect-gcp makes it, but for the address it speaks to."""
    server = grpc.server(futures.ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers((SecretManager(),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()

    def client(credentials: Any) -> Any:
        assert credentials.service_account_email == "preflow@p-1.iam.gserviceaccount.com"
        channel = grpc.insecure_channel(f"127.0.0.1:{port}")
        return secretmanager.SecretManagerServiceClient(transport=SecretManagerServiceGrpcTransport(channel=channel))

    monkeypatch.setattr(prefect_gcp.credentials, "SecretManagerServiceClient", client)
    yield
    server.stop(None)


@pytest.mark.parametrize("content", [None, "no json"])
def test_a_key_file_that_cannot_be_read_is_named(tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "key.json"
    if content is not None:
        file.write_text(content)
    command = [sys.executable, "deployments/gcp_blocks.py"]
    environment = {**os.environ, "PREFLOW_GCP_KEY_FILE": str(file)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.startswith(f"PREFLOW_GCP_KEY_FILE={file}: no service account's key can be read there: ")


def test_register_says_how_the_blocks_are_named(blocks: str) -> None:
    assert "gs://team@bucket/prefix" in blocks
    assert "gcp-secret:judge-key" in blocks


async def test_an_api_key_comes_from_secret_manager(blocks: str, secret_manager: None) -> None:
    assert await resolve_secret("gcp-secret:judge-key", "judging.api_key") == "sk-of-the-judge"


async def test_a_secret_that_is_not_there_is_named_with_what_to_do(blocks: str, secret_manager: None) -> None:
    with pytest.raises(
        PreflowError, match=r"judging\.api_key names the GcpSecret block 'gone-key', and Secret Manager"
    ):
        await resolve_secret("gcp-secret:gone-key", "judging.api_key")
    with pytest.raises(PreflowError, match=r"block 'none', which does not exist.*PREFLOW_GCP_SECRETS=none"):
        await resolve_secret("gcp-secret:none", "judging.api_key")


async def test_a_workspace_takes_the_credentials_of_its_block(blocks: str, tokens: TokenServer, tmp_path: Path) -> None:
    """In a running loop, as a flow opens it."""
    with FakeGcs({}, tmp_path / "gcs"):
        plain = Workspace(f"gs://{BUCKET}/ws")
        plain.write_json(plain.uri("plain.json"), 1)
        assert tokens.asked == 0
        store = Workspace(f"gs://team@{BUCKET}/ws")
        store.check_writable()
        store.write_json(store.uri("a", "b.json"), {"x": 1})
        assert tokens.asked == 1
        assert store.list(store.uri("a")) == [f"gs://team@{BUCKET}/ws/a/b.json"]
        assert (store.folders(store.root), store.list(store.root)) == (["a"], [f"gs://team@{BUCKET}/ws/plain.json"])
        assert plain.read_json(plain.uri("a", "b.json")) == {"x": 1}
        assert store.sha256(store.uri("plain.json")) == plain.sha256(plain.uri("plain.json"))
        assert tokens.asked == 1, "what is in the bucket is read with the block's credentials, however it is addressed"


def test_a_workspace_whose_block_is_missing_is_refused_by_name(blocks: str, tmp_path: Path) -> None:
    with pytest.raises(PreflowError, match=r"no GcpCredentials block 'nobody'.*PREFLOW_GCP_CREDENTIALS=nobody"):
        Workspace("gs://nobody@bucket/ws").check_writable()
