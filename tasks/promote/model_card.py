"""The model card of a published adapter, written from the manifests of what made it; it holds no data and no path."""

import posixpath
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tasks.config import JudgingConfig, PublishingConfig, TrainingConfig
from tasks.errors import PreflowError
from tasks.store.workspace import MANIFEST, Manifest, Origin, Workspace

HYPER_PARAMETERS = (
    "beta", "loss_type", "sft_weight", "label_smoothing", "learning_rate", "lr_scheduler_type", "warmup_steps",
    "per_device_train_batch_size", "gradient_accumulation_steps", "num_processes", "max_length", "weight_decay",
    "max_grad_norm", "load_in_4bit", "bnb_4bit_quant_type", "bf16", "disable_dropout", "seed",
)  # fmt: skip
HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")


@dataclass(frozen=True)
class Provenance:
    """The manifests of an adapter's evaluation, training and pairs, and the win rate."""

    adapter_sha256: str
    win_rate: dict[str, Any]
    evaluation: Manifest
    training: Manifest
    preferences: Manifest

    @classmethod
    def of(cls, entry: dict[str, Any], workspace: str) -> "Provenance":
        """Read what made the adapter of a pointer's entry.

        Raises:
            PreflowError: a manifest is no longer there.
        """
        store = Workspace(workspace)
        win_rate = entry["evaluation"]["uri"]
        try:
            evaluation = store.read_manifest(posixpath.join(posixpath.dirname(win_rate), MANIFEST))
            training = store.read_manifest(_upstream(evaluation, "adapter"))
            preferences = store.read_manifest(_upstream(training, "preferences"))
        except PreflowError as error:
            raise PreflowError(
                f"the model card cannot say how the adapter was made: {error}. Publish from the workspace that it was "
                "made in."
            ) from error
        return cls(entry["adapter_sha256"], store.read_json(win_rate), evaluation, training, preferences)

    def upstream(self, kind: str) -> Origin:
        """Return what of this kind the training was made from."""
        return _upstream(self.training, kind)


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


def write_card(provenance: Provenance, publishing: PublishingConfig) -> str:
    """Return the card, Markdown with YAML front matter; equal manifests give equal bytes."""
    from huggingface_hub import ModelCardData

    base = base_name(provenance, publishing)
    data = ModelCardData(
        base_model=base,
        library_name="peft",
        pipeline_tag="text-generation",
        license=publishing.license,
        tags=["base_model:adapter:" + base, "dpo", "lora", "trl", "preflow"],
    )
    name = publishing.repo.rsplit("/", 1)[-1]
    sections = [
        f"# {name}\n\nA LoRA adapter for `{base}`, improved by direct preference optimisation (DPO) over the SFT "
        "adapter that it started from. Written by preflow from the manifests of the run.",
        _result(provenance),
        _data(provenance),
        _judge(provenance),
        _training(provenance),
        _digests(provenance),
        _usage(base, publishing.repo, name, provenance.training),
    ]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"


def _result(provenance: Provenance) -> str:
    found = provenance.win_rate
    rows = [("the adapter against its SFT adapter", _rate(found))]
    if "length_controlled" in found:
        rows.append(("the same, with length taken out", _rate(found["length_controlled"])))
    if "null" in found:
        confidence = found["null"].get("confidence", found["confidence"])
        rows.append((f"the SFT adapter against itself (the null), at {confidence:.0%}", _rate(found["null"])))
    counts = f"{found['samples']:,} samples of {found['prompts']:,} held-out prompts"
    return (
        f"## Does it write better text?\n\nThe same judge compared {counts}, each pair in both orders; ties count "
        f"half. The interval holds at {found['confidence']:.0%}.\n\n" + _table(("win rate of", "value"), rows)
    )


def _rate(found: dict[str, Any]) -> str:
    return f"{found['win_rate']:.3f} [{found['lower']:.3f}, {found['upper']:.3f}]"


def _data(provenance: Provenance) -> str:
    counts, pairs = provenance.training.counts, provenance.preferences.counts
    rows = [("preference pairs, training", f"{counts['train_used']:,}")]
    if "val_used" in counts:
        rows.append(("preference pairs, validation", f"{counts['val_used']:,}"))
    rows += [(f"prompts judged: {name}", f"{pairs[name]:,}") for name in sorted(pairs) if name not in ("train", "val")]
    rows.append(("mean length of prompt and side, tokens", f"{counts['train_mean']}"))
    return (
        "## Trained on\n\nCompletions of the SFT adapter, as chosen and rejected by the judge. The data itself is not "
        "published here.\n\n" + _table(("what", "count"), rows)
    )


def _judge(provenance: Provenance) -> str:
    judging = provenance.preferences.settings(JudgingConfig)
    rows = [
        ("judge", ", ".join(judge.model for judge in judging.judges())),
        ("rubric", posixpath.basename(judging.rubric or "")),
        ("orders in which each prompt was judged", str(judging.orders)),
        ("a pair needs", judging.pair_policy),
    ]
    return "## Judge\n\n" + _table(("what", "value"), rows)


def _training(provenance: Provenance) -> str:
    config, figures = provenance.training.config, provenance.training.figures
    rows = [(name, str(config[name])) for name in HYPER_PARAMETERS if name in config]
    rows.append(("optimizer steps", str(provenance.training.counts["steps"])))
    rows.append(("first loss", f"{figures['first_loss']:.4f}"))
    if "eval_loss" in figures:
        rows.append(("accuracy on validation pairs", f"{figures['eval_rewards/accuracies']:.3f}"))
        rows.append(("margin on validation pairs", f"{figures['eval_rewards/margins']:.3f}"))
    packages = sorted(provenance.training.packages.items())
    versions = ", ".join(f"{name} {version}" for name, version in packages)
    return f"## Training\n\n{_table(('setting', 'value'), rows)}\n\nVersions: {versions}."


def _digests(provenance: Provenance) -> str:
    preferences = provenance.upstream("preferences")
    rows = [
        ("this adapter", provenance.adapter_sha256),
        ("reference policy (the SFT adapter)", provenance.upstream("sft_adapter").sha256),
        ("base model", provenance.upstream("base_model").sha256),
        ("training pairs", preferences.sha256),
    ]
    return "## Digests\n\n" + _table(("artifact", "sha256"), [(name, f"`{value}`") for name, value in rows])


# What vLLM 0.32 takes as --max-lora-rank (vllm/config/lora.py).
SERVED_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def _usage(base: str, repo: str, name: str, training: Manifest) -> str:
    config = training.settings(TrainingConfig)
    revision = config.base_revision
    pinned, flag = (f', revision="{revision}"', f" --revision {revision}") if revision else ("", "")
    rank = next(rank for rank in SERVED_RANKS if rank >= training.counts.get("lora_rank", 64))
    length = config.max_length
    return f"""## How to load it

With PEFT:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"{pinned}), "{repo}")
```

With vLLM (ask for the model `{name}`; it was trained on up to {length} tokens, with the chat template that lies here):

```sh
hf download {repo} chat_template.jinja --local-dir .
vllm serve {base}{flag} --chat-template chat_template.jinja \\
    --enable-lora --max-lora-rank {rank} --lora-modules {name}={repo}
```"""


def _table(head: tuple[str, str], rows: Iterable[tuple[str, str]]) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "| --- | --- |"]
    return "\n".join([*lines, *(f"| {name} | {value} |" for name, value in rows)])
