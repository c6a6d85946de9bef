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
from tests.fakes.tiny_training import Shape, TinyWorld, build_adapter, build_base, large_tokenizer

Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
OFFSETS = b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": ["x", "y"]}}'
WRONG_HEADER = len(OFFSETS).to_bytes(8, "little") + OFFSETS


def change(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_weights(world: TinyWorld, edit: Callable[[dict[str, Any]], Any]) -> None:
    file = world.adapter / "adapter_model.safetensors"
    weights = load_file(file)
    edit(weights)
    save_file(weights, file, metadata={"format": "pt"})


def refused(world: TinyWorld, message: str, **changes: Any) -> None:
    with pytest.raises(PreflowError, match=message):
        check_training_inputs(world.config(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; only LORA"),
        ({"use_dora": True}, "use_dora is True, which vLLM does not serve"),
        ({"use_of_the_future": True}, "use_of_the_future is True, which vLLM does not serve"),
        ({"arrow_config": {"top_k": 1}}, "arrow_config is {'top_k': 1}, which vLLM does not serve"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "target_parameters is .*, which vLLM does not serve"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\]"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"r": 0}, "the rank of r is 0, not a positive number"),
        ({"r": "4"}, "the rank of r is '4', not a positive number"),
        ({"rank_pattern": {"q_proj": 4.5}}, "the rank of q_proj is 4.5, not a positive number"),
        ({"lora_alpha": "8"}, "the alpha of lora_alpha is '8', not a number"),
        ({"r": 4.0}, "the rank of r is 4.0, not a positive number"),  # PEFT takes no such number either
        *(
            ({"lora_alpha": odd}, "the alpha of lora_alpha is .*, not a number above 0")
            for odd in (0, -8, float("nan"), float("inf"), 10**400)
        ),
        ({"alpha_pattern": {"q_proj": float("nan")}}, "the alpha of q_proj is nan"),
        *(
            ({"lora_dropout": odd}, "lora_dropout is .*, not a number from 0 to 1")
            for odd in (1.5, float("nan"), "0.1")
        ),
        ({"target_modules": None}, "target_modules is empty"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "it targets model.embed_tokens, which vLLM does not serve"),
        ({"lora_alpha": None}, "the alpha of lora_alpha is None, not a number"),
        ({"alpha_pattern": {"q_proj": None}}, "the alpha of q_proj is None, not a number"),
        ({"alpha_pattern": ["q_proj"]}, r"a JSON file there is not as PEFT or transformers write it"),
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights is 'pissa_niter_16', which changes the base"),
        ({"init_lora_weights": "loftq"}, "changes the base"),
        ({"init_lora_weights": "olora"}, "changes the base"),
        ({"init_lora_weights": "corda"}, "changes the base"),
        ({"init_lora_weights": "mica"}, "init_lora_weights is 'mica', .* set it to true"),
        ({"velora_config": {"num_groups": 4}}, "velora_config is {'num_groups': 4}, which vLLM does not serve"),
        ({"lora_bias": True}, "lora_bias is True, which vLLM does not serve"),
        ({"trainable_token_indices": [5]}, r"trainable_token_indices is \[5\]"),
        ({"alora_invocation_tokens": [5, 6]}, "alora_invocation_tokens"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"target_modules": ["q_proj", "lm_head"]}, "it targets lm_head"),
        ({"target_modules": r".*(q_proj|lm_head)"}, "it targets lm_head"),
        ({"r": 8}, r"has rank 4, where adapter_config.json says 8 \(r, rank_pattern\)"),
        ({"target_modules": r"(q_proj"}, r"'\(q_proj' is no regular expression \(missing \)"),
        ({"exclude_modules": "(q"}, r"'\(q' is no regular expression"),
        ({"alpha_pattern": {"(q": 8}}, r"'\(q' is no regular expression"),
        ({"rank_pattern": {"*": 8}}, r"'\*' is no regular expression \(nothing to repeat"),
        ({"rank_pattern": {"q_proj": 8}}, r"q_proj.lora_A.weight has rank 4, where adapter_config.json says 8"),
    ],
)
def test_an_adapter_that_cannot_work_is_refused_with_its_cause(
    world: TinyWorld, changes: dict[str, Any], message: str
) -> None:
    change(world.adapter / "adapter_config.json", **changes)
    refused(world, f"sft_adapter .*{message}")


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 8}, "alpha_pattern": {"q_proj": 32}},
        {"target_modules": ["q_proj"], "rank_pattern": {"^model.layers.0.self_attn.q_proj": 8}},
        {"target_modules": r"^(?!.*lm_head).*\.(q_proj|v_proj)$"},
        {"target_modules": r".*", "exclude_modules": r"^(?!.*(q|v)_proj$).*"},
        {"target_modules": "all-linear", "exclude_modules": ["k_proj"], "use_rslora": True},
    ],
)
def test_what_peft_and_vllm_take_is_taken(world: TinyWorld, options: dict[str, Any]) -> None:
    shutil.rmtree(world.adapter)
    build_adapter(world.adapter, world.base, **options)
    change(world.adapter / "adapter_config.json", of_a_newer_peft={"a": 1}, merge_weights=False)
    check_training_inputs(world.config())


