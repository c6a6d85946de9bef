"""The reference's log-probs: computed once, kept under all that determines them, used by every later run."""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from datasets import Dataset

from tasks.config import TrainingConfig
from tasks.errors import PreflowError
from tasks.store.workspace import Workspace, digest
from tasks.train.spec import STAGE_VERSION
from tasks.trainer.data import TokenPair

LOG = logging.getLogger(__name__)
# A killed trainer computes at most so much again.
PART_SECONDS = 60.0
# Of one micro-batch: row, chosen and rejected of each of its pairs.
Found = list[tuple[int, float, float]]


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
    uri = _uri(store, key)
    content = _read(store, uri)
    if content is None:
        return None
    LOG.info("reference log-probs taken from %s", uri)
    return {name: ReferenceLogps(**logps) for name, logps in content.items()}


def _uri(store: Workspace, key: str) -> str:
    return store.uri("reference-logprobs", f"{key}.json")


def _read(store: Workspace, uri: str) -> Any:
    """Return what was kept in a file with its digest; None where there is none, or it is not whole."""
    if not store.exists(uri):
        return None
    try:
        kept = store.read_json(uri)
        if digest(kept["content"]) != kept["sha256"]:
            raise PreflowError(f"{uri}: differs from its digest")
    except (PreflowError, KeyError, TypeError, OSError) as error:
        LOG.warning("cached reference log-probs are computed again: %s", error)
        return None
    return kept["content"]


def _write(store: Workspace, uri: str, content: Any) -> None:
    store.write_json(uri, {"sha256": digest(content), "content": content})


def save_reference(store: Workspace, key: str, found: Mapping[str, ReferenceLogps]) -> None:
    """Keep the log-probs of all splits, unless another training was faster; parts of them go."""
    if load_reference(store, key) is None:
        _write(store, _uri(store, key), {name: asdict(logps) for name, logps in found.items()})
    try:
        store.delete_folder(store.uri("reference-logprobs", key))
    except OSError as error:  # another training of a sweep is just keeping its own part
        LOG.info("parts of the reference log-probs are left (%s)", error)


class ReferencePart:
    """What one process has found of a split, by micro-batch: kept each minute, so that it need not start over.

    Args:
        store: the workspace.
        key: of the log-probs.
        name: of the split, and of the process among how many.
    """

    def __init__(self, store: Workspace, key: str, name: str) -> None:
        self._store, self._uri = store, store.uri("reference-logprobs", key, f"{name}.json")
        self.batches: list[Found] = [list(map(tuple, batch)) for batch in _read(store, self._uri) or ()]
        if self.batches:
            LOG.info("reference log-probs of %d micro-batches taken from %s", len(self.batches), self._uri)
        self._kept, self._kept_at = len(self.batches), time.monotonic()

    def add(self, batch: Found) -> None:
        """Note what was found of the next micro-batch."""
        self.batches.append(batch)
        if time.monotonic() - self._kept_at >= PART_SECONDS:
            self.keep()

    def keep(self) -> None:
        """Write what was found; without room for it the training goes on."""
        if self._kept < len(self.batches):
            try:
                _write(self._store, self._uri, self.batches)
            except OSError as error:
                LOG.warning("reference log-probs could not be kept (%s)", error)
        self._kept, self._kept_at = len(self.batches), time.monotonic()
