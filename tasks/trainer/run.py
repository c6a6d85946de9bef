"""One training from its spec to the committed adapter: the steps in order."""

import logging
import math
import os
import posixpath
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tasks.config import TrainingConfig
from tasks.errors import DiskFullError, PreflowError
from tasks.llm.chat_template import template_of
from tasks.store.measures import Probe
from tasks.store.refs import MANIFEST, AdapterRef, Cost, FileFacts, Manifest, Origin, canonical_json, digest
from tasks.store.workspace import COMMITTED, Workspace, folder_digest
from tasks.train.health import Run, assess
from tasks.train.invariants import check_weights_moved
from tasks.train.phases import Phases
from tasks.train.spec import STAGE_VERSION, MetricsRow, Progress, TrainingSpec, is_main_process, kept_steps
from tasks.trainer.checkpoints import Checkpoint, CheckpointStore, sweep
from tasks.trainer.data import NoUsablePairsError, PairData, load_pairs, make_micro_batches
from tasks.trainer.model import (
    AdapterWeights,
    adapter_state,
    arithmetic,
    as_loaded,
    has_cuda,
    load_base,
    load_policy,
    load_tokenizer,
    probe_texts,
    record_probe,
    save_adapter,
    use_deterministic_kernels,
    vocabulary_rows,
)
from tasks.trainer.reference import Split, load_reference, reference_key, save_reference
from tasks.trainer.stopping import StopFlag
from tasks.trainer.trainer import ExactTrainer, Hooks

LOG = logging.getLogger(__name__)

# Writing metrics.jsonl takes at most a twentieth of the time, however many rows there are.
ROWS_PAUSE = 20


@dataclass(frozen=True)
class Finished:
    """An adapter that is ready to be committed: of which step, the folder that gets it, the local one, its probe."""

    step: int
    uri: str
    folder: Path
    probe: Probe | None


