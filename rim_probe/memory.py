"""Memory blocks: which fixed tokens follow a question, and where each of them stands.

Knows token strings, counts and positions. Knows nothing about models, training or readouts.
A block is `m_k = <b> <m> * M </b>`; K blocks follow the question (arXiv:2605.30343, notation of the method section).
"""

import hashlib
import json
import logging
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from itertools import product
from pathlib import Path

from rim_probe.errors import LayoutError
from rim_probe.files import write_atomic

LAYOUT_FILE = "memory_layout.json"
DETECTED = "detected"  # in the place of a layout: the one that tokens tell
MAX_BLOCKS = 64
MAX_SLOTS = 64
log = logging.getLogger(__name__)
_PRINT = "fingerprint"  # the key in the file
_FILES = "files"  # likewise: what lay beside it when it was saved
_SEALED = ("adapter_config.json", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
# One name in three forms, such as <b> <m> </b>, <rim_b> <rim_m> <rim_eb> or <|mem_begin|> <|mem_slot|> <|mem_end|>.
_TOKEN = re.compile(r"[<\[]\|?(?P<closing>/?)(?P<name>\w+[_-])?(?P<part>[a-z]+)\|?[>\]]", re.IGNORECASE)
_PARTS = {"begin": {"b", "begin", "start"}, "slot": {"m", "mem", "memory", "slot"}, "end": {"e", "eb", "end"}}


@dataclass(frozen=True)
class MemoryLayout:
    """K memory blocks of M slots each, delimited by a begin and an end token.

    The defaults are those of the paper's main experiment (K = 8, M = 2).

    Raises:
        LayoutError: a count out of range, or token names that are empty, equal, or hold white space.
    """

    num_blocks: int = 8
    slots_per_block: int = 2
    begin: str = "<b>"
    slot: str = "<m>"
    end: str = "</b>"

    def __post_init__(self) -> None:
        for name, low, high in (("num_blocks", 0, MAX_BLOCKS), ("slots_per_block", 1, MAX_SLOTS)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
                raise LayoutError(f"Memory layout: {name} must be a whole number from {low} to {high}, not {value!r}.")
        for name in ("begin", "slot", "end"):
            token = getattr(self, name)
            if not isinstance(token, str) or not token or any(char.isspace() for char in token):
                raise LayoutError(
                    f"Memory layout: {name} must be a token name without white space, such as '<m>', not {token!r}."
                )
        if len(set(self.tokens)) != 3:
            raise LayoutError(f"Memory layout: begin, slot and end must be three different tokens, not {self.tokens}.")

    @property
    def tokens(self) -> tuple[str, str, str]:
        """The three added tokens: begin, slot, end."""
        return self.begin, self.slot, self.end

    @property
    def block_length(self) -> int:
        """Tokens in one block: M slots and two delimiters."""
        return self.slots_per_block + 2

    @property
    def block_text(self) -> str:
        """One block as text; what a plain serving stack appends K times to a prompt."""
        return self.begin + self.slot * self.slots_per_block + self.end

    def text(self, num_blocks: int | None = None) -> str:
        """All blocks as text."""
        return self.block_text * self.check_blocks(num_blocks)

    def check_blocks(self, num_blocks: int | None) -> int:
        """`num_blocks`, or the layout's own count for None; refuses what is out of range.

        Raises:
            LayoutError: not a whole number from 0 to MAX_BLOCKS.
        """
        if num_blocks is None:
            return self.num_blocks
        if not isinstance(num_blocks, int) or isinstance(num_blocks, bool) or not 0 <= num_blocks <= MAX_BLOCKS:
            raise LayoutError(
                f"The number of memory blocks must be a whole number from 0 to {MAX_BLOCKS}, not {num_blocks!r}."
            )
        return num_blocks

    def token_ids(self, tokenizer) -> tuple[int, int, int]:
        """Ids of begin, slot and end in `tokenizer`.

        Raises:
            LayoutError: the tokenizer does not hold all three tokens.
        """
        vocabulary = tokenizer.get_vocab()
        missing = [token for token in self.tokens if token not in vocabulary]
        if missing:
            raise LayoutError(
                f"The tokenizer does not know the memory tokens {', '.join(missing)} of this layout; "
                "use the tokenizer saved with the layout, or add them with RiM.attach."
            )
        return tuple(vocabulary[token] for token in self.tokens)

    def block_ids(self, tokenizer) -> list[int]:
        """Token ids of one block, shape [M + 2]; LayoutError as in `token_ids`."""
        begin, slot, end = self.token_ids(tokenizer)
        return [begin] + [slot] * self.slots_per_block + [end]

    def slot_positions(self, question_length: int, num_blocks: int | None = None) -> list[list[int]]:
        """Absolute positions of every slot, shape [K][M], for a question of `question_length` tokens."""
        return [
            [question_length + k * self.block_length + 1 + m for m in range(self.slots_per_block)]
            for k in range(self.check_blocks(num_blocks))
        ]

    def end_positions(self, question_length: int, num_blocks: int | None = None) -> list[int]:
        """Absolute position of every block's end token, shape [K]; readout k is predicted from the k-th of them."""
        return [question_length + (k + 1) * self.block_length - 1 for k in range(self.check_blocks(num_blocks))]

    @property
    def fingerprint(self) -> str:
        """What `memory_layout.json` holds of the layout that a model was trained with, to tell one edited since."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    def to_dict(self) -> dict:
        """The fields by name, as `memory_layout.json` holds them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: object) -> "MemoryLayout":
        """Inverse of `to_dict`; unknown keys and wrong types are refused by name."""
        if not isinstance(data, dict):
            raise LayoutError(f"Memory layout: expected a JSON object with named values, found {type(data).__name__}.")
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(data) - known)
        if unknown:
            raise LayoutError(
                f"Memory layout: unknown key {', '.join(map(repr, unknown))}; "
                f"known keys are {', '.join(sorted(known))}."
            )
        return cls(**data)

    def save(self, folder: str | Path) -> Path:
        """Writes `memory_layout.json` into `folder`, with digests of the configuration beside it; returns its path."""
        path = Path(folder) / LAYOUT_FILE
        told = self.to_dict() | {_PRINT: self.fingerprint, _FILES: _digests(path.parent)}
        write_atomic(path, (json.dumps(told, indent=2) + "\n").encode())
        return path

    @classmethod
    def load(cls, path: str | Path) -> "MemoryLayout":
        """Reads a layout from a checkpoint folder or from the JSON file itself; warns of what was edited since.

        A number changed in the layout, in the configuration or in the tokenizer beside it is another model.

        Raises:
            LayoutError: no such file, not JSON, unknown keys or impossible values.
        """
        path = Path(path)
        path = path / LAYOUT_FILE if path.suffix != ".json" else path
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise LayoutError(
                f"{path} is missing, so this is not a RiM checkpoint; make one with RiM.attach and save_pretrained."
            ) from None
        except (OSError, ValueError, RecursionError) as error:  # what json raises besides its own error
            raise LayoutError(f"{path} cannot be read as JSON ({error}); restore it from the checkpoint.") from None
        trained, saved = (data.pop(key, None) if isinstance(data, dict) else None for key in (_PRINT, _FILES))
        try:
            layout = cls.from_dict(data)
        except LayoutError as error:
            raise LayoutError(f"{path}: {error}") from None
        if trained not in (None, layout.fingerprint):
            log.warning("%s", _edited(path, layout, trained))
        now = _digests(path.parent)
        if isinstance(saved, dict) and (changed := [name for name in saved if now.get(name) != saved[name]]):
            log.warning("%s changed since %s was saved, so answers may differ.", ", ".join(changed), path.parent)
        return layout


