"""The models: tokenizer, base (4-bit or not), the SFT adapter as trainable policy, and digests of its weights."""

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Params4bit
from peft import PeftModel, get_peft_model_state_dict
from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedTokenizerBase
from trl.trainer.utils import use_adapter

from tasks.config import TrainingConfig
from tasks.errors import PreflowError
from tasks.llm.chat_template import TOKENIZER
from tasks.llm.choose_template import JINJA
from tasks.store.measures import Probe, ProbeText
from tasks.train.inputs import ADAPTER_WEIGHTS
from tasks.trainer.checkpoints import os_error
from tasks.trainer.data import TokenPair, highest_token

LOG = logging.getLogger(__name__)

ADAPTER_CONFIG = "adapter_config.json"
# What older models keep among their weights and newer code computes: masks and positions.
BUFFERS = re.compile(r"\.(attn|attention)\.(masked_)?bias$|\.inv_freq$|\.position_ids$")


def has_cuda() -> bool:
    """Tell whether a CUDA device can be used."""
    return torch.cuda.is_available()


def use_deterministic_kernels() -> None:
    """Have torch compute everything so that equal work gives equal bits; on a GPU that is not so by itself.

    transformers' `enable_full_determinism` does this too, and has each kernel waited for, which is for debugging.
    """
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)


def arithmetic() -> str:
    """Name what decides the last bits of a log-prob: the card, and the versions of what computes on it.

    Two cards, or one card with two kernels for attention, gave log-probs that differ by a quarter of a nat in 600
    tokens (an H200, nf4, bf16): measured from such a reference, the first loss is 0.68.
    """
    device = torch.cuda.get_device_name() if has_cuda() else "cpu"
    kernels = "deterministic" if torch.are_deterministic_algorithms_enabled() else "fastest"
    return f"{device}, {kernels} kernels, torch {torch.__version__}, transformers {transformers.__version__}"


def load_tokenizer(training: TrainingConfig, adapter: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer that the SFT adapter was trained with: its own where it brings one, else the base's."""
    brings_one = (adapter / "tokenizer_config.json").is_file()
    tokenizer = _tokenizer_of(str(adapter), None) if brings_one else None
    tokenizer = tokenizer or _tokenizer_of(training.base_model, training.base_revision)
    if tokenizer is None:
        raise PreflowError(
            f"base_model {training.base_model}: no tokenizer there, nor in the SFT adapter {adapter}. Save the "
            "tokenizer into one of the two with tokenizer.save_pretrained(folder)."
        )
    rows = vocabulary_rows(training)
    if tokenizer.pad_token is None or (rows and tokenizer.pad_token_id >= rows):
        # Padding is masked everywhere: any token will do.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def vocabulary_rows(training: TrainingConfig) -> int | None:
    """Return how many tokens the base can read and write, by its configuration; its tokenizer may have more."""
    config = _config_of(training.base_model, training.base_revision).get_text_config()
    return getattr(config, "vocab_size", None)


def _tokenizer_of(source: str, revision: str | None) -> PreTrainedTokenizerBase | None:
    try:
        return AutoTokenizer.from_pretrained(source, revision=revision or "main", trust_remote_code=False)
    except Exception as error:
        names = {file.name for file in Path(source).iterdir()} if Path(source).is_dir() else {"on the hub"}
        if "config.json" in names:
            _config_of(source, revision)  # read for the tokenizer too: where it is wrong, it is what must be named
        if names & {*TOKENIZER, "on the hub"}:
            raise PreflowError(
                f"the tokenizer of {source} cannot be read ({_cause(error)}). Install the package that it needs "
                "(sentencepiece, tiktoken), or save it again with tokenizer.save_pretrained(folder)."
            ) from error
        LOG.info("no tokenizer in %s", source)
        return None


def load_base(training: TrainingConfig, device: int) -> Any:
    """Load the base model, 4-bit where asked for: fp32 on the CPU, else bfloat16 or fp32 on the CUDA device."""
    config = _config_of(training.base_model, training.base_revision)
    options: dict[str, Any] = {"dtype": torch.bfloat16 if training.bf16 and has_cuda() else torch.float32}
    if _quantisation(config):
        LOG.warning("base_model %s is quantised already and stays as it is: %s", training.base_model, precision(config))
    elif training.load_in_4bit:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=training.bnb_4bit_quant_type,
            bnb_4bit_compute_dtype=training.bnb_4bit_compute_dtype,
            bnb_4bit_use_double_quant=training.bnb_4bit_use_double_quant,
        )
    if training.disable_dropout:
        switch_off_dropout(config)
    if has_cuda():
        options["device_map"] = {"": device}
    elif training.load_in_4bit or _quantisation(config):
        options["device_map"] = {"": "cpu"}
    try:
        base, found = AutoModelForCausalLM.from_pretrained(
            training.base_model, config=config, revision=training.base_revision or "main", trust_remote_code=False,
            output_loading_info=True, ignore_mismatched_sizes=True, **options,
        )  # fmt: skip
    except Exception as error:  # a quantised one raises whatever the package it lacks lets it
        raise _cannot_be_loaded(training.base_model, error) from error
    _check_weights(training.base_model, base, config, found)
    for module in base.modules():
        # Else bitsandbytes (0.50) repacks 4-bit weights at the first evaluation on a CPU with AVX512-BF16: rounded
        # further, they let no gradient through, also in the training that follows.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return base


