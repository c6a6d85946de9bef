"""What can be seen of adapter, base and tokenizer without weights: configurations, vocabularies, headers.

All of it raises `PreflowError` with what is wrong, where, and what to do.
"""

import json
import logging
import os
import posixpath
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy

from tasks.errors import PreflowError
from tasks.store.workspace import Workspace, folder_digest

LOG = logging.getLogger(__name__)

ADAPTER_WEIGHTS = "adapter_model.safetensors"
# What the safetensors library itself allows.
LONGEST_HEADER = 100_000_000
# The largest --max-lora-rank of vLLM 0.32 (vllm/config/lora.py).
HIGHEST_RANK = 512
# The exponent bits of each type of number: all set means infinite or NaN.
EXPONENTS = {
    "F64": ("u8", 0x7FF << 52),
    "F32": ("u4", 0xFF << 23),
    "F16": ("u2", 0x1F << 10),
    "BF16": ("u2", 0xFF << 7),
}
UNSERVED = (
    "modules_to_save", "lora_bias", "trainable_token_indices", "alora_invocation_tokens", "layer_replication",
    "target_parameters", "monteclora_config", "kasa_config", "arrow_config", "velora_config",
)  # fmt: skip
# The embeddings of the architectures that transformers knows.
EMBEDDINGS = r"(^|\.)(embed_tokens|wte|embed_in|word_embeddings)\.weight$"
SMALL_FILES = ["*.json", "*.jinja", "tokenizer.model", "*.txt"]


@dataclass(frozen=True)
class Tensor:
    """One entry of a safetensors header: type, shape, and where its bytes lie in the file."""

    dtype: str
    shape: list[int]
    start: int
    end: int


