"""RiM: a base causal language model, its tokenizer, a memory layout and, where there is one, a PEFT adapter.

Knows how these are put together, loaded and saved. Knows nothing about decoding loops or training.
No custom model class: a RiM checkpoint is an ordinary causal LM with three more tokens and a layout file. Weights are
read from safetensors only, and no code that comes with a checkpoint is ever run. An adapter is merged into its base
when it is loaded, unless it shall be trained further: what is asked and probed is always a plain model.
"""

import inspect
import logging
import os
from functools import cached_property, partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

from rim_probe.adapters import ADAPTER_FILE, base_name, has_tokenizer, load_adapter, save_adapter, source_of
from rim_probe.attaching import add_rows, add_tokens, settle_config
from rim_probe.bases import KNOWN, RECORD_FILE, BaseRecord, Progress, identify, record_of, resolve
from rim_probe.door import Verdict, difference, examine, tolerance
from rim_probe.encoding import Encoder
from rim_probe.errors import CheckpointError, LayoutError, QuestionError, RiMError
from rim_probe.files import one_sentence_if_full, whole_folder
from rim_probe.finding import layout_of, local_folder
from rim_probe.loading import cast_weights, load_tokenizer, load_weights, stored_dtype
from rim_probe.memory import MemoryLayout
from rim_probe.precision import default_dtype
from rim_probe.trained_on import TrainedOn

METHODS = ("memory", "cot", "direct")
log = logging.getLogger(__name__)
_WINDOWS = ("sliding_window", "attention_chunk_size")  # names of configurations
_MINIMUM_ROOM = 2  # a prompt must leave room for one answer token and EOS