def _config_of(source: str, revision: str | None) -> Any:
    try:
        return AutoConfig.from_pretrained(source, revision=revision or "main", trust_remote_code=False)
    except Exception as error:  # every architecture checks its own fields, with errors of its own
        raise _cannot_be_loaded(source, error) from error


def _cannot_be_loaded(name: str, error: Exception) -> PreflowError:
    return PreflowError(
        f"base_model {name}: cannot be loaded ({_cause(error)}). Give a hub name that this machine may read "
        "(HF_TOKEN), or a folder with config.json and whole safetensors; install the package that its config.json asks "
        "for, if the error names one."
    )


def _cause(error: Exception) -> str:
    """Return an error's first line; one of memory stays what it is."""
    if isinstance(error, torch.OutOfMemoryError):
        raise error
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]


def switch_off_dropout(config: Any) -> list[str]:
    """Set every dropout of a base's configuration to 0, before its modules read it, and return what was set.

    Half of the architectures call `functional.dropout` with a number from their configuration, where no module can be
    replaced; mixtures of experts add noise (jitter) to their router in the same way.
    """
    names = [name for name in vars(config) if re.search(r"drop|jitter", name)]
    found = [name for name in names if type(getattr(config, name)) in (int, float) and getattr(config, name) > 0]
    for name in found:
        setattr(config, name, 0.0)
    for name in getattr(config, "sub_configs", {}):
        found += switch_off_dropout(getattr(config, name))
    return found


def _check_weights(name: str, base: Any, config: Any, found: Mapping[str, Any]) -> None:
    """Refuse a base of which transformers drew weights at random, or left weights out: it only prints a table.

    Also one whose head is tied by its configuration and not by its weights, and one that is not finite.
    """
    problems = [f"{weight} is missing" for weight in sorted(found["missing_keys"])]
    problems += [f"{key[0]} has shape {tuple(key[1])}, not {tuple(key[2])}" for key in sorted(found["mismatched_keys"])]
    unexpected = sorted(weight for weight in found["unexpected_keys"] if not BUFFERS.search(weight))
    problems += [f"{weight} has no place in it" for weight in unexpected]
    problems += [str(message) for message in found["error_msgs"]]
    if problems:
        raise PreflowError(
            f"base_model {name}: its weights are not those of the model that its config.json describes: "
            f"{'; '.join(problems[:3])} ({len(problems)} in all). Fetch or save the base again."
        )
    _check_finite(f"base_model {name}", _float_weights(base))  # NaN differs from itself, also where the head is tied
    tied = getattr(config.get_text_config(), "tie_word_embeddings", False)
    head = base.get_output_embeddings() if tied else None
    if head is not None and not torch.equal(head.weight, base.get_input_embeddings().weight):
        raise PreflowError(
            f"base_model {name}: config.json says tie_word_embeddings, and its lm_head differs from the embeddings: "
            "transformers would train with the lm_head, vLLM serve with the embeddings. Set it to false there."
        )


