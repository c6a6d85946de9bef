"""The trainer on a tiny model: invariants, the reference in both forms, losses, and the two old bugs."""

import copy
import math
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from tasks.config import TrainingConfig
from tasks.errors import PreflowError
from tasks.store.workspace import Workspace
from tasks.train.health import Run, assess
from tasks.train.invariants import InvariantError, loss_at_margin_zero
from tasks.train.spec import Progress
from tasks.trainer.checkpoints import Checkpoint
from tasks.trainer.data import load_pairs, make_micro_batches
from tasks.trainer.model import (
    AdapterWeights,
    adapter_state,
    load_base,
    load_policy,
    load_tokenizer,
    save_adapter,
    trainable_parameters,
)
from tasks.trainer.reference import ReferenceLogps, Split
from tasks.trainer.stopping import StopFlag, StopTraining
from tasks.trainer.trainer import ExactTrainer, Hooks
from tests.fakes.tiny_training import TinyWorld, build_adapter


class Bench:
    """A trainer and everything it reported."""

    def __init__(self, world: TinyWorld, scratch: Path, training: TrainingConfig, policy: Any = None) -> None:
        self.rows: list[dict[str, Any]] = []
        self.saved: list[Checkpoint] = []
        self.signs: list[Progress] = []
        tokenizer = load_tokenizer(training, world.adapter)
        self.train = self._split(world, "train", tokenizer, training)
        self.val = self._split(world, "val", tokenizer, training)
        policy = policy or load_policy(load_base(training, 0), world.adapter, tokenizer)
        hooks, splits = Hooks(self._save, self._keep, self.signs.append, StopFlag()), [self.train, self.val]
        scratch.mkdir(exist_ok=True)
        sft = AdapterWeights(world.adapter)
        self.trainer = ExactTrainer(policy, sft, tokenizer, splits, training, scratch, hooks)

    def _save(self, checkpoint: Checkpoint) -> float:
        self.saved.append(copy.deepcopy(checkpoint))  # its tensors are those in training
        return 0.0

    def _keep(self, rows: list[dict[str, Any]]) -> None:
        self.rows = [dict(row) for row in rows]

    @staticmethod
    def _split(world: TinyWorld, name: str, tokenizer: Any, training: TrainingConfig) -> Split:
        folder = Path(world.preferences.uri).parent
        pairs = load_pairs(str(folder / f"{name}.jsonl"), Workspace(folder), tokenizer, training.max_length).pairs
        lengths = [pair.length(training.max_length) for pair in pairs]
        return Split(name, pairs, make_micro_batches(lengths, 2, name == "train", 0))


def fitted(world: TinyWorld, scratch: Path, training: TrainingConfig) -> Bench:
    bench = Bench(world, scratch, training)
    bench.trainer.fit(None)
    return bench


def adapter_of(trainer: ExactTrainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in adapter_state(trainer.model).items()}


def assert_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


LOSSES: list[tuple[str, dict[str, Any], float]] = [
    ("sigmoid", {}, math.log(2)),
    ("sigmoid", {"sft_weight": 1.0}, math.log(2)),
    ("hinge", {}, 1.0),
    ("ipo", {}, 25.0),
    ("robust", {"label_smoothing": 0.2}, math.log(2)),
    ("sigmoid_norm", {}, math.log(2)),
    ("apo_zero", {}, 1.0),
    ("sigmoid", {"ld_alpha": 0.5}, math.log(2)),
    ("sigmoid", {"use_weighting": True}, math.log(2)),
    ("sigmoid", {"f_divergence": "js_divergence"}, math.log(2)),
]


@pytest.mark.parametrize(("loss_type", "options", "first"), LOSSES)
def test_every_loss_starts_at_its_value_and_falls(
    world: TinyWorld, tmp_path: Path, loss_type: str, options: dict[str, Any], first: float
) -> None:
    training = world.config(loss_type=loss_type, max_steps=8, logging_steps=1, eval_steps=8, **options)
    bench = fitted(world, tmp_path, training)
    start, trained = bench.rows[0], [row for row in bench.rows if "loss" in row]
    assert start["step"] == 0
    assert start.get("dpo_loss", start["loss"]) == pytest.approx(first, abs=1e-6)
    assert f"{loss_type} loss before the first update {first:.4f}, as it must be" in bench.signs[0].message
    assert ("SFT loss added" in bench.signs[0].message) == ("sft_weight" in options)
    assert (start["rewards/margins"], start["rewards/accuracies"]) == (0.0, 0.0)
    assert trained[-1]["rewards/margins"] > 0
    assert min(row["loss"] for row in trained[1:]) < start["loss"]
    assert loss_at_margin_zero(training) == pytest.approx(first)
    if "sft_weight" in options:
        assert start["loss"] > start["dpo_loss"] + 1
    assert bench.rows[-1]["step"] == 8
    assert "eval_loss" in bench.rows[-1]


