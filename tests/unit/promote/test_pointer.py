"""The gate and the pointer: what did not win is refused, and what was served can be found again."""

import math
import re
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


def adapter(folder: Path, content: str) -> AdapterRef:
    local = folder / "made"
    local.mkdir(parents=True, exist_ok=True)
    (local / "adapter_model.safetensors").write_text(content)
    (local / "adapter_config.json").write_text("{}")
    uri = str(folder / "workspace" / "training" / content / "adapter")
    sha256 = Workspace(folder / "workspace").commit_folder(local, uri)
    return AdapterRef(uri=uri, sha256=sha256, size=len(content), rows=1)


def evaluation(of: AdapterRef, lower: float, **found: Any) -> EvaluationRef:
    uri, rate = f"{of.uri}/../win_rate.json", {"win_rate": 0.6, "lower": lower, "upper": 0.7}
    Workspace.holding(uri).write_json(uri, {**rate, **found})
    return EvaluationRef(uri=uri, sha256="0" * 64, size=1, rows=800, adapter_sha256=of.sha256, **rate)


def test_the_lower_bound_must_be_over_the_bar(tmp_path: Path) -> None:
    new = adapter(tmp_path, "new")
    check_gate(new, evaluation(new, lower=0.51), bar=0.5)
    with pytest.raises(PromotionRefused, match=r"60\.0 % \(50\.0-70\.0 %\).*What was served before is still served"):
        check_gate(new, evaluation(new, lower=0.5), bar=0.5)


def test_a_win_by_length_alone_and_a_null_test_that_fails_are_refused(tmp_path: Path) -> None:
    new, even = adapter(tmp_path, "new"), {"win_rate": 0.5, "lower": 0.47, "upper": 0.53}
    with pytest.raises(PromotionRefused, match="with length taken out"):
        check_gate(new, evaluation(new, lower=0.57, length_controlled=even), bar=0.5)
    uneven = {"win_rate": 0.61, "lower": 0.57, "upper": 0.65, "confidence": 0.99}
    with pytest.raises(PromotionRefused, match=r"two draws of the SFT adapter come out at 61\.0 %.*99 %"):
        check_gate(new, evaluation(new, lower=0.58, null=uneven), bar=0.5)
    check_gate(new, evaluation(new, lower=0.58, null=even, length_controlled={**even, "lower": 0.51}), bar=0.5)


def test_the_gate_reads_what_was_found_not_what_the_reference_says(tmp_path: Path) -> None:
    new, other = adapter(tmp_path, "new"), adapter(tmp_path, "other")
    with pytest.raises(PromotionRefused, match=other.sha256[:12]):
        check_gate(new, evaluation(other, lower=0.9), bar=0.5)
    with pytest.raises(PromotionRefused, match=rf"is of adapter {other.sha256[:12]}, not of {new.sha256[:12]}"):
        check_gate(new, evaluation(new, lower=0.9, adapter_sha256=other.sha256), bar=0.5)
    claimed = evaluation(new, lower=0.4).model_copy(update={"lower": 0.9})
    with pytest.raises(PromotionRefused, match=r"40\.0-70\.0 %"):
        check_gate(new, claimed, bar=0.5)
    Path(claimed.uri).unlink()
    with pytest.raises(PromotionRefused, match=r"win_rate\.json: not there.*run evaluate-adapter again"):
        check_gate(new, claimed, bar=0.5)


def test_the_pointer_moves_and_remembers(tmp_path: Path) -> None:
    workspace = str(tmp_path / "workspace")
    first, second = adapter(tmp_path, "first"), adapter(tmp_path, "second")
    for new in (first, second, second):
        uri = install_adapter(new, workspace, "mine")
        made = move_pointer(new, evaluation(new, 0.6), uri, workspace, PROMOTION)
    pointer = read_pointer(workspace, "mine")
    assert pointer is not None
    assert pointer.current.adapter_sha256 == second.sha256
    assert [old.adapter_sha256 for old in pointer.history] == [first.sha256]
    assert Path(pointer.current.uri, "adapter_model.safetensors").read_text() == "second"
    assert find_promotion(second, workspace, PROMOTION) == made
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


def test_a_damaged_pointer_is_named(tmp_path: Path) -> None:
    pointer = tmp_path / "workspace" / "adapters" / "mine" / "CURRENT.json"
    pointer.parent.mkdir(parents=True)
    for content in ('{"name": "min', '{"name": "mine"}'):
        pointer.write_text(content)
        with pytest.raises(PreflowError, match=r"CURRENT\.json: damaged"):
            read_pointer(str(tmp_path / "workspace"), "mine")


