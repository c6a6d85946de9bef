"""The whole pipeline on a bucket that fails, killed in the middle: the bytes of a folder, and no secret in them.

Real: the Prefect server, the flows, the training, the kills. Fake: the endpoints and the bucket, over HTTP.
"""

import base64
import json
import multiprocessing
import os
import secrets
import shutil
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import httpx
import pytest
from prefect.blocks.system import Secret

from tasks.store.workspace import COMMITTED
from tests.chaos.pipeline_process import run_pipeline
from tests.fakes import FakeOpenAI
from tests.fakes.gcs import BUCKET, FakeGcs
from tests.fakes.gcs_plan import FAULTS
from tests.fakes.tiny_training import build_adapter, build_base
from tests.integration.test_stages import write_prompts

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]  # the whole pipeline five times

# A run uploads about 150 times and downloads 300 times: often enough that no kind of fault stays away by chance.
SHARES = {**dict.fromkeys(FAULTS, 0.02), "cut_upload": 0.1, "cut_download": 0.05}
FAULTY = {"faults": SHARES, "slow_seconds": 0.3, "retry_after": 1}
# Files whose content depends on nothing but inputs and settings, wherever the workspace lies.
SAME = ("completions.jsonl", "failures.jsonl", "verdicts.jsonl", "judged.jsonl", "train.jsonl", "val.jsonl",
        "quality.json", "samples.jsonl", "comparisons.jsonl", "win_rate.json", "prompts.jsonl", "metrics.jsonl",
        "adapter_model.safetensors", "adapter_config.json")  # fmt: skip
MOUNT = "/mnt/workspace"


def _key(name: str) -> str:
    return f"sk-planted-{name}-{secrets.token_hex(12)}"


@dataclass
class Keys:
    """Distinctive secrets, one for each place that may hold one."""

    judge: str = field(default_factory=lambda: _key("judge"))
    sampler: str = field(default_factory=lambda: _key("sampler"))
    vllm: str = field(default_factory=lambda: _key("vllm"))
    hub: str = field(default_factory=lambda: f"hf_{secrets.token_hex(17)}")
    tracker: str = field(default_factory=lambda: secrets.token_hex(20))

    def environment(self) -> dict[str, str]:
        return {"PLANTED_JUDGE_KEY": self.judge, "PLANTED_VLLM_KEY": self.vllm, "HF_TOKEN": self.hub,
                "WANDB_API_KEY": self.tracker}  # fmt: skip

    def found_in(self, content: bytes) -> list[str]:
        """Return the names of the keys that `content` holds, plain or in base64."""
        return [
            name
            for name, key in vars(self).items()
            if key.encode() in content or base64.b64encode(key.encode())[:-4] in content
        ]


@dataclass
class World:
    """What both runs share: model, adapter, prompts, keys and the Prefect server."""

    folder: Path
    api: str
    keys: Keys

    def config(self, workspace: str, adapter: str, urls: dict[str, str]) -> dict[str, Any]:
        common = {"request_timeout_seconds": 20, "shard_size": 8, "max_concurrency": 4}
        return {
            "prompts": str(self.folder / "prompts-0-40.jsonl"),
            "workspace": workspace,
            "generation": {
                "model": "sampler", "endpoint": urls["sampler"], "api_key": "planted-sampler-key",
                "max_tokens": 64, **common,
            },
            "judging": {
                "model": "judge-hash", "endpoint": urls["judge"], "api_key": "env:PLANTED_JUDGE_KEY",
                "rubric": "demo", "val_ratio": 0.2, **common,
            },
            "training": {
                "base_model": str(self.folder / "base"), "sft_adapter": adapter, "load_in_4bit": False,
                "learning_rate": 1e-2, "warmup_steps": 2, "max_steps": 6, "gradient_accumulation_steps": 2,
                "eval_steps": 3, "save_steps": 2, "logging_steps": 3, "max_length": 256,
                "gradient_checkpointing": False, "lease_seconds": 5,
            },
            "evaluation": {"num_samples": 2, "max_prompts": 12, "null_test": False, "adapter_root": MOUNT},
            "promotion": {
                "name": "mine", "min_win_rate": 0.0, "endpoint": None, "api_key": "env:PLANTED_VLLM_KEY",
                "adapter_root": MOUNT,
            },
        }  # fmt: skip