class RiM:
    """A causal LM that can be asked through memory blocks.

    Attributes:
        model: a plain transformers causal LM, or the same wrapped by PEFT; in eval mode after loading.
        tokenizer: a fast tokenizer that holds the three memory tokens.
        layout: which memory blocks follow a question.
        encoder: text to ids for this tokenizer and layout.
        name: where it came from, for reports.
        trained_on: what its questions are like, where that is known; saved and loaded with it.
    """

    def __init__(self, model, tokenizer, layout: MemoryLayout, name: str = "unnamed"):
        self.model = model
        self.tokenizer = tokenizer
        self.layout = layout
        self.encoder = Encoder(tokenizer, layout)
        self.name = name
        self.trained_on: TrainedOn | None = None
        self._merged = None
        self._verdict: Verdict | None = None
        _check_positions(model, name)
        rows = model.get_input_embeddings().weight.shape[0]
        if max(self.memory_ids) >= rows:
            raise CheckpointError(
                f"{name}: the memory tokens have ids up to {max(self.memory_ids)} but the model has only {rows} "
                "embedding rows; the tokenizer and the weights do not belong together."
            )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the weights."""
        return self.model.dtype  # not that of an embedding's weight, which an adapter would copy as a whole to tell

    @property
    def adapter(self):
        """PEFT's configuration of the adapter around the model or merged into it; None where there is none."""
        return next(iter(getattr(self.model, "peft_config", {}).values()), self._merged)

    @property
    def verdict(self) -> Verdict:
        """What the model can be used for; tried when it is attached or loaded, else when first asked (see `door`).

        Raises:
            CheckpointError, LayoutError: a model that memory blocks cannot be used with.
        """
        return self._verdict or self.examine()

    def examine(self, anew: bool = False) -> Verdict:
        """Has the model checked as it is now; see `verdict`. `anew`: whatever is remembered of it."""
        self._verdict = examine(self.model, self.encoder, self.max_length, self.name, anew)
        log.log(logging.WARNING if self._verdict.off else logging.INFO, "%s", self._verdict)
        return self._verdict

    @property
    def max_length(self) -> int:
        """Context in tokens; of a model with a sliding window, or chunks, that: the masks of readouts know neither."""
        config = self.model.config
        windows = (getattr(config, key, None) for key in _WINDOWS)
        return min([config.max_position_embeddings, *(window for window in windows if window)])

    @property
    def eos_id(self) -> int:
        """The token that ends an answer."""
        return self.encoder.eos_id

    @property
    def memory_ids(self) -> tuple[int, int, int]:
        """Ids of the begin, slot and end token."""
        block = self.encoder.block_ids
        return block[0], block[1], block[-1]

    @cached_property  # reading a vocabulary takes 20 ms, more than a small model's first token
    def banned_ids(self) -> list[int]:
        """Ids that are never generated: memory and other control tokens, and rows without a token; never EOS."""
        rows = self.model.get_output_embeddings().weight.shape[0]
        unused = set(range(rows)) - set(self.tokenizer.get_vocab().values())
        return sorted((self.encoder.control_ids | unused) - {self.eos_id})

    def encode_question(self, question: str) -> list[int]:
        """See `Encoder.question_ids`."""
        return self.encoder.question_ids(question)

    def encode_text(self, text: str) -> list[int]:
        """See `Encoder.text_ids`."""
        return self.encoder.text_ids(text)

    def decode(self, ids: list[int]) -> str:
        """Text of `ids` without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def prompt_ids(self, question: str, method: str, num_blocks: int | None = None) -> list[int]:
        """The ids a method starts from: question and blocks (memory), question (cot), question and marker (direct).

        Raises:
            QuestionError: empty question, or a prompt that does not leave room for an answer in the context.
            LayoutError: `num_blocks` out of range.
        """
        if method not in METHODS:
            raise RiMError(f"Unknown method {method!r}; choose one of {', '.join(METHODS)}.")
        ids = self.encode_question(question)
        remedy = "shorten the question"
        if method == "memory":
            blocks = self.layout.check_blocks(num_blocks)
            ids = ids + self.encoder.block_ids * blocks
            if blocks:
                remedy += " or use fewer blocks"
        elif method == "direct":
            ids = ids + self.encoder.marker_ids
        if len(ids) + _MINIMUM_ROOM > self.max_length:
            raise QuestionError(
                f"The question needs {len(ids)} tokens with its prompt, but this model reads at most "
                f"{self.max_length - _MINIMUM_ROOM}; {remedy}."
            )
        return ids

    @classmethod
    def attach(
        cls, base: PreTrainedModel, tokenizer, layout: MemoryLayout | None = None, name: str = "unnamed"
    ) -> "RiM":
        """Adds the memory tokens to a base model in place and returns it as a RiM.

        New embedding rows start at the mean of the base's rows plus noise a tenth as wide as their spread, from a
        fixed seed, so that two attachments of the same base are equal. Rows of tokens that exist are not touched.

        Raises:
            LayoutError: a memory token that the tokenizer holds as an ordinary word, or gives the id of another token.
            CheckpointError: a model that memory blocks cannot be used with.
        """
        layout = layout or MemoryLayout()
        known = tokenizer.get_vocab()
        control = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        if words := [token for token in layout.tokens if token in known and token not in control]:
            raise LayoutError(
                f"The tokenizer holds {', '.join(words)} as ordinary text; choose other memory tokens for the layout."
            )
        new = [token for token in layout.tokens if token not in known]
        add_tokens(tokenizer, new)
        add_rows(base, tokenizer, [tokenizer.convert_tokens_to_ids(token) for token in new])
        rim = cls(base, tokenizer, layout, name)
        rim.examine()
        return rim

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        attention: str | None = None,
        trainable: bool = False,
        progress: Progress | None = None,
        layout: MemoryLayout | str | Path | None = None,
    ) -> "RiM":
        """Loads a RiM checkpoint (full weights or adapter) from a folder or a Hugging Face Hub id.

        Args:
            path: a folder with `memory_layout.json`, or a Hub id of such a repository.
            device: default: the GPU where there is one, else the CPU.
            dtype: default: `precision.default_dtype`, that is bfloat16 on a GPU and, for larger models, on a CPU that
                is fast in it; else float32.
            attention: transformers attention back end, default `sdpa`.
            trainable: load an adapter so that it can be trained further; otherwise it is merged into its base.
            progress: is told of a known base that has to be fetched, see `bases.Progress`.
            layout: of a checkpoint that another program made, without a layout file: a layout, such a file, or
                `detected` for what `memory.detect` makes of its tokens.

        Raises:
            CheckpointError: missing, damaged or mismatched files, another base than the adapter was trained on, or a
                model that memory blocks cannot be used with (see `door`).
            LayoutError: an impossible layout, or none.
        """
        folder = local_folder(path)
        device, dtype = placement(device, dtype)
        layout = layout_of(folder, layout)
        if (folder / ADAPTER_FILE).exists():
            model, tokenizer, adapter = _load_adapted(folder, layout, dtype, attention, trainable, progress)
        else:
            tokenizer = load_tokenizer(folder)
            model, adapter = load_weights(folder, dtype, attention), None
        if dtype is None and not trainable:
            cast_weights(model, default_dtype(device, sum(p.numel() for p in model.parameters())))
        rim = cls(model.eval(), tokenizer, layout, name=str(path))
        rim._merged = adapter
        rim.trained_on = TrainedOn.load(folder)
        if not os.environ.get("SPACES_ZERO_GPU"):  # where a GPU is lent for single calls, none of which this is
            rim.model.to(device)
        rim.examine()
        rim.model.to(device)
        return rim

    def save_pretrained(self, folder: str | Path, state_dict: dict | None = None) -> Path:
        """Writes weights (safetensors), tokenizer and layout into `folder`; an adapter is saved without its base.

        An adapter on a known base needs no tokenizer of its own. `state_dict` replaces the model's own where the
        weights live sharded elsewhere (FSDP).
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        base = record_of(self.model)
        (folder / RECORD_FILE).unlink(missing_ok=True)
        if hasattr(self.model, "peft_config"):
            save_adapter(self.model, folder, state_dict)
            if base is not None:
                base.save(folder)
            if base is None or base.name not in KNOWN:
                self.tokenizer.save_pretrained(folder)
        else:
            settle_config(self.model, self.eos_id, whole=state_dict is None)
            self.model.save_pretrained(folder, state_dict=state_dict)
            self.tokenizer.save_pretrained(folder)
        self.layout.save(folder)
        if self.trained_on is not None:
            self.trained_on.save(folder)
        return folder


