"""What the exact trainer overrides or reads of transformers and TRL is there, with the arguments it takes."""

import inspect

import pytest
from transformers import Trainer
from trl import DPOTrainer

from tasks.trainer.trainer import ExactTrainer

# As in trl 1.16 and transformers 5.23: the method, whose it is, and its arguments.
OVERRIDDEN: dict[str, tuple[type, str]] = {
    "_prepare_dataset": (DPOTrainer, "dataset processing_class args dataset_name"),
    "compute_loss": (DPOTrainer, "model inputs return_outputs num_items_in_batch"),
    "evaluate": (Trainer, "eval_dataset ignore_keys metric_key_prefix"),
    "log": (DPOTrainer, "logs start_time"),
    "prediction_step": (DPOTrainer, "model inputs prediction_loss_only ignore_keys"),
    "training_step": (DPOTrainer, "args kwargs"),
    "_save_checkpoint": (DPOTrainer, "model trial"),
    "_get_grad_norm": (Trainer, "model grad_norm"),
    "_get_train_sampler": (Trainer, "train_dataset"),
    "_load_from_checkpoint": (Trainer, "resume_from_checkpoint model"),
    "_load_optimizer_and_scheduler": (Trainer, "checkpoint"),
    "_load_rng_state": (Trainer, "checkpoint"),
    "_maybe_log_save_evaluate": (
        Trainer, "tr_loss grad_norm model trial epoch ignore_keys_for_eval start_time learning_rate",
    ),
    "_run_epoch": (
        Trainer,
        "model epoch train_dataloader steps_in_epoch num_update_steps_per_epoch trial ignore_keys_for_eval start_time "
        "resume_from_checkpoint epochs_trained steps_trained_in_current_epoch",
    ),
}  # fmt: skip
READ = {
    DPOTrainer: ("_metrics", "_total_train_tokens", "aux_loss_enabled", "precompute_ref_logps", "use_weighting"),
    Trainer: ("_globalstep_last_logged", "_total_loss_scalar", "_tr_loss"),
}


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_an_overridden_method_has_the_arguments_of_before(name: str) -> None:
    owner, arguments = OVERRIDDEN[name]
    assert name in vars(owner)
    assert list(inspect.signature(getattr(owner, name)).parameters)[1:] == arguments.split()


def test_every_override_is_listed() -> None:
    ours = {
        name for name, value in vars(ExactTrainer).items() if inspect.isfunction(value) and hasattr(DPOTrainer, name)
    }
    assert ours - {"__init__"} == set(OVERRIDDEN)


@pytest.mark.parametrize("owner", READ)
def test_attributes_that_are_read_are_set(owner: type) -> None:
    source = inspect.getsource(owner)
    for name in READ[owner]:
        assert f"self.{name} = " in source, name