def promoted(folder: Path, *contents: str) -> list[AdapterRef]:
    """Promote one adapter after the other, without a server."""
    workspace, made = str(folder / "workspace"), [adapter(folder, content) for content in contents]
    for new in made:
        move_pointer(new, evaluation(new, 0.6), install_adapter(new, workspace, "mine"), workspace, PROMOTION)
    return made


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


def test_the_history_keeps_everything_with_its_times(tmp_path: Path) -> None:
    first, second = promoted(tmp_path, "first", "second")
    roll_back(tmp_path)
    move_pointer(second, evaluation(second, 0.6), "uri", str(tmp_path / "workspace"), PROMOTION)
    pointer = read_pointer(str(tmp_path / "workspace"), "mine")
    assert pointer is not None
    assert [entry.adapter_sha256 for entry in (pointer.current, *pointer.history)] == [
        second.sha256, first.sha256, second.sha256, first.sha256,
    ]  # fmt: skip
    restored, withdrawn, original = pointer.history
    assert withdrawn.rolled_back_at == restored.restored_at >= withdrawn.promoted_at
    assert restored.restored_from == second.sha256
    assert original.restored_at is None
    assert pointer.current.rolled_back_at is None


def test_a_pipeline_that_runs_again_does_not_undo_a_rollback(tmp_path: Path) -> None:
    workspace = str(tmp_path / "workspace")
    first, second = promoted(tmp_path, "first", "second")
    assert find_promotion(first, workspace, PROMOTION) is None, "an older adapter that won again may be promoted"
    roll_back(tmp_path)
    assert find_promotion(second, workspace, PROMOTION) is None, "what is served is another adapter"
    assert re.match(r"it was rolled back at 20.*run promote-adapter", find_rollback(second, workspace, PROMOTION) or "")
    assert find_rollback(first, workspace, PROMOTION) is None
    move_pointer(second, evaluation(second, 0.6), "uri", workspace, PROMOTION)
    found = find_promotion(second, workspace, PROMOTION)
    assert found is not None
    assert found.adapter_sha256 == second.sha256
    assert find_rollback(second, workspace, PROMOTION) is None


def test_a_rollback_to_what_is_not_there_says_what_is(tmp_path: Path) -> None:
    with pytest.raises(PreflowError, match="nothing was ever promoted as 'mine'"):
        roll_back(tmp_path)
    (only,) = promoted(tmp_path, "only")
    with pytest.raises(PreflowError, match="its history is empty"):
        roll_back(tmp_path)
    (second,) = promoted(tmp_path, "second")
    for to in ("f00f00f00", only.sha256[:5]):
        with pytest.raises(PreflowError, match=rf"no one adapter '{to}'.*{only.sha256[:12]} \(promoted 20"):
            roll_back(tmp_path, to)
    with pytest.raises(PreflowError, match="already"):
        roll_back(tmp_path, second.sha256)
    (tmp_path / "workspace" / "adapters" / "mine" / only.sha256[:16] / "adapter_model.safetensors").write_text("bad")
    with pytest.raises(PreflowError, match=r"adapter_model\.safetensors: damaged"):
        roll_back(tmp_path)


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


BASE, SFT, TRAINED = [-2.0, -3.0, -1.0], [-1.5, -2.5, -1.2], [-1.3, -2.2, -1.6]


def probe(precision: str = "float32") -> Probe:
    # The positions that are asked for run from the end to the beginning.
    text = ProbeText(token_ids=[4, 5, 6, 7], adapter=TRAINED[::-1], sft=SFT[::-1], base=BASE[::-1])
    return Probe(base_precision=precision, texts=[text])


def shifted(values: list[float], *by: float) -> list[float]:
    return [value + shift for value, shift in zip(values, by, strict=True)]


def test_the_adapter_itself_passes_its_probe_whatever_the_precision_of_the_base() -> None:
    """Four bits move base and adapter alike; only what the adapter adds is compared."""
    assert check_probe(probe(), [TRAINED], [BASE]) == 0
    assert check_probe(probe(), [shifted(TRAINED, 0.01, -0.02, 0.01)], [BASE]) == pytest.approx(0.0133, abs=1e-3)
    noise = (0.4, -0.5, 0.3)
    found = check_probe(probe("nf4"), [shifted(TRAINED, *noise)], [shifted(BASE, *noise)])
    assert found == pytest.approx(0, abs=1e-9)


def test_an_adapter_that_hardly_moved_passes_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    text = ProbeText(token_ids=[4, 5, 6, 7], adapter=TRAINED, sft=shifted(TRAINED, 0.01, 0.0, 0.0), base=BASE)
    alike = Probe(base_precision="float32", texts=[text])
    noisy = shifted(TRAINED, 0.02, 0.0, 0.0)
    assert check_probe(alike, [noisy[::-1]], [BASE[::-1]]) < 0.03
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