def load_methods(
    path: str | Path,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
    layout: MemoryLayout | str | Path | None = None,
) -> dict[str, RiM]:
    """The models of a checkpoint folder by method.

    The folder itself is the memory model; `cot/` and `direct/` inside it are the matched models. A method without a
    folder of its own uses the memory model. `progress` is told of a known base that has to be fetched; for `layout` see
    `RiM.from_pretrained`.

    Raises:
        CheckpointError, LayoutError: as `RiM.from_pretrained`, for any of the folders.
    """
    folder = local_folder(path)
    memory = RiM.from_pretrained(folder, device, dtype, progress=progress, layout=layout)
    memory.name = str(path)
    methods = {"memory": memory}
    for method in ("cot", "direct"):
        own = folder / method
        load = partial(RiM.from_pretrained, own, device, dtype, progress=progress, layout=layout)
        methods[method] = load() if own.is_dir() else memory
    return methods


def export(path: str | Path, folder: str | Path, method: str = "memory", progress: Progress | None = None) -> Path:
    """Writes the model of a method as a plain transformers checkpoint, its adapter merged, which is a RiM as well.

    Weights keep the precision of the checkpoint's own, or of the base under its adapter.

    Returns:
        `folder`.

    Raises:
        CheckpointError: as `RiM.from_pretrained`; a folder that holds something; or (a fault of a library) a model that
            is another one when it is loaded again.
    """
    source, folder = local_folder(path), Path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists and is not empty; give a new folder to export to.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    if (source / method).is_dir():
        source = source / method
    rim = RiM.from_pretrained(source, "cpu", progress=progress)
    base = source
    if rim.adapter is not None:
        base = resolve(base_name(source), source_of(source))
    cast_weights(rim.model, stored_dtype(base))
    row, dtype = torch.tensor([rim.encoder.marker_ids + rim.encoder.block_ids]), rim.dtype
    with torch.no_grad(), one_sentence_if_full(folder), whole_folder(folder, "export") as made:
        said = rim.model(input_ids=row).logits
        rim.save_pretrained(made)
        del rim
        again = RiM.from_pretrained(made, "cpu", dtype).model(input_ids=row).logits
        if difference(again, said) > tolerance(dtype):
            raise CheckpointError(f"What would be written to {folder} says something else than {path}.")
    return folder


