"""The interchange test: a block is claimed to hold step t; taken from a partner problem, it must change the answer to
what the problem's own equations predict.

Method (interchange intervention: Geiger et al. 2021, arXiv:2106.02997):
1. Pairs: for each problem a partner with one number of the question changed (`equations.counterfactual`); the number
   enters at step t. Only pairs count in which the model answers both problems right at the readout looked at.
2. The states of the blocks claimed to hold step t are taken from the partner's run, the question stays. Success: the
   model now says exactly the answer that the equations give with the partner's result of step t.
3. The token where the answer is read is never swapped: it would carry the partner's answer over whatever the blocks
   hold. Swapped at one middle layer, chosen on `choose`, it is the positive control: the layers after it still read the
   problem's own question and blocks, so that it may fail. At all layers it succeeds by construction, the last layer
   being what the answer is read from: that row shows no more than that the hook writes.
4. What is swapped (the claimed blocks, all from the claimed ones on, all), at which layer (one, or all), which
   positions (slots, or the whole block) and which readout is looked at, is chosen on the split `choose` among cells of
   claimed blocks, and reported on `report`; so is, apart, the best joint swap.
5. The strict test: a partner with a second number changed in a later step, so that whoever copies the partner's answer
   fails. Here the wrong blocks are swapped: as many, none of them claimed for step t, nor for a step between the two
   changes, whose result is the predicted one by right. (With one changed number every later block may succeed by right:
   what follows from the change is what it should hold. That control is shown, too.)
6. Further controls on the same pairs: the claimed blocks from a random other problem (same prediction).
7. The same search on the stage-1 model, where there is one: its blocks were trained to state the steps.

Knows pairs, swaps and their outcomes. Knows nothing of how claims are found (see the nearest-step decoder) and how the
result is told (see `interchange_report`).
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from rim_probe.equations import Partner, counterfactual, value_bounds
from rim_probe.errors import RiMError
from rim_probe.evaluation import can_ask
from rim_probe.model import RiM
from rim_probe.probing.hooks import layers_told, spread_layers
from rim_probe.probing.interchange_report import section
from rim_probe.probing.patching import Edit, Patcher
from rim_probe.probing.section import Estimate, Section, proportion_estimate
from rim_probe.probing.study import Study
from rim_probe.problems import Problem

CHOOSE_PAIRS = 150
REPORT_PAIRS = 1000
HEATMAP_PAIRS = 300
FEWEST_PAIRS = 20  # a cell that is answered right in fewer pairs of `choose` cannot be chosen
FAMILIES = {
    "claimed": "the blocks claimed",
    "from": "all blocks from the first claimed on",
    "all": "all blocks",
}
POSITIONS = {"slots": "slots", "block": "whole block but the token where the answer is read"}
READ_TOKEN = "read token"  # the family of the positive control: the end token of the readout's own block
OWN, PREDICTED, PARTNER = range(3)  # the answers followed: the index of what was said


class Cell(NamedTuple):
    """One way to swap: which blocks, at which layer (None: all of 1..L), which positions, and the readout looked at."""

    family: str
    layer: int | None
    positions: str
    readout: int

    def __str__(self) -> str:
        where = "all layers" if self.layer is None else f"layer {self.layer}"
        return f"{FAMILIES[self.family]}, {where}, {POSITIONS[self.positions]}, readout {self.readout}"


class Swap(NamedTuple):
    """A swap spelled out: blocks 1..K, one layer or None, positions, and the readout looked at."""

    blocks: tuple[int, ...]
    layer: int | None
    positions: str
    readout: int


class Outcome(NamedTuple):
    """What a swap came to: the problem's index in its split, the step the changed number enters at, and whether its
    own, the predicted, the partner's answer was said (bool [3])."""

    index: int
    step: int
    said: np.ndarray


@dataclass(frozen=True)
class Pair:
    """A problem, its partner, and which problem of the split it is."""

    index: int
    problem: Problem
    partner: Partner


@dataclass(frozen=True)
class _Run:
    """Both clean runs of a pair; `right` [K]: both problems answered right at readout k."""

    pair: Pair
    clean: Patcher
    donor: Patcher
    right: np.ndarray


