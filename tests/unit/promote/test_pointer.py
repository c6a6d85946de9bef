"""The gate and the pointer: what did not win is refused, and what was served can be found again."""

import math
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from tasks.config import PromotionConfig
from tasks.errors import PreflowError
from tasks.promote import pointer as served
from tasks.promote.pointer import (
    PromotionRefused,
    check_gate,
    find_promotion,
    find_rollback,
    install_adapter,
    move_pointer,
    read_pointer,
)
from tasks.promote.vllm import ProbeFailed, check_probe, read_probe
from tasks.store.measures import Probe, ProbeText
from tasks.store.workspace import AdapterRef, EvaluationRef, Workspace

PROMOTION = PromotionConfig(name="mine", endpoint=None)


BY_LENGTH = {"win_rate": 0.5, "lower": 0.47, "upper": 0.53}
UNEVEN = {"win_rate": 0.61, "lower": 0.57, "upper": 0.65, "confidence": 0.99}


def adapter(folder: Path, content: str) -> AdapterRef:
    local = folder / "made"
    local.mkdir(parents=True, exist_ok=True)
    (local / "adapter_model.safetensors").write_text(content)
    (local / "adapter_config.json").write_text("{}")
    uri = str(folder / "workspace" / "training" / content / "adapter")
    sha256 = Workspace(folder / "workspace").commit_folder(local, uri)
    return AdapterRef(uri=uri, sha256=sha256, size=len(content), rows=1)


def evaluation(of: AdapterRef, lower: float = 0.6, **found: Any) -> EvaluationRef:
    uri, rate = f"{of.uri}/../win_rate.json", {"win_rate": 0.6, "lower": lower, "upper": 0.7}
    Workspace.holding(uri).write_json(uri, {**rate, **found})
    return EvaluationRef(uri=uri, sha256="0" * 64, size=1, rows=800, adapter_sha256=of.sha256, **rate)


@pytest.mark.parametrize(
    ("lower", "found", "refused"),
    [
        (0.51, {}, None),
        (0.5, {}, r"60\.0 % \(50\.0-70\.0 %\).*What was served before is still served"),
        (math.nan, {}, "not as this version writes it"),
        (0.58, {"length_controlled": {**BY_LENGTH, "lower": math.nan}}, "not as this version writes it"),
        (0.57, {"length_controlled": BY_LENGTH}, "with length taken out"),
        (0.58, {"null": UNEVEN}, r"two draws of the SFT adapter come out at 61\.0 %.*99 %"),
        (0.58, {"null": BY_LENGTH, "length_controlled": {**BY_LENGTH, "lower": 0.51}}, None),
        (0.58, {"samples": 80, "sft_silent": 17}, r"the SFT adapter wrote nothing in 17 of 80.*chat template"),
        (0.58, {"samples": 80, "sft_silent": 16}, None),
        (0.9, {"adapter_sha256": "f" * 64}, "is of adapter ffffffffffff, not of"),
    ],
)
def test_both_lower_bounds_must_be_over_the_bar_and_the_null_test_must_hold(
    tmp_path: Path, lower: float, found: dict[str, Any], refused: str | None
) -> None:
    new = adapter(tmp_path, "new")
    with pytest.raises(PromotionRefused, match=refused) if refused else nullcontext():
        check_gate(new, evaluation(new, lower, **found), bar=0.5)


def test_the_gate_reads_what_was_found_not_what_the_reference_says(tmp_path: Path) -> None:
    new, other = adapter(tmp_path, "new"), adapter(tmp_path, "other")
    with pytest.raises(PromotionRefused, match=other.sha256[:12]):
        check_gate(new, evaluation(other, lower=0.9), bar=0.5)
    claimed = evaluation(new, lower=0.4).model_copy(update={"lower": 0.9})
    with pytest.raises(PromotionRefused, match=r"40\.0-70\.0 %"):
        check_gate(new, claimed, bar=0.5)
    Path(claimed.uri).unlink()
    with pytest.raises(PromotionRefused, match=r"win_rate\.json: not there.*run evaluate-adapter again"):
        check_gate(new, claimed, bar=0.5)


def promoted(folder: Path, *contents: str) -> list[AdapterRef]:
    """Promote one adapter after the other, without a server."""
    workspace, made = str(folder / "workspace"), [adapter(folder, content) for content in contents]
    for new in made:
        move_pointer(new, evaluation(new), install_adapter(new, workspace, "mine"), workspace, PROMOTION)
    return made


