"""TRL's DPOTrainer, made exact: it stops within a micro-batch, saves its whole state and goes on bit for bit."""

import base64
import copy
import dataclasses
import json
import logging
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TrainerCallback
from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import use_adapter

from tasks.config import TrainingConfig
from tasks.errors import PreflowError
from tasks.store.workspace import Workspace
from tasks.train import invariants
from tasks.train.spec import MetricsRow, Progress, kept_steps
from tasks.trainer.checkpoints import Checkpoint, State
from tasks.trainer.data import MicroBatchSampler, as_dataset
from tasks.trainer.model import AdapterWeights, adapter_state, has_cuda, trainable_parameters, weights_digest
from tasks.trainer.reference import ReferenceLogps, ReferencePart, Split
from tasks.trainer.stopping import StopFlag, StopTraining

LOG = logging.getLogger(__name__)

T = TypeVar("T")

# Depend on the clock or on this process alone: they would differ after a preemption.
UNREPEATABLE = ("_runtime", "_per_second", "_time", "total_flos", "train_loss")


@dataclass(frozen=True)
class Hooks:
    """What an `ExactTrainer` reports to: checkpoints to keep, rows of metrics, signs of life, and when to stop."""

    save: Callable[[Checkpoint], float]
    rows: Callable[[list[MetricsRow]], None]
    progress: Callable[[Progress], None]
    stop: StopFlag


# The settings that TRL knows by the same name.
SAME = {
    "beta", "label_smoothing", "ld_alpha", "use_weighting", "router_aux_loss_coef", "max_length", "disable_dropout",
    "learning_rate", "num_train_epochs", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm",
    "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
    "gradient_checkpointing", "logging_steps", "save_steps", "eval_steps", "seed", "report_to",
}  # fmt: skip


def dpo_config(training: TrainingConfig, output_dir: Path, evaluate: bool) -> DPOConfig:
    """Translate the configuration into TRL's; on a machine without CUDA everything is fp32.

    Trackers may write to `output_dir`; `evaluate` says whether there are pairs to evaluate on.
    """
    weighted = training.sft_weight > 0
    return DPOConfig(
        **training.model_dump(include=SAME),
        output_dir=str(output_dir),
        loss_type=[training.loss_type, "sft"] if weighted else [training.loss_type],
        loss_weights=[1.0, training.sft_weight] if weighted else None,
        f_divergence_type=training.f_divergence,
        max_steps=training.max_steps or -1,
        bf16=training.bf16 and has_cuda(),
        use_cpu=not has_cuda(),
        dataloader_pin_memory=has_cuda(),
        logging_strategy="steps",
        logging_nan_inf_filter=False,
        save_strategy="steps",
        eval_strategy="steps" if evaluate else "no",
        ddp_find_unused_parameters=False,
        disable_tqdm=True,
    )


