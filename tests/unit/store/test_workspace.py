"""The workspace: files are whole or absent, and what is damaged is noticed."""

import errno
import hashlib
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tasks.errors import PreflowError
from tasks.store import local
from tasks.store.local import LocalStorage
from tasks.store.workspace import (
    AdapterRef,
    CompletionsRef,
    FileFacts,
    Manifest,
    Origin,
    Workspace,
    folder_digest,
    server_path,
)


@pytest.fixture
def store(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "ws")


def write_rows(store: Workspace, name: str, rows: list[Any]) -> CompletionsRef:
    with store.writing(store.uri(name)) as out:
        for row in rows:
            out.write_row(row)
    return CompletionsRef(uri=store.uri(name), **out.facts())


def make_adapter(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    (folder / "adapter_config.json").write_text('{"r": 8}')
    return folder


# ---- digests


def test_an_adapter_s_digest_is_of_weights_and_configuration_only_and_pickled_weights_are_none(tmp_path: Path) -> None:
    first, second = make_adapter(tmp_path / "a"), make_adapter(tmp_path / "elsewhere" / "b")
    (second / "README.md").write_text("something else")
    assert folder_digest(str(first)) == folder_digest(str(second))
    (second / "adapter_config.json").write_text('{"r": 16}')
    assert folder_digest(str(first)) != folder_digest(str(second))
    (tmp_path / "adapter_model.bin").write_bytes(b"pickle")
    for folder, found in ((tmp_path, "adapter_model.bin"), (tmp_path / "missing", "nothing")):
        with pytest.raises(PreflowError, match=rf"no .safetensors weights \(found: {found}\)"):
            folder_digest(str(folder))


@pytest.mark.parametrize("seconds", [5.0, -1.0])
def test_a_settled_file_is_read_once_for_its_digest_and_one_just_written_each_time(
    seconds: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time of a file that was just written may be that of the content before."""
    read: list[str] = []
    opened = LocalStorage.open
    monkeypatch.setattr(LocalStorage, "open", lambda self, uri: read.append(uri) or opened(self, uri))
    monkeypatch.setattr(local, "SETTLED_SECONDS", seconds)
    base = make_adapter(tmp_path / "base")
    first, weights = folder_digest(str(base)), base / "adapter_model.safetensors"
    assert folder_digest(str(base)) == first
    assert len(read) == (2 if seconds < 0 else 4)
    at = weights.stat()
    weights.write_bytes(weights.read_bytes()[::-1])
    os.utime(weights, ns=(1, 1) if seconds < 0 else (at.st_atime_ns, at.st_mtime_ns))
    assert folder_digest(str(base)) != first


# ---- whole or absent


def test_a_write_that_fails_or_is_killed_leaves_what_was_there(store: Workspace) -> None:
    uri, script = store.uri("file"), (
        "import os, signal, sys; from tasks.store.workspace import Workspace\n"
        "with Workspace(sys.argv[1]).writing(sys.argv[2]) as out:\n"
        "    out.write(b'x' * 3_000_000)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )  # fmt: skip
    store.write_bytes(uri, b"old")
    with suppress(RuntimeError), store.writing(uri) as out:
        out.write(b"new, but")
        raise RuntimeError("half way")
    assert os.listdir(store.root) == ["file"]
    ended = subprocess.run([sys.executable, "-c", script, store.root, uri], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert store.read_bytes(uri) == b"old"
    assert store.list(store.root) == [uri], "what was not finished was taken for a file"


def test_a_full_disk_damages_nothing(store: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    store.write_bytes(store.uri("file"), b"old")

    def fail(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        store.write_bytes(store.uri("file"), b"new")
    assert store.read_bytes(store.uri("file")) == b"old"
    with pytest.raises(PreflowError, match=rf"{store.root}: cannot be written .*No space left.*nothing was spent"):
        store.check_writable()


def test_a_workspace_is_tried_and_keeps_no_trace_of_it(store: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    read, others = Workspace.read_bytes, [Workspace(store.root)]  # of a pod whose process has the same id

    def read_after_another(self: Workspace, uri: str) -> bytes:
        while others:
            others.pop().check_writable()
        return read(self, uri)

    monkeypatch.setattr(Workspace, "read_bytes", read_after_another)
    store.check_writable()
    assert store.list(store.root) + store.list(store.uri("cache")) == []
    store.write_bytes(store.uri("file"), b"")
    with pytest.raises(PreflowError, match="cannot be written"):
        Workspace(store.uri("file", "workspace")).check_writable()


@pytest.mark.parametrize("root", ["s3://bucket/x", "http://host/x", "gs://", "gs:///x", "gs://block@/x"])
def test_other_schemes_and_no_bucket_are_no_workspace(root: str) -> None:
    with pytest.raises(PreflowError, match=rf"workspace '{root}': only a local folder or gs://"):
        Workspace(root)


# ---- reading


def test_rows_lines_and_ranges_are_read_as_they_were_written(store: Workspace) -> None:
    artifact = write_rows(store, "rows.jsonl", [{"a": "é"}, {"a": "line\nbreak"}])
    content = store.read_bytes(artifact.uri)
    assert (artifact.size, artifact.rows) == (len(content), 2)
    assert artifact.sha256 == hashlib.sha256(content).hexdigest()
    uri = store.uri("f")
    store.write_bytes(uri, b"one\ntwo\nthree\nfour")
    assert list(store.lines(uri)) == [b"one\n", b"two\n", b"three\n", b"four"]
    assert list(store.lines(uri, 4, 14)) == [b"two\n", b"three\n"]
    parts = ((0, 4), (8, 14), (14, 99), (99, 100), (4, 4))
    assert [store.read_bytes(uri, *part) for part in parts] == [b"one\n", b"three\n", b"four", b"", b""]


def finished(store: Workspace, **files: FileFacts) -> CompletionsRef:
    written = write_rows(store, "out/rows.jsonl", [{"a": 1}])
    artifact = written.model_copy(update={"manifest": store.uri("out", "manifest.json")})
    files["rows.jsonl"] = FileFacts(size=artifact.size, sha256=artifact.sha256)
    store.write_manifest(Manifest(artifact=artifact, stage="generation", version=1, key="k", files=files))
    return artifact


def is_found(store: Workspace) -> bool:
    return store.find_finished(store.uri("out", "manifest.json"), CompletionsRef) is not None


@pytest.mark.parametrize("content", [b'{"a": 3}\n', b'{"a"', b"", None])
@pytest.mark.parametrize("name", ["rows.jsonl", "val.jsonl"])
def test_an_artifact_is_finished_only_while_all_its_files_are_whole(
    store: Workspace, name: str, content: bytes | None
) -> None:
    assert not is_found(store)
    with store.writing(store.uri("out", "val.jsonl")) as val:
        val.write_row({"b": 1})
    artifact = finished(store, **{"val.jsonl": val.file})
    assert store.find_finished(str(artifact.manifest), CompletionsRef) == artifact
    alone = artifact.model_copy(update={"manifest": None})
    assert store.is_intact(artifact)
    assert store.is_intact(alone)
    store.delete(store.uri("out", name))
    if content is not None:
        store.write_bytes(store.uri("out", name), content)
    assert not is_found(store)
    assert not store.is_intact(artifact)
    assert store.is_intact(alone) == (name != "rows.jsonl")


def test_what_was_copied_elsewhere_is_found_there(store: Workspace, tmp_path: Path) -> None:
    artifact, folder = finished(store), store.uri("in")
    inside = Origin(kind="prompts", sha256="a", uri=f"{folder}/p.jsonl", manifest=f"{folder}/manifest.json")
    outside = Origin(kind="prompts", sha256="b", uri=str(tmp_path / "p.jsonl"))
    store.write_manifest(store.read_manifest(artifact).model_copy(update={"upstream": (inside, outside)}))
    shutil.move(store.root, tmp_path / "moved" / "ws")
    there = Workspace(tmp_path / "moved" / "ws")
    found = there.find_manifest(there.uri("out", "manifest.json"))
    assert found is not None
    files = [(made.uri, made.manifest) for made in (found.artifact, found.upstream[0])]
    assert files == [(there.uri(*names), there.uri(names[0], "manifest.json"))
                     for names in (("out", "rows.jsonl"), ("in", "p.jsonl"))]  # fmt: skip
    assert found.upstream[1] == outside
    assert there.is_intact(found.artifact)


@pytest.mark.parametrize("content", ["", "{", "[]", '"text"', "{}", '{"artifact": 3}', '{"artifact": {"kind": "x"}}'])
def test_a_damaged_manifest_means_that_nothing_is_finished(store: Workspace, content: str) -> None:
    Path(str(finished(store).manifest)).write_text(content)
    assert not is_found(store)


# ---- committed folders


def test_a_folder_counts_once_it_is_committed_and_only_while_it_is_whole(store: Workspace, tmp_path: Path) -> None:
    target = store.uri("adapters", "a")
    with pytest.raises(PreflowError, match=r"has no COMMITTED.json"):
        store.verify_folder(target)
    sha256 = store.commit_folder(make_adapter(tmp_path / "source"), target, {"step": 3})
    assert store.read_json(f"{target}/COMMITTED.json")["step"] == 3
    files = {f"a/{name}": facts for name, facts in store.verify_folder(target).items()}
    assert files["a/COMMITTED.json"].sha256 == sha256
    assert files["a/adapter_config.json"].size == 8
    manifest = store.uri("adapters", "manifest.json")
    adapter = AdapterRef(uri=target, sha256=sha256, size=0, rows=0, manifest=manifest)
    store.write_manifest(Manifest(artifact=adapter, stage="training", version=1, key="k", files=files))
    assert store.is_intact(adapter)
    store.write_bytes(f"{target}/adapter_model.safetensors", b"weighty")
    with pytest.raises(PreflowError, match=r"adapter_model.safetensors: damaged"):
        store.verify_folder(target)
    assert not store.is_intact(adapter)
    store.delete(f"{target}/adapter_model.safetensors")
    with pytest.raises(PreflowError, match=r"adapter_model.safetensors: missing"):
        store.verify_folder(target)
    store.write_bytes(f"{target}/COMMITTED.json", b'{"files": [1]}')
    with pytest.raises(PreflowError, match=r"COMMITTED.json: damaged"):
        store.verify_folder(target)


def test_the_server_sees_the_workspace_where_it_is_mounted() -> None:
    assert server_path("/ws/adapters/a", "/ws", "/mnt/bucket") == "/mnt/bucket/adapters/a"
    assert server_path("/ws/adapters/a", "/ws", None) == "/ws/adapters/a"
    for uri, root in (("gs://b/ws/a", "gs://team@b/ws"), ("gs://team@b/ws/a", "gs://b/ws")):
        assert server_path(uri, root, "/mnt") == "/mnt/a"
    with pytest.raises(PreflowError, match=r"mount the bucket there.*adapter_root"):
        server_path("gs://b/ws/adapters/a", "gs://b/ws", None)
