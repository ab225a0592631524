"""A layer x block heat map of activation patching for one question, in one sweep (see `patching`)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rim_probe.errors import RiMError
from rim_probe.model import RiM
from rim_probe.probing.interventions import Donors, Variant, resolve
from rim_probe.probing.patching import Patcher


@dataclass(frozen=True)
class Sweep:
    """Results per layer, block and target, numpy.

    Attributes:
        layers, blocks: what the rows and columns are.
        log_probability: float32 [layers, blocks, A], of all tokens of a target under the patch.
        says: bool [layers, blocks, A], greedy decoding gives exactly the target.
        clean: float32 [A], log probability without a patch.
    """

    layers: tuple[int, ...]
    blocks: tuple[int, ...]
    log_probability: np.ndarray
    says: np.ndarray
    clean: np.ndarray


def patching_sweep(
    rim: RiM,
    question: str,
    source_question: str | None,
    targets: Sequence[str],
    *,
    layers: Sequence[int | str] | None = None,
    blocks: Sequence[int] | None = None,
    slots: Sequence[int | str] | None = None,
    num_blocks: int | None = None,
) -> Sweep:
    """What each answer's log probability becomes when one block at one layer is taken from another question.

    Args:
        source_question: whose states are put in; None writes zeros.
        targets: answers as text, such as the question's own and the source's.
        layers: None for 1..L. Slots patched after the last layer alone can change nothing: nobody reads them there.
        slots: 1..M, "begin", "end"; None for all slots.

    Raises:
        RiMError: as `interventions.intervene_many`; no target.
    """
    if isinstance(targets, str) or not targets:
        raise RiMError("Name the answers to follow as a list with at least one of them.")
    clean = Patcher(rim, question, [rim.encoder.answer_ids(target) for target in targets], num_blocks=num_blocks)
    every = Variant(range(1, clean.K + 1) if blocks is None else blocks, layers, slots)
    blocks, layers, _ = resolve(every, clean)
    donors, mode = Donors(clean), "zero" if source_question is None else "swap"
    rng = np.random.default_rng(0)  # asked for, never drawn from: neither mode is random
    cells = [Variant([block], [layer], slots, mode, source_question) for layer in layers for block in blocks]
    scores = clean.score([donors.edits(cell, rng) for cell in cells])
    shape = len(layers), len(blocks), len(targets)
    found = (x.reshape(shape).numpy() for x in (scores.log_probability, scores.says))
    return Sweep(tuple(layers), tuple(blocks), *found, clean.log_probability.numpy())