# Overrides and reads insides of trl 1.16 and transformers 5.23: tests/unit/trainer/test_upstream.py lists which, and
# fails when one of them changes its signature.
class ExactTrainer(DPOTrainer):  # type: ignore[misc]  # trl has no types
    """DPO with cached or live reference log-probs, whose state between two steps can be saved and restored exactly.

    Data order depends on seed and epoch alone; evaluation and measuring leave the random state as it was; the state
    kept for a preemption is always that of the last complete step. `policy` is the PEFT model with the SFT adapter as
    trainable `default`, `splits` what to train on, and what to evaluate on if anything.
    """

    train_dataset: Dataset
    eval_dataset: Dataset | None
    loss_types: list[str]
    loss_weights: list[float]
    control: Any
    _metrics: dict[str, Any]

    def __init__(
        self, policy: Any, sft: AdapterWeights, tokenizer: PreTrainedTokenizerBase, splits: Sequence[Split],
        training: TrainingConfig, scratch: Path, hooks: Hooks,
    ) -> None:  # fmt: skip
        train, val = splits[0], splits[1] if len(splits) > 1 else None
        self._training = training
        self._hooks = hooks
        self.sft = sft
        self._order = MicroBatchSampler(train.micro_batches, training.seed)
        self._boundary: State | None = None
        self._restored: Checkpoint | None = None
        self._has_moved = False
        self._first_row: MetricsRow = {}
        self._started = (time.monotonic(), 0)
        expected = sft.digest()
        found = weights_digest(adapter_state(policy))
        invariants.check_reference(found, expected, "the policy that is to be trained")
        if training.router_aux_loss_coef and not hasattr(policy.config.get_text_config(), "output_router_logits"):
            raise PreflowError(
                f"router_aux_loss_coef {training.router_aux_loss_coef:g}: base_model {training.base_model} has no "
                "router. Set it to 0, or give a mixture-of-experts base."
            )
        super().__init__(
            model=policy,
            args=dpo_config(training, scratch, val is not None),
            train_dataset=as_dataset(train.pairs),
            eval_dataset=as_dataset(val.pairs) if val else None,
            processing_class=tokenizer,
            callbacks=[_TrainingHooks(self.begin, training.checkpoints)],
        )
        # TRL rounds the policy of a 4-bit model to bfloat16, in which small updates are lost.
        sft.copy_to(self.model, "default")
        self.precompute_ref_logps = True
        parameters = trainable_parameters(self.model)
        invariants.check_trainable_precision({name: str(p.dtype) for name, p in parameters.items()})
        for name in self.model.peft_config:
            found = weights_digest(adapter_state(self.model, name))
            what = "the reference" if name == "ref" else "the policy at its start"
            invariants.check_reference(found, expected, what)

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset  # tokenized before the model was loaded

    # The reference

    def use_cached_reference(self, train: ReferenceLogps, val: ReferenceLogps | None) -> None:
        """Take the reference's log-probs from now on from the data, and drop the frozen adapter from memory."""
        self.train_dataset = train.add_to(self.train_dataset)
        if val is not None:
            self.eval_dataset = val.add_to(self.eval_dataset)
        if "ref" in self.model.peft_config:
            self.model.delete_adapter("ref")

    def agree(self, found: T | None) -> T | None:
        """Return what this process found, or None where any process found nothing."""
        if self.args.world_size > 1 and not all(gather_object([found is not None])):
            return None
        return found

    def reference_logps(self, split: Split, store: Workspace, key: str) -> ReferenceLogps:
        """Compute the reference's log-probs of a split; of several processes each does its share of micro-batches.

        What a killed process has found is taken from the workspace, where it lies under `key`.
        """
        rank, world = self.args.process_index, self.args.world_size
        rows, part = as_dataset(split.pairs), ReferencePart(store, key, f"{split.name}-{rank + 1}-of-{world}")
        try:
            for batch in split.micro_batches[rank::world][len(part.batches) :]:
                self._hooks.stop.check()
                inputs = self._prepare_inputs(self.data_collator([rows[row] for row in batch]))
                chosen, rejected = self._live_reference(inputs)
                part.add(list(zip(batch, chosen.tolist(), rejected.tolist(), strict=True)))
        except StopTraining:
            part.keep()
            raise
        found = [one for batch in part.batches for one in batch]
        if world > 1:
            found = gather_object(found)
        found.sort()
        return ReferenceLogps([chosen for _, chosen, _ in found], [rejected for _, _, rejected in found])

    def _live_reference(self, inputs: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        with self._in_mode(training=False):
            found: tuple[torch.Tensor, torch.Tensor] = self.compute_ref_log_probs(self.model, inputs)
        return found

    @contextmanager
    def _in_mode(self, training: bool) -> Iterator[None]:
        before = self.model.training
        self.model.train(training)
        try:
            yield
        finally:
            self.model.train(before)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """As TRL, with the live reference (without dropout) where the data holds no log-probs of it."""
        if "ref_chosen_logps" not in inputs:
            chosen, rejected = self._live_reference(inputs)
            inputs = {**inputs, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    # Measuring

    def measure(
        self, batches: Sequence[Sequence[int]], split: Dataset, dpo_only: bool = False, training: bool = False
    ) -> dict[str, float]:
        """Return loss, rewards and log-probs on micro-batches of `split`'s rows as they are now, touching no state.

        `dpo_only` leaves out an added SFT loss, the router's and the weighting of pairs; `training` is the mode, still
        without gradients.
        """
        mode = "train" if training else "eval"
        touched = ("_metrics", "_total_train_tokens", "loss_types", "loss_weights", "aux_loss_enabled", "use_weighting")
        kept = {name: getattr(self, name) for name in touched}
        self._metrics = copy.deepcopy(self._metrics)
        self._metrics[mode].clear()
        if dpo_only:
            self.loss_types, self.loss_weights = self.loss_types[:1], self.loss_weights[:1]
            self.aux_loss_enabled = self.use_weighting = False
        try:
            with _random_state_kept(), self._in_mode(training), torch.no_grad(), self.compute_loss_context_manager():
                losses = [self._loss_of(batch, split) for batch in batches]
            means = {name: sum(values) / len(values) for name, values in self._metrics[mode].items()}
        finally:
            for name, value in kept.items():
                setattr(self, name, value)
        return {"loss": sum(losses) / len(losses), **means}

    def _loss_of(self, batch: Sequence[int], split: Dataset) -> float:
        self._hooks.stop.check()
        columns = [name for name in split.column_names if name in _COLUMNS]
        rows = [{name: row[name] for name in columns} for row in (split[number] for number in batch)]
        inputs = self._prepare_inputs(self.data_collator(rows))
        with self.accelerator.autocast():
            return float(self.compute_loss(self.model, inputs))

    def next_batches(self, step: int) -> list[list[int]]:
        """Return the micro-batches of the optimizer step after `step`."""
        size = self._training.gradient_accumulation_steps * self.args.world_size
        per_epoch = -(-len(self._order.order(0)) // size)
        epoch, within = divmod(step, per_epoch)
        return self._order.order(epoch)[within * size : (within + 1) * size]

    def check_saved(self, folder: Path, split: Split) -> None:
        """Load the adapter in `folder` next to the trained one: on a micro-batch both must give the same log-probs."""
        rows = self.eval_dataset if split.name == "val" else self.train_dataset
        batch = split.micro_batches[:1]
        running = self.measure(batch, rows)
        self.model.load_adapter(str(folder), "saved")
        with use_adapter(self.model, "saved"):
            saved = self.measure(batch, rows)
        self.model.delete_adapter("saved")
        invariants.check_saved_logps(running, saved)

    # Running

    def fit(self, checkpoint: Checkpoint | None) -> None:
        """Train to the last step, from the start or from `checkpoint`.

        Raises `StopTraining` when asked to stop, with the last complete step saved, and `InvariantError`.
        """
        self._restored = checkpoint
        state = Path(self.args.output_dir, "trainer_state.json")
        if checkpoint is None:
            self._measure_start()
        else:  # transformers reads its own state from a file; everything else is put back by the overrides below
            state.write_text(json.dumps(checkpoint.state["trainer_state"]))
        self._started = (time.monotonic(), checkpoint.step if checkpoint else 0)
        try:
            with self._hooks.stop.deferred():
                self.train(resume_from_checkpoint=str(state.parent) if checkpoint else None)
        except StopTraining:
            self.save_boundary()
            raise

    def _measure_start(self) -> None:
        batches = self.next_batches(0)
        first = self.measure(batches, self.train_dataset, dpo_only=True)
        invariants.check_first_loss(first, self._training)
        if self._training.disable_dropout:
            training, evaluating = (
                self.measure(batches[:1], self.train_dataset, dpo_only=True, training=mode)["loss"]
                for mode in (True, False)
            )
            named = "modules and every number of the base's config.json"
            invariants.check_nothing_random(training, evaluating, named)
        settings = self._training
        more = {
            f"{settings.sft_weight:g} times the SFT loss added": settings.sft_weight,
            f"{settings.router_aux_loss_coef:g} times the router's loss added": settings.router_aux_loss_coef,
            "their pairs weighted": settings.use_weighting,
        }
        added = " and ".join(text for text, present in more.items() if present)
        said = f"{settings.loss_type} loss before the first update {first['loss']:.4f}, as it must be"
        self._hooks.progress(Progress("training", said + (f"; the losses from here on have {added}" if added else "")))
        if added:
            first = {**self.measure(batches, self.train_dataset), "dpo_loss": first["loss"]}
        self._first_row = {**first, "epoch": 0.0, "step": 0}

    def begin(self) -> None:
        """Called when training begins: put back what transformers has just set to zero."""
        self.state.save_steps = self.args.save_steps
        if self._restored is None:
            self.state.log_history.append(self._first_row)
            self._hooks.rows(self.state.log_history)
            return
        state = self._restored.state["ranks"][self.args.process_index]
        self._tr_loss += state["tr_loss"]
        self._total_loss_scalar = state["total_loss"]
        self._globalstep_last_logged = self._restored.state["last_logged"]
        self._total_train_tokens = self._restored.state["train_tokens"]
        for name, values in state["metrics"].items():
            self._metrics["train"][name] = list(values)
        self._boundary = copy.deepcopy(self._restored.state)
        self._check_resumed(self._restored.state["policy_digest"])
        self._hooks.rows(self.state.log_history)
        if pending := self._restored.state["pending"]:
            LOG.info("step %d: finishing the log and evaluation that the preemption cut off", self.state.global_step)
            self.model.train()
            self.control = self.callback_handler.on_step_end(self.args, self.state, self.control)
            rate, norm = pending["learning_rate"], pending["grad_norm"]
            self._maybe_log_save_evaluate(self._tr_loss, norm, self.model, None, 0, None, 0.0, learning_rate=rate)

    def _check_resumed(self, expected: str) -> None:
        invariants.check_resumed_weights(weights_digest(adapter_state(self.model)), expected)
        self._has_moved = moved = self.sft.movement(self.model)["weights/moved"] > 0
        if self.state.global_step < self.state.max_steps:
            first = self.measure(self.next_batches(self.state.global_step)[:1], self.train_dataset, dpo_only=True)
            invariants.check_resumed_margin(first, moved)

    def _run_epoch(self, **arguments: Any) -> None:
        self._order.set_epoch(arguments["epoch"])
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(**arguments)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> MicroBatchSampler:
        return self._order

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One micro-batch; a stop is noticed before it begins."""
        self._stop_together()
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        return loss

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        """One evaluation batch; a stop is noticed before it begins."""
        self._stop_together()
        return super().prediction_step(*args, **kwargs)

    def _stop_together(self) -> None:
        if self.args.world_size > 1:
            wanted = torch.tensor([int(self._hooks.stop.is_set)], device=self.args.device)
            if int(self.accelerator.reduce(wanted, "sum")) > 0:
                self._hooks.stop.set("another process of this training was asked to stop")
        self._hooks.stop.check()

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        invariants.check_gradient(float(norm), self.state.global_step + 1)
        return norm

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate without moving the random state."""
        self._hooks.progress(self._progress("evaluating"))
        with _random_state_kept():
            found: dict[str, float] = super().evaluate(*args, **kwargs)
        return found

    def _maybe_log_save_evaluate(
        self, tr_loss: torch.Tensor, grad_norm: Any, *args: Any, learning_rate: float | None = None, **kwargs: Any
    ) -> None:
        norm = None if grad_norm is None else float(grad_norm)
        pending = {"grad_norm": norm, "learning_rate": learning_rate}
        if not self._has_moved and learning_rate:
            invariants.check_weights_moved(self.sft.movement(self.model)["weights/moved"], self.state.global_step)
            self._has_moved = True
        self._boundary = self._capture(pending)
        self._hooks.progress(self._progress("training"))
        super()._maybe_log_save_evaluate(tr_loss, norm, *args, learning_rate=learning_rate, **kwargs)
        self._boundary = self._capture(None)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As TRL, without what depends on the clock; training rows also say how far the weights have moved."""
        repeatable = {name: value for name, value in logs.items() if not name.endswith(UNREPEATABLE)}
        if not repeatable:
            self._metrics["train"].clear()
            return
        if "loss" in repeatable:
            repeatable |= self.sft.movement(self.model)
        super().log(repeatable, None)
        logs.update(repeatable)
        self._hooks.rows(self.state.log_history)

    def _progress(self, phase: str) -> Progress:
        since, first = self._started
        done = self.state.global_step - first
        seconds = time.monotonic() - since
        size = self._training.per_device_train_batch_size * self._training.gradient_accumulation_steps
        last = self.state.log_history[-1] if self.state.log_history else {}
        rows: MetricsRow = {name.removeprefix("eval_"): value for name, value in last.items()}
        return Progress(
            phase=phase,
            step=self.state.global_step,
            total=self.state.max_steps,
            loss=rows.get("loss"),
            accuracy=rows.get("rewards/accuracies"),
            margin=rows.get("rewards/margins"),
            pairs_per_second=done * size * self.args.world_size / seconds if done else None,
            eta_seconds=(self.state.max_steps - self.state.global_step) * seconds / done if done else None,
        )

    # Saving and restoring

    def _capture(self, pending: State | None) -> State:
        rank = {
            "random": random_state(),
            "tr_loss": float(self._tr_loss),
            "total_loss": self._total_loss_scalar,
            "metrics": {name: list(values) for name, values in self._metrics["train"].items()},
        }
        scheduler = {name: value for name, value in self.lr_scheduler.state_dict().items() if name != "lr_lambdas"}
        # Shallow: this happens twice a step, and the rows, ever more of them, are not changed any more.
        trainer = {field.name: getattr(self.state, field.name) for field in dataclasses.fields(self.state)}
        # The operations are an estimate that is not restored exactly; nothing here reads it.
        trainer |= {"log_history": list(self.state.log_history), "stateful_callbacks": {}, "total_flos": 0}
        return {
            "step": self.state.global_step,
            "pending": pending,
            "rank": rank,
            "scheduler": scheduler,
            "groups": [{"lr": g["lr"], "initial_lr": g["initial_lr"]} for g in self.optimizer.param_groups],
            "last_logged": self._globalstep_last_logged,
            "train_tokens": self._total_train_tokens,
            "trainer_state": trainer,
        }

    def save_boundary(self) -> None:
        """Save the last complete step, if there is one; called by all processes together."""
        if self._boundary is None:
            LOG.info("stopped before the first step was complete: nothing to save")
            return
        state = dict(self._boundary)
        rank = state.pop("rank", None)
        ranks = gather_object([rank]) if self.args.world_size > 1 and rank is not None else [rank]
        if rank is not None:
            state["ranks"] = ranks
        if not self.is_world_process_zero():
            return
        policy = adapter_state(self.model)
        state["policy_digest"] = weights_digest(policy)
        names = {id(parameter): name for name, parameter in trainable_parameters(self.model).items()}
        optimizer = {
            f"{names[id(parameter)]}|{slot}": torch.as_tensor(value)
            for parameter, slots in self.optimizer.state.items()
            for slot, value in slots.items()
        }
        self._commit(Checkpoint(state["step"], dict(policy), optimizer, state))

    def _commit(self, checkpoint: Checkpoint) -> None:
        try:
            seconds = self._hooks.save(checkpoint)
        except OSError as error:
            if checkpoint.step in kept_steps(self.state.max_steps, self._training.checkpoints):
                self._hooks.stop.set(  # all processes together; the next start goes on from the one before
                    f"the checkpoint of step {checkpoint.step}, which training.checkpoints keeps, could not be written "
                    f"({error}): free space in the workspace"
                )
            LOG.error(
                "checkpoint of step %d could not be written (%s): free space in the workspace. If it is preempted now, "
                "it resumes from the checkpoint before", checkpoint.step, error,
            )  # fmt: skip
            return
        LOG.info("checkpoint of step %d committed, checkpoint_seconds %.2f", checkpoint.step, seconds)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._boundary = self._capture(None)
        self.save_boundary()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        assert self._restored is not None
        self._put(self._restored.policy)

    def _put(self, policy: Mapping[str, torch.Tensor]) -> None:
        state = adapter_state(self.model)
        for name, tensor in policy.items():
            state[name].copy_(tensor)

    @contextmanager
    def holding(self, policy: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Have the adapter hold the weights of another step for the time of the block."""
        own = {name: tensor.clone() for name, tensor in adapter_state(self.model).items()}
        try:
            self._put(policy)
            yield
        finally:
            self._put(own)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        assert self._restored is not None
        state: State = {}
        for key, tensor in self._restored.optimizer.items():
            name, _, slot = key.rpartition("|")
            state.setdefault(name, {})[slot] = tensor
        names = {id(parameter): name for name, parameter in trainable_parameters(self.model).items()}
        groups = self.optimizer.state_dict()["param_groups"]
        ordered = [names[id(p)] for group in self.optimizer.param_groups for p in group["params"]]
        self.optimizer.load_state_dict(
            {"state": {i: state[name] for i, name in enumerate(ordered) if name in state}, "param_groups": groups}
        )
        for group, saved in zip(self.optimizer.param_groups, self._restored.state["groups"], strict=True):
            group.update(saved)
        self.lr_scheduler.load_state_dict({**self.lr_scheduler.state_dict(), **self._restored.state["scheduler"]})

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        assert self._restored is not None
        set_random_state(self._restored.state["ranks"][self.args.process_index]["random"])


_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps", "ref_rejected_logps")


class _TrainingHooks(TrainerCallback):  # type: ignore[misc]  # transformers is not followed
    """Let the trainer restore its state when training begins, log the last step, and save those that are kept."""

    def __init__(self, begin: Callable[[], None], checkpoints: int) -> None:
        self._begin = begin
        self._checkpoints = checkpoints

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_log = control.should_log or state.global_step >= state.max_steps
        control.should_save = control.should_save or state.global_step in kept_steps(state.max_steps, self._checkpoints)


def random_state() -> State:
    """Return the state of every random generator of this process, JSON-ready."""
    version, numbers, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = numpy.random.get_state()
    tensors = {"torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state() if has_cuda() else None}
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [kind, [int(key) for key in keys], int(position), int(has_gauss), float(cached)],
        **{name: found if found is None else base64.b64encode(found.cpu().numpy().tobytes()).decode()
           for name, found in tensors.items()},
    }  # fmt: skip


def set_random_state(state: Mapping[str, Any]) -> None:
    """Put back what `random_state` returned."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = state["numpy"]
    numpy.random.set_state((kind, numpy.array(keys, dtype=numpy.uint32), *rest))
    for name, put in (("torch", torch.set_rng_state), ("cuda", torch.cuda.set_rng_state)):
        if state[name] is not None and (name == "torch" or has_cuda()):
            put(torch.frombuffer(bytearray(base64.b64decode(state[name])), dtype=torch.uint8))


@contextmanager
def _random_state_kept() -> Iterator[None]:
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)