def test_a_rank_that_no_server_takes_is_refused(world: TinyWorld) -> None:
    change(world.adapter / "adapter_config.json", r=600)

    def widen(weights: dict[str, Any]) -> None:
        for name, weight in weights.items():
            shape = (600, weight.shape[1]) if ".lora_A." in name else (weight.shape[0], 600)
            weights[name] = numpy.zeros(shape, numpy.float16)

    change_weights(world, widen)
    refused(world, "rank 600 is over 512")


@pytest.mark.parametrize("value", [numpy.nan, numpy.inf])
@pytest.mark.parametrize("kind", [numpy.float32, numpy.float16])
def test_nan_in_the_adapter_is_called_nan(world: TinyWorld, value: float, kind: type) -> None:
    def damage(weights: dict[str, Any]) -> None:
        weights.update({name: weight.astype(kind) for name, weight in weights.items()})
        weights[Q][1, 2] = value

    change_weights(world, damage)
    refused(world, f"its weight {Q} holds NaN or infinite numbers")


def zeros(*shape: int, kind: type = numpy.float32) -> Any:
    return numpy.zeros(shape, kind)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda w: w.update({"base_model.model.model.embed_tokens.weight": zeros(128, 64)}), "PEFT adds them when"),
        (lambda w: w.update({"base_model.model.lm_head.weight": zeros(128, 64)}), "PEFT adds them when"),
        (lambda w: w.update({Q: zeros(4)}), rf"holds {Q} of shape \[4\], no LoRA weight of a linear layer as PEFT's"),
        (lambda w: w.update({Q: zeros(4, 64, 1, 1)}), "no LoRA weight of a linear layer as PEFT's"),
        (lambda w: w.update({Q.replace("A.", "A.default."): w.pop(Q)}), "lora_A.default.weight of .*save it again"),
        (lambda w: w.pop(Q), f"lora_B.weight and not {Q}: a part is missing"),
        (lambda w: w.pop(Q.replace("_A", "_B")), f"holds {Q} and not .*lora_B.weight: a part is missing"),
        (lambda w: w.update({Q: zeros(4, 64, kind=numpy.int8)}), f"weight {Q} is of type I8, no floating-point"),
        (lambda w: [w.update({name[11:]: w.pop(name)}) for name in list(w)], "has not the name that PEFT's"),
        (lambda w: w.clear(), "holds no weights. Save the adapter again"),
    ],
)
def test_weights_that_are_no_linear_lora_are_refused_with_their_cause(
    world: TinyWorld, edit: Callable[[dict[str, Any]], Any], message: str
) -> None:
    change_weights(world, edit)
    refused(world, message)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("sft/adapter_config.json", None, "no adapter_config.json there"),
        ("sft/adapter_config.json", b"{'r': 4}", r"adapter_config.json: not JSON .*save the adapter again"),
        ("sft/adapter_model.safetensors", None, "holds no .safetensors weights"),
        ("sft/adapter_model.safetensors", bytes(100), "damaged, its header cannot be read"),
        ("sft/adapter_model.safetensors", -1000, r"sft/adapter_model.safetensors: cut off, it has [\d,]+ bytes of"),
        ("base/model.safetensors", None, "no .safetensors there"),
        ("base/model.safetensors", -1000, r"base/model.safetensors: cut off, it has [\d,]+ bytes of [\d,]+"),
        ("base/model.safetensors.index.json", b'{"weight_map": null}', "index.json: .* not as PEFT or transformers"),
        ("sft/adapter_config.json", b'\xef\xbb\xbf{"r": 4}', "adapter_config.json: not JSON .*BOM"),
        ("base/chat_template.jinja", b"\xef\xbb\xbf{{ messages }}", "chat_template.jinja: .*a byte order mark"),
        ("base/model.safetensors.index.json", b'{"weight_map": {"a": "model-2.safetensors"}}', "model-2.* is missing"),
        ("base/model.safetensors", WRONG_HEADER, "damaged, its header cannot be read"),
        ("base/config.json", None, "no config.json there"),
        ("base/tokenizer.json", None, "no tokenizer in"),
        ("base/chat_template.jinja", None, "no chat template in"),
        ("base/chat_template.jinja", b"\xff\xfe", "chat_template.jinja: damaged .*utf-8"),
        ("base/tokenizer_config.json", b"[]", r"tokenizer_config.json: damaged \(no JSON object\)"),
        ("base/tokenizer_config.json", b"{", "tokenizer_config.json: damaged"),
        ("base/tokenizer.json", b'{"model": {"vocab": [1]}}', "a JSON file there is not as PEFT or transformers"),
    ],
)
def test_a_file_that_is_missing_or_damaged_is_named(
    world: TinyWorld, file: str, content: bytes | int | None, message: str
) -> None:
    path = world.base.parent / file
    if content is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:content] if isinstance(content, int) else content)
    refused(world, message)


