"""What the finished adapter says about a few fixed texts: by this a server can prove that it serves this adapter."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from trl.trainer.utils import use_adapter

from tasks.config import TrainingConfig
from tasks.training.data import TokenPair
from tasks.training.model import has_cuda

# Both sides of three pairs show what DPO has moved; 160 tokens fit every server.
PAIRS, MOST_TOKENS = 3, 160


def probe_texts(pairs: Sequence[TokenPair]) -> list[list[int]]:
    """Return both sides of the first pairs as token ids, prompts included, cut to `MOST_TOKENS`."""
    sides = [pair.prompt_ids + side for pair in pairs[:PAIRS] for side in (pair.chosen_ids, pair.rejected_ids)]
    return [ids[:MOST_TOKENS] for ids in sides]


def record_probe(model: Any, sft: Path, texts: Sequence[list[int]], training: TrainingConfig) -> dict[str, Any]:
    """Compute the log-probs of `texts` under the trained adapter, the SFT adapter and the bare base.

    Args:
        model: the policy, with the trained adapter as `default`.
        sft: folder of the SFT adapter.
        texts: token ids.
        training: says how the base was loaded.

    Returns:
        JSON-ready: `base_precision`, and `texts` with `token_ids` and, from the second token on, log-probs in nats
        under `adapter`, `sft` and `base`.
    """
    was_training = model.training
    model.eval()
    model.load_adapter(str(sft), "probe-sft")
    try:
        rows = [_row(model, ids) for ids in texts]
    finally:
        model.delete_adapter("probe-sft")
        model.train(was_training)
    return {"base_precision": _precision(training), "texts": rows}


def _row(model: Any, ids: list[int]) -> dict[str, Any]:
    row: dict[str, Any] = {"token_ids": ids}
    for name, adapter in (("adapter", "default"), ("sft", "probe-sft"), ("base", None)):
        with use_adapter(model, adapter):
            row[name] = _log_probs(model, ids)
    return row


def _log_probs(model: Any, ids: list[int]) -> list[float]:
    tokens = torch.tensor([ids], device=model.device)
    with torch.no_grad():
        logits = model(input_ids=tokens).logits[0, :-1].float()
    found = torch.log_softmax(logits, dim=-1).gather(1, tokens[0, 1:, None])
    return [float(value) for value in found[:, 0]]


def _precision(training: TrainingConfig) -> str:
    if training.load_in_4bit:
        return training.bnb_4bit_quant_type.value
    return "bfloat16" if training.bf16 and has_cuda() else "float32"