def _float_weights(base: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield all weights as numbers, a 4-bit one at a time."""
    for name, weight in base.named_parameters():
        if isinstance(weight, Params4bit):
            yield name, dequantize_4bit(weight.data, weight.quant_state)
        elif weight.is_floating_point():
            yield name, weight.data


def _check_finite(what: str, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    for name, weight in weights:
        if not torch.isfinite(weight.sum(dtype=torch.float32)):  # one pass, and no second tensor of its size
            kind = "NaN" if torch.isnan(weight).any() else "infinite or overflowing numbers"
            raise PreflowError(f"{what}: its weight {name} holds {kind}. Fetch or save it again.")


def load_policy(base: Any, adapter: Path, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Put the SFT adapter, trainable and in fp32 as `default`, onto the base model."""
    rows, highest = base.get_input_embeddings().weight.shape[0], highest_token(tokenizer)
    if highest >= rows:
        LOG.warning(
            "the tokenizer has tokens up to %d, the base model %d embeddings: pairs with higher ones are left out",
            highest, rows,
        )  # fmt: skip
    try:
        policy = PeftModel.from_pretrained(base, str(adapter), is_trainable=True)
    except Exception as error:  # PEFT checks little of a configuration: what it raises says where it stumbled
        raise PreflowError(
            f"SFT adapter {adapter}: does not fit the base model {base.config.name_or_path} ({_cause(error)}). Give "
            "the base model that it was trained on, and the adapter_config.json that PEFT wrote."
        ) from error
    sft = AdapterWeights(adapter, policy)
    _check_finite(f"SFT adapter {adapter}", sft)
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
    """The weights of an adapter folder, under the names that they have in `model` (as in the file without one).

    Older versions of transformers called the modules of some models differently; PEFT renames when it loads.
    """

    folder: Path
    model: Any = None

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from sorted(self._tensors.items())

    @cached_property
    def _tensors(self) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = load_file(self.folder / ADAPTER_WEIGHTS)
        if self.model is None:
            return found
        config = self.model.peft_config["default"]
        renamed: dict[str, torch.Tensor] = convert_peft_adapter_state_dict_for_transformers(self.model, config, found)
        return renamed

    def digest(self) -> str:
        """Return `weights_digest` of the file."""
        return weights_digest(dict(self))

    def check_fits(self, model: Any, base_name: str) -> None:
        """Check that names and shapes are those of the adapter in `model`."""
        state = adapter_state(model)
        theirs = {name: tuple(tensor.shape) for name, tensor in self}
        ours = {name: tuple(tensor.shape) for name, tensor in state.items()}
        for name in sorted(theirs.keys() ^ ours.keys()) or [n for n in theirs if theirs[n] != ours[n]]:
            raise PreflowError(
                f"SFT adapter {self.folder}: its weight {name} does not fit the base {base_name} with this "
                f"adapter_config.json: it has {theirs.get(name, 'nothing of the name')}, they ask for "
                f"{ours.get(name, 'no such weight')}. Give the base that it was trained on, and the configuration that "
                "it was saved with."
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
        """Return how far the policy is from these weights.

        `weights/moved` is the share of weights that differ at all, `weights/distance` the L2 norm of the difference
        over that of these weights.
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
    try:
        model.save_pretrained(str(folder), selected_adapters=["default"], save_embedding_layers=False)
    except SafetensorError as error:
        raise os_error(error, folder) from error
    (folder / "README.md").unlink(missing_ok=True)
    config = json.loads((sft / ADAPTER_CONFIG).read_text())
    config["inference_mode"] = True
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for name in (*TOKENIZER, JINJA):
        if (sft / name).is_file():
            (folder / name).write_bytes((sft / name).read_bytes())


# Both sides of three pairs show what DPO has moved; 160 tokens fit every server.
PAIRS, MOST_TOKENS = 3, 160


def probe_texts(pairs: Sequence[TokenPair], max_length: int) -> list[list[int]]:
    """Return both sides of the first pairs as token ids, prompts included, cut to `MOST_TOKENS` or as in training."""
    sides = [pair.prompt_ids + side for pair in pairs[:PAIRS] for side in (pair.chosen_ids, pair.rejected_ids)]
    return [ids[: min(MOST_TOKENS, max_length)] for ids in sides]


def as_loaded(training: TrainingConfig, config: Any) -> TrainingConfig:
    """Return the configuration as it came to be: a base that was quantised already has its own 4-bit settings."""
    facts = _quantisation(config)
    if not facts:
        return training
    names = [name for name in type(training).model_fields if name.startswith("bnb_4bit_") and name in facts]
    is_4bit = bool(facts.get("load_in_4bit"))
    its_own = {name: facts[name] for name in names} if is_4bit else {"bnb_4bit_quant_type": "nf4"}
    return TrainingConfig.model_validate({**training.model_dump(), **its_own, "load_in_4bit": is_4bit})


def record_probe(model: Any, sft: Path, texts: Sequence[list[int]]) -> Probe:
    """Compute the log-probs of `texts` under the trained adapter (`default`), the SFT adapter and the bare base."""
    was_training = model.training
    model.eval()
    model.load_adapter(str(sft), "probe-sft")
    found: dict[str, list[list[float]]] = {}
    try:
        for name, adapter in (("adapter", "default"), ("sft", "probe-sft"), ("base", None)):
            with use_adapter(model, adapter):
                found[name] = [_log_probs(model, ids) for ids in texts]
    finally:
        model.delete_adapter("probe-sft")
        model.train(was_training)
    rows = zip(texts, found["adapter"], found["sft"], found["base"], strict=True)
    return Probe(
        base_precision=precision(model.get_base_model().config),
        texts=[ProbeText(token_ids=ids, adapter=adapter, sft=sft, base=base) for ids, adapter, sft, base in rows],
    )


def _log_probs(model: Any, ids: list[int]) -> list[float]:
    tokens = torch.tensor([ids], device=model.device)
    with torch.no_grad():
        logits = model(input_ids=tokens).logits[0, :-1].float()
    found = torch.log_softmax(logits, dim=-1).gather(1, tokens[0, 1:, None])
    return [float(value) for value in found[:, 0]]


def precision(config: Any) -> str:
    """Return how the weights of a loaded base are kept: fp4, nf4, another quantisation's name, or their type."""
    facts = _quantisation(config)
    if not facts:
        return str(config.dtype).removeprefix("torch.")
    if facts.get("load_in_4bit"):
        return str(facts["bnb_4bit_quant_type"])
    method = facts.get("quant_method", "of no known kind")
    return str(getattr(method, "value", method))


def _quantisation(config: Any) -> Mapping[str, Any]:
    """Return how a base was quantised already; nothing if it was not."""
    found = getattr(config, "quantization_config", None) or {}
    facts: Mapping[str, Any] = found if isinstance(found, dict) else found.to_dict()
    return facts