@pytest.mark.parametrize(("loss_type", "options", "first"), LOSSES)
def test_equal_sides_leave_the_sft_term_alone(
    world: TinyWorld, tmp_path: Path, loss_type: str, options: dict[str, Any], first: float
) -> None:
    """What `judging.unsure_for_sft` trains on: no loss of DPO has a gradient there, also far from the reference."""
    trainer = Bench(world, tmp_path, world.config(loss_type=loss_type, **options)).trainer
    rows = [trainer.train_dataset[number] for number in (0, 1)]
    weights = trainable_parameters(trainer.model)
    with torch.no_grad():
        for weight in weights.values():
            weight.add_(torch.full_like(weight, 0.05))

    def gradient(rows: list[dict[str, Any]], names: list[str]) -> torch.Tensor:
        trainer.loss_types, trainer.loss_weights = names, [1.0] * len(names)
        trainer.model.zero_grad()
        trainer.compute_loss(trainer.model, trainer._prepare_inputs(trainer.data_collator(rows))).backward()
        return torch.cat([weight.grad.flatten() for weight in weights.values()])

    equal = [{**row, "rejected_ids": row["chosen_ids"]} for row in rows]
    of_pairs = gradient(rows, [loss_type])
    assert gradient(equal, [loss_type]).norm() < 1e-5 * of_pairs.norm()
    if "use_weighting" in options:
        return  # which has no SFT term next to it
    of_sft = gradient(equal, ["sft"])
    assert (gradient(equal, [loss_type, "sft"]) - of_sft).norm() < 1e-5 * of_sft.norm()


def test_cached_and_live_reference_give_the_same_bits(world: TinyWorld, tmp_path: Path) -> None:
    """Two epochs and a half, with dropout on; the cached one holds no reference adapter in memory."""
    training = world.config(max_steps=18, disable_dropout=False)
    live = fitted(world, tmp_path / "live", training)
    cached = Bench(world, tmp_path / "cached", training)
    cached.trainer.use_cached_reference(
        *(cached.trainer.reference_logps(split, Workspace(tmp_path), "key") for split in (cached.train, cached.val))
    )
    assert list(cached.trainer.model.peft_config) == ["default"]
    assert not [name for name, _ in cached.trainer.model.named_parameters() if ".ref." in name]
    cached.trainer.fit(None)
    assert cached.rows == live.rows
    assert_equal(adapter_of(cached.trainer), adapter_of(live.trainer))


