"""The reference's log-probs: computed once, kept under all that determines them, used by every later run."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from datasets import Dataset

from tasks.config import TrainingConfig
from tasks.errors import PreflowError
from tasks.store.workspace import Workspace, digest
from tasks.train.spec import STAGE_VERSION
from tasks.trainer.data import TokenPair

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Split:
    """The pairs of one file and the micro-batches in which their log-probs are computed."""

    name: str
    pairs: Sequence[TokenPair]
    micro_batches: Sequence[list[int]]


@dataclass(frozen=True)
class ReferenceLogps:
    """Summed log-probs (nats) of one split's sides under the reference, in the order of its pairs."""

    chosen: list[float]
    rejected: list[float]

    def add_to(self, dataset: Dataset) -> Dataset:
        """Return `dataset` with the columns that TRL's loss reads."""
        return dataset.add_column("ref_chosen_logps", self.chosen).add_column("ref_rejected_logps", self.rejected)


def reference_key(splits: Sequence[Split], training: TrainingConfig, weights: Mapping[str, str]) -> str:
    """Return the digest of what determines the log-probs: tokens, micro-batches, base, adapter, precision.

    Beta, loss (but for `ld_alpha`), learning rate, epochs and seeds are not in it. The micro-batches are, since padding
    decides the last bits. `weights` has the digests of base and SFT adapter, and what computes with them
    (`model.arithmetic`).
    """
    names = ("load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_compute_dtype", "bnb_4bit_use_double_quant", "bf16",
             "max_length", "ld_alpha")  # fmt: skip
    identity = training.identity()
    return digest(
        {
            "stage": "reference-logprobs",
            "version": STAGE_VERSION,
            "splits": {
                split.name: {"pairs": [pair.sha256 for pair in split.pairs], "batches": list(split.micro_batches)}
                for split in splits
            },
            "settings": {name: identity[name] for name in names},
            "weights": dict(weights),
        }
    )


def load_reference(store: Workspace, key: str) -> dict[str, ReferenceLogps] | None:
    """Return the log-probs of each split, or None (and why, in the log) where they must be computed.

    They are kept as `<workspace>/reference-logprobs/<key>.json`, with a digest of their own.
    """
    uri = store.uri("reference-logprobs", f"{key}.json")
    if not store.exists(uri):
        return None
    try:
        kept = store.read_json(uri)
        if digest(kept["content"]) != kept["sha256"]:
            raise PreflowError(f"{uri}: differs from its digest")
        found = {name: ReferenceLogps(**logps) for name, logps in kept["content"].items()}
    except (PreflowError, KeyError, TypeError, OSError) as error:
        LOG.warning("cached reference log-probs are computed again: %s", error)
        return None
    LOG.info("reference log-probs taken from %s", uri)
    return found


def save_reference(store: Workspace, key: str, found: Mapping[str, ReferenceLogps]) -> None:
    """Keep the log-probs of all splits, unless another training was faster."""
    if load_reference(store, key) is None:
        content = {name: asdict(logps) for name, logps in found.items()}
        uri = store.uri("reference-logprobs", f"{key}.json")
        store.write_json(uri, {"sha256": digest(content), "content": content})
