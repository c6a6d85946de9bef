"""The base that was asked for: every weight its own and finite, nothing random in it, quantised as it is."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from tasks.config import TrainingConfig
from tasks.errors import PreflowError
from tasks.trainer.model import as_loaded, load_base, load_tokenizer, precision, switch_off_dropout
from tasks.trainer.run import with_fitting_warmup
from tests.fakes.tiny_training import build_base, large_tokenizer

UP, EMBEDDINGS = "model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return build_base(tmp_path / "base")


def settings(base: Path, **changes: Any) -> TrainingConfig:
    return TrainingConfig(**{"base_model": str(base), "load_in_4bit": False, **changes})


def edit(base: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(base / "model.safetensors")
    change(weights)
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})


IN_4_BITS = {"load_in_4bit": True, "bnb_4bit_compute_dtype": "float32"}


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda weights: weights.pop(UP), {}, f"{UP} is missing"),
        (lambda weights: weights.update({UP: torch.zeros(3, 64)}), {}, rf"{UP} has shape \(3, 64\), not \(128, 64\)"),
        (lambda weights: weights.update(other=torch.zeros(3)), {}, "other has no place in it"),
        (lambda weights: weights[UP].fill_(torch.nan), {}, f"its weight {UP} holds NaN"),
        (lambda weights: weights[UP].fill_(torch.nan), IN_4_BITS, f"its weight {UP} holds NaN"),
    ],
)
def test_a_base_with_wrong_weights_is_refused_by_name(
    base: Path, change: Callable[..., Any], options: dict[str, Any], message: str
) -> None:
    edit(base, change)
    with pytest.raises(PreflowError, match=f"base_model .*{message}"):
        load_base(settings(base, **options), 0)


def test_masks_and_positions_that_newer_code_computes_are_no_weights(base: Path) -> None:
    kept = ("h.0.attn.bias", "h.0.attn.masked_bias", "layers.0.self_attn.rotary_emb.inv_freq", "x.position_ids")
    edit(base, lambda weights: weights.update({name: torch.zeros(3) for name in kept}))
    load_base(settings(base), 0)
    edit(base, lambda weights: weights.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}))
    with pytest.raises(PreflowError, match=r"q_proj\.bias has no place in it \(1 in all\)"):
        load_base(settings(base), 0)


def test_out_of_memory_is_not_called_a_base_that_does_not_fit(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", full)
    with pytest.raises(torch.OutOfMemoryError):
        load_base(settings(base), 0)


@pytest.mark.parametrize("method", ["gptq", "hqq", None])
def test_a_quantised_base_whose_package_is_absent_is_no_traceback(base: Path, method: str | None) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"bits": 4, "quant_method": method}}))
    with pytest.raises(PreflowError, match=r"base_model .* cannot be loaded \(.*install the package"):
        load_base(settings(base), 0)


def test_a_head_that_is_not_tied_though_the_configuration_says_so_is_refused(base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with pytest.raises(PreflowError, match="says tie_word_embeddings, and its lm_head differs"):
        load_base(settings(base), 0)
    edit(base, lambda weights: weights.update({"lm_head.weight": weights[EMBEDDINGS].clone()}))
    load_base(settings(base), 0)
    edit(base, lambda weights: (weights.pop("lm_head.weight"), weights[EMBEDDINGS].fill_(torch.nan)))
    with pytest.raises(PreflowError, match=f"its weight {EMBEDDINGS} holds NaN"):
        load_base(settings(base), 0)


@pytest.mark.parametrize("asked", [{"load_in_4bit": False}, {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}])
def test_a_base_quantised_already_is_recorded_as_it_is(base: Path, asked: dict[str, Any]) -> None:
    kept = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    quantised = AutoModelForCausalLM.from_pretrained(base, quantization_config=kept, device_map={"": "cpu"})
    (base / "model.safetensors").unlink()
    quantised.save_pretrained(base)
    training = settings(base, **asked)
    config = load_base(training, 0).config
    recorded = as_loaded(training, config)
    assert precision(config) == "nf4"
    assert (recorded.load_in_4bit, recorded.bnb_4bit_quant_type) == (True, "nf4")
    assert (recorded.bnb_4bit_use_double_quant, recorded.bnb_4bit_compute_dtype) == (False, "float32")


COMMON = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
RANDOM: dict[str, dict[str, Any]] = {
    "llama": {**COMMON, "intermediate_size": 32, "attention_dropout": 0.3},
    "opt": {**COMMON, "ffn_dim": 32, "word_embed_proj_dim": 32, "dropout": 0.3},
    "gpt2": {"vocab_size": 64, "n_embd": 32, "n_layer": 1, "n_head": 2, "resid_pdrop": 0.2, "attn_pdrop": 0.2},
    "mixtral": {**COMMON, "num_key_value_heads": 2, "intermediate_size": 32, "num_local_experts": 2,
                "router_jitter_noise": 0.3},
    "gpt_neox": {**COMMON, "intermediate_size": 32, "hidden_dropout": 0.2, "attention_dropout": 0.2},
}  # fmt: skip


@pytest.mark.parametrize("kind", RANDOM)
@pytest.mark.parametrize("disable", [True, False])
def test_nothing_in_the_base_is_random_unless_that_is_asked_for(tmp_path: Path, kind: str, disable: bool) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **RANDOM[kind], initializer_range=0.5, init_std=0.5)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = load_base(settings(tmp_path, disable_dropout=disable), 0).train()
    tokens = torch.arange(20)[None]
    first, second = model(input_ids=tokens).logits, model(input_ids=tokens).logits
    assert torch.equal(first, second) == disable


def test_dropout_of_a_part_of_the_model_is_switched_off_too() -> None:
    config = AutoConfig.for_model("gemma3")
    config.text_config.attention_dropout = config.vision_config.attention_dropout = 0.1
    assert switch_off_dropout(config) == ["attention_dropout", "attention_dropout"]
    assert config.text_config.attention_dropout == config.vision_config.attention_dropout == 0.0


def test_a_configuration_that_is_wrong_is_not_taken_for_a_tokenizer_that_is(base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"num_attention_heads": 3}))
    with pytest.raises(PreflowError, match=r"base_model .*: cannot be loaded \(StrictDataclass"):
        load_tokenizer(settings(base), base)
    with pytest.raises(PreflowError, match=r"base_model .*: cannot be loaded \(StrictDataclass"):
        load_base(settings(base), 0)


def test_padding_has_a_row_in_the_model(base: Path) -> None:
    large_tokenizer(base, 128)
    assert load_tokenizer(settings(base), base).pad_token == "<pad>"
    content = json.loads((base / "tokenizer_config.json").read_text())
    tokens = json.loads((base / "tokenizer.json").read_text())
    tokens["added_tokens"].append({**tokens["added_tokens"][0], "id": 128, "content": "[PAD]"})
    (base / "tokenizer.json").write_text(json.dumps(tokens))
    (base / "tokenizer_config.json").write_text(json.dumps(content | {"pad_token": "[PAD]"}))
    assert load_tokenizer(settings(base), base).pad_token == "</s>"


def test_a_tokenizer_that_cannot_be_read_is_not_called_absent(base: Path) -> None:
    (base / "tokenizer.json").write_text("{")
    with pytest.raises(PreflowError, match=r"the tokenizer of .* cannot be read \(\w+: "):
        load_tokenizer(settings(base), base)


@pytest.mark.parametrize(
    ("changes", "batches", "warmup"),
    [
        ({}, 1, 0), ({}, 160, 2), ({}, 168, 20), ({"warmup_steps": 0}, 1, 0), ({"num_train_epochs": 3}, 56, 20),
        ({"num_processes": 4}, 168, 0), ({"max_steps": 20}, 800, 2),
    ],
)  # fmt: skip
def test_a_warm_up_as_long_as_the_run_is_shortened(
    changes: dict[str, Any], batches: int, warmup: int, caplog: pytest.LogCaptureFixture
) -> None:
    training = TrainingConfig(**changes)
    assert with_fitting_warmup(training, batches).warmup_steps == warmup
    assert ("is shortened to" in caplog.text) == (warmup != training.warmup_steps)
