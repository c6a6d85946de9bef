"""A stand-in for the Google provider: Terraform's plugin protocol over a table of the real one's schema.

It checks by schema alone, knows nothing until apply, and makes nothing. Terraform finds it by TF_REATTACH_PROVIDERS.
"""

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import grpc
import msgpack

Table = dict[str, Any]
TABLE: Table = json.loads(Path(__file__).with_name("google_provider.json").read_text())
TYPES = {"": '"string"', "number": '"number"', "bool": '"bool"', "list": '["list","string"]', "map": '["map","string"]'}
PROVIDER = {"optional": "project region billing_project user_project_override:bool"}
PROJECT_NUMBER = "123456789"
UNKNOWN = msgpack.ExtType(0, b"\0")
LIST = 2


def varint(number: int) -> bytes:
    """Encode a number as protobuf does: 7 bits a byte, the lowest first."""
    return bytes([number]) if number < 128 else bytes([number % 128 + 128]) + varint(number // 128)


def field(number: int, value: bytes | str | int) -> bytes:
    """Encode one field of a protobuf message; `b""` stays, as an empty message."""
    if isinstance(value, int):
        return varint(number * 8) + varint(value)
    content = value.encode() if isinstance(value, str) else value
    return varint(number * 8 + 2) + varint(len(content)) + content


def fields(message: bytes) -> dict[int, bytes]:
    """Decode the byte fields of a protobuf message that has no others."""
    found, at = {}, 0

    def read() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte, at = message[at], at + 1
            value += (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(message):
        number, length = read() // 8, read()
        found[number], at = message[at : at + length], at + length
    return found


def entries(known: Table, kind: str) -> Iterator[tuple[str, str]]:
    """Yield name and type of the attributes of one kind."""
    for entry in known.get(kind, "").split():
        name, _, type_name = entry.partition(":")
        yield name, TYPES[type_name]


def block(known: Table) -> bytes:
    """Return the Schema.Block of an entry of the table; what is optional, the provider may fill in."""
    flags = {"required": field(4, 1), "optional": field(5, 1) + field(6, 1), "computed": field(6, 1)}
    message = b"".join(
        field(2, field(1, name) + field(2, type_name) + flag)
        for kind, flag in flags.items()
        for name, type_name in entries(known, kind)
    )
    inner: Table = {name: {} for name in known.get("other_blocks", "").split()} | known.get("blocks", {})
    required = known.get("required_blocks", "").split()
    for name, entry in inner.items():
        minimum = field(4, 1) if name in required else b""
        message += field(3, field(1, name) + field(2, block(entry)) + field(3, LIST) + minimum)
    return message


def schema(known: Table) -> bytes:
    """Return the Schema of a resource."""
    return field(2, block(known))


def provider_schema(request: bytes) -> bytes:
    """Answer GetProviderSchema."""
    message = field(1, schema(PROVIDER))
    for name, known in TABLE.items():
        if name != "source":
            entry = field(1, name.removeprefix("data.")) + field(2, schema(known))
            message += field(3 if name.startswith("data.") else 2, entry)
    return message


def plan(request: bytes) -> bytes:
    """Answer PlanResourceChange: what is asked for, and of the rest nothing is known."""
    asked = fields(request)
    planned = msgpack.unpackb(fields(asked[3])[1])
    known = TABLE[asked[1].decode()]
    for kind in ("optional", "computed"):
        for name, _ in entries(known, kind):
            planned[name] = UNKNOWN if planned[name] is None else planned[name]
    return field(1, field(1, msgpack.packb(planned)))


def read_data(request: bytes) -> bytes:
    """Answer ReadDataSource for the project."""
    state = {**msgpack.unpackb(fields(fields(request)[2])[1]), "number": PROJECT_NUMBER}
    return field(1, field(1, msgpack.packb(state)))


ANSWERS: dict[str, Callable[[bytes], bytes]] = {
    "GetProviderSchema": provider_schema,
    "PlanResourceChange": plan,
    "ReadDataSource": read_data,
    **dict.fromkeys(
        ["ValidateProviderConfig", "ValidateResourceConfig", "ValidateDataResourceConfig", "ConfigureProvider"],
        lambda request: b"",
    ),
    "StopProvider": lambda request: b"",
}


@contextmanager
def google_provider() -> Iterator[dict[str, str]]:
    """Serve the stand-in from this process; yields the environment in which Terraform takes it."""
    handlers = {
        name: grpc.unary_unary_rpc_method_handler(lambda request, context, answer=answer: answer(request))
        for name, answer in ANSWERS.items()
    }
    server = grpc.server(ThreadPoolExecutor(4))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("tfplugin6.Provider", handlers),))
    # Not pytest's folder: a socket's path may have about 100 characters.
    with TemporaryDirectory(prefix="google-") as folder:
        socket, settings = Path(folder, "socket"), Path(folder, "terraform.rc")
        settings.touch()
        server.add_insecure_port(f"unix:{socket}")
        server.start()
        try:
            yield {**os.environ, "TF_CLI_CONFIG_FILE": str(settings), "CHECKPOINT_DISABLE": "1", **reattach(socket)}
        finally:
            server.stop(None)


def reattach(socket: Path) -> dict[str, str]:
    """Return the variable that tells Terraform where a provider runs that it neither starts nor ends."""
    address = {"Network": "unix", "String": str(socket)}
    where = {"Protocol": "grpc", "ProtocolVersion": 6, "Pid": os.getpid(), "Test": True, "Addr": address}
    return {"TF_REATTACH_PROVIDERS": json.dumps({"hashicorp/google": where})}
