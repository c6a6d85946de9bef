"""Checkpoints in the workspace: safetensors and JSON only, committed whole, the newest valid one resumed."""

import json
import logging
import os
import posixpath
import re
import shutil
import tempfile
import time
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tasks.errors import PreflowError
from tasks.store.local import UNFINISHED
from tasks.store.workspace import COMMITTED, Workspace, file_sha256

LOG = logging.getLogger(__name__)

KEPT = 2
STATE = "state.json"
POLICY = "policy.safetensors"
OPTIMIZER = "optimizer.safetensors"
# What of a trainer is no tensor, as JSON: see `trainer.ExactTrainer._capture`.
State: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """One moment of a training, after `step` optimizer steps; `optimizer` has its tensors by `<parameter>|<slot>`."""

    step: int
    policy: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    state: State

    def write(self, folder: Path) -> None:
        """Write the files into a local folder."""
        folder.mkdir(parents=True, exist_ok=True)
        try:
            for name, tensors in ((POLICY, self.policy), (OPTIMIZER, self.optimizer)):
                here = {key: tensor.detach().to("cpu").contiguous() for key, tensor in tensors.items()}
                save_file(here, folder / name)
        except SafetensorError as error:
            raise os_error(error, folder) from error
        (folder / STATE).write_text(json.dumps(self.state))

    @classmethod
    def read(cls, folder: Path) -> "Checkpoint":
        """Read what `write` wrote."""
        try:
            state = json.loads((folder / STATE).read_text())
            return cls(state["step"], load_file(folder / POLICY), load_file(folder / OPTIMIZER), state)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise PreflowError(f"{folder}: not a readable checkpoint ({error}); delete it and run again") from error


def os_error(error: SafetensorError, folder: Path) -> OSError:
    """Return the error of the disk that safetensors hides in its message ("... (os error 28)")."""
    number = re.search(r"os error (\d+)", str(error))
    if number is None:
        return OSError(f"{folder}: {error}")
    return OSError(int(number[1]), os.strerror(int(number[1])), str(folder))


def sweep(store: Workspace, folder: str) -> None:
    """Remove what a killed trainer was just writing below a local folder, which a workspace does not show."""
    for left in list(Path(folder).rglob(f"{UNFINISHED}*")):
        if left.is_dir():
            store.delete_folder(str(left))
        else:
            store.delete(str(left))


class CheckpointStore:
    """The checkpoints of one training, `step-000050/` and the like, in the workspace's folder `folder`.

    The guard of `store` keeps a trainer that was replaced from writing; `scratch` is a local folder.
    """

    def __init__(self, store: Workspace, folder: str, scratch: Path) -> None:
        self._store = store
        self._folder = folder
        self._scratch = scratch

    def save(self, checkpoint: Checkpoint, spared: Collection[int] = ()) -> float:
        """Commit a checkpoint and drop all but the last two and the `spared` steps; one that is whole is left.

        Returns the seconds it took. An OSError leaves what was there before untouched.
        """
        started = time.monotonic()
        uri = posixpath.join(self._folder, f"step-{checkpoint.step:06d}")
        if self._problem(uri) is None:
            return 0.0
        if self._store.is_local:
            self._commit_in_place(checkpoint, Path(uri))
        else:
            with tempfile.TemporaryDirectory(dir=self._scratch) as name:
                checkpoint.write(Path(name))
                self._store.delete_folder(uri)
                self._store.commit_folder(Path(name), uri, {"step": checkpoint.step})
        self.prune(spared=spared)
        return time.monotonic() - started

    def _commit_in_place(self, checkpoint: Checkpoint, folder: Path) -> None:
        """Write next to it and rename the whole folder: a copy more than doubles the time (583 MB: 10 s for 4)."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=UNFINISHED, ignore_cleanup_errors=True) as name:
            written = Path(name) / folder.name
            checkpoint.write(written)
            files = sorted(written.iterdir())
            with ThreadPoolExecutor(len(files)) as pool:
                digests = list(pool.map(file_sha256, files))
            facts = {
                file.name: {"size": file.stat().st_size, "sha256": sha256}
                for file, sha256 in zip(files, digests, strict=True)
            }
            (written / COMMITTED).write_text(json.dumps({"files": facts, "step": checkpoint.step}))
            self._store.delete_folder(str(folder))  # and only the holder of the lease gets past here
            written.rename(folder)

    def newest(self) -> Checkpoint | None:
        """Return the newest checkpoint that is whole; torn ones are named in the log and skipped."""
        for uri in reversed(self._uris()):
            problem = self._problem(uri)
            if problem is None:
                try:
                    return self._read(uri)
                except PreflowError as error:
                    problem = str(error)
            LOG.warning("checkpoint %s is skipped: %s", posixpath.basename(uri), problem)
        return None

    def at(self, step: int) -> Checkpoint:
        """Return the checkpoint of a step, which is to be there."""
        uri = posixpath.join(self._folder, f"step-{step:06d}")
        if problem := self._problem(uri):
            raise PreflowError(
                f"the checkpoint of step {step}, which training.checkpoints keeps, is no longer whole ({problem}). "
                f"Delete {self._folder} and run again: the training starts over."
            )
        return self._read(uri)

    def _read(self, uri: str) -> Checkpoint:
        local = self._scratch / "resumed"
        shutil.rmtree(local, ignore_errors=True)
        return Checkpoint.read(self._store.fetch_folder(uri, local))

    def _problem(self, uri: str) -> str | None:
        try:
            self._store.verify_folder(uri)
        except (PreflowError, KeyError, TypeError, OSError) as error:
            return str(error)
        return None

    def _uris(self) -> list[str]:
        names = [name for name in self._store.folders(self._folder) if re.fullmatch(r"step-\d{6,}", name)]
        return [posixpath.join(self._folder, name) for name in sorted(names, key=lambda name: int(name[5:]))]

    def prune(self, kept: int = KEPT, spared: Collection[int] = ()) -> None:
        """Remove all but the newest `kept` whole checkpoints and those of the `spared` steps."""
        uris = self._uris()
        whole = [uri for uri in uris if self._store.exists(posixpath.join(uri, COMMITTED))]
        for uri in uris:
            if uri not in whole[-kept:] and int(uri.rpartition("-")[2]) not in spared:
                self._store.delete_folder(uri)