@dataclass
class Side:
    """One workspace with endpoints of its own."""

    world: World
    folder: Path
    workspace: str
    adapter: str
    mounted: str

    def __post_init__(self) -> None:
        keys, base = self.world.keys, str(self.world.folder / "base")
        common = {"mounts": {MOUNT: self.mounted}, "latency_ms": 10, "base": base}
        self.endpoints = {
            name: FakeOpenAI({**common, "key": key}, self.folder / name)
            for name, key in (("sampler", keys.sampler), ("judge", keys.judge))
        }

    def __enter__(self) -> "Side":
        for endpoint in self.endpoints.values():
            endpoint.start()
        return self

    def __exit__(self, *_: object) -> None:
        for endpoint in self.endpoints.values():
            endpoint.stop()

    @property
    def log(self) -> Path:
        return self.folder / "flow.log"

    @property
    def scratch(self) -> Path:
        folder = self.folder / "scratch"
        folder.mkdir(exist_ok=True)
        return folder

    def trainer_logs(self) -> str:
        """What the trainers printed: next to a local workspace's artifacts, and for a bucket on this machine."""
        logs = [*self.scratch.glob("preflow-worker-*.log"), *Path(self.mounted).glob("training/*/train.log")]
        return "".join(log.read_text() for log in logs)

    def start(self) -> ForkServerProcess:
        urls = {name: endpoint.url for name, endpoint in self.endpoints.items()}
        names = ("STORAGE_EMULATOR_HOST", "OMP_NUM_THREADS")
        environment = {name: os.environ[name] for name in names if name in os.environ}
        order = {
            "config": self.world.config(self.workspace, self.adapter, urls), "log": str(self.log),
            "api": self.world.api, "home": os.environ["PREFECT_HOME"],
            "environment": {**environment, **self.world.keys.environment(), "TMPDIR": str(self.scratch)},
        }  # fmt: skip
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["flows.pipeline"])
        process = context.Process(target=run_pipeline, args=(order,))
        process.start()
        return process

    def run_to_the_end(self) -> None:
        process = self.start()
        process.join(400)
        assert process.exitcode == 0, self.log.read_text()[-5000:]

    def kill_once(self, condition: Callable[["Side"], bool]) -> None:
        """Start the pipeline, and kill -9 it and its trainer as soon as `condition` holds."""
        process = self.start()
        assert process.pid is not None
        while process.is_alive() and not condition(self):
            time.sleep(0.01)
        assert process.is_alive(), f"it ended before the kill:\n{self.log.read_text()[-5000:]}"
        for pid in (process.pid, *children_of(process.pid)):
            os.kill(pid, signal.SIGKILL)
        process.join()

    def asked(self, endpoint: str) -> int:
        return len(self.endpoints[endpoint].requests())


def children_of(parent: int) -> list[int]:
    """Return the processes that a process has started."""
    return [int(pid) for task in Path(f"/proc/{parent}/task").iterdir()
            for pid in (task / "children").read_text().split()]  # fmt: skip


class Reader(threading.Thread):
    """Polls the bucket past its faults and holds every manifest and COMMITTED.json that it sees against the objects."""

    def __init__(self, gcs: FakeGcs) -> None:
        super().__init__(daemon=True)
        self._gcs, self._ended = gcs, threading.Event()
        self.looks, self.checked, self.problems = 0, set[str](), list[str]()

    def run(self) -> None:
        while not self._ended.is_set():
            self.look()
            self._ended.wait(0.2)

    def look(self) -> None:
        self.looks += 1
        # Newest first: what a marker refers to must be there before the marker is.
        markers = self._gcs.objects("ws/", lambda name: name.endswith((COMMITTED, "manifest.json", "CURRENT.json")))
        sizes = self._gcs.sizes("ws/")
        for name, content in markers.items():
            if name in sizes:  # otherwise it was pruned meanwhile, marker first
                self._check(name, json.loads(content), sizes)

    def _check(self, name: str, marker: dict[str, Any], sizes: dict[str, int]) -> None:
        folder = name.rpartition("/")[0]
        self.checked.add(name.rpartition("/")[2])
        files = {f"{folder}/{file}": facts["size"] for file, facts in marker.get("files", {}).items()}
        if artifact := marker.get("artifact"):
            uri = artifact["uri"].removeprefix(f"gs://{BUCKET}/")
            if artifact["kind"] == "adapter":  # a folder, with a marker of its own that names its files
                assert f"{uri}/{COMMITTED}" in sizes
            else:
                files[uri] = artifact["size"]
        if current := marker.get("current"):
            assert f"{current['uri'].removeprefix(f'gs://{BUCKET}/')}/{COMMITTED}" in sizes
        self.problems += [f"{name} names {file}" for file, size in files.items() if sizes.get(file) != size]

    def end(self) -> None:
        self._ended.set()
        self.join()


