"""The gate and the pointer: what did not win is refused, and what was served can be found again."""

import json
from pathlib import Path

import pytest

from tasks.config import PromotionConfig
from tasks.errors import PreflowError
from tasks.promotion import (
    PromotionRefused,
    check_gate,
    find_promotion,
    install_adapter,
    move_pointer,
    read_pointer,
)
from tasks.storage import AdapterRef, EvaluationRef, Workspace, server_path

PROMOTION = PromotionConfig(name="mine", endpoint=None)


def adapter(folder: Path, content: str) -> AdapterRef:
    local = folder / "made"
    local.mkdir(parents=True, exist_ok=True)
    (local / "adapter_model.safetensors").write_text(content)
    (local / "adapter_config.json").write_text("{}")
    uri = str(folder / "workspace" / "training" / content / "adapter")
    sha256 = Workspace(folder / "workspace").commit_folder(local, uri)
    return AdapterRef(uri=uri, sha256=sha256, size=len(content), rows=1)


def evaluation(of: AdapterRef, lower: float) -> EvaluationRef:
    return EvaluationRef(
        uri="win_rate.json", sha256="0" * 64, size=1, rows=800, adapter_sha256=of.sha256, win_rate=0.6, lower=lower,
        upper=0.7,
    )  # fmt: skip


def test_the_lower_bound_must_be_over_the_bar(tmp_path: Path) -> None:
    new = adapter(tmp_path, "new")
    check_gate(new, evaluation(new, lower=0.51), bar=0.5)
    with pytest.raises(PromotionRefused, match=r"interval \[0\.500, 0\.700\]"):
        check_gate(new, evaluation(new, lower=0.5), bar=0.5)


def test_another_adapters_evaluation_does_not_count(tmp_path: Path) -> None:
    new, other = adapter(tmp_path, "new"), adapter(tmp_path, "other")
    with pytest.raises(PromotionRefused, match=other.sha256[:12]):
        check_gate(new, evaluation(other, lower=0.9), bar=0.5)


def test_the_pointer_moves_and_remembers(tmp_path: Path) -> None:
    workspace = str(tmp_path / "workspace")
    first, second = adapter(tmp_path, "first"), adapter(tmp_path, "second")
    for new in (first, second, second):
        uri = install_adapter(new, workspace, "mine")
        made = move_pointer(new, evaluation(new, 0.6), uri, workspace, PROMOTION)
    pointer = read_pointer(workspace, "mine")
    assert pointer is not None
    assert pointer["current"]["adapter_sha256"] == second.sha256
    assert [old["adapter_sha256"] for old in pointer["history"]] == [first.sha256]
    assert Path(pointer["current"]["uri"], "adapter_model.safetensors").read_text() == "second"
    assert find_promotion(second, workspace, PROMOTION) == made
    assert find_promotion(first, workspace, PROMOTION) is None


def test_a_damaged_copy_is_not_taken_for_the_adapter(tmp_path: Path) -> None:
    workspace = str(tmp_path / "workspace")
    new = adapter(tmp_path, "new")
    uri = install_adapter(new, workspace, "mine")
    Path(uri, "adapter_model.safetensors").write_text("bad")
    with pytest.raises(PreflowError, match=r"adapter_model\.safetensors: damaged"):
        install_adapter(new, workspace, "mine")


def test_a_part_made_adapter_is_not_installed(tmp_path: Path) -> None:
    new = adapter(tmp_path, "new")
    Path(new.uri, "COMMITTED.json").unlink()
    with pytest.raises(PreflowError, match="never finished"):
        install_adapter(new, str(tmp_path / "workspace"), "mine")
    assert not (tmp_path / "workspace" / "adapters").exists()


def test_the_servers_path_of_an_adapter(tmp_path: Path) -> None:
    uri = str(tmp_path / "workspace" / "adapters" / "mine" / "abc")
    assert server_path(uri, str(tmp_path / "workspace"), None) == uri
    assert server_path(uri, str(tmp_path / "workspace"), "/mnt/ws") == "/mnt/ws/adapters/mine/abc"
    with pytest.raises(PreflowError, match="adapter_root"):
        server_path("gs://bucket/ws/adapters/mine/abc", "gs://bucket/ws", None)


def test_a_pointer_that_is_not_json_is_named(tmp_path: Path) -> None:
    pointer = tmp_path / "workspace" / "adapters" / "mine" / "CURRENT.json"
    pointer.parent.mkdir(parents=True)
    pointer.write_text(json.dumps({"name": "mine"})[:-3])
    with pytest.raises(PreflowError, match=r"CURRENT\.json: damaged"):
        read_pointer(str(tmp_path / "workspace"), "mine")
