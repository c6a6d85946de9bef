"""The reference's log-probs as an artifact of their own: computed once, verified on load, used by every later run."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from datasets import Dataset

from tasks.config import TrainingConfig
from tasks.errors import PreflowError
from tasks.store.workspace import Workspace, digest, package_versions
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
    decides the last bits.

    Args:
        splits: the pairs.
        training: for quantisation and length.
        weights: digests of the base and of the SFT adapter, and what computes with them (`model.arithmetic`).
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


class ReferenceCache:
    """The artifact `<workspace>/reference-logprobs/<key>.json`, with a digest of its own content.

    Args:
        store: the workspace.
        key: from `reference_key`.
        weights_digest: of the reference's weights as loaded (`model.weights_digest`): recorded, and compared on load.
    """

    def __init__(self, store: Workspace, key: str, weights_digest: str) -> None:
        self._store = store
        self._uri = store.uri("reference-logprobs", f"{key}.json")
        self._weights_digest = weights_digest

    def load(self, splits: Sequence[Split]) -> dict[str, ReferenceLogps] | None:
        """Return the log-probs of each split, or None (and why, in the log) where they must be computed."""
        if not self._store.exists(self._uri):
            return None
        try:
            found = self._verified(self._store.read_json(self._uri), splits)
        except (PreflowError, KeyError, TypeError, OSError) as error:
            LOG.warning("cached reference log-probs are computed again: %s", error)
            return None
        LOG.info("reference log-probs taken from %s", self._uri)
        return found

    def _verified(self, kept: dict[str, Any], splits: Sequence[Split]) -> dict[str, ReferenceLogps]:
        if digest(kept["content"]) != kept["sha256"]:
            raise PreflowError(f"{self._uri}: differs from its digest")
        content = kept["content"]
        if content["reference_weights"] != self._weights_digest:
            raise PreflowError(f"{self._uri}: computed with other weights than the SFT adapter's")
        if content["pairs"] != _pairs(splits):
            raise PreflowError(f"{self._uri}: its rows are not the pairs of this training")
        return {name: ReferenceLogps(**logps) for name, logps in content["logps"].items()}

    def save(self, splits: Sequence[Split], found: Mapping[str, ReferenceLogps], weights: Mapping[str, str]) -> None:
        """Keep the log-probs of all splits, unless another training was faster."""
        if self.load(splits) is not None:
            return
        content = {
            "reference_weights": self._weights_digest,
            "upstream": dict(weights),
            "packages": package_versions(),
            "pairs": _pairs(splits),
            "logps": {split.name: asdict(found[split.name]) for split in splits},
        }
        self._store.write_json(self._uri, {"sha256": digest(content), "content": content})


def _pairs(splits: Sequence[Split]) -> dict[str, list[str]]:
    return {split.name: [pair.sha256 for pair in split.pairs] for split in splits}
