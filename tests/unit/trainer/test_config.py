"""Every field of TrainingConfig reaches TRL, the model loader or the launcher; none is read by nobody."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from tasks.config import ChatSettings, TrainingConfig
from tasks.trainer import model
from tasks.trainer.trainer import SAME, dpo_config


def another(value: Any) -> Any:
    return not value if isinstance(value, bool) else value + 1 if isinstance(value, int) else value / 2 + 0.01


# field: (a value that is not the default, attribute of DPOConfig, what it must be there)
REACHES_TRL: dict[str, tuple[Any, str, Any]] = {
    **{name: (another(value), name, another(value)) for name, value in TrainingConfig().model_dump(include=SAME).items()
       if isinstance(value, int | float)},
    "loss_type": ("ipo", "loss_type", ["ipo"]),
    "ld_alpha": (0.3, "ld_alpha", 0.3),
    "max_steps": (77, "max_steps", 77),
    "lr_scheduler_type": ("linear", "lr_scheduler_type", "linear"),
    "gradient_checkpointing": (False, "activation_checkpointing", False),
    "report_to": ("tensorboard", "report_to", ["tensorboard"]),
    "sft_weight": (0.5, "loss_weights", [1.0, 0.5]),
    "f_divergence": ("js_divergence", "f_divergence_type", "js_divergence"),
}  # fmt: skip
# Tested below, or where the file names say: the loader, the launcher, the data, the lease, the cached reference.
REACHES_OTHERS = {
    "base_model", "base_revision", "sft_adapter", "load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_compute_dtype",
    "bnb_4bit_use_double_quant", "bf16", "group_by_length", "cache_reference", "num_processes", "grace_seconds",
    "lease_seconds", "measured_label_smoothing", "full_determinism", "checkpoints", *ChatSettings.model_fields,
}  # fmt: skip


def test_every_field_is_accounted_for() -> None:
    assert set(TrainingConfig.model_fields) == set(REACHES_TRL) | REACHES_OTHERS


@pytest.mark.parametrize("field", REACHES_TRL)
def test_a_field_reaches_trl(field: str, tmp_path: Path) -> None:
    value, attribute, expected = REACHES_TRL[field]
    changes = {field: value} | ({"loss_type": "robust"} if field == "label_smoothing" else {})
    default = getattr(dpo_config(TrainingConfig(), tmp_path, evaluate=True), attribute)
    found = getattr(dpo_config(TrainingConfig(**changes), tmp_path, evaluate=True), attribute)
    assert found == expected
    assert default != expected, "the value in the table is the default: the test would prove nothing"


def test_the_sft_term_is_a_second_loss_and_only_what_is_there_is_evaluated(tmp_path: Path) -> None:
    config = dpo_config(TrainingConfig(sft_weight=0.5), tmp_path, evaluate=False)
    assert (config.loss_type, config.eval_strategy) == (["sigmoid", "sft"], "no")
    config = dpo_config(TrainingConfig(), tmp_path, evaluate=True)
    assert (config.loss_weights, config.eval_strategy) == (None, "steps")


@pytest.mark.parametrize("cuda", [True, False])
def test_bf16_is_for_cuda_only(cuda: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr("tasks.trainer.trainer.has_cuda", lambda: cuda)
    monkeypatch.setattr("tasks.trainer.trainer.DPOConfig", lambda **options: seen.update(options))
    dpo_config(TrainingConfig(bf16=True), tmp_path, evaluate=False)
    assert (seen["bf16"], seen["use_cpu"]) == (cuda, not cuda)


def test_the_base_is_loaded_as_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def load(name: str, **options: Any) -> tuple[torch.nn.Module, dict[str, Any]]:
        seen.update(name=name, **options)
        found = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}
        return torch.nn.Linear(1, 1), found

    monkeypatch.setattr(model.AutoModelForCausalLM, "from_pretrained", load)
    monkeypatch.setattr(model.AutoConfig, "from_pretrained", lambda name, **options: LlamaConfig())
    training = TrainingConfig(
        base_model="a/b", base_revision="abc", bnb_4bit_quant_type="fp4",
        bnb_4bit_compute_dtype="float16", bnb_4bit_use_double_quant=False,
    )  # fmt: skip
    model.load_base(training, device=0)
    quantisation = seen["quantization_config"]
    assert (seen["name"], seen["revision"], seen["trust_remote_code"]) == ("a/b", "abc", False)
    assert (quantisation.bnb_4bit_quant_type, quantisation.bnb_4bit_use_double_quant) == ("fp4", False)
    assert str(quantisation.bnb_4bit_compute_dtype) == "torch.float16"
    seen.clear()
    model.load_base(TrainingConfig(load_in_4bit=False), device=0)
    assert "quantization_config" not in seen
