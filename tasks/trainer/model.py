"""The models: tokenizer, base (4-bit or not), the SFT adapter as trainable policy, and digests of its weights."""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedTokenizerBase
from trl.trainer.utils import use_adapter

from tasks.config import TrainingConfig
from tasks.errors import PreflowError
from tasks.trainer.data import TokenPair

LOG = logging.getLogger(__name__)

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "tokenizer.model", "vocab.json", "merges.txt",
)  # fmt: skip


def has_cuda() -> bool:
    """Tell whether a CUDA device can be used."""
    return torch.cuda.is_available()


def load_tokenizer(training: TrainingConfig, adapter: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer that the SFT adapter was trained with: its own where it brings one, else the base's.

    Raises:
        PreflowError: there is none, or the adapter's differs from the base's.
    """
    base = _tokenizer_of(training.base_model, training.base_revision)
    own = _tokenizer_of(str(adapter), None) if (adapter / "tokenizer_config.json").is_file() else None
    tokenizer = own or base
    if tokenizer is None:
        raise PreflowError(
            f"base_model {training.base_model}: no tokenizer there, nor in the SFT adapter {adapter}. Save the "
            "tokenizer into one of the two with tokenizer.save_pretrained(folder)."
        )
    if own is not None and base is not None:
        _check_same_vocabulary(own, base, adapter, training.base_model)
    if tokenizer.pad_token is None:
        # Padding is masked everywhere: any token will do.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def _tokenizer_of(source: str, revision: str | None) -> PreTrainedTokenizerBase | None:
    try:
        return AutoTokenizer.from_pretrained(source, revision=revision or "main", trust_remote_code=False)
    except (OSError, ValueError) as error:
        LOG.info("no tokenizer in %s: %s", source, str(error).splitlines()[0] if str(error) else type(error).__name__)
        return None


def _check_same_vocabulary(
    own: PreTrainedTokenizerBase, base: PreTrainedTokenizerBase, adapter: Path, base_model: str
) -> None:
    ours, theirs = own.get_vocab(), base.get_vocab()  # each call builds a new dict: 25 ms for 49,152 tokens
    different = [token for token, number in ours.items() if theirs.get(token, number) != number]
    missing = [token for token in theirs if token not in ours]
    if different or missing:
        raise PreflowError(
            f"the tokenizer in {adapter} is not that of {base_model}: {len(different)} tokens have another number, "
            f"{len(missing)} are missing (e.g. {(different + missing)[0]!r}). The adapter belongs to another base; "
            "give that one as base_model."
        )


def load_base(training: TrainingConfig, device: int) -> Any:
    """Load the base model, 4-bit where asked for; fp32 on the CPU, bfloat16 or fp32 on CUDA.

    Args:
        training: the configuration.
        device: the CUDA device's number, ignored without CUDA.

    Raises:
        PreflowError: the model is not there or cannot be loaded.
    """
    dtype = torch.bfloat16 if training.bf16 and has_cuda() else torch.float32
    options: dict[str, Any] = {"dtype": dtype}
    if training.load_in_4bit:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=training.bnb_4bit_quant_type.value,
            bnb_4bit_compute_dtype=training.bnb_4bit_compute_dtype.value,
            bnb_4bit_use_double_quant=training.bnb_4bit_use_double_quant,
        )
    if has_cuda():
        options["device_map"] = {"": device}
    elif training.load_in_4bit:
        options["device_map"] = {"": "cpu"}
    revision = training.base_revision or "main"
    try:
        base = AutoModelForCausalLM.from_pretrained(
            training.base_model, revision=revision, trust_remote_code=False, **options
        )
    except (OSError, ValueError) as error:
        raise PreflowError(
            f"base_model {training.base_model}: cannot be loaded ({error}). Give a hub name that this machine may "
            "read (HF_TOKEN), or a folder with config.json and safetensors."
        ) from error
    _keep_weights_as_quantised(base)
    return base


def _keep_weights_as_quantised(base: Any) -> None:
    """Forbid bitsandbytes (0.50) to repack 4-bit weights at the first evaluation on a CPU with AVX512-BF16.

    The repacked weights are rounded further and let no gradient through, also in the training that follows.
    """
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def load_policy(base: Any, adapter: Path, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Put the SFT adapter, trainable and in fp32 as `default`, onto the base model.

    Raises:
        PreflowError: the adapter does not fit the base, or the tokenizer has more tokens than the base.
    """
    rows = base.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise PreflowError(
            f"the tokenizer has {len(tokenizer)} tokens, the base model {rows} embeddings: it belongs to another "
            "model. Give the base model that the SFT adapter was trained on."
        )
    try:
        policy = PeftModel.from_pretrained(base, str(adapter), is_trainable=True)
    except (ValueError, RuntimeError, KeyError) as error:
        raise PreflowError(
            f"SFT adapter {adapter}: does not fit the base model {base.config.name_or_path} "
            f"({str(error).splitlines()[0]}). Give the base model that it was trained on."
        ) from error
    sft = AdapterWeights(adapter)
    sft.check_fits(policy, base.config.name_or_path)
    sft.copy_to(policy, "default")
    return policy


def trainable_parameters(model: Any) -> dict[str, torch.nn.Parameter]:
    """Return the trainable parameters by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def adapter_state(model: Any, name: str = "default") -> dict[str, torch.Tensor]:
    """Return the tensors of adapter `name` under the names they have in `adapter_model.safetensors`."""
    state: dict[str, torch.Tensor] = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    return state


def weights_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the sha256 (hex) of named tensors, taken as fp32: one digest whatever the type in the file was."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(name.encode() + str(tuple(tensors[name].shape)).encode())
        total.update(tensors[name].detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return total.hexdigest()


@dataclass(frozen=True)
class AdapterWeights:
    """The weights file of an adapter folder, read tensor by tensor."""

    folder: Path

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        with safe_open(self.folder / ADAPTER_WEIGHTS, framework="pt") as file:
            for name in sorted(file.keys()):
                yield name, file.get_tensor(name)

    def digest(self) -> str:
        """Return `weights_digest` of the file."""
        return weights_digest(dict(self))

    def check_fits(self, model: Any, base_name: str) -> None:
        """Check that names and shapes are those of the adapter in `model`.

        Raises:
            PreflowError: naming the first weight that has no place.
        """
        state = adapter_state(model)
        theirs = {name: tuple(tensor.shape) for name, tensor in self}
        ours = {name: tuple(tensor.shape) for name, tensor in state.items()}
        for name in sorted(theirs.keys() ^ ours.keys()) or [n for n in theirs if theirs[n] != ours[n]]:
            raise PreflowError(
                f"SFT adapter {self.folder}: its weight {name} {theirs.get(name, 'is missing')} does not fit the base "
                f"model {base_name} ({ours.get(name, 'has no such place')}). Give the base that it was trained on."
            )

    def copy_to(self, model: Any, name: str) -> None:
        """Set adapter `name` of `model` to these weights, in fp32."""
        for key, parameter in model.named_parameters():
            if f".{name}." in key and parameter.dtype is not torch.float32:
                parameter.data = parameter.data.float()
        state = adapter_state(model, name)
        for weight, tensor in self:
            state[weight].copy_(tensor)

    def movement(self, model: Any) -> dict[str, float]:
        """Compare the policy with these weights.

        Returns:
            `weights/moved`: share of weights that differ at all, 0-1; `weights/distance`: the L2 norm of the
            difference over the L2 norm of these weights.
        """
        state = adapter_state(model)
        moved, count, difference, norm = 0, 0, 0.0, 0.0
        for name, tensor in self:
            before, now = tensor.float(), state[name].detach().to("cpu", torch.float32)
            moved += int((before != now).sum())
            count += before.numel()
            difference += float((now - before).double().square().sum())
            norm += float(before.double().square().sum())
        distance = (difference / norm) ** 0.5 if norm else 0.0
        return {"weights/moved": moved / count, "weights/distance": distance}


def save_adapter(model: Any, sft: Path, folder: Path) -> None:
    """Write the policy's adapter as PEFT and vLLM read it, without `ref` and without a model card.

    The configuration is the SFT adapter's own, keys sorted: PEFT writes its sets in a random order.
    """
    model.save_pretrained(str(folder), selected_adapters=["default"], save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    config = json.loads((sft / ADAPTER_CONFIG).read_text())
    config["inference_mode"] = True
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for name in TOKENIZER_FILES:
        if (sft / name).is_file():
            (folder / name).write_bytes((sft / name).read_bytes())


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