def _digests(folder: Path) -> dict[str, str]:
    files = {name: folder / name for name in _SEALED}
    return {name: hashlib.sha256(file.read_bytes()).hexdigest()[:16] for name, file in files.items() if file.is_file()}


def _edited(path: Path, layout: MemoryLayout, trained: object) -> str:
    """What is wrong with an edited layout; block and slot counts can be found again, for there are few."""
    counts = product(range(MAX_BLOCKS + 1), range(1, MAX_SLOTS + 1))
    found = (replace(layout, num_blocks=blocks, slots_per_block=slots) for blocks, slots in counts)
    was = next(
        (f"{it.num_blocks} blocks of {it.slots_per_block}" for it in found if it.fingerprint == trained), "others"
    )
    return (
        f"{path} was edited: the model was trained with {was}, not with {layout.num_blocks} blocks of "
        f"{layout.slots_per_block} slots {layout.block_text}, so its answers may be wrong."
    )


def detect(tokens: Iterable[str]) -> MemoryLayout | None:
    """The layout that added tokens of a tokenizer tell by their names; None where they tell none, or several.

    Tokens do not tell how many blocks and slots there are: these are the defaults.
    """
    found: dict[str, dict[str, str]] = {}
    for token in tokens:
        if match := _TOKEN.fullmatch(token):
            part = match["part"].lower()
            kind = next((kind for kind, names in _PARTS.items() if part in names), None)
            kind = ("end" if kind == "begin" else None) if match["closing"] else kind
            if kind:
                found.setdefault((match["name"] or "").lower(), {}).setdefault(kind, token)
    whole = [parts for parts in found.values() if len(parts) == len(_PARTS)]
    return MemoryLayout.from_dict(whole[0]) if len(whole) == 1 else None
