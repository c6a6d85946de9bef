"""A training that is tracked with Weights & Biases, offline: what its run folder holds, and that it changes nothing."""

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from wandb.proto.wandb_internal_pb2 import Record

from tasks.train.launch import check_training_inputs, run_training, training_key
from tests.fakes.tiny_training import TinyWorld

BLOCK = 1 << 15
HEADER = 7


class Gateway:
    """A proxy that lets nothing through and counts who asked."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self.asked: list[bytes] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(5)
                self.asked.append(connection.recv(200))

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def gateway(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gateway]:
    with closing(Gateway()) as gateway:
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, gateway.address)
            monkeypatch.setenv(name.lower(), gateway.address)
        # Threads that other tests have left may ask their server on this machine.
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.setenv(name, "127.0.0.1")
        yield gateway


def payloads(content: bytes) -> Iterator[bytes]:
    """Yield the records of a log in LevelDB's format: blocks of chunks of (crc, length, type), records may be split."""
    position, record = HEADER, b""
    while position + HEADER <= len(content):
        if BLOCK - position % BLOCK < HEADER:
            position += BLOCK - position % BLOCK
            continue
        length = int.from_bytes(content[position + 4 : position + 6], "little")
        kind = content[position + 6]
        record += content[position + HEADER : position + HEADER + length]
        position += HEADER + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def history(run: Path) -> list[dict[str, Any]]:
    """Return what an offline run has logged, in order."""
    (log,) = run.glob("*.wandb")
    records = [Record.FromString(payload) for payload in payloads(log.read_bytes())]
    rows = [record.history.item for record in records if record.WhichOneof("record_type") == "history"]
    return [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row} for row in rows]


@pytest.mark.long  # two trainings
def test_an_offline_run_holds_the_losses_and_the_adapter_is_the_same(
    world: TinyWorld, tmp_path: Path, gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout: a tracker that drew a random number would change the adapter."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    adapters = {}
    for tracker in ("wandb", "none"):
        training = world.config(report_to=tracker, disable_dropout=False)
        check_training_inputs(training)
        key = training_key(world.preferences, training)
        adapters[tracker] = Path(run_training(world.preferences, str(tmp_path / tracker), training, key).uri)

    (run,) = tmp_path.glob("wandb/offline-run-*")
    metrics = [json.loads(line) for line in (adapters["none"].parent / "metrics.jsonl").open()]
    logged = [row for row in history(run) if "train/loss" in row]
    expected = [row for row in metrics if "loss" in row and row["step"] > 0]
    assert [row["train/global_step"] for row in logged] == [row["step"] for row in expected] == [3, 6, 9, 12]
    for name in ("loss", "rewards/margins", "logps/chosen", "weights/moved"):
        assert [row[f"train/{name}"] for row in logged] == [row[name] for row in expected], name
    for name in ("adapter/adapter_model.safetensors", "metrics.jsonl"):
        tracked, plain = (adapters[tracker].parent / name for tracker in ("wandb", "none"))
        assert tracked.read_bytes() == plain.read_bytes(), name
    assert gateway.asked == []
