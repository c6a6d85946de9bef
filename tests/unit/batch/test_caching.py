"""Cache keys and records: content decides the key, and no record can run code or name what is not there."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
from prefect.results import ResultRecord, ResultRecordMetadata
from prefect.serializers import JSONSerializer, PickleSerializer, Serializer

from tasks.batch.caching import SERIALIZER, WorkspaceResults, find_finished, mark_used
from tasks.errors import PreflowError
from tasks.store.workspace import (
    CompletionsRef,
    Manifest,
    PreferencesRef,
    Reference,
    VerdictsRef,
    Workspace,
    stage_key,
)


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def make_artifact(folder: Path) -> Reference:
    store = Workspace(folder)
    with store.writing(store.uri("rows.jsonl")) as out:
        out.write_row({"a": 1})
    return Reference(kind="shard", uri=store.uri("rows.jsonl"), **out.facts())


def make_record(result: Any, serializer: Serializer = SERIALIZER) -> bytes:
    metadata = ResultRecordMetadata(storage_key="k", serializer=serializer)
    return ResultRecord(result=result, metadata=metadata).serialize()


@pytest.fixture
def results(tmp_path: Path) -> WorkspaceResults:
    return WorkspaceResults(root=str(tmp_path))


# ---- keys


def test_a_key_is_of_the_stage_its_version_and_the_content() -> None:
    key = stage_key("a", 1, settings={"x": 1, "y": 2}, rows="r")
    assert key == stage_key("a", 1, rows="r", settings={"y": 2, "x": 1})
    rows = [("b", 1, 2, "r"), ("a", 2, 2, "r"), ("a", 1, 3, "r"), ("a", 1, 2, "s")]
    others = [stage_key(stage, version, settings={"x": 1, "y": y}, rows=of) for stage, version, y, of in rows]
    assert (len({key, *others}), len(key)) == (5, 32)


# ---- records


async def test_a_record_of_ours_is_read_back(results: WorkspaceResults, tmp_path: Path) -> None:
    content = make_record(make_artifact(tmp_path).model_dump(mode="json"))
    await results.awrite_path("k", content)
    assert await results.aread_path("k") == content == (tmp_path / "cache" / "k").read_bytes()
    with pytest.raises(FileNotFoundError):
        await results.aread_path("nothing")


def hostile_records(folder: Path) -> dict[str, bytes]:
    artifact, bomb = make_artifact(folder).model_dump(mode="json"), Bomb(folder / "boom")
    by_class = {"__class__": "subprocess.Popen", "data": ["mkdir", str(folder / "boom")]}
    whole = json.loads(make_record(artifact))

    def changed(**serializer: Any) -> bytes:
        metadata = {**whole["metadata"], "serializer": {**whole["metadata"]["serializer"], **serializer}}
        return json.dumps({**whole, "metadata": metadata}).encode()

    return {
        "pickle inside": make_record(bomb, PickleSerializer()),
        "bare pickle": pickle.dumps(bomb),
        "bare cloudpickle": cloudpickle.dumps(bomb),
        "pickle of a reference": make_record(artifact, PickleSerializer()),
        "compressed pickle": changed(type="compressed/pickle"),
        "prefect's own json": make_record(artifact, JSONSerializer()),
        "object decoder": changed(object_decoder="subprocess.Popen"),
        "object encoder": changed(object_encoder="prefect.serializers.prefect_json_object_encoder"),
        "another json": changed(jsonlib="pickle"),
        "options": changed(loads_kwargs={"object_hook": "os.system"}),
        "an object for a result": make_record(by_class),
        "no reference": make_record({"answer": 42}),
        "a list": make_record([1, 2]),
        "empty": b"",
        "garbage": os.urandom(200),
        "cut": make_record(artifact)[:-30],
        "not a record": b'{"a": 1}',
        "null": b"null",
        "deep": b"[" * 100_000,
    }


def test_a_record_that_is_not_ours_is_refused_and_not_obeyed(results: WorkspaceResults, tmp_path: Path) -> None:
    records = hostile_records(tmp_path)
    for content in records.values():
        results.write_path("k", content)
        with pytest.raises(PreflowError, match="cache record k"):
            results.read_path("k")
    assert not (tmp_path / "boom").exists()
    pickle.loads(records["bare pickle"])
    assert (tmp_path / "boom").is_dir(), "the planted pickle is a live one"


@pytest.mark.parametrize("damage", [b'{"a": 2}\n', b"", None])
def test_a_record_of_a_damaged_artifact_is_not_believed(
    results: WorkspaceResults, tmp_path: Path, damage: bytes | None
) -> None:
    artifact = make_artifact(tmp_path)
    results.write_path("k", make_record(artifact.model_dump(mode="json")))
    Path(artifact.uri).unlink()
    if damage is not None:
        Path(artifact.uri).write_bytes(damage)
    with pytest.raises(PreflowError, match="is missing or differs from its digest"):
        results.read_path("k")


# ---- what is finished


def make_stage(store: Workspace, kind: str, key: str, counts: dict[str, int], *upstream: Reference) -> Reference:
    folder = store.uri(kind, key)
    with store.writing(f"{folder}/rows.jsonl") as out:
        out.write_row({"a": 1})
    kinds: dict[str, type[Reference]] = {"completions": CompletionsRef, "verdicts": VerdictsRef}
    made = kinds.get(kind, PreferencesRef)
    found = made(uri=f"{folder}/rows.jsonl", manifest=f"{folder}/manifest.json", **out.facts())
    manifest = {"artifact": found, "stage": kind, "version": 1, "key": key, "counts": counts, "upstream": upstream}
    store.write_manifest(Manifest.model_validate({**manifest, "files": {"rows.jsonl": out.file}}))
    return found


def test_a_stage_with_failures_that_may_pass_is_finished_only_when_a_training_has_begun_on_it(tmp_path: Path) -> None:
    store = Workspace(tmp_path)
    completions = make_stage(store, "completions", "c", {"failed": 3, "passing": 1})
    verdicts = make_stage(store, "verdicts", "v", {"failed j": 2, "passing j": 0, "passing k": 2}, completions)
    preferences = make_stage(store, "preferences", "p", {}, verdicts)
    final = make_stage(store, "completions", "d", {"failed": 3, "passing": 0})
    assert find_finished(store, store.uri("completions", "c"), CompletionsRef) is None
    assert find_finished(store, store.uri("verdicts", "v"), VerdictsRef) is None
    assert find_finished(store, store.uri("completions", "d"), CompletionsRef) == final
    mark_used(preferences, str(tmp_path))
    assert find_finished(store, store.uri("completions", "c"), CompletionsRef) == completions
    assert find_finished(store, store.uri("verdicts", "v"), VerdictsRef) == verdicts
