"""What is checked before anything is spent, and what a training's key depends on."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from tasks.config import TrainingConfig
from tasks.errors import PreflowError
from tasks.train import launch
from tasks.train.launch import Preempted, check_training_inputs, run_training, training_key, with_measured_smoothing
from tests.fakes.tiny_training import Shape, TinyWorld, build_adapter, build_base, pairs, write_preferences


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return TinyWorld.build(tmp_path_factory.mktemp("original"), train=4, val=2)


@pytest.fixture
def world(original: TinyWorld, tmp_path: Path) -> TinyWorld:
    """A copy that a test may break."""
    for name, source in (("base", original.base), ("sft", original.adapter)):
        shutil.copytree(source, tmp_path / name)
    preferences = write_preferences(tmp_path / "preferences", pairs(4, 3), pairs(2, 4))
    return TinyWorld(tmp_path / "base", tmp_path / "sft", preferences)


def change_adapter(world: TinyWorld, **changes: Any) -> None:
    file = world.adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_good_inputs_pass(world: TinyWorld) -> None:
    check_training_inputs(world.config())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; only LORA"),
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\]"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"r": 0}, "rank r is 0"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head"),
    ],
)
def test_adapters_that_cannot_be_trained_or_served_are_refused(
    world: TinyWorld, changes: dict[str, Any], message: str
) -> None:
    change_adapter(world, **changes)
    with pytest.raises(PreflowError, match=f"sft_adapter .*{message}"):
        check_training_inputs(world.config())


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("sft/adapter_config.json", "no adapter_config.json there"),
        ("sft/adapter_model.safetensors", "holds no .safetensors weights"),
        ("base/config.json", "no config.json there"),
        ("base/model.safetensors", "no .safetensors there"),
        ("base/tokenizer.json", "no tokenizer in"),
        ("base/chat_template.jinja", "no chat template in"),
    ],
)
def test_a_missing_file_is_named(world: TinyWorld, file: str, message: str) -> None:
    (world.base.parent / file).unlink()
    with pytest.raises(PreflowError, match=message):
        check_training_inputs(world.config())


def test_a_tracker_that_is_not_installed_is_named(world: TinyWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.train.launch.find_spec", lambda name: None)
    with pytest.raises(PreflowError, match="report_to wandb: not installed here"):
        check_training_inputs(world.config(report_to="wandb"))
    check_training_inputs(world.config())


@pytest.mark.parametrize("folder", ["base_model", "sft_adapter"])
def test_a_missing_folder_is_named(world: TinyWorld, folder: str) -> None:
    with pytest.raises(PreflowError, match=f"{folder} .*/nowhere"):
        check_training_inputs(world.config(**{folder: str(world.base.parent / "nowhere")}))


def test_a_revision_of_a_folder_is_refused(world: TinyWorld) -> None:
    with pytest.raises(PreflowError, match=r"base_revision v1: base_model .* is a folder"):
        check_training_inputs(world.config(base_revision="v1"))


def test_a_chat_template_beside_the_adapter_will_do(world: TinyWorld) -> None:
    (world.base / "chat_template.jinja").rename(world.adapter / "chat_template.jinja")
    check_training_inputs(world.config())


def test_another_base_in_the_adapters_config_is_a_warning(world: TinyWorld, caplog: pytest.LogCaptureFixture) -> None:
    change_adapter(world, base_model_name_or_path="someone/other-model")
    check_training_inputs(world.config())
    assert "names the base model someone/other-model" in caplog.text


def test_shapes_that_contradict_the_base_are_an_error(world: TinyWorld, tmp_path: Path) -> None:
    build_base(tmp_path / "wider", shape=Shape(hidden=128))
    with pytest.raises(
        PreflowError, match=r"of sizes \[64, \d+\], base_model .*wider has \[128, \d+\]. The adapter was"
    ):
        check_training_inputs(world.config(base_model=str(tmp_path / "wider")))


def test_an_adapter_of_a_deeper_base_is_an_error(world: TinyWorld, tmp_path: Path) -> None:
    build_base(tmp_path / "shallow", shape=Shape(layers=1))
    with pytest.raises(PreflowError, match=r"layers\.1\..* has no such module"):
        check_training_inputs(world.config(base_model=str(tmp_path / "shallow")))


def test_damaged_weights_are_an_error(world: TinyWorld) -> None:
    (world.adapter / "adapter_model.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(PreflowError, match="damaged, its header cannot be read"):
        check_training_inputs(world.config())


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


class TestMeasuredSmoothing:
    """Label smoothing from the judge's flip rate."""

    def config(self) -> TrainingConfig:
        return TrainingConfig(loss_type="robust", measured_label_smoothing=True)

    def report(self, world: TinyWorld, rate: float | None) -> None:
        content = {"metrics": [{"name": "position", "value": 0.1}, {"name": "flip_rate", "value": rate}]}
        (Path(world.preferences.uri).parent / "quality.json").write_text(json.dumps(content))

    @pytest.mark.parametrize(("rate", "smoothing"), [(0.0, 0.0), (0.32, 0.2), (0.42, 0.3)])
    def test_it_is_the_share_of_wrong_verdicts(self, world: TinyWorld, rate: float, smoothing: float) -> None:
        self.report(world, rate)
        assert with_measured_smoothing(world.preferences, self.config()).label_smoothing == pytest.approx(smoothing)

    @pytest.mark.parametrize(
        ("judged", "smoothing"),
        [
            ({"orders": 2, "panel": [], "pair_policy": "unanimous"}, 0.04 / 0.68),
            ({"orders": 3, "panel": [], "pair_policy": "majority"}, 0.104),
            ({"orders": 2, "panel": [{}], "pair_policy": "unanimous"}, 0.0016 / 0.4112),
        ],
    )
    def test_pairs_on_which_verdicts_agree_are_wrong_less_often(
        self, world: TinyWorld, judged: dict[str, Any], smoothing: float
    ) -> None:
        self.report(world, 0.32)  # each verdict is wrong with probability 0.2
        (Path(world.preferences.uri).parent / "manifest.json").write_text(json.dumps({"config": judged}))
        assert with_measured_smoothing(world.preferences, self.config()).label_smoothing == pytest.approx(smoothing)

    @pytest.mark.parametrize("rate", [None, 0.5, 0.7])
    def test_coin_flips_are_refused(self, world: TinyWorld, rate: float | None) -> None:
        self.report(world, rate)
        with pytest.raises(PreflowError, match=f"flip rate of {rate}"):
            with_measured_smoothing(world.preferences, self.config())

    def test_without_a_report_it_is_refused(self, world: TinyWorld) -> None:
        with pytest.raises(PreflowError, match=r"quality\.json"):
            with_measured_smoothing(world.preferences, self.config())

    def test_it_is_part_of_the_key(self, world: TinyWorld) -> None:
        keys = []
        for rate in (0.1, 0.2):
            self.report(world, rate)
            keys.append(training_key(world.preferences, world.config(
                loss_type="robust", measured_label_smoothing=True)))  # fmt: skip
        assert keys[0] != keys[1]


TOLD = "open(folder + '/outcome.json', 'w').write(json.dumps({'code': 1, 'message': 'KeyError: x'})); "
BEGUN = "open(folder + '/progress.jsonl', 'w').close(); "


@pytest.mark.parametrize(
    ("child", "ending", "message"),
    [
        (TOLD + "sys.exit(1)", PreflowError, r"exit code 1 \(KeyError: x\).* is .*log; it ends with:\nlast words"),
        ("sys.exit(3)", PreflowError, r"exit code 3 \(no message\).* is .*log; it ends with:\nlast words"),
        (BEGUN + "os.kill(os.getpid(), 9)", Preempted, "ended by SIGKILL"),
        (BEGUN + "sys.exit(1)", Preempted, "a process of the trainer was ended by a signal"),
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