@dataclass
class Runs:
    """Both runs, ended: everything that they left."""

    world: World
    local: dict[str, bytes]
    bucket: dict[str, bytes]
    sides: tuple[Side, Side]
    requests: list[dict[str, Any]]
    reader: Reader


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, prefect_server: str) -> World:
    folder = tmp_path_factory.mktemp("world")
    build_adapter(folder / "sft", build_base(folder / "base"))
    write_prompts(folder, 40)
    world = World(folder, prefect_server, Keys())
    Secret(value=world.keys.sampler).save("planted-sampler-key", overwrite=True, _sync=True)  # type: ignore[call-arg]
    return world


@pytest.fixture(scope="module")
def runs(world: World) -> Iterator[Runs]:
    with FakeGcs(FAULTY, world.folder / "gcs") as gcs:
        yield make_runs(world, gcs)


def make_runs(world: World, gcs: FakeGcs) -> Runs:
    for file in (world.folder / "sft").iterdir():
        url = f"{gcs.healthy}/upload/storage/v1/b/{BUCKET}/o"
        params = {"uploadType": "media", "name": f"sft/{file.name}"}
        httpx.post(url, params=params, content=file.read_bytes()).raise_for_status()
    place = world.folder / "workspace"
    local = Side(world, world.folder / "local", str(place), str(world.folder / "sft"), str(place))
    mounted = f"{gcs.healthy}/storage/v1/b/{BUCKET}/o/ws"
    bucket = Side(world, world.folder / "bucket", f"gs://{BUCKET}/ws", f"gs://{BUCKET}/sft", mounted)
    reader = Reader(gcs)
    with local, bucket:
        uninterrupted = local.start()
        reader.start()
        bucket.kill_once(lambda side: side.asked("sampler") >= 15)
        bucket.kill_once(lambda side: side.asked("judge") >= 30)
        bucket.kill_once(lambda _: any("checkpoints/step-000002/COMMITTED" in name for name in gcs.sizes("ws/")))
        bucket.run_to_the_end()
        reader.end()
        reader.look()
        uninterrupted.join(400)
        assert uninterrupted.exitcode == 0, local.log.read_text()[-5000:]
    files = {str(path.relative_to(place)): path.read_bytes() for path in place.rglob("*") if path.is_file()}
    objects = {name.removeprefix("ws/"): content for name, content in gcs.objects("ws/").items()}
    return Runs(world, files, objects, (local, bucket), gcs.requests(), reader)


def same(files: dict[str, bytes]) -> dict[str, bytes]:
    return {
        name: content
        for name, content in files.items()
        if name.rpartition("/")[2] in SAME and "/checkpoints/" not in name
    }


def test_killed_on_a_faulty_bucket_it_ends_in_the_bytes_of_a_folder(runs: Runs) -> None:
    expected, found = same(runs.local), same(runs.bucket)
    assert {name.rpartition("/")[2] for name in expected} == set(SAME)
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
    pointers = [json.loads(files["adapters/mine/CURRENT.json"]) for files in (runs.local, runs.bucket)]
    assert pointers[0]["current"]["adapter_sha256"] == pointers[1]["current"]["adapter_sha256"]