def score(
    study: Study,
    claims: Mapping[int, Sequence[int]] | None = None,
    *,
    choose_pairs: int = CHOOSE_PAIRS,
    report_pairs: int = REPORT_PAIRS,
    heatmap_pairs: int = HEATMAP_PAIRS,
) -> Section:
    """The interchange test on the split `report`, its cell chosen on `choose`.

    Args:
        claims: step t (1-based) -> the blocks claimed to hold it, from a decoder fitted and chosen on other splits; by
            default block t for step t.
        choose_pairs, report_pairs, heatmap_pairs: how many pairs at most; the heat maps take the first of `report`.

    Raises:
        RiMError: claims about blocks that do not exist, or no pair whose problems are both answered right.
    """
    rim = study.models["memory"]
    claims = _checked(claims, study)
    bounds = value_bounds(study.problems("fit"))
    pairs = {
        split: _pairs(study, split, claims, bounds, limit)
        for split, limit in (("choose", choose_pairs), ("report", report_pairs))
    }
    cells, controls = _cells(study), _control_cells(study)
    searched = _search(study, rim, pairs["choose"], claims, [*cells, *controls])
    control = {cell: searched.pop(cell) for cell in controls}
    chosen = best(searched, [cell for cell in cells if cell.family == "claimed"])
    joint = best(searched, [cell for cell in cells if cell.family != "claimed"])
    read = best(control, [cell for cell in controls if cell.readout == chosen.readout])
    outcomes, heat = _report(study, rim, pairs["report"], claims, (chosen, joint, read), heatmap_pairs)
    outcomes |= _strict(study, rim, claims, bounds, chosen, report_pairs)
    stage1 = {}
    if "stage1" in study.models:
        found = _search(study, study.models["stage1"], pairs["choose"], claims, cells)
        if any(estimate.n for estimate in found.values()):
            stage1 = {cell: found[cell] for cell in _best_of_kinds(found)}
    results = Results(
        claims=claims,
        layers=cells_layers(study),
        looked=layers_told(cells_layers(study)[:-1], range(1, study.layers[-1])),
        num_blocks=study.K,
        counts={f"{split} pairs": len(found) for split, found in pairs.items()},
        searched=searched,
        best_of_kinds=_best_of_kinds(searched),
        stage1=stage1,
        chosen=chosen,
        joint=joint,
        read=read,
        outcomes=outcomes,
        heat=heat,
    )
    return section(results, study.seed)


def _checked(claims: Mapping[int, Sequence[int]] | None, study: Study) -> dict[int, tuple[int, ...]]:
    if claims is None:
        longest = max(len(problem.steps) for problem in study.problems("choose"))
        if longest == 0:
            raise RiMError("The problems have no steps, so nothing is claimed about blocks; give problems with steps.")
        claims = {t: [t] for t in range(1, min(longest, study.K) + 1)}
    if not claims or not all(blocks and set(blocks) <= set(range(1, study.K + 1)) for blocks in claims.values()):
        raise RiMError(f"A claim names for each step the blocks, 1 to {study.K}, that are said to hold it.")
    return {t: tuple(sorted(set(blocks))) for t, blocks in claims.items()}


# ---------------------------------------------------------------------------------------------------------------- pairs


def _pairs(study, split, claims, bounds, limit, *, two_numbers: bool = False) -> list[Pair]:
    """At most `limit` pairs whose step is claimed to be held somewhere, in the order of the split."""
    rim, found = study.models["memory"], []
    for index, problem in enumerate(study.problems(split)):
        rng = np.random.default_rng([study.seed, index, two_numbers])
        partner = counterfactual(problem, rng, bounds, two_numbers=two_numbers)
        if partner is None or partner.step not in claims:
            continue
        if not can_ask(rim, partner.problem.question, "memory", study.K):
            continue
        found.append(Pair(index, problem, partner))
        if len(found) == limit:
            break
    return found


def _runs(study: Study, rim: RiM, pairs: Sequence[Pair], label: str) -> Iterator[_Run]:
    """The clean runs of every pair that is answered right at some readout."""
    readouts = range(1, study.K + 1)
    for pair in study.progress(pairs, label):
        partner = pair.partner.problem
        answers = (pair.problem.answer, pair.partner.predicted, partner.answer)
        targets = [rim.encoder.answer_ids(answer) for answer in answers]
        clean = Patcher(rim, pair.problem.question, targets, readouts=readouts, num_blocks=study.K)
        donor = Patcher(rim, partner.question, targets[2:], readouts=readouts, num_blocks=study.K)
        right = (clean.says[:, OWN] & donor.says[:, 0]).numpy()
        if right.any():
            yield _Run(pair, clean, donor, right)


# ---------------------------------------------------------------------------------------------------------------- swaps


def _places(swap: Swap, clean: Patcher) -> tuple[tuple[int, int], ...]:
    """(block, position) of all that a swap writes; the end of the readout's block only where ends are asked for."""
    last = clean.block_length - 1
    if swap.positions == "end":
        return tuple((block, last) for block in swap.blocks)
    positions = range(1, last) if swap.positions == "slots" else range(last + 1)
    return tuple((block, p) for block in swap.blocks for p in positions if (block, p) != (swap.readout, last))