def test_a_preempted_reference_pass_goes_on_where_it_was(
    world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(world, tmp_path / "bench", world.config())
    whole = bench.trainer.reference_logps(bench.train, Workspace(tmp_path / "whole"), "key")
    compute, computed, preempted = bench.trainer.compute_ref_log_probs, list[int](), [3]

    def count(model: Any, inputs: Any) -> Any:
        computed.append(len(computed))
        if computed[-1] in preempted:
            raise StopTraining
        return compute(model, inputs)

    monkeypatch.setattr(bench.trainer, "compute_ref_log_probs", count)
    with pytest.raises(StopTraining):
        bench.trainer.reference_logps(bench.train, Workspace(tmp_path), "key")
    assert bench.trainer.reference_logps(bench.train, Workspace(tmp_path), "key") == whole
    assert len(computed) == len(bench.train.micro_batches) + len(preempted)


def test_gradient_checkpointing_changes_nothing(world: TinyWorld, tmp_path: Path) -> None:
    plain = fitted(world, tmp_path / "plain", world.config(max_steps=4))
    checkpointing = fitted(world, tmp_path / "checkpointing", world.config(max_steps=4, gradient_checkpointing=True))
    assert checkpointing.trainer.model.get_base_model().is_gradient_checkpointing
    assert_equal(adapter_of(checkpointing.trainer), adapter_of(plain.trainer))


@pytest.mark.parametrize("learnable", [True, False])
def test_it_learns_what_is_there_and_says_when_nothing_is(tmp_path: Path, learnable: bool) -> None:
    """Held-out accuracy is strong on pairs with a rule, and at chance on shuffled labels; the health page says so."""
    world = TinyWorld.build(tmp_path, train=160, val=64, learnable=learnable)
    training = world.config(max_steps=40, gradient_accumulation_steps=4, learning_rate=5e-3, eval_steps=20)
    bench = fitted(world, tmp_path / "bench", training)
    accuracy = next(r for r in assess(Run(bench.rows, training, 160, 64)).readings if r.name == "rewards/accuracies")
    assert accuracy.ok == learnable
    assert accuracy.value >= 0.70 if learnable else "at chance" in accuracy.meaning


def test_the_reference_is_that_of_trl_to_the_last_bit(world: TinyWorld, tmp_path: Path) -> None:
    training = world.config()
    bench = Bench(world, tmp_path / "ours", training)
    tokenizer = AutoTokenizer.from_pretrained(world.base)
    policy = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(world.base), str(world.adapter), is_trainable=True
    )
    rows = [{name: getattr(pair, name) for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
            for pair in bench.train.pairs]  # fmt: skip
    config = DPOConfig(
        output_dir=str(tmp_path / "theirs"), use_cpu=True, bf16=False, report_to="none", gradient_checkpointing=False
    )

    class Prepared(DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
            return dataset

    plain = Prepared(model=policy, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    ours = bench.trainer.reference_logps(bench.train, Workspace(tmp_path), "key")
    for batch in bench.train.micro_batches:
        chosen, rejected = plain.compute_ref_log_probs(plain.model, plain.data_collator([rows[row] for row in batch]))
        assert chosen.tolist() == [ours.chosen[row] for row in batch]
        assert rejected.tolist() == [ours.rejected[row] for row in batch]


@pytest.fixture(scope="module")
def alone() -> Iterator[ProcessPoolExecutor]:
    """A process in which nothing but training happens, as in a trainer's.

    Here a thread that another test has left may draw from the random numbers whose state is compared.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        yield pool


@pytest.mark.long  # test_training_exactness compares the bytes after a kill
@pytest.mark.parametrize("load_in_4bit", [False, True])
def test_resuming_is_exact(world: TinyWorld, tmp_path: Path, load_in_4bit: bool, alone: ProcessPoolExecutor) -> None:
    alone.submit(compare_resumed, world, tmp_path, load_in_4bit).result()


def compare_resumed(world: TinyWorld, tmp_path: Path, load_in_4bit: bool) -> None:
    training = world.config(load_in_4bit=load_in_4bit, disable_dropout=False)
    whole = fitted(world, tmp_path / "whole", training)
    checkpoint = whole.saved[0]
    assert checkpoint.step == 4
    resumed = Bench(world, tmp_path / "resumed", training)
    resumed.trainer.fit(checkpoint)
    assert resumed.rows == whole.rows
    assert_equal(adapter_of(resumed.trainer), adapter_of(whole.trainer))
    assert resumed.saved[-1].state == whole.saved[-1].state
    assert_equal(resumed.saved[-1].optimizer, whole.saved[-1].optimizer)


def test_under_4_bits_adapter_and_optimizer_are_fp32_and_move(world: TinyWorld, tmp_path: Path) -> None:
    """With the rounding to bfloat16 that TRL applies, a learning rate this small moves next to nothing."""
    bench = fitted(world, tmp_path, world.config(load_in_4bit=True, learning_rate=5e-6, warmup_steps=0))
    assert {tensor.dtype for tensor in bench.saved[-1].optimizer.values()} == {torch.float32}
    assert {tensor.dtype for tensor in adapter_of(bench.trainer).values()} == {torch.float32}
    last = [row for row in bench.rows if "weights/moved" in row][-1]
    assert last["weights/moved"] > 0.8


def test_under_4_bits_an_evaluation_leaves_the_gradient_alone(world: TinyWorld, tmp_path: Path) -> None:
    """bitsandbytes 0.50 repacks the base at the first evaluation on some CPUs: hardly any gradient is left."""
    trainer = Bench(world, tmp_path, world.config(load_in_4bit=True)).trainer
    inputs = trainer.data_collator([trainer.train_dataset[row] for row in range(2)])

    def gradient() -> float:
        trainer.model.zero_grad()
        trainer.model.train()
        trainer.compute_loss(trainer.model, dict(inputs)).backward()
        return sum(float(p.grad.norm()) for p in trainer.model.parameters() if p.grad is not None)

    before = gradient()
    trainer.measure([[0, 1]], trainer.train_dataset)
    assert gradient() == before


def test_old_bug_the_base_as_reference_is_stopped(world: TinyWorld, tmp_path: Path) -> None:
    """What trl up to 0.28 did: no frozen copy, so that the reference is the model with its adapter switched off."""
    bench = Bench(world, tmp_path, world.config())
    bench.trainer.model.delete_adapter("ref")
    with pytest.raises(InvariantError, match="invariant first-loss") as caught:
        bench.trainer.fit(None)
    assert caught.value.name == "first-loss"
    assert bench.rows == []


def test_old_bug_a_checkpoint_loaded_as_adapter_is_stopped(world: TinyWorld, tmp_path: Path) -> None:
    """The policy built from a checkpoint makes TRL clone the checkpoint as reference: the first loss looks perfect."""
    training = world.config()
    first = fitted(world, tmp_path / "first", training)
    checkpoint = tmp_path / "checkpoint"
    save_adapter(first.trainer.model, world.adapter, checkpoint)
    tokenizer = load_tokenizer(training, world.adapter)
    policy = load_policy(load_base(training, 0), checkpoint, tokenizer)
    with pytest.raises(InvariantError, match="checkpoint") as caught:
        Bench(world, tmp_path / "second", training, policy)
    assert caught.value.name == "reference-is-sft"


def test_a_resume_that_loads_nothing_is_stopped(
    world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = world.config()
    whole = fitted(world, tmp_path / "whole", training)
    monkeypatch.setattr(ExactTrainer, "_load_from_checkpoint", lambda *_: None)
    with pytest.raises(InvariantError, match="resumed-weights"):
        Bench(world, tmp_path / "resumed", training).trainer.fit(whole.saved[0])


def test_a_gradient_that_is_not_finite_stops_before_the_update(
    world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(world, tmp_path, world.config())
    monkeypatch.setattr(DPOTrainer, "_get_grad_norm", lambda *_, **__: torch.tensor(float("nan")))
    before = adapter_of(bench.trainer)
    with pytest.raises(InvariantError, match="finite-gradient"):
        bench.trainer.fit(None)
    assert_equal(adapter_of(bench.trainer), before)


def test_a_saved_adapter_that_differs_is_stopped(world: TinyWorld, tmp_path: Path) -> None:
    bench = fitted(world, tmp_path / "bench", world.config(max_steps=4, warmup_steps=0))
    save_adapter(bench.trainer.model, world.adapter, tmp_path / "good")
    bench.trainer.check_saved(tmp_path / "good", bench.val)
    assert list(bench.trainer.model.peft_config) == ["default", "ref"]
    with pytest.raises(InvariantError, match="saved-adapter"):
        bench.trainer.check_saved(world.adapter, bench.val)


def test_measuring_touches_no_state(world: TinyWorld, tmp_path: Path) -> None:
    bench = Bench(world, tmp_path, world.config(disable_dropout=False))
    state = torch.get_rng_state()
    first = bench.trainer.measure([[0, 1]], bench.trainer.train_dataset)
    assert first == bench.trainer.measure([[0, 1]], bench.trainer.train_dataset)
    assert torch.equal(torch.get_rng_state(), state)
    assert not bench.trainer._metrics["train"]


def test_the_saved_adapter_is_what_peft_and_vllm_read(world: TinyWorld, tmp_path: Path) -> None:
    bench = Bench(world, tmp_path / "bench", world.config())
    save_adapter(bench.trainer.model, world.adapter, tmp_path / "adapter")
    names = sorted(file.name for file in (tmp_path / "adapter").iterdir())
    assert names == ["adapter_config.json", "adapter_model.safetensors"]
    assert dict(AdapterWeights(tmp_path / "adapter")).keys() == dict(AdapterWeights(world.adapter)).keys()
    assert AdapterWeights(tmp_path / "adapter").digest() == AdapterWeights(world.adapter).digest()


def test_an_adapter_of_another_base_is_named(world: TinyWorld, tmp_path: Path) -> None:
    training = world.config()
    other = build_adapter(tmp_path / "other", world.base, target_modules=["q_proj"])
    (other / "adapter_config.json").write_bytes((world.adapter / "adapter_config.json").read_bytes())
    with pytest.raises(PreflowError, match=r"SFT adapter .*other: its weight .* does not fit the base"):
        load_policy(load_base(training, 0), other, load_tokenizer(training, other))


def test_wrong_cached_values_are_caught_at_the_start(world: TinyWorld, tmp_path: Path) -> None:
    bench = Bench(world, tmp_path, world.config())
    right, val = (
        bench.trainer.reference_logps(split, Workspace(tmp_path), "key") for split in (bench.train, bench.val)
    )
    bench.trainer.use_cached_reference(ReferenceLogps([value + 5 for value in right.chosen], right.rejected), val)
    with pytest.raises(InvariantError, match="first-loss"):
        bench.trainer.fit(None)