@pytest.mark.parametrize("folder", ["base_model", "sft_adapter"])
def test_a_missing_folder_is_named(world: TinyWorld, folder: str) -> None:
    refused(world, f"{folder} .*/nowhere", **{folder: str(world.base.parent / "nowhere")})


def test_a_revision_of_a_folder_is_refused(world: TinyWorld) -> None:
    refused(world, r"base_revision v1: base_model .* is a folder", base_revision="v1")


def test_a_chat_template_next_to_the_adapter_will_do(world: TinyWorld) -> None:
    (world.base / "chat_template.jinja").rename(world.adapter / "chat_template.jinja")
    check_training_inputs(world.config())


def test_a_tracker_that_is_not_installed_is_named(world: TinyWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.train.launch.find_spec", lambda name: None)
    refused(world, "report_to wandb: not installed here", report_to="wandb")
    check_training_inputs(world.config())


def test_another_base_in_the_adapters_config_is_a_warning(world: TinyWorld, caplog: pytest.LogCaptureFixture) -> None:
    change(world.adapter / "adapter_config.json", base_model_name_or_path="someone/other-model")
    check_training_inputs(world.config())
    assert "names the base model someone/other-model" in caplog.text


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (Shape(hidden=128), r"of sizes \[64, \d+\], base_model .*other has \[128, \d+\]. Give the base that"),
        (Shape(layers=1), r"layers\.1\..* has no such module"),
    ],
)
def test_another_base_is_seen_by_its_shapes(world: TinyWorld, tmp_path: Path, shape: Shape, message: str) -> None:
    build_base(tmp_path / "other", shape=shape)
    refused(world, message, base_model=str(tmp_path / "other"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 120}, None),  # as Llama 3.2 Vision has it
        ({"vocab_size": 200}, r"says vocab_size 200, its weight model\.embed_tokens\.weight has 128 rows"),
        ({"rope_scaling": "yarn"}, "a JSON file there is not as PEFT or transformers"),
        ({"text_config": None}, None),
    ],
)
def test_a_base_is_held_against_its_configuration(
    world: TinyWorld, changes: dict[str, Any], message: str | None
) -> None:
    change(world.base / "config.json", **changes)
    if message:
        refused(world, f"base_model .*{message}")
    else:
        check_training_inputs(world.config())


def test_an_adapter_in_the_bases_folder_is_refused(world: TinyWorld) -> None:
    """transformers would read the base that the adapter names, whatever lies there."""
    shutil.copytree(world.adapter, world.base, dirs_exist_ok=True)
    refused(world, "base_model .*: holds an adapter")


