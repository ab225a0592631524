"""The files of a PEFT adapter: written as one file or in shards, read back, put around a base or merged into it.

Knows PEFT and safetensors. Knows nothing of memory blocks; which base belongs under an adapter is told by `bases`.
"""

import itertools
import json
import shutil
import warnings
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file
from transformers import PreTrainedModel

from rim_probe import trained_on
from rim_probe.bases import KNOWN, RECORD_FILE, BaseRecord
from rim_probe.errors import CheckpointError
from rim_probe.files import replace_files
from rim_probe.loading import first_line, shards_of

ADAPTER_FILE = "adapter_config.json"
SHARD_BYTES = 14_900_000  # of tensors; with its header a file stays below 15 MB
_WEIGHTS, _INDEX = "adapter_model.safetensors", "adapter_model.safetensors.index.json"
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "vocab.json", "merges.txt",
)  # fmt: skip
_CONFIG_FILES = ("config.json", "generation_config.json", ADAPTER_FILE, RECORD_FILE, trained_on.FILE)


def has_tokenizer(folder: Path) -> bool:
    """Whether an adapter folder holds a tokenizer of its own."""
    return any((folder / name).exists() for name in _TOKENIZER_FILES[:2])


def base_name(folder: Path) -> str:
    """The base that an adapter names.

    Raises:
        CheckpointError: an adapter without a configuration that can be read.
    """
    file = folder / ADAPTER_FILE
    try:
        name = json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"]
        if not isinstance(name, str):
            raise TypeError(f"base_model_name_or_path is {name!r}")
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} cannot be read ({first_line(error)}); restore it.") from error
    return name


def source_of(folder: Path) -> str | None:
    """The source of the base that an adapter records, where that is a known base; None: any will do."""
    record = BaseRecord.load(folder)
    return record.source if record is not None and base_name(folder) in KNOWN else None


def save_adapter(model, folder: Path, state_dict: dict | None = None) -> None:
    """Writes configuration and weights of a PEFT model's adapter, as one file in the precision it is trained in.

    `PeftModel.save_pretrained` would put a card of its own into the folder, or its lines into one that is there.

    Args:
        state_dict: replaces the model's own where the weights live sharded elsewhere (FSDP).
    """
    from peft import get_peft_model_state_dict

    # The adapter holds the memory rows already: PEFT would add the whole embedding matrix because it was resized.
    tensors = get_peft_model_state_dict(model, state_dict=state_dict, save_embedding_layers=False)
    config = model.peft_config[model.active_adapter]
    trained, config.inference_mode = config.inference_mode, True
    config.save_pretrained(str(folder))
    config.inference_mode = trained
    _write(tensors, folder, max(1, sum(tensor.nbytes for tensor in tensors.values())))


def finish_checkpoint(source: Path, folder: Path) -> None:
    """Puts the checkpoint that training chose into its final place: an adapter as bfloat16 shards below 15 MB.

    What stood there before is replaced when the new files are on the disk (`checkpoint_files`); all other files stay.
    """
    is_adapter = (source / ADAPTER_FILE).exists()
    with replace_files(folder, lambda: checkpoint_files(folder)) as made:
        for file in source.iterdir():
            if not (is_adapter and file.name.startswith("adapter_model.")):
                shutil.copy2(file, made / file.name)
        if is_adapter:
            tensors = {name: tensor.to(torch.bfloat16) for name, tensor in _read(source).items()}
            _write(tensors, made, SHARD_BYTES)


def checkpoint_files(folder: Path) -> list[Path]:
    """Weights, configuration and tokenizer of the checkpoint in a folder."""
    named = (folder / name for name in (*_CONFIG_FILES, *_TOKENIZER_FILES))
    return [file for file in itertools.chain(folder.glob("*.safetensors*"), named) if file.exists()]


def load_adapter(base: PreTrainedModel, folder: Path, trainable: bool):
    """An adapter around its base, to be trained further, or merged into it: then a plain model like any other.

    Merged in float64, so that rounding of the sums, which differs between machines, does not reach the weights; they
    come out in the base's precision.

    Returns:
        (model, configuration of the adapter).

    Raises:
        CheckpointError: missing or damaged files, or an adapter that lacks tensors.
    """
    from peft import PeftConfig, PeftModelForCausalLM, get_peft_model_state_dict, set_peft_model_state_dict

    empty = not trainable  # filled below; what is trained stays in float32, which only PEFT's own tensors do
    try:
        tensors = {name: tensor.float() for name, tensor in _read(folder).items()}
        config = PeftConfig.from_pretrained(str(folder))
        config.inference_mode = not trainable
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # between PEFT and transformers
            model = PeftModelForCausalLM(base, config, low_cpu_mem_usage=empty)
        missing = set(get_peft_model_state_dict(model, save_embedding_layers=False)) - set(tensors)
        if not missing:
            set_peft_model_state_dict(model, tensors, low_cpu_mem_usage=empty)
            model = model if trainable else _merge(model)
    except CheckpointError:
        raise
    except Exception as error:  # peft and safetensors raise a dozen kinds; a user needs one sentence
        raise CheckpointError(
            f"The adapter in {folder} cannot be loaded ({first_line(error)}); restore its files."
        ) from error
    if missing:  # PEFT only warns, and would go on with random values
        raise CheckpointError(
            f"The adapter in {folder} lacks {len(missing)} tensors, such as {min(missing)}; "
            "a file is incomplete or belongs to another base."
        )
    return model, config


def _merge(model) -> PreTrainedModel:
    _part_tied(model.get_base_model())
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.double()
    return model.merge_and_unload()


def _part_tied(base: PreTrainedModel) -> None:
    """Parts a head from the embeddings it is tied to where LoRA is on one of them alone, or on both.

    PEFT would add what belongs to the one to the matrix that both share.
    """
    from peft.tuners.lora import LoraLayer

    layers = base.get_input_embeddings(), base.get_output_embeddings()
    adapted = [layer for layer in layers if isinstance(layer, LoraLayer)]
    if adapted and layers[0].weight is layers[1].weight:
        held = adapted[0].get_base_layer()
        held.weight = torch.nn.Parameter(held.weight.detach().clone(), requires_grad=False)
        base.config.tie_word_embeddings = False


def _write(tensors: dict[str, torch.Tensor], folder: Path, most: int) -> None:
    """Weights as files of at most `most` bytes of tensors, with an index where there are several; stale ones go.

    Each tensor as a copy of its own: of two that share their memory, as the rows of tied embeddings do, one would be
    left out, and be missed by PEFT.
    """
    tensors = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    pattern = _WEIGHTS.replace(".", "{suffix}.", 1)
    save_torch_state_dict(tensors, folder, filename_pattern=pattern, max_shard_size=most)


def _read(folder: Path) -> dict[str, torch.Tensor]:
    single, index = folder / _WEIGHTS, folder / _INDEX
    if single.exists() and index.exists():
        raise CheckpointError(f"{folder} holds both {_WEIGHTS} and {_INDEX}; remove the one that is left from before.")
    if not index.exists():
        if not single.exists():
            raise CheckpointError(f"{single} is missing; restore it (adapters in other formats are not read).")
        return load_file(single)
    places, tensors = shards_of(index), {}
    for file in sorted(set(places.values())):
        tensors |= load_file(folder / file)
    if lost := sorted(set(places) - set(tensors)):
        raise CheckpointError(
            f"{folder / places[lost[0]]} lacks {lost[0]}, which {_INDEX} says is there; restore the file."
        )
    return tensors
