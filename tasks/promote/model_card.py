"""The model card of a published adapter, written from the manifests of what made it; it holds no data and no path."""

import hashlib
import posixpath
import re
from dataclasses import dataclass
from pathlib import Path

from tasks.config import EvaluationConfig, JudgingConfig, PublishingConfig, TrainingConfig
from tasks.errors import PreflowError
from tasks.promote.pointer import Entry, read_evaluation
from tasks.store.measures import Choice, Evaluation, percent, read_choice
from tasks.store.workspace import MANIFEST, EvaluationRef, Manifest, Origin, Workspace

HYPER_PARAMETERS = (
    "beta", "loss_type", "sft_weight", "label_smoothing", "learning_rate", "lr_scheduler_type", "warmup_steps",
    "per_device_train_batch_size", "gradient_accumulation_steps", "num_processes", "max_length", "weight_decay",
    "max_grad_norm", "load_in_4bit", "bnb_4bit_quant_type", "bf16", "disable_dropout", "seed",
)  # fmt: skip
HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
# What vLLM 0.32 takes as --max-lora-rank (vllm/config/lora.py).
SERVED_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class Provenance:
    """The manifests of an adapter's evaluation, training and pairs, and what the evaluation found."""

    found: Evaluation
    choice: Choice | None
    evaluation: Manifest
    training: Manifest
    preferences: Manifest

    @classmethod
    def of(cls, entry: Entry, workspace: str) -> "Provenance":
        """Read what made the adapter of a pointer's entry.

        Raises:
            PreflowError: a manifest is no longer there.
        """
        store = Workspace(workspace)
        try:
            evaluation = store.read_manifest(posixpath.join(posixpath.dirname(entry.evaluation.uri), MANIFEST))
            training = store.read_manifest(_upstream(evaluation, "adapter"))
            preferences = store.read_manifest(_upstream(training, "preferences"))
            if not isinstance(made := evaluation.artifact, EvaluationRef):
                raise PreflowError(f"{made.manifest}: is of no evaluation; run evaluate-adapter again")
            return cls(read_evaluation(made), read_choice(made), evaluation, training, preferences)
        except PreflowError as error:
            raise PreflowError(
                f"the model card cannot say how the adapter was made: {error}. Publish from the workspace that it was "
                "made in."
            ) from error


def _upstream(manifest: Manifest, kind: str) -> Origin:
    if origin := manifest.origin(kind):
        return origin
    raise PreflowError(f"{manifest.artifact.manifest}: names no {kind}; run the {manifest.stage} stage again")


def base_name(provenance: Provenance, publishing: PublishingConfig) -> str:
    """Return the base model's name on the hub.

    Raises:
        PreflowError: it was trained on a folder, and `publishing.base_model` does not say which model that is.
    """
    named = publishing.base_model or str(provenance.training.config["base_model"])
    if not HUB_NAME.match(named):
        raise PreflowError(
            f"the base model is a folder ({posixpath.basename(named)}), and a card must name one on the hub: set "
            "publishing.base_model to owner/name"
        )
    return named


def write_card(provenance: Provenance, publishing: PublishingConfig, evidence: bytes | None = None) -> str:
    """Return the card, Markdown with YAML front matter; equal manifests give equal bytes.

    It names the evidence from which the win rate can be recomputed, if that is still there.
    """
    from huggingface_hub import ModelCard, ModelCardData

    base, training = base_name(provenance, publishing), provenance.training
    config, evaluation = training.settings(TrainingConfig), provenance.evaluation.settings(EvaluationConfig)
    # Pairs that were given have no settings: no judge is known to have made them.
    judging = provenance.preferences.settings(JudgingConfig) if provenance.preferences.config else None
    compared_by = [judge.model for judge in evaluation.null_judge().judges()]
    is_same = judging is not None and compared_by == [judge.model for judge in judging.judges()]
    data = ModelCardData(
        base_model=base, library_name="peft", pipeline_tag="text-generation", license=publishing.license,
        tags=["base_model:adapter:" + base, "dpo", "lora", "trl", "preflow"],
    )  # fmt: skip
    card = ModelCard.from_template(
        data, template_path=str(Path(__file__).with_name("model_card.md.j2")), percent=percent,
        found=provenance.found, choice=provenance.choice,
        evidence=hashlib.sha256(evidence).hexdigest() if evidence else None, has_evidence=publishing.evidence,
        name=publishing.repo.rsplit("/", 1)[-1], repo=publishing.repo,
        judging=judging, rubric=posixpath.basename((judging and judging.rubric) or ""),
        compared_by="The same judge" if is_same else ", ".join(compared_by),
        data=_data(training.counts, provenance.preferences.counts), settings=_settings(training),
        versions=", ".join(f"{name} {version}" for name, version in sorted(training.packages.items())),
        sft_adapter=_upstream(training, "sft_adapter"), base=_upstream(training, "base_model"),
        pairs=_upstream(training, "preferences"), revision=config.base_revision, max_length=config.max_length,
        lora_rank=next(rank for rank in SERVED_RANKS if rank >= training.counts.get("lora_rank", 64)),
    )  # fmt: skip
    return str(card) + "\n"


def _data(counts: dict[str, int], pairs: dict[str, int]) -> list[tuple[str, str]]:
    rows = [("preference pairs, training", f"{counts['train_used']:,}")]
    if "val_used" in counts:
        rows.append(("preference pairs, validation", f"{counts['val_used']:,}"))
    rows += [(f"prompts judged: {name}", f"{pairs[name]:,}") for name in sorted(pairs) if name not in ("train", "val")]
    return [*rows, ("mean length of prompt and side, tokens", f"{counts['train_mean']}")]


def _settings(training: Manifest) -> list[tuple[str, object]]:
    figures, rows = training.figures, list[tuple[str, object]]()
    rows += [(name, training.config[name]) for name in HYPER_PARAMETERS if name in training.config]
    rows += [("optimizer steps", training.counts["steps"]), ("first loss", f"{figures['first_loss']:.4f}")]
    if "eval_loss" in figures:
        rows.append(("accuracy on validation pairs", f"{figures['eval_rewards/accuracies']:.3f}"))
        rows.append(("margin on validation pairs", f"{figures['eval_rewards/margins']:.3f}"))
    return rows