def test_the_pointer_moves_once_and_remembers(tmp_path: Path) -> None:
    workspace = str(tmp_path / "workspace")
    first, second = promoted(tmp_path, "first", "second")
    again = move_pointer(second, evaluation(second), "uri", workspace, PROMOTION)
    pointer = read_pointer(workspace, "mine")
    assert [old.adapter_sha256 for old in (pointer.current, *pointer.history)] == [second.sha256, first.sha256]
    assert Path(pointer.current.uri, "adapter_model.safetensors").read_text() == "second"
    assert find_promotion(second, workspace, PROMOTION) == again
    assert find_promotion(first, workspace, PROMOTION) is None


def test_only_a_whole_adapter_is_installed_and_a_damaged_copy_is_noticed(tmp_path: Path) -> None:
    workspace, new = str(tmp_path / "workspace"), adapter(tmp_path, "new")
    uri = install_adapter(new, workspace, "mine")
    Path(uri, "adapter_model.safetensors").write_text("bad")
    with pytest.raises(PreflowError, match=r"adapter_model\.safetensors: damaged"):
        install_adapter(new, workspace, "mine")
    with pytest.raises(PreflowError, match=rf"holds adapter {new.sha256[:12]}, not 000000000000, which won"):
        install_adapter(new.model_copy(update={"sha256": "0" * 64}), workspace, "another")
    Path(new.uri, "COMMITTED.json").unlink()
    with pytest.raises(PreflowError, match="never finished"):
        install_adapter(new, workspace, "another")
    assert not (tmp_path / "workspace" / "adapters" / "another").exists()


@pytest.mark.parametrize("content", ['{"name": "min', '{"name": "mine"}'])
def test_a_damaged_pointer_is_named(tmp_path: Path, content: str) -> None:
    pointer = tmp_path / "workspace" / "adapters" / "mine" / "CURRENT.json"
    pointer.parent.mkdir(parents=True)
    pointer.write_text(content)
    with pytest.raises(PreflowError, match=r"CURRENT\.json: damaged.*delete it"):
        promoted(tmp_path, "new")
    pointer.unlink()
    promoted(tmp_path, "new")


def roll_back(folder: Path, to: str | None = None) -> str:
    workspace = str(folder / "workspace")
    entry = served.choose_rollback(workspace, "mine", to)
    return served.roll_back_pointer(entry, workspace, "mine").adapter_sha256


def test_rollbacks_go_further_and_further_back(tmp_path: Path) -> None:
    """What was rolled back is not gone back to by itself: that would put the bad one in service again."""
    first, second, third = promoted(tmp_path, "first", "second", "third")
    assert roll_back(tmp_path) == second.sha256
    assert roll_back(tmp_path) == first.sha256
    with pytest.raises(PreflowError, match=f"no earlier adapter to roll back to.*{second.sha256[:12]}"):
        roll_back(tmp_path)
    assert roll_back(tmp_path, third.sha256[:8]) == third.sha256


def test_two_rollbacks_at_once_and_one_that_is_run_again_go_back_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = str(tmp_path / "workspace")
    first, second, _ = promoted(tmp_path, "first", "second", "third")
    entries = [served.choose_rollback(workspace, "mine", None) for _ in range(2)]
    assert [served.roll_back_pointer(one, workspace, "mine").rows for one in entries] == [4, 4]
    monkeypatch.setenv("PREFECT__RUNTIME__FLOW_RUN__ID", "one")
    assert roll_back(tmp_path) == roll_back(tmp_path) == first.sha256, "killed after the pointer, and executed again"
    monkeypatch.setenv("PREFECT__RUNTIME__FLOW_RUN__ID", "two")
    with pytest.raises(PreflowError, match=f"no earlier adapter.*{second.sha256[:12]}"):
        roll_back(tmp_path)


async def test_a_server_that_is_away_after_the_pointer_moved_is_named_with_the_remedy(tmp_path: Path) -> None:
    promoted(tmp_path, "new")
    away = PROMOTION.model_copy(update={"endpoint": "http://127.0.0.1:9/v1"})
    with pytest.raises(PreflowError, match=r"CURRENT\.json was moved, but is not served: .*:9/v1.*reconcile-served"):
        await served.ensure_pointer_is_served(str(tmp_path / "workspace"), away)


def test_a_run_again_does_not_undo_a_rollback_and_the_history_keeps_all_with_its_times(tmp_path: Path) -> None:
    workspace = str(tmp_path / "workspace")
    first, second = promoted(tmp_path, "first", "second")
    assert find_promotion(first, workspace, PROMOTION) is None, "an older adapter that won again may be promoted"
    roll_back(tmp_path)
    assert find_promotion(second, workspace, PROMOTION) is None, "what is served is another adapter"
    assert re.match(r"it was rolled back at 20.*run promote-adapter", find_rollback(second, workspace, PROMOTION) or "")
    assert find_rollback(first, workspace, PROMOTION) is None
    move_pointer(second, evaluation(second), "uri", workspace, PROMOTION)
    assert find_promotion(second, workspace, PROMOTION) is not None
    assert find_rollback(second, workspace, PROMOTION) is None
    pointer = read_pointer(workspace, "mine")
    restored, withdrawn, original = pointer.history
    assert [entry.adapter_sha256 for entry in (pointer.current, *pointer.history)] == [
        second.sha256, first.sha256, second.sha256, first.sha256,
    ]  # fmt: skip
    assert withdrawn.rolled_back_at == restored.restored_at >= withdrawn.promoted_at
    assert (restored.restored_from, original.restored_at, pointer.current.rolled_back_at) == (second.sha256, None, None)


