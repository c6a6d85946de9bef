"""Whole trainings of a few steps in this process: bases and adapters of many kinds, and runs that are very short."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from tasks.config import TrainingConfig
from tasks.errors import DiskFullError, PreflowError
from tasks.store.workspace import AdapterRef, PreferencesRef, Workspace, folder_digest
from tasks.train.launch import base_digest, check_training_inputs, training_key
from tasks.train.spec import TrainingSpec
from tasks.trainer.checkpoints import Checkpoint, CheckpointStore
from tasks.trainer.run import TrainingRun, gpu_usd_per_hour
from tasks.trainer.stopping import StopFlag, StopTraining
from tests.fakes.process import ROOT
from tests.fakes.tiny_training import build_adapter, build_base, pairs, write_preferences

QV = ["q_proj", "v_proj"]
SIZES = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.1,
}  # fmt: skip
EXPERTS = {"num_experts_per_tok": 2, "router_aux_loss_coef": 0.02}
MODELS: dict[str, dict[str, Any]] = {
    "mixtral": {**SIZES, **EXPERTS, "num_local_experts": 4},
    "qwen3_moe": {**SIZES, **EXPERTS, "num_experts": 4, "moe_intermediate_size": 32, "head_dim": 16},
    "llama": {**SIZES, "attention_dropout": 0.3},
    "opt": {"vocab_size": 128, "hidden_size": 32, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "max_position_embeddings": 512, "word_embed_proj_dim": 32, "dropout": 0.2, "init_std": 0.1},
}  # fmt: skip


class Run:
    """One training below a folder; `base` takes the place of the tiny Llama."""

    def __init__(self, root: Path) -> None:
        self.root, self.base, self.sft = root, root / "base", root / "sft"
        self.preferences: PreferencesRef = write_preferences(root / "preferences", pairs(6, 3), pairs(2, 4))
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(build_base(self.base))

    def use(self, kind: str, **changes: Any) -> None:
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **{**MODELS[kind], **changes})
        (self.base / "model.safetensors").unlink()
        AutoModelForCausalLM.from_config(config).save_pretrained(self.base)

    def train(self, **changes: Any) -> "Run":
        settings: dict[str, Any] = {
            "base_model": str(self.base), "sft_adapter": str(self.sft), "load_in_4bit": False, "learning_rate": 1e-2,
            "warmup_steps": 0, "max_steps": 2, "gradient_accumulation_steps": 1, "logging_steps": 1, "eval_steps": 2,
            "max_length": 128, "gradient_checkpointing": False,
        }  # fmt: skip
        self.training = TrainingConfig(**{**settings, **changes})
        check_training_inputs(self.training)
        key = training_key(self.preferences, self.training)
        self.folder = self.root / "workspace" / "training" / key
        spec = TrainingSpec(
            preferences=self.preferences, workspace=str(self.root / "workspace"), training=self.training, key=key,
            sft_sha256=folder_digest(str(self.sft)), base_sha256=base_digest(self.training),
        )  # fmt: skip
        scratch = self.root / "scratch"
        scratch.mkdir(exist_ok=True)
        TrainingRun(spec, Workspace(spec.workspace), scratch, lambda _: None, StopFlag()).execute()
        return self

    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").open()]

    def manifest(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "manifest.json").read_text())
        return found


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def fill_disk(monkeypatch: pytest.MonkeyPatch, method: str, ending: str, times: int) -> None:
    """Have the disk full the first times that a method of the workspace is called for such an address."""
    original, left = getattr(Workspace, method), [times]

    def call(store: Workspace, *arguments: Any) -> Any:
        if left[0] and any(str(argument).endswith(ending) for argument in arguments):
            left[0] -= 1
            raise DiskFullError("the disk is full")
        return original(store, *arguments)

    monkeypatch.setattr(Workspace, method, call)


@pytest.mark.parametrize("kind", MODELS)
def test_experts_and_dropout_that_is_no_module_leave_the_first_loss_alone(run: Run, kind: str) -> None:
    run.use(kind)
    build_adapter(run.sft, run.base, target_modules=QV)
    rows = run.train().rows()
    assert rows[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)
    assert rows[1]["loss"] == pytest.approx(0.6931472, abs=1e-5)


def test_a_routers_loss_that_is_asked_for_is_added_and_no_part_of_the_invariant(run: Run) -> None:
    run.use("mixtral")
    build_adapter(run.sft, run.base, target_modules=QV)
    first = run.train(router_aux_loss_coef=0.5).rows()[0]
    assert first["dpo_loss"] == pytest.approx(0.6931472, abs=1e-6)
    assert first["loss"] > 0.6931472 + 0.5  # the router's loss is 1 where experts are evenly used, at the least


def test_an_adapter_with_the_names_of_an_older_transformers_is_taken(run: Run) -> None:
    config = AutoConfig.for_model("gemma3", text_config={**SIZES, "head_dim": 16, "sliding_window": 16})
    config.vision_config.update({"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
                                 "num_attention_heads": 2, "image_size": 28, "patch_size": 14})  # fmt: skip
    config.mm_tokens_per_image, config.image_token_index = 1, 100
    (run.base / "model.safetensors").unlink()
    AutoModelForImageTextToText.from_config(config).save_pretrained(run.base)
    build_adapter(run.sft, run.base, target_modules=r".*language_model.*\.(q_proj|v_proj)")
    file = run.sft / "adapter_model.safetensors"
    prefixes = ("base_model.model.model.language_model.", "base_model.model.language_model.model.")
    old = {name.replace(*prefixes): weight for name, weight in load_file(file).items()}
    assert all(name.startswith(prefixes[1]) for name in old)
    save_file(old, file, metadata={"format": "pt"})
    assert run.train().rows()[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)


def test_ranks_that_differ_by_module_are_trained_and_the_highest_is_recorded(run: Run) -> None:
    build_adapter(run.sft, run.base, target_modules=QV, rank_pattern={"v_proj": 8}, alpha_pattern={"v_proj": 32})
    counts = run.train().manifest()["counts"]
    assert counts["lora_rank"] == 8


def test_a_run_shorter_than_its_warm_up_moves_and_says_so(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    build_adapter(run.sft, run.base)
    run.train(warmup_steps=20, max_steps=None, gradient_accumulation_steps=8)
    assert run.rows()[-1]["step"] == 1
    assert "warmup_steps 20 is not less than the 1 optimizer steps" in caplog.text
    assert run.manifest()["config"]["warmup_steps"] == 0
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (run.sft, run.folder / "adapter"))
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_an_adapter_that_did_not_move_is_not_committed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    build_adapter(run.sft, run.base)
    monkeypatch.setattr("torch.optim.lr_scheduler.LambdaLR.get_lr", lambda scheduler: [0.0] * 2)
    with pytest.raises(PreflowError, match=r"adapter-moves.*not committed"):
        run.train()
    assert not (run.folder / "adapter").exists()


@pytest.mark.parametrize(("val", "said"), [("", None), ("\n", "has no rows"), ("too long", "can be trained on")])
def test_without_usable_validation_pairs_nothing_is_evaluated(
    run: Run, val: str, said: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    (long,) = pairs(1, 9)
    long["prompt"][0]["content"] = " ".join(["w1"] * 200)
    Path(run.preferences.sibling("val.jsonl")).write_text(json.dumps(long) if val == "too long" else val)
    build_adapter(run.sft, run.base)
    assert run.train().rows()[-1]["step"] == 2
    assert not any("eval_loss" in row for row in run.rows())
    assert ("goes on without an evaluation" in caplog.text) == (said is not None)
    assert said is None or said in caplog.text


def test_metrics_that_cannot_be_written_cost_no_training(
    run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    build_adapter(run.sft, run.base)
    fill_disk(monkeypatch, "write_bytes", "metrics.jsonl", 2)
    assert [row["step"] for row in run.train().rows()] == [0, 1, 2, 2]
    assert "the newest metrics could not be written" in caplog.text


def test_a_configuration_over_which_peft_stumbles_is_no_traceback(run: Run) -> None:
    build_adapter(run.sft, run.base)
    file = run.sft / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"megatron_config": {"a": 1}}))
    with pytest.raises(PreflowError, match=r"SFT adapter .*\(ModuleNotFoundError: .*megatron"):
        run.train()


@pytest.mark.parametrize("failures", [1, 2])
def test_a_full_disk_at_the_end_costs_old_checkpoints_but_no_training(
    run: Run, failures: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where removing them is not enough, the last step is kept, and the next start only commits."""
    build_adapter(run.sft, run.base)
    fill_disk(monkeypatch, "commit_folder", "adapter", failures)
    if failures == 2:
        with pytest.raises(DiskFullError):
            run.train(max_steps=3, save_steps=1)
        assert [folder.name for folder in (run.folder / "checkpoints").iterdir()] == ["step-000003"]
        caplog.set_level(logging.INFO)
    run.train(max_steps=3, save_steps=1)
    assert (run.folder / "adapter" / "adapter_model.safetensors").is_file()
    assert ("resuming from the checkpoint of step 3" in caplog.text) == (failures == 2)
    assert "no room for the finished adapter" in caplog.text


