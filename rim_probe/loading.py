"""Weights and tokenizers as transformers reads them: from safetensors or GGUF alone, and every failure one sentence.

Knows the files of a model. Knows nothing of memory blocks, adapters or where a base comes from. Nothing is unpickled,
and no code that comes with a checkpoint is ever run.
"""

import importlib.util
import json
import re
import threading
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from rim_probe.errors import CheckpointError

_NUMBER = re.compile(r"\.\d+\.")
_NO_SDPA = "through torch.nn.functional.scaled_dot_product_attention"
_NO_CAUSAL_LM = "for this kind of AutoModel: AutoModelForCausalLM"
_LOADING = threading.Lock()  # transformers ties weights wrongly, and then misses them, when two threads load at once


def load_weights(path: str | Path, dtype: torch.dtype | None, attention: str | None) -> PreTrainedModel:
    """A causal LM from a folder, a Hub id or a GGUF file, on the CPU.

    Args:
        dtype: default float32.
        attention: transformers attention back end; default `sdpa`, or `eager` for a family without it.

    Raises:
        CheckpointError: missing or damaged files, another format, or weights that lack a part of the model or hold
            more layers.
    """
    source, gguf = _source(path)
    index = Path(path) / "model.safetensors.index.json"
    if index.exists():
        shards_of(index)
    _check_layers(Path(path))
    # Unpacked and no longer called quantized, for what is can be neither trained nor saved.
    kind = gguf | {"quantization_config": GgufConfig(dequantize=True)} if gguf else {"use_safetensors": True}
    load = partial(
        AutoModelForCausalLM.from_pretrained,
        source,
        dtype=dtype or torch.float32,
        trust_remote_code=False,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # reported below, in a sentence
        **kind,
    )
    try:
        with _LOADING:
            try:
                model, info = load(attn_implementation=attention or "sdpa")
            except ValueError as error:
                if attention or _NO_SDPA not in str(error):
                    raise
                model, info = load(attn_implementation="eager")  # all that some families have
    except Exception as error:  # transformers, safetensors and gguf raise a dozen kinds; a user needs one sentence
        if _NO_CAUSAL_LM in str(error):
            raise CheckpointError(f"{path} holds no causal language model; name one.") from error
        raise CheckpointError(
            f"The weights in {path} cannot be loaded ({first_line(error)}); restore its safetensors and config.json."
        ) from error
    wrong = sorted(info["missing_keys"]) + sorted(key for key, *_ in info["mismatched_keys"])
    if wrong:
        raise CheckpointError(
            f"The weights in {path} lack {len(wrong)} tensors or hold them in another shape, such as {wrong[0]}; "
            "the file is incomplete or belongs to another model."
        )
    held = {_NUMBER.sub(".0.", key) for key in model.state_dict()}
    if more := sorted(key for key in info["unexpected_keys"] if _NUMBER.sub(".0.", key) in held):
        raise CheckpointError(
            f"The weights in {path} hold more layers than its config.json tells of, such as {more[0]}; restore the "
            "config.json."
        )
    return model


def _check_layers(folder: Path) -> None:
    """Refuses a number of layers that the weights cannot have, before a model of so many is made."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    try:
        layers = json.loads((folder / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"]
        if index.exists():
            tensors = len(shards_of(index))
        else:
            with safe_open(single, "pt") as file:
                tensors = len(file.keys())
    except (OSError, ValueError, RecursionError, LookupError, TypeError, SafetensorError):
        return  # told where it is loaded
    if isinstance(layers, int) and layers > tensors:
        raise CheckpointError(
            f"{folder / 'config.json'} tells of {layers:,} layers, but the weights hold only {tensors:,} tensors; "
            "restore it."
        )


def load_tokenizer(path: str | Path):
    """The tokenizer of a folder, a Hub id or a GGUF file.

    Raises:
        CheckpointError: missing or damaged files.
    """
    source, gguf = _source(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **gguf)
        _ = tokenizer.all_special_ids, tokenizer.unk_token_id  # a damaged file may name tokens that are not there
        return tokenizer
    except Exception as error:
        raise CheckpointError(
            f"The tokenizer in {path} cannot be loaded ({first_line(error)}); restore its tokenizer files."
        ) from error


def shards_of(index: Path) -> dict[str, str]:
    """Which file beside an index holds which tensor.

    Raises:
        CheckpointError: an index that cannot be read, or names anything but safetensors in its own folder: pickles
            would be run, and other paths read what is none of the checkpoint's.
    """
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(places.values()))
        if not files:
            raise ValueError("it names no file")
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} cannot be read ({first_line(error)}); restore it.") from error
    for file in files:
        if not str(file).endswith(".safetensors"):
            raise CheckpointError(f"{index} names {file!r}; weights are read from safetensors only.")
        if not re.fullmatch(r"\w[\w.-]*", file):
            raise CheckpointError(f"{index} names {file!r}; weights are read from the checkpoint's own folder only.")
        if not (index.parent / file).is_file():
            raise CheckpointError(f"{index.parent / file} is missing, but {index.name} names it; restore the file.")
    return places


def cast_weights(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """The model in another precision, as if loaded in it: `model.to` would round the rotary frequencies as well."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model


def stored_dtype(path: str | Path) -> torch.dtype:
    """The precision that the weights of a folder or Hub id say they are kept in; float32 where nothing is said.

    Raises:
        CheckpointError: a configuration that cannot be read.
    """
    source, gguf = _source(path)
    if gguf:
        return torch.float32
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False).dtype or torch.float32
    except Exception as error:
        raise CheckpointError(
            f"The configuration in {path} cannot be read ({first_line(error)}); restore its config.json."
        ) from error


def byte_level_tokenizer(read, config) -> PreTrainedTokenizerFast:
    """SmolLM2's tokenizer from the vocabulary, merges and control tokens that transformers read from a GGUF file.

    The file does not hold the rest: the rule by which text is cut before BPE (every digit stands alone), and the
    decoder, which versions of transformers guess differently. 5.17 also takes the BOS for the EOS, so these come from
    the model's configuration.
    """
    held = json.loads(read.backend_tokenizer.to_str())
    bpe = Tokenizer(models.BPE(held["model"]["vocab"], [tuple(pair) for pair in held["model"]["merges"]]))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    control = [token["content"] for token in held["added_tokens"] if token["special"]]
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    ids = {role: getattr(config, f"{role}_token_id", None) for role in ("bos", "eos", "pad", "unk")}
    roles = {f"{role}_token": bpe.id_to_token(id) for role, id in ids.items() if id is not None}
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, clean_up_tokenization_spaces=False, chat_template=read.chat_template, **roles
    )


def first_line(error: Exception) -> str:
    """What an error of another library says, short enough to stand in a sentence."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(" .:")
    return f"no entry {line}" if isinstance(error, KeyError) else line


def _source(path: str | Path) -> tuple[str, dict[str, str]]:
    """What transformers calls a source: a folder or Hub id, and for a GGUF file its folder and its name apart."""
    file = Path(path)
    if file.suffix != ".gguf":
        return str(path), {}
    if not file.is_file():
        raise CheckpointError(f"{path} does not exist; give the path of a GGUF file.")
    if importlib.util.find_spec("gguf") is None:
        raise CheckpointError(f"Reading {path} needs the package gguf; install it with `pip install gguf`.")
    return str(file.parent), {"gguf_file": file.name}
