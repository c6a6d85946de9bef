"""What preflight sees without weights: kinds of adapters, ranks, damage, positions, vocabularies, bases on the hub."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
from safetensors.numpy import load_file, save_file

from tasks.errors import PreflowError
from tasks.train.launch import check_training_inputs
from tests.fakes.tiny_training import TinyWorld, build_adapter, build_base, pairs, write_preferences

Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return TinyWorld.build(tmp_path_factory.mktemp("original"), train=2, val=1)


@pytest.fixture
def world(original: TinyWorld, tmp_path: Path) -> TinyWorld:
    """A copy that a test may break."""
    for name, source in (("base", original.base), ("sft", original.adapter)):
        shutil.copytree(source, tmp_path / name)
    preferences = write_preferences(tmp_path / "preferences", pairs(2, 3), pairs(1, 4))
    return TinyWorld(tmp_path / "base", tmp_path / "sft", preferences)


def change(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_weights(world: TinyWorld, edit: Callable[[dict[str, Any]], Any]) -> None:
    file = world.adapter / "adapter_model.safetensors"
    weights = load_file(file)
    edit(weights)
    save_file(weights, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights is 'pissa_niter_16', which changes the base"),
        ({"init_lora_weights": "loftq"}, "changes the base"),
        ({"init_lora_weights": "olora"}, "changes the base"),
        ({"init_lora_weights": "corda"}, "changes the base"),
        ({"lora_bias": True}, "lora_bias is True, which vLLM does not serve"),
        ({"trainable_token_indices": [5]}, r"trainable_token_indices is \[5\]"),
        ({"alora_invocation_tokens": [5, 6]}, "alora_invocation_tokens"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"target_modules": r".*(q_proj|lm_head)"}, "it targets lm_head"),
        ({"r": 8}, r"has rank 4, where adapter_config.json says 8 \(r, rank_pattern\)"),
        ({"rank_pattern": {"q_proj": 8}}, r"q_proj.lora_A.weight has rank 4, where adapter_config.json says 8"),
    ],
)
def test_an_adapter_that_cannot_work_is_refused_with_its_cause(
    world: TinyWorld, changes: dict[str, Any], message: str
) -> None:
    change(world.adapter / "adapter_config.json", **changes)
    with pytest.raises(PreflowError, match=message):
        check_training_inputs(world.config())


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 8}, "alpha_pattern": {"q_proj": 32}},
        {"target_modules": r"^(?!.*lm_head).*\.(q_proj|v_proj)$"},
        {"target_modules": "all-linear", "exclude_modules": ["k_proj"], "use_rslora": True},
    ],
)
def test_what_peft_and_vllm_take_is_taken(world: TinyWorld, options: dict[str, Any]) -> None:
    shutil.rmtree(world.adapter)
    build_adapter(world.adapter, world.base, **options)
    check_training_inputs(world.config())


def test_a_rank_that_no_server_takes_is_refused(world: TinyWorld) -> None:
    change(world.adapter / "adapter_config.json", r=600)

    def widen(weights: dict[str, Any]) -> None:
        for name, weight in weights.items():
            shape = (600, weight.shape[1]) if ".lora_A." in name else (weight.shape[0], 600)
            weights[name] = numpy.zeros(shape, numpy.float16)

    change_weights(world, widen)
    with pytest.raises(PreflowError, match="rank 600 is over 512"):
        check_training_inputs(world.config())


@pytest.mark.parametrize("value", [numpy.nan, numpy.inf])
@pytest.mark.parametrize("kind", [numpy.float32, numpy.float16])
def test_nan_in_the_adapter_is_called_nan(world: TinyWorld, value: float, kind: type) -> None:
    def damage(weights: dict[str, Any]) -> None:
        weights.update({name: weight.astype(kind) for name, weight in weights.items()})
        weights[Q][1, 2] = value

    change_weights(world, damage)
    with pytest.raises(PreflowError, match=f"its weight {Q} holds NaN or infinite numbers"):
        check_training_inputs(world.config())


def test_whole_embeddings_in_the_adapter_are_refused_with_their_cause(world: TinyWorld) -> None:
    name = "base_model.model.model.embed_tokens.weight"
    change_weights(world, lambda weights: weights.update({name: numpy.zeros((128, 64), numpy.float32)}))
    with pytest.raises(PreflowError, match=f"holds {name}.*PEFT adds embeddings"):
        check_training_inputs(world.config())


@pytest.mark.parametrize("file", ["base/model.safetensors", "sft/adapter_model.safetensors"])
def test_a_file_that_is_cut_off_is_named(world: TinyWorld, file: str) -> None:
    path = world.base.parent / file
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(PreflowError, match=rf"{file}: cut off, it has [\d,]+ bytes of [\d,]+"):
        check_training_inputs(world.config())


def test_a_shard_that_is_missing_is_named(world: TinyWorld) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (world.base / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(PreflowError, match=r"model-00002-of-00002.safetensors is missing"):
        check_training_inputs(world.config())


def test_a_configuration_that_is_no_json_is_the_users_file(world: TinyWorld) -> None:
    (world.adapter / "adapter_config.json").write_text("{'r': 4}")
    with pytest.raises(PreflowError, match=r"adapter_config.json: not JSON .*save the adapter again"):
        check_training_inputs(world.config())


def test_more_tokens_than_positions_are_refused(world: TinyWorld) -> None:
    check_training_inputs(world.config(max_length=512))
    with pytest.raises(PreflowError, match=r"max_length 513 is more than the 512 positions .*max_position_embeddings"):
        check_training_inputs(world.config(max_length=513))
    change(world.base / "config.json", rope_scaling={"rope_type": "yarn", "factor": 2.0})
    check_training_inputs(world.config(max_length=1024))


def test_a_routers_loss_needs_experts(world: TinyWorld) -> None:
    with pytest.raises(PreflowError, match=r"router_aux_loss_coef 0.01: base_model .* has no experts"):
        check_training_inputs(world.config(router_aux_loss_coef=0.01))


def test_a_base_that_is_quantised_already_is_said(world: TinyWorld, caplog: pytest.LogCaptureFixture) -> None:
    change(world.base / "config.json", quantization_config={"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"})
    check_training_inputs(world.config())
    assert "is quantised already (nf4)" in caplog.text


def test_tokens_that_were_added_or_renumbered_are_named(world: TinyWorld) -> None:
    for file in world.base.glob("tokenizer*"):
        shutil.copy(file, world.adapter / file.name)
    check_training_inputs(world.config())
    file = world.adapter / "tokenizer.json"
    content = json.loads(file.read_text())
    content["added_tokens"].append({"id": 128, "content": "<extra>"})
    file.write_text(json.dumps(content))
    with pytest.raises(PreflowError, match=r"the token '<extra>' with number 128, base_model .* rows for 128 tokens"):
        check_training_inputs(world.config())
    content["added_tokens"].pop()
    content["model"]["vocab"]["w1"], content["model"]["vocab"]["w2"] = 9, 8
    file.write_text(json.dumps(content))
    with pytest.raises(PreflowError, match=r"its tokenizer gives 'w1' the number 9, that of base_model .* 8"):
        check_training_inputs(world.config())


class TestOnTheHub:
    @pytest.fixture(autouse=True)
    def cached(self, world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A base in this machine's cache of the hub, and no network."""
        root = tmp_path / "hub" / "models--acme--tiny"
        snapshot = root / "snapshots" / ("a" * 40)
        shutil.copytree(world.base, snapshot)
        (root / "refs").mkdir()
        (root / "refs" / "main").write_text("a" * 40)
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        return snapshot

    def test_a_good_one_passes(self, world: TinyWorld) -> None:
        check_training_inputs(world.config(base_model="acme/tiny"))

    def test_it_is_checked_as_a_folder_is(self, world: TinyWorld, cached: Path) -> None:
        (cached / "chat_template.jinja").unlink()
        with pytest.raises(PreflowError, match="no chat template in acme/tiny"):
            check_training_inputs(world.config(base_model="acme/tiny"))

    def test_another_base_is_seen(self, world: TinyWorld, cached: Path) -> None:
        from tests.fakes.tiny_training import Shape

        build_base(cached, shape=Shape(hidden=128))
        with pytest.raises(PreflowError, match=r"base_model acme/tiny has .*trained on another base"):
            check_training_inputs(world.config(base_model="acme/tiny"))

    def test_what_cannot_be_asked_for_is_not_called_absent(
        self, world: TinyWorld, caplog: pytest.LogCaptureFixture
    ) -> None:
        training = world.config(base_model="acme/other")
        with pytest.raises(PreflowError, match=r"acme/other: the hub cannot be asked .*HF_HUB_OFFLINE"):
            check_training_inputs(training)
        check_training_inputs(training, trains_here=False)
        assert "acme/other cannot be looked at from here" in caplog.text
