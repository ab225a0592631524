"""A layer x block heat map of activation patching for one question, in one sweep; and the same, cell by cell.

`patching_sweep` uses what `patching` shares (prefix, lower layers, earlier blocks). `patching_naive` runs one whole
forward pass per cell, the way a patching loop is usually written: the yardstick in tests and benchmarks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rim_probe.errors import RiMError
from rim_probe.greedy import keeps_logits
from rim_probe.model import RiM
from rim_probe.probing.hooks import edit_residual
from rim_probe.probing.interventions import Donors, Variant, resolve
from rim_probe.probing.patching import MAX_ROWS, Edit, Patcher


@dataclass(frozen=True)
class Sweep:
    """Results per layer, block and target, numpy.

    Attributes:
        layers, blocks: what the rows and columns are.
        targets: the answers followed.
        log_probability: float32 [layers, blocks, A], of all tokens of a target under the patch.
        says: bool [layers, blocks, A], greedy decoding gives exactly the target.
        clean: float32 [A], log probability without a patch.
    """

    layers: tuple[int, ...]
    blocks: tuple[int, ...]
    targets: tuple[str, ...]
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
    max_rows: int = MAX_ROWS,
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
    clean, edits, layers, blocks = _prepare(rim, question, source_question, targets, layers, blocks, slots, num_blocks)
    scores = clean.score(edits, max_rows)
    shape = len(layers), len(blocks), len(targets)
    return Sweep(
        layers,
        blocks,
        tuple(targets),
        scores.log_probability.reshape(shape).numpy(),
        scores.says.reshape(shape).numpy(),
        clean.log_probability[0].numpy(),
    )


def patching_naive(
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
    """The same as `patching_sweep` by one whole forward pass per cell and target."""
    clean, edits, layers, blocks = _prepare(rim, question, source_question, targets, layers, blocks, slots, num_blocks)
    found = [[_one_pass(rim, clean, target, edit) for target in clean.targets] for [edit] in edits]
    shape = len(layers), len(blocks), len(targets)
    return Sweep(
        layers,
        blocks,
        tuple(targets),
        np.array([[log for log, _ in row] for row in found], dtype=np.float32).reshape(shape),
        np.array([[says for _, says in row] for row in found]).reshape(shape),
        clean.log_probability[0].numpy(),
    )


def _prepare(
    rim: RiM, question: str, source, targets, layers, blocks, slots, num_blocks
) -> tuple[Patcher, list[list[Edit]], tuple[int, ...], tuple[int, ...]]:
    """The clean run, one list of edits per cell (layers outside), and the layers and blocks by number."""
    if isinstance(targets, str) or not targets:
        raise RiMError("Name the answers to follow as a list with at least one of them.")
    clean = Patcher(rim, question, [rim.encoder.answer_ids(target) for target in targets], num_blocks=num_blocks)
    every = Variant(range(1, clean.K + 1) if blocks is None else blocks, layers, slots)
    blocks, layers, _ = resolve(every, clean)
    donors, mode = Donors(clean), "zero" if source is None else "swap"
    rng = np.random.default_rng(0)  # asked for, never drawn from: neither mode is random
    edits = [donors.edits(Variant([block], [layer], slots, mode, source), rng) for layer in layers for block in blocks]
    return clean, edits, tuple(layers), tuple(blocks)


@torch.inference_mode()
def _one_pass(rim: RiM, clean: Patcher, target: list[int], edit: Edit) -> tuple[float, bool]:
    prompt = rim.prompt_ids(clean.question, "memory", clean.K)
    first = len(prompt) - clean.K * clean.block_length

    def patch(states: torch.Tensor) -> torch.Tensor:
        if edit.values is not None:
            states[:, first + edit.columns.to(states.device)] = edit.values.to(states)
        return states

    with edit_residual(rim, {edit.layer: patch}):
        ids = torch.tensor([prompt + target[:-1]], device=rim.device)
        choose = {"logits_to_keep": len(target)} if keeps_logits(rim.model) else {}
        logits = rim.model(input_ids=ids, use_cache=False, **choose).logits[0, -len(target) :].float()
    logits[:, rim.banned_ids] = -torch.inf
    wanted = torch.tensor(target, device=logits.device)
    log = logits.log_softmax(-1).gather(-1, wanted[:, None]).sum()
    return log.item(), bool((logits.argmax(-1) == wanted).all())