def read_header(uri: str) -> dict[str, Tensor]:
    """Read the header of a safetensors file (8 bytes of length, then JSON); the file must be as long as it says."""
    store = Workspace.holding(uri)
    try:
        length = int.from_bytes(store.read_bytes(uri, 0, 8), "little")
        content = json.loads(store.read_bytes(uri, 8, 8 + min(length, LONGEST_HEADER)))
        content.pop("__metadata__", None)
        found = {
            name: Tensor(entry["dtype"], entry["shape"], *(8 + length + at for at in entry["data_offsets"]))
            for name, entry in content.items()
        }
        expected, size = max((tensor.end for tensor in found.values()), default=0), store.size(uri)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PreflowError(f"{uri}: damaged, its header cannot be read ({error}); copy the file again") from error
    if size < expected:
        raise PreflowError(f"{uri}: cut off, it has {size:,} bytes of {expected:,}; copy the file again")
    return found


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter folder's configuration and header."""

    uri: str
    config: Mapping[str, Any]

    @classmethod
    def read(cls, uri: str) -> "AdapterFiles":
        """Read the configuration of a whole adapter."""
        store = Workspace.holding(uri)
        names = {posixpath.basename(file) for file in store.list(uri)}
        if "adapter_config.json" not in names:
            raise PreflowError(
                f"sft_adapter {uri}: no adapter_config.json there (found: {', '.join(sorted(names)) or 'nothing'}). "
                "Give the folder that PEFT's save_pretrained() wrote."
            )
        folder_digest(uri)
        if ADAPTER_WEIGHTS not in names:
            raise PreflowError(f"sft_adapter {uri}: no {ADAPTER_WEIGHTS} there. Save it with safe serialization.")
        return cls(uri, read_json(posixpath.join(uri, "adapter_config.json"), "save the adapter again"))

    @cached_property
    def header(self) -> dict[str, Tensor]:
        """The weights' types and shapes, by name."""
        return read_header(posixpath.join(self.uri, ADAPTER_WEIGHTS))

    def rank(self, module: str) -> int:
        """Return the rank that the configuration gives a module, as PEFT looks it up."""
        patterns: dict[str, int] = self.config.get("rank_pattern") or {}
        name = module.removeprefix("base_model.model.")  # a pattern may begin with ^
        key = next((key for key in patterns if re.match(rf"(.*\.)?({key})$", name)), None)
        return int(patterns[key] if key else self.config["r"])

    def check(self) -> None:
        """Check that this is an adapter that DPO can train and vLLM can serve."""
        with only_known_forms(f"sft_adapter {self.uri}"):
            for problem in chain(self._kind_problems(), self._weight_problems()):
                raise PreflowError(f"sft_adapter {self.uri}: {problem}")
            self._check_finite()

    def _kind_problems(self) -> Iterator[str]:
        config = self.config
        kind, bias, init = (config.get(name) for name in ("peft_type", "bias", "init_lora_weights"))
        targets, excluded = (config.get(name) or [] for name in ("target_modules", "exclude_modules"))
        dropout = config.get("lora_dropout", 0.0)
        ranks = {"r": config.get("r"), **(config.get("rank_pattern") or {})}
        scales = {"lora_alpha": config.get("lora_alpha", 8), **(config.get("alpha_pattern") or {})}
        patterns = [text for text in (targets, excluded) if isinstance(text, str)]
        for pattern in [*patterns, *(config.get("rank_pattern") or {}), *(config.get("alpha_pattern") or {})]:
            try:
                re.compile(pattern)
            except re.error as error:
                yield f"{pattern!r} is no regular expression ({error}): correct it (adapter_config.json)"
        unserved = "which vLLM does not serve; train the SFT adapter without"
        problems = {
            f"peft_type is {kind!r}; only LORA can be trained and served": kind != "LORA",
            f"bias is {bias!r}, {unserved}": (bias or "none") != "none",
            f"init_lora_weights is {init!r}, which changes the base when it is loaded; convert it to a plain LoRA with "
            "save_pretrained(path_initial_model_for_weight_conversion=...)": re.match(
                "pissa|olora|corda|loftq|lora_ga", str(init), re.IGNORECASE
            ),
            "init_lora_weights is 'mica', with which PEFT trains half of an adapter and takes no 4-bit base; set it to "
            "true: the weights stay what they are": str(init).lower() == "mica",
            "target_modules is empty, where PEFT writes what it was trained on; save the adapter again": not targets,
            f"lora_dropout is {dropout!r}, not a number from 0 to 1": type(dropout) not in (int, float)
            or not 0 <= dropout <= 1,
        }
        for module in ("lm_head", "model.embed_tokens", "transformer.wte"):
            if _names(targets, module) and not _names(excluded, module):
                yield f"it targets {module}, {unserved} (adapter_config.json)"
        for name, number in ranks.items():
            problems[f"the rank of {name} is {number!r}, not a positive number"] = type(number) is not int or number < 1
        for name, number in scales.items():
            is_number = type(number) in (int, float) and 0 < number < 1e9  # NaN is in no range
            problems[f"the alpha of {name} is {number!r}, not a number above 0"] = not is_number
        # A variant that vLLM does not know it ignores in silence: served would be something else than was trained.
        for name in (*UNSERVED, *(name for name in config if name.startswith("use_") and name != "use_rslora")):
            problems[f"{name} is {config.get(name)}, {unserved}"] = config.get(name)
        yield from (f"{problem} (adapter_config.json)" for problem, present in problems.items() if present)

    def _weight_problems(self) -> Iterator[str]:
        if not self.header:
            yield f"{ADAPTER_WEIGHTS} holds no weights. Save the adapter again with PEFT's save_pretrained()"
        for name, tensor in self.header.items():
            module, found, side = name.rpartition(".lora_")
            if not found or side not in ("A.weight", "B.weight") or len(tensor.shape) != 2:
                why = "as PEFT's save_pretrained() writes it: save it again with that, and target linear layers alone"
                if re.search(r"embed|lm_head|\bwte\b", name):
                    why = (
                        "and vLLM does not serve embeddings. PEFT adds them when the vocabulary was resized or they "
                        "are a target: train the SFT adapter without; where they are the base's own, save it again "
                        "with save_embedding_layers=False"
                    )
                yield f"{ADAPTER_WEIGHTS} holds {name} of shape {tensor.shape}, no LoRA weight of a linear layer {why}"
            elif not name.startswith("base_model.model."):
                yield f"its weight {name} has not the name that PEFT's save_pretrained() gives; save it with that"
            elif (other := f"{module}.lora_{'B' if side == 'A.weight' else 'A'}.weight") not in self.header:
                yield f"{ADAPTER_WEIGHTS} holds {name} and not {other}: a part is missing; copy or save it again"
            elif tensor.dtype not in EXPONENTS:
                yield f"its weight {name} is of type {tensor.dtype}, no floating-point number; save it again in F32"
            elif side == "A.weight" and tensor.shape[0] != self.rank(module):
                yield (
                    f"its weight {name} has rank {tensor.shape[0]}, where adapter_config.json says {self.rank(module)} "
                    "(r, rank_pattern). Configuration and weights are of two adapters: copy both again"
                )
            elif side == "A.weight" and tensor.shape[0] > HIGHEST_RANK:
                yield f"its rank {tensor.shape[0]} is over {HIGHEST_RANK}, vLLM's highest; train a smaller one"

    def _check_finite(self) -> None:
        file = posixpath.join(self.uri, ADAPTER_WEIGHTS)
        if not Workspace.holding(file).is_local:
            return  # the trainer, which fetches it, sees it
        content = numpy.memmap(file, mode="r")
        for name, tensor in self.header.items():
            if tensor.dtype in EXPONENTS:
                kind, mask = EXPONENTS[tensor.dtype]
                length = (tensor.end - tensor.start) // numpy.dtype(kind).itemsize
                if ((numpy.frombuffer(content, kind, length, tensor.start) & mask) == mask).any():
                    raise PreflowError(
                        f"sft_adapter {self.uri}: its weight {name} holds NaN or infinite numbers. Its training "
                        "diverged, or the file is damaged: give an earlier checkpoint, or train it again."
                    )