def test_a_shard_that_the_index_does_not_name_is_not_read(world: TinyWorld) -> None:
    weights = load_file(world.base / "model.safetensors")
    (world.base / "model.safetensors").unlink()
    names = {name: f"model-{1 + ('layers.1' in name)}.safetensors" for name in weights}
    for file in set(names.values()):
        save_file({name: weight for name, weight in weights.items() if names[name] == file}, world.base / file)
    index = world.base / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    check_training_inputs(world.config())
    index.write_text(json.dumps({"weight_map": {name: file for name, file in names.items() if "1" in file}}))
    refused(world, r"layers\.1\..* has no such module")


def test_more_tokens_than_positions_are_refused(world: TinyWorld) -> None:
    check_training_inputs(world.config(max_length=512))
    refused(world, r"max_length 513 is more than the 512 positions .*max_position_embeddings", max_length=513)
    change(world.base / "config.json", rope_scaling={"rope_type": "yarn", "factor": 2.0})
    check_training_inputs(world.config(max_length=1024))


def test_a_routers_loss_needs_experts(world: TinyWorld) -> None:
    refused(world, r"router_aux_loss_coef 0.01: base_model .* has no experts", router_aux_loss_coef=0.01)


def test_a_base_that_is_quantised_already_is_said(world: TinyWorld, caplog: pytest.LogCaptureFixture) -> None:
    change(world.base / "config.json", quantization_config={"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"})
    check_training_inputs(world.config())
    assert "is quantised already (nf4)" in caplog.text


def test_tokens_that_were_added_renumbered_or_left_out_are_named(
    world: TinyWorld, caplog: pytest.LogCaptureFixture
) -> None:
    for folder in (world.base, world.adapter):
        large_tokenizer(folder, 128)
    check_training_inputs(world.config())
    file = world.adapter / "tokenizer.json"
    original = file.read_text()

    def write(edit: Callable[[dict[str, Any]], Any]) -> None:
        content = json.loads(original)
        edit(content)
        file.write_text(json.dumps(content))

    write(lambda content: content["added_tokens"].append({"id": 128, "content": "<extra>"}))
    message = f"the tokenizer of {world.adapter} has the token '<extra>' with number 128, base_model .* for 128 tokens"
    refused(world, message)
    shutil.copy(file, world.base)
    check_training_inputs(world.config())  # Gemma 3 has one for images
    file.unlink()
    check_training_inputs(world.config())
    large_tokenizer(world.base, 128)
    write(lambda content: content["model"]["vocab"].update(w1=9, w2=8))
    refused(world, r"its tokenizer gives 'w1' the number 9, that of base_model .* 8")
    write(lambda content: content["model"]["vocab"].pop("w7"))
    refused(world, r"its tokenizer lacks 1 tokens of base_model .* \(e\.g\. 'w7'\)")
    write(lambda content: (content["model"]["vocab"].pop("<unk>"), content["added_tokens"].pop()))
    check_training_inputs(world.config())
    assert "lacks 1 special tokens of" in caplog.text


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

    def test_it_is_checked_as_a_folder_is(self, world: TinyWorld, cached: Path) -> None:
        check_training_inputs(world.config(base_model="acme/tiny"))
        (cached / "chat_template.jinja").unlink()
        refused(world, "no chat template in acme/tiny", base_model="acme/tiny")
        build_base(cached, shape=Shape(hidden=128))
        refused(world, r"base_model acme/tiny has \[128, \d+\]", base_model="acme/tiny")

    def test_what_cannot_be_asked_for_is_not_called_absent(
        self, world: TinyWorld, cached: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        refused(world, r"acme/other: the hub cannot be asked .*HF_HUB_OFFLINE", base_model="acme/other")
        (cached / "model.safetensors").unlink()
        with monkeypatch.context() as unreachable:  # the small files are here, and the sizes of its weights are not
            unreachable.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
            unreachable.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
            refused(world, r"acme/tiny: the hub cannot be asked .*ConnectError", base_model="acme/tiny")
        check_training_inputs(world.config(base_model="acme/other"), trains_here=False)
        assert "acme/other cannot be looked at from here" in caplog.text