class TrainingRun:
    """A training under one key, with everything it reads and writes.

    Only the main process's `store` can write; `scratch` is a local folder for this process alone; `stop` is looked at
    between any two batches.
    """

    def __init__(
        self, spec: TrainingSpec, store: Workspace, scratch: Path, progress: Callable[[Progress], None], stop: StopFlag
    ) -> None:
        self._spec = spec
        self._training = spec.training
        self._store = store
        self._scratch = scratch
        self._tell = progress
        self._stop = stop
        self._folder = store.uri("training", spec.key)
        self._checkpoints = CheckpointStore(store, f"{self._folder}/checkpoints", scratch)
        self._started = time.monotonic()
        self._phases = Phases(self._tell)
        self._checkpoint_seconds: list[float] = []
        self._rows_due = 0.0
        self._val_data: PairData | None = None
        self._cost_before = Cost()

    def execute(self) -> None:
        """Train, check, and commit the adapter; after a `StopTraining` what could be saved is saved."""
        if is_main_process():
            sweep(self._store, self._folder)
        phase = self._phases.phase
        with phase("reading the SFT adapter"):
            adapter = fetch_adapter(self._training.sft_adapter, self._scratch / "sft", self._spec.sft_sha256)
        with phase("reading the tokenizer"):
            tokenizer = load_tokenizer(self._training, adapter)
            self._template = template_of(self._training, str(adapter))
        with phase("tokenizing the pairs"):
            splits = self._load_splits(tokenizer)
        self._tell(Progress("loading", f"loading {self._training.base_model}"))
        trainer = self._build(adapter, tokenizer, splits)
        with phase("reading the newest checkpoint"):
            checkpoint = self._checkpoints.newest()
        if checkpoint is not None:
            if checkpoint.state.get("tokens") != self._tokens:  # half of the training would be on others
                raise PreflowError(
                    f"{self._folder}/checkpoints: that of step {checkpoint.step} was trained on other tokens than the "
                    f"pairs give now (chat template of {self._template.source}). Put back the tokenizer and the "
                    "packages that it was started with, or delete this folder to start from step 0."
                )
            self._cost_before = Cost.model_validate(checkpoint.state.get("cost", {}))
            LOG.info("resuming from the checkpoint of step %d", checkpoint.step)
        self._tell(Progress("training", "resuming" if checkpoint else "starting"))
        trainer.fit(checkpoint)
        self._finish(trainer, adapter, splits[-1])

    def _load_splits(self, tokenizer: Any) -> list[Split]:
        """Return what to train on, and what to evaluate on if anything can be."""
        preferences, training = self._spec.preferences, self._training
        options = tokenizer, training.max_length, self._template, vocabulary_rows(training)
        self._train_data = load_pairs(preferences.uri, self._store, *options)
        lengths = [pair.length(training.max_length) for pair in self._train_data.pairs]
        batches = make_micro_batches(
            lengths, training.per_device_train_batch_size, training.group_by_length, training.seed
        )
        self._training = with_fitting_warmup(training, len(batches))
        splits = [Split("train", self._train_data.pairs, batches)]
        val_uri = preferences.sibling("val.jsonl")
        if self._store.exists(val_uri) and self._store.size(val_uri) > 0:
            try:
                self._val_data = load_pairs(val_uri, self._store, *options)
            except NoUsablePairsError as error:
                LOG.warning("training goes on without an evaluation: %s", error)
            else:
                size, rows = training.per_device_eval_batch_size, list(range(len(self._val_data.pairs)))
                batches = [rows[start : start + size] for start in range(0, len(rows), size)]
                splits.append(Split("val", self._val_data.pairs, batches))
        self._tokens = digest([[pair.sha256 for pair in split.pairs] for split in splits])
        return splits

    def _build(self, adapter: Path, tokenizer: Any, splits: list[Split]) -> ExactTrainer:
        if self._training.bf16 and not has_cuda():
            LOG.info("bf16 is ignored: no CUDA here, training is fp32")
        torch.manual_seed(self._training.seed)
        if self._training.full_determinism:
            use_deterministic_kernels()
        with self._phases.phase("loading the base model"):
            base = load_base(self._training, int(os.environ.get("LOCAL_RANK", "0")))
        self._training = as_loaded(self._training, base.config)
        with self._phases.phase("putting the SFT adapter onto it"):
            policy = load_policy(base, adapter, tokenizer)
        with self._phases.phase("making the trainer"):
            hooks = Hooks(self._save, self._write_rows, self._tell, self._stop)
            sft = AdapterWeights(adapter, policy)
            trainer = ExactTrainer(policy, sft, tokenizer, splits, self._training, self._scratch, hooks)
        if self._training.cache_reference:
            with self._phases.phase("computing the reference log-probs"):
                self._use_cached_reference(trainer, splits)
        return trainer

    def _use_cached_reference(self, trainer: ExactTrainer, splits: list[Split]) -> None:
        weights = {"base": self._spec.base_sha256, "sft": self._spec.sft_sha256, "device": arithmetic()}
        key = reference_key(splits, self._training, weights)
        found = trainer.agree(load_reference(self._store, key))
        if found is None:
            count = sum(len(split.pairs) for split in splits)
            self._tell(Progress("reference", f"computing the reference log-probs of {count} pairs"))
            found = {split.name: trainer.reference_logps(split, self._store, key) for split in splits}
            if is_main_process():
                save_reference(self._store, key, found)
        trainer.use_cached_reference(found["train"], found.get("val"))

    def _save(self, checkpoint: Checkpoint) -> float:
        checkpoint.state.update(tokens=self._tokens, cost=self._cost().model_dump())
        kept = kept_steps(checkpoint.state["trainer_state"]["max_steps"], self._training.checkpoints)
        seconds = self._checkpoints.save(checkpoint, kept)
        self._checkpoint_seconds.append(seconds)
        return seconds

    def _write_rows(self, rows: list[MetricsRow]) -> None:
        """Write all rows; a file is written whole, so each time costs more, and then it is done more rarely."""
        started = time.monotonic()
        if is_main_process() and started >= self._rows_due:
            try:
                self._store.write_bytes(f"{self._folder}/metrics.jsonl", as_lines(rows))
            except OSError as error:  # the rows are in every checkpoint, and written again at the end
                LOG.warning("the newest metrics could not be written (%s); training goes on", error)
            self._rows_due = started + ROWS_PAUSE * (time.monotonic() - started)

    def _finish(self, trainer: ExactTrainer, adapter: Path, check: Split) -> None:
        if trainer.state.global_step < trainer.state.max_steps:
            raise RuntimeError(f"training ended at step {trainer.state.global_step} of {trainer.state.max_steps}")
        check_weights_moved(trainer.sft.movement(trainer.model)["weights/moved"], trainer.state.global_step)
        self._tell(Progress("saving", "checking and committing the adapter"))
        try:
            done = []
            for step in kept_steps(trainer.state.max_steps, self._training.checkpoints):
                with trainer.holding(self._checkpoints.at(step).policy):
                    done.append(self._save_adapter(trainer, adapter, check, step, f"{self._folder}/step-{step:06d}"))
            done.append(self._save_adapter(trainer, adapter, check, trainer.state.global_step, self._folder))
            if is_main_process():
                self._commit(trainer, done)
        except OSError:
            if self._training.num_processes == 1:  # the other processes do not wait for this one any more
                trainer.save_boundary()  # the training is done, and is not done again when there is room
            raise

    def _save_adapter(self, trainer: ExactTrainer, adapter: Path, check: Split, step: int, uri: str) -> Finished:
        """Write the policy, as it is now, to a local folder, and see that it is what was written."""
        folder = self._scratch / f"adapter-{step}"
        save_adapter(trainer.model, adapter, folder)
        (folder / "chat_template.jinja").write_text(self._template.text)
        trainer.check_saved(folder, check)
        texts = probe_texts(check.pairs, self._training.max_length)
        probe = record_probe(trainer.model, adapter, texts) if is_main_process() else None
        return Finished(step, uri, folder, probe)

    def _commit(self, trainer: ExactTrainer, done: list[Finished]) -> None:
        """Commit what is kept of the training, the last adapter's manifest last: that finishes all of it."""
        *earlier, last = done
        for one in done:
            self._commit_adapter(one, trainer, [kept.step for kept in earlier])
        timing = {
            "seconds": time.monotonic() - self._started,
            "phases": self._phases.seconds,
            "checkpoint_seconds": self._checkpoint_seconds,
            "peak_accelerator_bytes": torch.cuda.max_memory_allocated() if has_cuda() else None,
        }
        self._store.write_json(f"{last.uri}/timing.json", timing)
        files = dict[str, FileFacts]()
        for one in earlier:
            made = self._manifest(one, trainer)
            self._store.write_manifest(made)
            name = posixpath.basename(one.uri)
            files |= {posixpath.join(name, file): facts for file, facts in made.files.items()}
            files[posixpath.join(name, MANIFEST)] = self._facts(f"{one.uri}/{MANIFEST}")
        made = self._manifest(last, trainer)
        whole = {"files": made.files | files, "cost": self._cost(), "seconds": time.monotonic() - self._started}
        self._store.write_manifest(made.model_copy(update=whole))
        self._checkpoints.prune()

    def _commit_adapter(self, one: Finished, trainer: ExactTrainer, kept: list[int]) -> None:
        """Write the files of one adapter, with the metrics up to its step, and the readings that these give."""
        rows = rows_until(one.step, trainer)
        used = len(self._train_data.pairs), len(self._val_data.pairs) if self._val_data else 0
        self._store.write_bytes(f"{one.uri}/metrics.jsonl", as_lines(rows))
        self._store.write_json(f"{one.uri}/health.json", assess(Run(rows, self._training, *used)).model_dump())
        if one.probe is not None:  # only the main process, which writes, makes one
            self._store.write_json(f"{one.uri}/probe.json", one.probe.model_dump())
        self._store.delete_folder(f"{one.uri}/adapter")
        facts = {"step": one.step}
        try:
            self._store.commit_folder(one.folder, f"{one.uri}/adapter", facts)
        except DiskFullError:
            LOG.warning("no room for the finished adapter: all checkpoints but the newest are removed for it")
            self._checkpoints.prune(kept=1, spared=kept)
            self._store.commit_folder(one.folder, f"{one.uri}/adapter", facts)

    def _cost(self) -> Cost:
        """Return what the GPUs have cost, earlier processes' share up to the checkpoint that this one went on from."""
        if not has_cuda():
            return self._cost_before
        seconds = self._training.num_processes * (time.monotonic() - self._started)
        return self._cost_before + Cost(gpu_seconds=seconds, usd=seconds / 3600 * gpu_usd_per_hour())

    def _facts(self, uri: str) -> FileFacts:
        return FileFacts(size=self._store.size(uri), sha256=self._store.sha256(uri))

    def _manifest(self, one: Finished, trainer: ExactTrainer) -> Manifest:
        """Return the manifest of one adapter; an earlier one names the whole training, which has the cost of all."""
        spec, store, rows = self._spec, self._store, rows_until(one.step, trainer)
        adapter = f"{one.uri}/adapter"
        files = {f"adapter/{name}": facts for name, facts in store.committed_files(adapter).items()}
        files |= {name: self._facts(f"{one.uri}/{name}") for name in ("metrics.jsonl", "health.json", "probe.json")}
        artifact = AdapterRef(
            uri=adapter,
            manifest=f"{one.uri}/{MANIFEST}",
            sha256=files[f"adapter/{COMMITTED}"].sha256,
            size=sum(facts.size for name, facts in files.items() if name.endswith(".safetensors")),
            rows=len(self._train_data.pairs),
        )
        upstream = [
            spec.preferences,
            Origin(kind="sft_adapter", uri=spec.training.sft_adapter, sha256=spec.sft_sha256),
            Origin(kind="base_model", uri=spec.training.base_model, sha256=spec.base_sha256),
            Origin(kind="chat_template", uri=self._template.source, sha256=digest(self._template.text)),
        ]
        if one.uri != self._folder:
            whole, manifest = f"{self._folder}/adapter", f"{self._folder}/{MANIFEST}"
            sha256 = store.committed_files(whole)[COMMITTED].sha256
            upstream.append(Origin(kind="training", uri=whole, sha256=sha256, manifest=manifest))
        return Manifest(
            artifact=artifact, stage="training", version=STAGE_VERSION, key=spec.key, config=self._training,
            upstream=tuple(upstream), files=files,
            counts={
                "steps": one.step,
                # The highest, which a server must allow.
                "lora_rank": max(w.shape[0] for name, w in adapter_state(trainer.model).items() if ".lora_A." in name),
                **count_pairs("train", self._train_data),
                **count_pairs("val", self._val_data),
            },
            figures={**summarise(rows), "exact_share": self._train_data.report.exact_share},
        )  # fmt: skip