def load_base(
    path: str | Path,
    dtype: torch.dtype | None = None,
    attention: str | None = None,
    *,
    source: str | None = None,
    progress: Progress | None = None,
):
    """A base causal LM and its tokenizer by a known name, or from a folder, a Hub id or a GGUF file.

    Args:
        source: of a known base, see `bases.resolve`; `progress` is told of it where it has to be fetched.

    Returns:
        (model, tokenizer), the model on the CPU.

    Raises:
        CheckpointError: missing or damaged files, weights in another format than safetensors or GGUF, or weights that
            lack a part of the model.
    """
    place = resolve(path, source, progress)
    if os.path.isdir(place) and not (Path(place) / "config.json").exists():
        raise CheckpointError(
            f"{path} holds no model, for config.json is missing; train one with `python -m rim_probe train RECIPE`, or "
            "name another folder."
        )
    tokenizer = load_tokenizer(place)
    model = load_weights(place, dtype, attention)
    identify(model, path, place)
    return model, tokenizer


def _load_adapted(
    folder: Path,
    layout: MemoryLayout,
    dtype: torch.dtype | None,
    attention: str | None,
    trainable: bool,
    progress: Progress | None,
):
    """(model, tokenizer, configuration of the adapter) of an adapter folder, on exactly the base it records.

    In float32 where no dtype is given.
    """
    name, record = base_name(folder), BaseRecord.load(folder)
    base, tokenizer = load_base(
        name,
        dtype if trainable else torch.float32,
        attention,
        source=source_of(folder),
        progress=progress,
    )
    found = record_of(base)
    if record is not None and (found is None or record.sha256 != found.sha256):
        raise CheckpointError(
            f"The adapter in {folder} was trained on {record}, but what is found is {found}; give it the "
            "base it was trained on."
        )
    if has_tokenizer(folder) or name not in KNOWN:
        tokenizer = load_tokenizer(folder)
    else:
        known = tokenizer.get_vocab()
        add_tokens(tokenizer, [token for token in layout.tokens if token not in known])
    add_rows(base, tokenizer, layout.token_ids(tokenizer))
    model, config = load_adapter(base, folder, trainable)
    return model if trainable or dtype is None else cast_weights(model, dtype), tokenizer, config


def _check_positions(model, name: str) -> None:
    """Refuses models that take no positions of our choice (ALiBi, state spaces) or tell no length of context."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if "position_ids" not in inspect.signature(base.forward).parameters:
        raise CheckpointError(f"{name}: {type(base).__name__} takes no position ids, which memory blocks need.")
    for key in ("max_position_embeddings", *_WINDOWS):
        length = getattr(base.config, key, None)
        if not isinstance(length, int) and (length is not None or key == "max_position_embeddings"):
            raise CheckpointError(f"{name}: {key} in its config.json must be a whole number, not {length!r}.")


def placement(device: str | torch.device | None, dtype: torch.dtype | None) -> tuple[torch.device, torch.dtype | None]:
    """Device and dtype from what was asked for; a GPU that is not there falls back to the CPU.

    The dtype is None where the size of the model decides, see `precision.default_dtype`.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(device)
        if device.type == "cuda" and not torch.cuda.is_available():
            device = torch.device("cpu")
        torch.zeros(1, device=device).item()  # to be read back, too: `meta` holds no data
    except (RuntimeError, AssertionError, ImportError, TypeError):  # a misspelt name, or a device this machine lacks
        raise CheckpointError(f"The device {str(device)!r} cannot be used here; use cpu or cuda.") from None
    return device, dtype or (torch.bfloat16 if device.type == "cuda" else None)