def swapped(clean: Patcher, swaps: Sequence[Swap], memories: Sequence[torch.Tensor]) -> np.ndarray:
    """What is said at each swap's readout when its states come from `memories[i]` [L + 1, K, M + 2, d].

    Returns:
        bool [n, A], whether each of the patcher's target answers is said; its readouts must be 1 to K.
    """
    keys = [(_places(swap, clean), swap.layer, id(memory)) for swap, memory in zip(swaps, memories, strict=True)]
    memory_of = {id(memory): memory for memory in memories}
    rows = {key: i for i, key in enumerate(dict.fromkeys(keys))}  # another readout of the same states: the same row
    edits = []
    for places, layer, memory in rows:
        columns = torch.cat([clean.columns(block, [position]) for block, position in places])
        blocks, positions = (torch.tensor(index) for index in zip(*places, strict=True))
        layers = range(1, len(clean.memory)) if layer is None else [layer]
        edits.append([Edit(x, columns, memory_of[memory][x, blocks - 1, positions]) for x in layers])
    says = clean.score(edits).says.numpy()
    return np.array([says[rows[key], swap.readout - 1] for key, swap in zip(keys, swaps, strict=True)])


def _spell(cell: Cell, blocks: Sequence[int], last: int) -> Swap:
    whole = {
        "claimed": blocks,
        "from": range(blocks[0], last + 1),
        "all": range(1, last + 1),
        READ_TOKEN: (cell.readout,),
    }
    return Swap(tuple(whole[cell.family]), cell.layer, cell.positions, cell.readout)


def cells_layers(study: Study) -> list[int | None]:
    """Layers of 1..L-1 (see `spread_layers`), and None for all of 1..L: states are read by later layers alone, so the
    last is no place of its own."""
    return [*spread_layers(range(1, study.layers[-1])), None]


def _cells(study: Study) -> list[Cell]:
    return [
        Cell(family, layer, positions, readout)
        for family in FAMILIES
        for layer in cells_layers(study)
        for positions in POSITIONS
        for readout in range(1, study.K + 1)
    ]