def test_every_fault_was_met_and_the_trainer_resumed(runs: Runs) -> None:
    assert {row["fault"] for row in runs.requests} >= set(FAULTS)
    local, bucket = runs.sides
    assert "resuming from the checkpoint of step 2" in bucket.trainer_logs()
    asked = [local.asked("judge"), bucket.asked("judge")]
    assert asked[0] <= asked[1] <= asked[0] + 4 + 40, f"{asked}: judged again, though it was paid for"


def test_a_reader_meanwhile_saw_only_whole_things(runs: Runs) -> None:
    assert runs.reader.looks > 20
    assert runs.reader.checked == {COMMITTED, "manifest.json", "CURRENT.json"}
    assert runs.reader.problems == []


def test_no_secret_lies_in_either_workspace(runs: Runs) -> None:
    for files in (runs.local, runs.bucket):
        assert len(files) > 40
        assert {name: found for name, content in files.items() if (found := runs.world.keys.found_in(content))} == {}


def test_no_secret_is_in_the_servers_database(runs: Runs) -> None:
    wait_for_logs()
    rows = list(database_values(Path(os.environ["PREFECT_HOME"])))
    tables = {table for table, _ in rows}
    assert {"flow_run", "task_run", "log", "artifact", "events", "block_document"} <= tables
    assert any(b"PLANTED_JUDGE_KEY" in value for table, value in rows if table == "flow_run"), "the parameters"
    assert any(b"win rate" in value for table, value in rows if table == "log"), "the flow's own log lines"
    # The Secret block too: Prefect encrypts it.
    assert {table for table, value in rows if runs.world.keys.found_in(value)} == set()


def wait_for_logs() -> None:
    """Wait until the server has written the log lines that the flows sent it last."""
    before = -1
    while (now := sum(table == "log" for table, _ in database_values(Path(os.environ["PREFECT_HOME"])))) != before:
        before = now
        time.sleep(2)


def database_values(home: Path) -> Iterator[tuple[str, bytes]]:
    """Yield table and content of every value in the server's database."""
    database = sqlite3.connect(f"file:{home / 'prefect.db'}?mode=ro", uri=True)
    tables = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    for table in tables:
        for row in database.execute(f'SELECT * FROM "{table}"'):
            for value in row:
                yield table, value if isinstance(value, bytes) else str(value).encode()
    database.close()


def test_no_secret_is_printed(runs: Runs) -> None:
    logs = [side.log.read_bytes() for side in runs.sides] + [side.trainer_logs().encode() for side in runs.sides]
    logs += [path.read_bytes() for path in Path(os.environ["PREFECT_HOME"]).parent.rglob("*.log")]
    assert len(logs) > 4
    assert all(len(log) > 200 for log in logs)
    assert [runs.world.keys.found_in(log) for log in logs] == [[]] * len(logs)


@pytest.mark.parametrize("wrong", ["sampler", "judge"])
def test_a_wrong_key_is_refused_without_being_shown(wrong: str, world: World, tmp_path: Path) -> None:
    """The endpoint itself repeats the key that it was given in its answer."""
    given = Keys()
    place = tmp_path / "workspace"
    side = Side(world, tmp_path / "side", str(place), str(world.folder / "sft"), str(place))
    world_with_wrong = World(world.folder, world.api, Keys(sampler=world.keys.sampler, judge=world.keys.judge))
    if wrong == "judge":
        world_with_wrong.keys.judge = given.judge
    else:
        Secret(value=given.sampler).save("planted-sampler-key", overwrite=True, _sync=True)  # type: ignore[call-arg]
    with side:
        side.world = world_with_wrong
        process = side.start()
        process.join(300)
    try:
        assert process.exitcode == 1
        log = side.log.read_bytes()
        assert b"API key provided: ***" in log
        assert given.found_in(log) == []
        wait_for_logs()
        values = database_values(Path(os.environ["PREFECT_HOME"]))
        assert [table for table, value in values if given.found_in(value)] == []
    finally:
        Secret(value=world.keys.sampler).save("planted-sampler-key", overwrite=True, _sync=True)  # type: ignore[call-arg]
        shutil.rmtree(place, ignore_errors=True)