@pytest.mark.slow
def test_the_adapters_of_earlier_steps_are_kept_as_they_were(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is what a training leaves, and the training is whole only with all of them; a cut-off end is made again."""
    build_adapter(run.sft, run.base)
    settings: dict[str, Any] = {"max_steps": 6, "save_steps": 100, "lr_scheduler_type": "constant_with_warmup"}
    original = CheckpointStore.prune
    monkeypatch.setattr(CheckpointStore, "prune", lambda *args, **more: original(*args, **{**more, "kept": 1}))
    with monkeypatch.context() as broken:
        fill_disk(broken, "write_manifest", "", 1)
        with pytest.raises(DiskFullError):
            run.train(checkpoints=3, **settings)
    folder = run.train(checkpoints=3, **settings).folder
    assert sorted(path.parent.name for path in folder.glob("*/manifest.json")) == ["step-000002", "step-000004"]
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-000006"], "its size is given back"
    store = Workspace(folder)
    for step in (2, 4):
        made = store.read_manifest(str(folder / f"step-{step:06d}" / "manifest.json"))
        assert store.is_intact(made.artifact)
        assert made.counts["steps"] == step
        assert {"preferences", "training"} <= {origin.kind for origin in made.upstream}
        assert [row["step"] for row in store.read_rows(made.artifact.sibling("metrics.jsonl"))][-1] == step
    # The very weights that a training of so many steps ends with.
    alone, kept = run.train(**{**settings, "max_steps": 4}).folder, folder / "step-000004"
    for name in ("adapter_model.safetensors", "adapter_config.json", "chat_template.jinja"):
        assert (alone / "adapter" / name).read_bytes() == (kept / "adapter" / name).read_bytes()
    assert (alone / "probe.json").read_bytes() == (kept / "probe.json").read_bytes()
    without = run.train(**settings).folder
    assert without != folder
    assert store.sha256(str(without / "adapter/COMMITTED.json")) == store.sha256(str(folder / "adapter/COMMITTED.json"))
    assert store.find_finished(str(folder / "manifest.json"), AdapterRef)
    (folder / "step-000002" / "adapter" / "adapter_model.safetensors").unlink()
    assert store.find_finished(str(folder / "manifest.json"), AdapterRef) is None


@pytest.mark.slow
@pytest.mark.parametrize("checkpoints", [0, 2])
def test_a_training_goes_on_without_a_checkpoint_unless_it_is_to_be_kept(
    run: Run, checkpoints: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_adapter(run.sft, run.base)
    original = CheckpointStore.save

    def save(store: CheckpointStore, checkpoint: Checkpoint, *more: Any) -> float:
        if checkpoint.step == 2:
            raise OSError("the bucket does not answer")
        return original(store, checkpoint, *more)

    settings = {"max_steps": 4, "save_steps": 1, "checkpoints": checkpoints}
    with monkeypatch.context() as broken:
        broken.setattr(CheckpointStore, "save", save)
        if checkpoints:
            with pytest.raises(StopTraining, match=r"checkpoint of step 2, which .*the bucket does not answer"):
                run.train(**settings)
            assert [path.name for path in (run.folder / "checkpoints").iterdir()] == ["step-000001"]
        else:
            run.train(**settings)
    run.train(**settings)
    assert len(list(run.folder.glob("step-000002/adapter/COMMITTED.json"))) == checkpoints / 2


@pytest.mark.parametrize(
    ("node", "price"), [("gke-preflow-l4-spot-1f-x2", 0.4), ("gke-preflow-l4-on-demand-1f-x2", 1.0), ("worker-1", 0.0)]
)
def test_a_gpu_costs_what_its_kind_of_node_costs(node: str, price: float, monkeypatch: pytest.MonkeyPatch) -> None:
    template = json.loads((ROOT / "deployments" / "l4-spot.job-template.json").read_text())
    monkeypatch.setenv("PREFLOW_GPU_USD_PER_HOUR", template["variables"]["properties"]["gpu_usd_per_hour"]["default"])
    monkeypatch.setenv("PREFLOW_NODE", node)
    assert gpu_usd_per_hour() == price
    monkeypatch.setenv("PREFLOW_GPU_USD_PER_HOUR", f"{node}=0.4 USD")
    assert gpu_usd_per_hour() == 0.0, "a slip in the settings costs a figure and no training"