def _control_cells(study: Study) -> list[Cell]:
    """The token where the answer is read, at one layer of the middle third: many layers are left to overrule it."""
    last = study.layers[-1]
    middle = spread_layers(range(max(1, last // 3), max(1, 2 * last // 3) + 1))
    return [Cell(READ_TOKEN, layer, "end", readout) for layer in middle for readout in range(1, study.K + 1)]


def _search(study, rim, pairs, claims, cells) -> dict[Cell, Estimate]:
    """Success of every cell on `choose`, over the pairs answered right at its readout."""
    outcomes: dict[Cell, list[bool]] = {cell: [] for cell in cells}
    for run in _runs(study, rim, pairs, "interchange choose"):
        wanted = [cell for cell in cells if run.right[cell.readout - 1]]
        swaps = [_spell(cell, claims[run.pair.partner.step], study.K) for cell in wanted]
        says = swapped(run.clean, swaps, [run.donor.memory] * len(swaps))
        for cell, row in zip(wanted, says, strict=True):
            outcomes[cell].append(bool(row[PREDICTED]))
    return {cell: proportion_estimate(found) for cell, found in outcomes.items()}


def best(searched: Mapping[Cell, Estimate], cells: Sequence[Cell]) -> Cell:
    """The most successful cell; of equals the one with most pairs, then the later readout."""
    most = max(searched[cell].n for cell in cells)
    if most == 0:
        raise RiMError("No pair of problems is answered right both times, so there is nothing to interchange.")
    fit = [cell for cell in cells if searched[cell].n >= min(FEWEST_PAIRS, most)]
    return max(fit, key=lambda cell: (searched[cell].value, searched[cell].n, cell.readout))


def _best_of_kinds(searched: Mapping[Cell, Estimate]) -> list[Cell]:
    """The best cell of every choice of blocks and positions, single layers and all layers apart."""
    kinds: dict[tuple, list[Cell]] = {}
    for cell in searched:
        kinds.setdefault((cell.family, cell.layer is None, cell.positions), []).append(cell)
    return [best(searched, cells) for cells in kinds.values()]


@dataclass(frozen=True)
class Results:
    """All that the report is made of.

    Attributes:
        layers: the single layers and None for all of 1..L, as in the cells.
        looked: "all layers", or how many single layers of how many.
        counts: pairs by split, before the filter on right answers.
        searched: success on `choose` of every cell.
        best_of_kinds: the best cell there of every choice of blocks and positions, one layer and all layers apart.
        stage1: such cells of the stage-1 model with their success; empty without one that is right in some pair.
        chosen, joint, read: the cells chosen there; `read` is the positive control's.
        outcomes: swap -> one entry per pair.
        heat: (step, block, layer) -> successes of single blocks.
    """

    claims: Mapping[int, Sequence[int]]
    layers: Sequence[int | None]
    looked: str
    num_blocks: int
    counts: Mapping[str, int]
    searched: Mapping[Cell, Estimate]
    best_of_kinds: Sequence[Cell]
    stage1: Mapping[Cell, Estimate]
    chosen: Cell
    joint: Cell
    read: Cell
    outcomes: Mapping[str, list[Outcome]]
    heat: Mapping[tuple[int, int, int | None], list[bool]]


def _report(study, rim, pairs, claims, cells, heatmap_pairs):
    """The outcomes of every swap at the chosen cells on `report`, and the heat maps of single blocks."""
    chosen, joint, read = cells
    outcomes: dict[str, list[Outcome]] = {}
    heat: dict[tuple[int, int, int | None], list[bool]] = {}
    problems = study.problems("report")
    grid = [(block, layer) for block in range(1, study.K + 1) for layer in cells_layers(study)]
    other = "block" if chosen.positions == "slots" else "slots"
    drawn = 0
    for run in _runs(study, rim, pairs, "interchange report"):
        step, donor = run.pair.partner.step, run.donor.memory
        swap = _spell(chosen, claims[step], study.K)
        rng = np.random.default_rng([study.seed, run.pair.index])
        stranger = problems[_another(len(problems), run.pair.index, rng)]
        wrong = _wrong_blocks(swap, claims[step], study.K, rng)
        swaps = {
            "claimed": (swap, donor),
            "wrong, one number": (wrong and swap._replace(blocks=wrong), donor),
            "random": (swap, Patcher(rim, stranger.question, num_blocks=study.K).memory),
            "other positions": (swap._replace(positions=other), donor),
            "all layers": (swap._replace(layer=None), donor),
            "joint": (_spell(joint, claims[step], study.K), donor),
            "read token": (_spell(read, claims[step], study.K), donor),
            "read token, all layers": (_spell(read._replace(layer=None), claims[step], study.K), donor),
        }
        asked = {name: entry for name, entry in swaps.items() if entry[0] and run.right[entry[0].readout - 1]}
        if asked:
            said = swapped(run.clean, *zip(*asked.values(), strict=True))
            for name, row in zip(asked, said, strict=True):
                outcomes.setdefault(name, []).append(Outcome(run.pair.index, step, row))
        if run.right[chosen.readout - 1] and drawn < heatmap_pairs:
            drawn += 1
            singles = [Swap((block,), layer, chosen.positions, chosen.readout) for block, layer in grid]
            said = swapped(run.clean, singles, [donor] * len(singles))
            for (block, layer), row in zip(grid, said, strict=True):
                heat.setdefault((step, block, layer), []).append(bool(row[PREDICTED]))
    return outcomes, heat


def _strict(study, rim, claims, bounds, chosen, limit) -> dict[str, list[Outcome]]:
    """The chosen swap, and the wrong blocks, with partners that differ in two numbers."""
    outcomes: dict[str, list[Outcome]] = {}
    pairs = _pairs(study, "report", claims, bounds, limit, two_numbers=True)
    for run in _runs(study, rim, pairs, "interchange strict"):
        partner = run.pair.partner
        if not run.right[chosen.readout - 1]:
            continue
        swap = _spell(chosen, claims[partner.step], study.K)
        by_right = {b for t in range(partner.step, partner.second.step) for b in claims.get(t, ())}
        wrong = _wrong_blocks(swap, by_right, study.K, np.random.default_rng([study.seed, run.pair.index]))
        swaps = {"strict": swap} | ({"wrong": swap._replace(blocks=wrong)} if wrong else {})
        said = swapped(run.clean, list(swaps.values()), [run.donor.memory] * len(swaps))
        for name, row in zip(swaps, said, strict=True):
            outcomes.setdefault(name, []).append(Outcome(run.pair.index, partner.step, row))
    return outcomes


def _another(count: int, index: int, rng: np.random.Generator) -> int:
    """A problem other than this one, where there is one."""
    return (index + int(rng.integers(1, max(count, 2)))) % count


def _wrong_blocks(swap: Swap, claimed: Collection[int], last: int, rng: np.random.Generator) -> tuple[int, ...] | None:
    """As many blocks as are swapped, none of them claimed, drawn among those the readout sees where that many are."""
    for upto in (swap.readout, last):
        others = [block for block in range(1, upto + 1) if block not in claimed]
        if len(others) >= len(swap.blocks):
            return tuple(sorted(rng.choice(others, len(swap.blocks), replace=False).tolist()))
    return None