def test_a_rollback_to_what_is_not_there_says_what_is(tmp_path: Path) -> None:
    with pytest.raises(PreflowError, match="nothing was ever promoted as 'mine'"):
        roll_back(tmp_path)
    (only,) = promoted(tmp_path, "only")
    with pytest.raises(PreflowError, match="its history is empty"):
        roll_back(tmp_path)
    (second,) = promoted(tmp_path, "second")
    unknown = rf"no one adapter '{{}}'.*{only.sha256[:12]} \(promoted 20"
    for to, said in (
        ("f00f00f00", unknown.format("f00f00f00")),
        (only.sha256[:5], unknown.format(only.sha256[:5])),
        (second.sha256, "already"),
    ):
        with pytest.raises(PreflowError, match=said):
            roll_back(tmp_path, to)
    (tmp_path / "workspace" / "adapters" / "mine" / only.sha256[:16] / "adapter_model.safetensors").write_text("bad")
    with pytest.raises(PreflowError, match=r"adapter_model\.safetensors: damaged"):
        roll_back(tmp_path)


BASE, SFT, TRAINED = [-2.0, -3.0, -1.0], [-1.5, -2.5, -1.2], [-1.3, -2.2, -1.6]


def shifted(values: list[float], *by: float) -> list[float]:
    return [value + shift for value, shift in zip(values, by, strict=True)]


def probe(precision: str = "float32", sft: list[float] = SFT) -> Probe:
    # The positions that are asked for run from the end to the beginning.
    text = ProbeText(token_ids=[4, 5, 6, 7], adapter=TRAINED[::-1], sft=sft[::-1], base=BASE[::-1])
    return Probe(base_precision=precision, texts=[text])


def test_the_probe_lies_next_to_the_installed_adapter(tmp_path: Path) -> None:
    new = adapter(tmp_path, "new")
    uri = install_adapter(new, str(tmp_path / "workspace"), "mine")
    assert read_probe(uri) is None
    Path(new.uri).parent.joinpath("probe.json").write_text(probe().model_dump_json())
    assert install_adapter(new, str(tmp_path / "workspace"), "mine") == uri
    assert read_probe(uri) == probe()
    assert Workspace(tmp_path / "workspace").sha256(f"{uri}/COMMITTED.json") == new.sha256
    Path(uri, "probe.json").write_text('{"base_precision": "float32", "texts": [{"token_ids": [1, 2]}]}')
    with pytest.raises(PreflowError, match=r"probe\.json: damaged"):
        read_probe(uri)


def test_the_adapter_itself_passes_its_probe_whatever_the_precision_of_the_base(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Four bits move base and adapter alike; only what the adapter adds is compared."""
    assert check_probe(probe(), [shifted(TRAINED, 0.01, -0.02, 0.01)], [BASE]) == pytest.approx(0.0133, abs=1e-3)
    noise = (0.4, -0.5, 0.3)
    found = check_probe(probe("nf4"), [shifted(TRAINED, *noise)], [shifted(BASE, *noise)])
    assert found == pytest.approx(0, abs=1e-9)
    assert caplog.text == ""
    hardly_moved = probe(sft=shifted(TRAINED, 0.01, 0.0, 0.0))
    assert check_probe(hardly_moved, [shifted(TRAINED, 0.02, 0.0, 0.0)], [BASE]) < 0.03
    assert "cannot tell them apart" in caplog.text


@pytest.mark.parametrize(
    ("precision", "answered", "said"),
    [
        ("float32", SFT, r"differ by more than 0\.1 nats"),
        ("float32", BASE, r"differ by more than 0\.1 nats"),
        ("nf4", SFT, "nearer to those of the sft"),
        ("float32", shifted(TRAINED, 0.3, 0.3, -0.3), r"more than 0\.1 nats"),
        ("float32", [math.nan, -2.2, -1.6], "no numbers"),
    ],
)
def test_what_is_another_adapter_or_none_fails(precision: str, answered: list[float], said: str) -> None:
    with pytest.raises(ProbeFailed, match=said):
        check_probe(probe(precision), [answered], [BASE])
    assert check_probe(probe("nf4"), [shifted(TRAINED, 0.2, 0.2, -0.2)], [BASE]) == pytest.approx(0.2)
