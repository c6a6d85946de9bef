"""The reference's log-probs as an artifact of their own: computed once, verified on load, used by every later run."""

import json
import logging
import posixpath
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from tasks.config import TrainingConfig
from tasks.errors import PreflowError
from tasks.store.workspace import COMMITTED, Workspace, digest, package_versions
from tasks.train.spec import STAGE_VERSION
from tasks.trainer.data import TokenPair

LOG = logging.getLogger(__name__)

ROWS = "logprobs.jsonl"


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


def reference_key(splits: Sequence[Split], training: TrainingConfig, weights: dict[str, str]) -> str:
    """Return the digest of what determines the log-probs: tokens, micro-batches, base, adapter, precision.

    Beta, loss (but for `ld_alpha`), learning rate, epochs and seeds are not in it. The micro-batches are, since padding
    decides the last bits.

    Args:
        splits: the pairs.
        training: for quantisation and length.
        weights: digests of the base and of the SFT adapter, and the device's kind.
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
            "weights": weights,
        }
    )


class ReferenceCache:
    """The artifact `<workspace>/reference-logprobs/<key>/`.

    Args:
        store: the workspace.
        key: from `reference_key`.
        weights_digest: of the reference's weights as loaded (`model.weights_digest`): recorded, and compared on load.
        scratch: local folder for fetched files.
    """

    def __init__(self, store: Workspace, key: str, weights_digest: str, scratch: Path) -> None:
        self._store = store
        self._uri = store.uri("reference-logprobs", key)
        self._weights_digest = weights_digest
        self._scratch = scratch

    def load(self, splits: Sequence[Split]) -> dict[str, ReferenceLogps] | None:
        """Return the log-probs of each split, or None (and why, in the log) where they must be computed."""
        if not self._store.exists(posixpath.join(self._uri, COMMITTED)):
            return None
        try:
            folder = self._store.fetch_folder(self._uri, self._scratch / "reference")
            found = self._verified(folder, splits)
        except (PreflowError, KeyError, ValueError, OSError) as error:
            LOG.warning("cached reference log-probs are computed again: %s", error)
            return None
        LOG.info("reference log-probs taken from %s", self._uri)
        return found

    def _verified(self, folder: Path, splits: Sequence[Split]) -> dict[str, ReferenceLogps]:
        manifest = json.loads((folder / "manifest.json").read_text())
        if manifest["reference_weights"] != self._weights_digest:
            raise PreflowError(f"{self._uri}: computed with other weights than the SFT adapter's")
        rows = [json.loads(line) for line in (folder / ROWS).read_text().splitlines()]
        expected = [(split.name, pair.sha256) for split in splits for pair in split.pairs]
        if [(row["split"], row["pair"]) for row in rows] != expected:
            raise PreflowError(f"{self._uri}: its {len(rows)} rows are not the {len(expected)} pairs of this training")
        return {
            split.name: ReferenceLogps(
                [float(row["chosen"]) for row in rows if row["split"] == split.name],
                [float(row["rejected"]) for row in rows if row["split"] == split.name],
            )
            for split in splits
        }

    def save(self, splits: Sequence[Split], found: dict[str, ReferenceLogps], weights: dict[str, str]) -> None:
        """Commit the log-probs of all splits with their manifest, unless another training was faster."""
        if self.load(splits) is not None:
            return
        with tempfile.TemporaryDirectory(dir=self._scratch) as name:
            folder = Path(name)
            with (folder / ROWS).open("w") as out:
                for split in splits:
                    for row in _rows(split, found[split.name]):
                        out.write(json.dumps(row) + "\n")
            manifest = {
                "reference_weights": self._weights_digest,
                "upstream": weights,
                "packages": package_versions(),
                "rows": {split.name: len(split.pairs) for split in splits},
            }
            (folder / "manifest.json").write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")
            self._store.delete_folder(self._uri)
            self._store.commit_folder(folder, self._uri)


def _rows(split: Split, logps: ReferenceLogps) -> list[dict[str, Any]]:
    sides = zip(split.pairs, logps.chosen, logps.rejected, strict=True)
    return [
        {"split": split.name, "pair": pair.sha256, "chosen": chosen, "rejected": rejected}
        for pair, chosen, rejected in sides
    ]