def _names(pattern: str | list[str], module: str) -> bool:
    """Tell whether target_modules, or exclude_modules, name a module: as PEFT reads a text, and a list."""
    if isinstance(pattern, str):
        return re.fullmatch(pattern, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in pattern)


@contextmanager
def only_known_forms(what: str) -> Iterator[None]:
    """Name the folder whose files hold a text where a number belongs, a list for a table, and the like."""
    try:
        yield
    except (TypeError, ValueError, AttributeError, LookupError) as error:
        raise PreflowError(
            f"{what}: a JSON file there is not as PEFT or transformers write it ({type(error).__name__}: {error}). "
            "Copy or save it again."
        ) from error


def read_json(uri: str, remedy: str) -> dict[str, Any]:
    """Read a JSON object from a file that is the user's own."""
    try:
        found = json.loads(Workspace.holding(uri).read_bytes(uri).decode())  # as PEFT and transformers read it
    except ValueError as error:
        raise PreflowError(f"{uri}: not JSON ({error}); {remedy}") from error
    if not isinstance(found, dict):
        raise PreflowError(f"{uri}: not a JSON object; {remedy}")
    return found


@dataclass(frozen=True)
class BaseFiles:
    """A base model's folder, or the small files of one on the hub and, where they can be read, its weights' shapes.

    Attributes:
        name: base_model, for messages.
        folder: where the files lie.
        shapes: of the weights, by name; empty where they are not known.
    """

    name: str
    folder: Path
    shapes: Mapping[str, list[int]]

    @classmethod
    def of_folder(cls, folder: Path) -> "BaseFiles":
        """Read a folder."""
        if not (folder / "config.json").is_file():
            raise PreflowError(f"base_model {folder}: no config.json there. Give the folder of a transformers model.")
        if (folder / "adapter_config.json").is_file():
            raise PreflowError(
                f"base_model {folder}: holds an adapter (adapter_config.json): transformers would put that onto it, "
                "or onto the base that it names. Move the adapter's files to a folder of their own."
            )
        files = {file.name for file in folder.glob("*.safetensors")}
        if not files:
            raise PreflowError(
                f"base_model {folder}: no .safetensors there. Save the model with save_pretrained(folder)."
            )
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            with only_known_forms(f"base_model {folder}, {index.name}"):
                named = set(read_json(str(index), "copy it again")["weight_map"].values())
            for missing in sorted(named - files):
                raise PreflowError(f"base_model {folder}: {missing} is missing, which {index.name} names; copy it.")
            # transformers reads no others.
            files = {"model.safetensors"} if "model.safetensors" in files else named
        headers = [read_header(str(folder / name)) for name in sorted(files)]
        return cls(str(folder), folder, {name: tensor.shape for header in headers for name, tensor in header.items()})

    @classmethod
    def of_hub(cls, name: str, revision: str) -> "BaseFiles":
        """Read the small files of a base on the hub, from the cache of this machine or from the hub.

        Raises:
            PreflowError: there is no such model or revision, or it may not be read.
            OSError: the hub cannot be reached and the cache does not hold it.
        """
        import httpx2
        from huggingface_hub import errors, get_safetensors_metadata, snapshot_download

        try:
            found = snapshot_download(
                name, revision=revision, allow_patterns=SMALL_FILES, cache_dir=os.environ.get("HF_HUB_CACHE")
            )
            folder = Path(found)
            if any(folder.glob("*.safetensors")):
                return cls(name, folder, cls.of_folder(folder).shapes)
            metadata = get_safetensors_metadata(name, revision=revision)
        except errors.NotASafetensorsRepoError as error:
            raise PreflowError(f"base_model {name}: holds no .safetensors. Give a base that has them.") from error
        except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError) as error:
            raise PreflowError(
                f"base_model {name}, revision {revision}: not on the hub, or not for this machine's HF_TOKEN "
                f"({str(error).strip().splitlines()[-1]}). Correct the name, accept the model's terms, or give a "
                "folder."
            ) from error
        except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, httpx2.TransportError) as error:
            raise OSError(f"{type(error).__name__}: {error}".strip().splitlines()[0]) from error
        shapes = {key: info.shape for file in metadata.files_metadata.values() for key, info in file.tensors.items()}
        return cls(name, folder, shapes)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The model's configuration; of a model with several parts the one of its text."""
        found = read_json(str(self.folder / "config.json"), "copy the base again")
        return {**found, **(found.get("text_config") or {})}

    def check(self, max_length: int, router_aux_loss_coef: float) -> None:
        """Hold the training's settings against the base."""
        if quantised := self.config.get("quantization_config"):
            kind = (
                quantised.get("bnb_4bit_quant_type") if quantised.get("load_in_4bit") else quantised.get("quant_method")
            )
            LOG.warning(
                "base_model %s is quantised already (%s): it is trained on, and recorded, as it is", self.name, kind
            )
        name = next((name for name in ("max_position_embeddings", "n_positions") if self.config.get(name)), None)
        scaling = self.config.get("rope_scaling") or self.config.get("rope_parameters") or {}
        stretched = scaling.get("rope_type", scaling.get("type")) in ("yarn", "linear", "dynamic")
        positions = int(self.config[name] * (scaling.get("factor") or 1 if stretched else 1)) if name else max_length
        if max_length > positions:
            raise PreflowError(
                f"max_length {max_length} is more than the {positions} positions of base_model {self.name} ({name} in "
                f"its config.json). Set max_length to {positions} or less."
            )
        embeddings = {name: shape for name, shape in self.shapes.items() if re.search(EMBEDDINGS, name)}
        rows = self.config.get("vocab_size")
        # Fewer may be right: Llama 3.2 Vision has 8 more embeddings. The trainer sees those that are not.
        if rows and embeddings and rows > max(shape[0] for shape in embeddings.values()):
            name, shape = next(iter(embeddings.items()))
            raise PreflowError(
                f"base_model {self.name}: its config.json says vocab_size {rows}, its weight {name} has {shape[0]} "
                "rows. Save the base again, with the configuration that belongs to these weights."
            )
        if router_aux_loss_coef and not any("expert" in name for name in self.config):
            raise PreflowError(
                f"router_aux_loss_coef {router_aux_loss_coef:g}: base_model {self.name} has no experts. Set it to 0."
            )

    def check_holds(self, adapter: AdapterFiles) -> None:
        """Check that every module of the adapter is in the base, with its sizes.

        Names are compared from the layer's number on: what stands before it changes with transformers' versions.
        """
        if self.config.get("quantization_config"):
            return  # packed, so shapes say nothing
        places: dict[str, list[list[int]]] = {}
        for name, shape in self.shapes.items():
            places.setdefault(_tail(name.removesuffix(".weight")), []).append(sorted(shape))
        kinds = {place.rpartition(".")[2] for place in places}
        for name, tensor in adapter.header.items():
            module = name.removesuffix(".lora_A.weight")
            if module == name or module.rpartition(".")[2] not in kinds:
                continue
            sizes = sorted([tensor.shape[1], adapter.header[f"{module}.lora_B.weight"].shape[0]])
            if sizes not in places.get(_tail(module), []):
                there = " or ".join(map(str, places.get(_tail(module), []))) or "no such module"
                raise PreflowError(
                    f"sft_adapter {adapter.uri}: its weight {name} is for a module of sizes {sizes}, base_model "
                    f"{self.name} has {there}. Give the base that the adapter was trained on, with all its weights."
                )

    def check_tokenizer(self, adapter: str) -> None:
        """Check that there are a tokenizer and a chat template, and that the adapter's tokenizer is the base's."""
        folders = [adapter, str(self.folder)]
        names = {posixpath.basename(file) for folder in folders for file in Workspace.holding(folder).list(folder)}
        if not names & {"tokenizer.json", "tokenizer.model", "vocab.json"}:
            raise PreflowError(
                f"no tokenizer in {self.name} nor in {adapter}: save one there with tokenizer.save_pretrained()"
            )
        (own, _), (base, added) = (_vocabulary(posixpath.join(folder, "tokenizer.json")) for folder in folders)
        rows = int(self.config.get("vocab_size") or 0)
        for token, number in (own or base).items():
            # One that is the base's own is never sampled: Gemma 3 has a token for images where it has no rows for it.
            if rows and number >= rows and base.get(token) != number:
                raise PreflowError(
                    f"the tokenizer of {adapter} has the token {token!r} with number {number}, base_model {self.name} "
                    f"has rows for {rows} tokens. vLLM does not serve embeddings that were added: train the SFT "
                    "adapter without new tokens, and give it its base's tokenizer."
                )
            if base and base.get(token, number) != number:
                raise PreflowError(
                    f"sft_adapter {adapter}: its tokenizer gives {token!r} the number {number}, that of base_model "
                    f"{self.name} {base[token]}. The adapter belongs to another base; give that one as base_model."
                )
        lacking = [token for token in base if own and token not in own]
        if missing := [token for token in lacking if token not in added]:
            raise PreflowError(
                f"sft_adapter {adapter}: its tokenizer lacks {len(missing)} tokens of base_model {self.name} (e.g. "
                f"{missing[0]!r}). The adapter belongs to another base; give that one as base_model."
            )
        if lacking:
            LOG.warning(
                "the tokenizer in %s lacks %d special tokens of %s (e.g. %r): texts that spell one are read otherwise",
                adapter, len(lacking), self.name, lacking[0],
            )  # fmt: skip


def _tail(module: str) -> str:
    return ".".join(module.split(".")[-4:])


def _vocabulary(file: str) -> tuple[dict[str, int], set[str]]:
    """Return the tokens of a tokenizer.json by number, and which were added; nothing where there is no such file."""
    if not Workspace.holding(file).exists(file):
        return {}, set()
    content = read_json(file, "save the tokenizer again")
    tokens = content.get("model", {}).get("vocab", {})
    found = dict(tokens) if isinstance(tokens, dict) else {entry[0]: number for number, entry in enumerate(tokens)}
    added = {token["content"]: token["id"] for token in content.get("added_tokens", [])}
    return found | added, set(added)
