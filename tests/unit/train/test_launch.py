"""What a training's key depends on, how its end is told, and its log lines: none that repeats readings."""

import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from tasks.config import TrainingConfig
from tasks.errors import PreflowError
from tasks.train import launch
from tasks.train.launch import Preempted, ProgressLog, run_training, training_key, with_measured_smoothing
from tasks.train.spec import Progress
from tests.fakes.tiny_training import TinyWorld, build_adapter, build_base, pairs, write_preferences


def test_the_key_depends_on_content_and_settings_only(world: TinyWorld, tmp_path: Path) -> None:
    key = training_key(world.preferences, world.config())
    assert training_key(world.preferences, world.config()) == key
    operational = {"save_steps": 3, "cache_reference": False, "grace_seconds": 5, "lease_seconds": 9}
    assert training_key(world.preferences, world.config(**operational)) == key
    shutil.copytree(world.adapter, tmp_path / "elsewhere")
    shutil.copytree(world.base, tmp_path / "moved-base")
    for moved in ({"sft_adapter": str(tmp_path / "elsewhere")}, {"base_model": str(tmp_path / "moved-base")}):
        assert training_key(world.preferences, world.config(**moved)) == key
    for change in ({"beta": 0.2}, {"seed": 1}, {"sft_weight": 1.0}, {"max_steps": 13}):
        assert training_key(world.preferences, world.config(**change)) != key


def test_the_key_changes_with_every_input(world: TinyWorld, tmp_path: Path) -> None:
    keys = {training_key(world.preferences, world.config())}
    build_adapter(tmp_path / "other-sft", world.base, seed=9)
    keys.add(training_key(world.preferences, world.config(sft_adapter=str(tmp_path / "other-sft"))))
    build_base(tmp_path / "other-base", seed=9)
    keys.add(training_key(world.preferences, world.config(base_model=str(tmp_path / "other-base"))))
    for train, val in ((pairs(4, 8), pairs(2, 4)), (pairs(4, 3), pairs(2, 8)), (pairs(4, 3), [])):
        keys.add(training_key(write_preferences(tmp_path / "preferences", train, val), world.config()))
    assert len(keys) == 6


def test_a_hub_name_is_identified_by_its_revision(world: TinyWorld) -> None:
    names = [{"base_model": "a/b"}, {"base_model": "a/b", "base_revision": "123"}, {"base_model": "a/c"}]
    assert len({training_key(world.preferences, world.config(**name)) for name in names}) == 3


MEASURED = {"loss_type": "robust", "measured_label_smoothing": True}


def report(world: TinyWorld, rate: float | None, judged: dict[str, Any] | None = None) -> None:
    content = {"metrics": [{"name": "position", "value": 0.1}, {"name": "flip_rate", "value": rate}]}
    folder = Path(world.preferences.uri).parent
    (folder / "quality.json").write_text(json.dumps(content))
    if judged is not None:
        (folder / "manifest.json").write_text(json.dumps({"config": judged}))


@pytest.mark.parametrize(
    ("rate", "judged", "smoothing"),
    [
        (0.0, None, 0.0),
        (0.32, None, pytest.approx(0.2)),
        (0.42, None, pytest.approx(0.3)),
        # Verdicts that agree are wrong less often. To the last bit: it is in the key, by which trainings are found.
        (0.32, {"orders": 2, "panel": [], "pair_policy": "unanimous"}, 0.058823529411764705),
        (0.32, {"orders": 3, "panel": [], "pair_policy": "majority"}, 0.10400000000000001),
        (0.32, {"orders": 2, "panel": [{}], "pair_policy": "unanimous"}, 0.0038910505836575876),
    ],
)
def test_label_smoothing_is_the_share_of_wrong_pairs_by_the_judges_flip_rate(
    world: TinyWorld, rate: float, judged: dict[str, Any] | None, smoothing: Any
) -> None:
    report(world, rate, judged)
    assert with_measured_smoothing(world.preferences, TrainingConfig(**MEASURED)).label_smoothing == smoothing


@pytest.mark.parametrize(("rate", "said"), [(None, "rate of None"), (0.5, "rate of 0.5"), ("none", r"quality\.json")])
def test_coin_flips_and_no_report_are_refused(world: TinyWorld, rate: Any, said: str) -> None:
    if rate != "none":
        report(world, rate)
    with pytest.raises(PreflowError, match=said):
        with_measured_smoothing(world.preferences, TrainingConfig(**MEASURED))


def test_measured_smoothing_is_part_of_the_key(world: TinyWorld) -> None:
    keys = set()
    for rate in (0.1, 0.2):
        report(world, rate)
        keys.add(training_key(world.preferences, world.config(**MEASURED)))
    assert len(keys) == 2


TOLD = "open(folder + '/outcome.json', 'w').write(json.dumps({'code': 1, 'message': 'KeyError: x'})); "
BEGUN = "open(folder + '/progress.jsonl', 'w').close(); "


@pytest.mark.parametrize(
    ("child", "ending", "message"),
    [
        (TOLD + "sys.exit(1)", PreflowError, r"exit code 1 \(KeyError: x\).* is .*log; it ends with:\nlast words"),
        (TOLD.replace("'code': 1", "'code': 42") + "sys.exit(42)", PreflowError, "^KeyError: x$"),
        ("sys.exit(3)", PreflowError, r"exit code 3 \(no message\).* is .*log; it ends with:\nlast words"),
        (BEGUN + "os.kill(os.getpid(), 9)", Preempted, "ended by SIGKILL"),
        (BEGUN + "sys.exit(1)", Preempted, "process of the trainer was ended by a signal"),
    ],
)
def test_how_a_trainer_ends_decides_whether_it_is_run_again(
    world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, child: str, ending: type[Exception], message: str
) -> None:
    code = f"import json, os, sys; folder = sys.argv[1]; print('last words', flush=True); {child}"
    monkeypatch.setattr(launch, "_command", lambda files, _: [sys.executable, "-c", code, str(files)])
    key = training_key(world.preferences, world.config())
    with pytest.raises(ending, match=message):
        run_training(world.preferences, str(tmp_path / "workspace"), world.config(), key)


def test_a_step_is_said_when_its_readings_changed_or_after_ten_seconds(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("tasks.train.launch.time.monotonic", lambda: now)
    caplog.set_level(logging.INFO, "tasks")
    log = ProgressLog()
    log.say(Progress("loading"))
    for step in range(1, 61):
        now = float(step)
        loss, accuracy, margin = (0.61, 0.7, 0.1) if step > 30 else (1.0746, 0.0, 0.0)
        log.say(Progress("training", step=step, total=60, loss=loss, accuracy=accuracy, margin=margin))
    lines = [record.getMessage() for record in caplog.records]
    assert lines[:2] == ["loading", "step 1/60, loss 1.0746"]
    assert "step 31/60, loss 0.6100, accuracy 0.7000, margin 0.1000" in lines
    assert [int(line[5:7].strip("/")) for line in lines[1:]] == [1, 11, 21, 31, 41, 51, 60]