def as_lines(rows: list[MetricsRow]) -> bytes:
    """Return rows of metrics as JSONL."""
    return b"".join(canonical_json(row) + b"\n" for row in rows)


def rows_until(step: int, trainer: ExactTrainer) -> list[MetricsRow]:
    """Return the rows of metrics up to a step."""
    return [row for row in trainer.state.log_history if row["step"] <= step]


def gpu_usd_per_hour() -> float:
    """Return the price of this node's GPU: the first whose name is in the node's, as the job template gives them; or 0.

    On GKE a node's name has its pool's in it, so spot and on demand have prices of their own.
    """
    node, prices = os.environ.get("PREFLOW_NODE", ""), os.environ.get("PREFLOW_GPU_USD_PER_HOUR", "")
    for name, _, price in (part.partition("=") for part in prices.split(",") if part):
        if name in node:
            try:
                return float(price)
            except ValueError:
                LOG.warning("gpu_usd_per_hour: no price in %r of %r; the cost is counted as 0", price, prices)
    return 0.0


def with_fitting_warmup(training: TrainingConfig, micro_batches: int) -> TrainingConfig:
    """Return the configuration with a tenth of the steps as warm-up, where the warm-up would be all of the run."""
    per_epoch = math.ceil(micro_batches / (training.gradient_accumulation_steps * training.num_processes))
    steps = training.max_steps or math.ceil(per_epoch * training.num_train_epochs)
    if training.warmup_steps < steps or training.warmup_steps == 0:
        return training
    LOG.warning(
        "warmup_steps %d is not less than the %d optimizer steps of this run, which would never reach learning_rate: "
        "the warm-up is shortened to %d", training.warmup_steps, steps, steps // 10,
    )  # fmt: skip
    return training.model_copy(update={"warmup_steps": steps // 10})


def count_pairs(side: str, data: PairData | None) -> dict[str, int]:
    """Return what became of the pairs of one side, each count under the side's name."""
    if data is None:
        return {}
    counts = asdict(data.report) | {"refused": len(data.report.refused)}
    return {f"{side}_{name}": round(count) for name, count in counts.items()}


def summarise(rows: list[MetricsRow]) -> dict[str, float]:
    """Return the first loss, and the figures of the last evaluation, of a run's metrics."""
    trained = [row for row in rows if "loss" in row]
    evaluated = [row for row in rows if "eval_loss" in row]
    first = {"first_loss": trained[0].get("dpo_loss", trained[0]["loss"])} if trained else {}
    return {**first, **(evaluated[-1] if evaluated else {})}


def fetch_adapter(uri: str, local: Path, expected: str) -> Path:
    """Return a local folder with the SFT adapter, whose digest must still be the one in the training's key."""
    store = Workspace.holding(uri)
    folder = Path(uri) if store.is_local else store.fetch_files(uri, local)
    found = folder_digest(str(folder))
    if found != expected:
        raise PreflowError(
            f"SFT adapter {uri}: its content has changed (digest {found[:12]}, expected {expected[:12]}). Do not "
            "overwrite an adapter while it is being improved; run again to train from the new one."
        )
    return folder
