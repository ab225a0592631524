"""A base that nobody trained to think in memory, asked like a RiM checkpoint: real speed, answers that say nothing.

Such weights do not stop where an answer ends. Whoever times them lets them write exactly as many tokens as the gold
text has (`gold_length`, `gold_first`, `never_ending`): the work of weights that answer right.

Knows which paths are bases, and the lengths of gold texts. Does not know clocks or grading.
"""

from collections.abc import Mapping
from pathlib import Path

from rim_probe.bases import KNOWN, Progress
from rim_probe.memory import LAYOUT_FILE
from rim_probe.model import METHODS, RiM, load_base, load_methods, placement
from rim_probe.problems import Problem


class Untrained(RiM):
    """A base model with memory tokens that it was never trained on."""


class Endless(Untrained):
    """One that never ends an answer: no id equals its `eos_id`, and the true one is banned like any control token."""

    @property
    def eos_id(self) -> int:
        return -1


def load_methods_or_base(
    checkpoint: str, device: str | None = None, progress: Progress | None = None
) -> dict[str, RiM]:
    """The models of a RiM checkpoint by method; of a base (known name, folder, GGUF file) one `Untrained` for all.

    `progress` is told of a base that has to be fetched.

    Raises:
        RiMError: no such checkpoint, damaged files, an unknown device.
    """
    if not _is_base(checkpoint):
        return load_methods(checkpoint, device, progress=progress)
    place, dtype = placement(device, None)
    base, tokenizer = load_base(checkpoint, dtype, progress=progress)
    return dict.fromkeys(METHODS, Untrained.attach(base.to(place).eval(), tokenizer, name=Path(checkpoint).name))


def _is_base(checkpoint: str) -> bool:
    path = Path(checkpoint)
    return checkpoint in KNOWN or path.suffix == ".gguf" or (path.is_dir() and not (path / LAYOUT_FILE).exists())


def never_ending(methods: Mapping[str, RiM]) -> dict[str, RiM]:
    """The same models, each untrained one as `Endless`; methods that share a model go on sharing it."""
    swapped = {
        id(rim): Endless(rim.model, rim.tokenizer, rim.layout, rim.name) if isinstance(rim, Untrained) else rim
        for rim in methods.values()
    }
    return {method: swapped[id(rim)] for method, rim in methods.items()}


def gold_length(rim: RiM, problem: Problem, method: str) -> int:
    """Tokens of the gold text with EOS: steps, marker and answer for cot, the answer for memory and direct."""
    return len(rim.encoder.chain_ids(problem) if method == "cot" else rim.encoder.answer_ids(problem.answer))


def gold_first(rim: RiM, problem: Problem, method: str) -> int:
    """Index of the answer's first token in the gold text: for cot the one after the steps and the marker."""
    return gold_length(rim, problem, method) - len(rim.encoder.answer_ids(problem.answer))
