"""What a stage makes of problems: which of them it can use, their rows and batches, the weights of their readouts.

Knows recipes, problems and rows. Knows nothing about models, optimizers or folders.
"""

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np
import torch
from accelerate import PartialState

from rim_probe.datasets.arithmetic import generate
from rim_probe.datasets.partners import Partners
from rim_probe.datasets.sources import load_problems
from rim_probe.encoding import Encoder
from rim_probe.equations import unread_steps
from rim_probe.errors import RecipeError
from rim_probe.model import RiM
from rim_probe.packing import Row, cot_row, direct_row, stage1_row, stage2_row
from rim_probe.problems import Problem
from rim_probe.training.pairs import PairRows, draw_pairs
from rim_probe.training.recipe import Data, Recipe, Stage
from rim_probe.training.rows import Batches, draw, padding, row_sizes, sized_batches, token_batches
from rim_probe.training.schedules import stage1_weights, stage2_weights
from rim_probe.training.tokens import Entry, Tokens, tokenise

_STEPS_TOLD = ("stage1", "interchange")  # objectives whose rows tell steps; a pair is more than one of them


@dataclasses.dataclass(frozen=True)
class Pool:
    """Problems, how many of them each file holds (they stand in the order of the files), and their ids."""

    problems: list[Problem]
    sizes: list[int]
    tokens: Tokens


def make_problems(data: Data, report: Callable[[str], None]) -> tuple[list[list[Problem]], list[Problem]]:
    """The training problems of each file (a world counts as one), and those for choosing checkpoints."""
    if data.world is not None:
        train = list(generate(data.world, "train", data.rows, data.seed))
        valid = list(generate(data.world, "valid", data.validation_rows, data.seed, unique=True))
        return [train], valid
    files = [_read(source, report) for source in data.files]
    whole = sum(map(len, files))
    if data.rows is not None and data.rows < whole:
        drawn = torch.randperm(whole, generator=torch.Generator().manual_seed(data.seed))[: data.rows]
        drawn, starts = set(drawn.tolist()), itertools.accumulate(map(len, files), initial=0)
        files = [
            [p for i, p in enumerate(file, start) if i in drawn] for file, start in zip(files, starts, strict=False)
        ]
    valid = _read(data.validation, report)[: data.validation_rows] if data.validation else []
    return files, valid


def _read(source: str, report: Callable[[str], None]) -> list[Problem]:
    """The problems of a source; lines that were left out, and steps that can't be read, are counted aloud."""
    loaded = load_problems(source)
    if loaded.rejected:
        first = loaded.rejected[0]
        report(f"{source}: {len(loaded.rejected)} lines left out, such as line {first.line_number}: {first.reason}")
    if unread := unread_steps(loaded.problems):
        report(f"{source}: {len(unread):,} steps are no equation, such as {unread[0]}; they are trained on as text")
    return loaded.problems


def make_pool(rim: RiM, files: list[list[Problem]], report: Callable[[str], None]) -> Pool:
    """The problems of all files with their ids."""
    problems = list(itertools.chain.from_iterable(files))
    return Pool(problems, list(map(len, files)), tokenise(rim.encoder, problems, report))


def make_row(encoder: Encoder | Tokens, stage: Stage, seed: int) -> Callable[[Problem | Entry, int], Row]:
    """The function that turns a problem, and its place among those drawn, into a row of this stage's objective."""
    blocks = _blocks(encoder, stage)

    def row(problem: Problem | Entry, place: int) -> Row:
        if stage.objective == "cot":
            return cot_row(encoder, problem)
        if stage.objective == "direct":
            return direct_row(encoder, problem)
        if stage.objective in _STEPS_TOLD or _keeps_steps(stage, place, seed):
            return stage1_row(encoder, problem, blocks, stage.slot_labels > 0, stage.memory)
        return stage2_row(encoder, problem, blocks)

    return row


def _blocks(encoder: Encoder | Tokens, stage: Stage) -> int | None:
    """See `Stage.blocks`."""
    own = stage.blocks is None and stage.objective in ("stage2", "interchange")
    return encoder.layout.num_blocks if own else stage.blocks


def _keeps_steps(stage: Stage, place, seed: int):
    """Whether the row at a place (or at each of an array of them) keeps the targets of stage 1 in stage 2.

    A share of the rows does; which ones depends on the place alone, not on any state.
    """
    return (place * 2_654_435_761 + seed) % 2**32 < stage.grounded * 2**32


def usable_problems(pool: Pool, purpose: str, rim: RiM, stage: Stage, report: Callable[[str], None]) -> np.ndarray:
    """Which problems make rows of a stage, bool [n]; what is left out is counted aloud, all of it is refused.

    A problem without steps is left out where the objective needs them. It is also left out where others of its file
    have them, so that what is compared, memory, chain of thought and direct, sees the same rows of the same files.
    """
    tokens = pool.tokens
    stepped = tokens.step_numbers.lengths > 0
    file = np.repeat(np.arange(len(pool.sizes)), pool.sizes)
    needed = (np.bincount(file, stepped, len(pool.sizes))[file] > 0) | (stage.objective in (*_STEPS_TOLD, "cot"))
    blocks = _blocks(tokens, stage)
    ends = row_sizes(tokens, stage.objective, blocks).ends
    if stage.grounded:
        ends = np.maximum(ends, row_sizes(tokens, "stage1", blocks).ends)
    usable, told = np.ones(len(tokens), dtype=bool), []
    for fault, sound in (
        ("have no steps", stepped | ~needed),
        ("hold words that the tokenizer does not know", tokens.known),
        ("have a question that is empty, too long or holds a control token", tokens.askable),
        (f"do not fit into the context of {rim.max_length:,} tokens", ends <= rim.max_length),
    ):
        if count := int((usable & ~sound).sum()):
            told.append(f"{count:,} {fault}")
        usable &= sound
    if told and not usable.any():
        raise RecipeError(
            f"Stage {stage.name} can use none of the {len(tokens):,} {purpose} problems: {' and '.join(told)}."
        )
    if told:
        report(f"Stage {stage.name} leaves out some of the {len(tokens):,} {purpose} problems: {' and '.join(told)}.")
    return usable


def batches_per_step(stage: Stage) -> int:
    """Batches of a step."""
    return stage.accumulation * PartialState().num_processes


def _rows(stage: Stage) -> int:
    """How many rows a stage draws: batches of a fixed size make whole steps of them."""
    step = 1 if stage.batch_tokens else stage.batch_size * batches_per_step(stage)
    return min(stage.rows, max(1, stage.rows // step) * step)


def make_batches(
    rim: RiM, pool: Pool, usable: np.ndarray, plan: Recipe, number: int, report: Callable[[str], None]
) -> Batches:
    """The batches of a stage in their order, and a line that says how many rows they hold and how large they are.

    No batch more than the steps need: with batches to spare, a run resumed at its last step would take another one.
    """
    stage, tokens = plan.stages[number], pool.tokens
    # Stages follow one another through the files, as one long stage would go through them.
    start, rows = sum(map(_rows, plan.stages[:number])), _rows(stage)
    repeats = plan.data.repeats or (1.0,) * len(pool.sizes)
    drawn, ends = draw(pool.sizes, repeats, usable, plan.seed, start, rows)
    blocks = _blocks(tokens, stage)
    lengths = row_sizes(tokens, stage.objective, blocks, stage.memory).lengths[drawn]
    if stage.grounded:
        grounded = row_sizes(tokens, "stage1", blocks).lengths[drawn]
        lengths = np.where(_keeps_steps(stage, np.arange(rows), plan.seed), grounded, lengths)
    seed = plan.seed + 1000 * number
    pairs = None
    if stage.objective == "interchange":
        alike = Partners(plan.data.world, "train", plan.data.seed) if plan.data.world else None
        drawn_pairs = draw_pairs(pool.problems, drawn, alike, stage.share, stage.one_number_share, seed)
        pairs = PairRows(rim, tokens, drawn, drawn_pairs, blocks, stage.slot_labels > 0, report)
        report(f"Stage {stage.name}: {(pairs.lengths > 0).mean():.1%} of the rows are pairs")
        lengths = np.where(pairs.lengths > 0, pairs.lengths, lengths)
    if stage.batch_tokens:
        batches = token_batches(lengths, ends, stage.batch_tokens, seed)
    else:
        batches = sized_batches(lengths, ends, stage.batch_size, seed)
    at_once = batches_per_step(stage)
    batches = batches[: max(1, len(batches) // at_once) * at_once]
    told = (
        f"rows {sum(map(len, batches)):,}, batches {len(batches):,}, tokens {lengths[np.concatenate(batches)].sum():,}"
    )
    report(f"Stage {stage.name}: {told}, padding {padding(lengths, batches):.1%}")
    single = make_row(tokens, stage, plan.seed)
    return Batches(drawn, batches, lambda problem, at: (pairs and pairs.row(at)) or single(tokens[problem], at))


def readout_weights(stage: Stage):
    """The weights of a row's readouts at a point of the stage, by its objective (see `schedules`)."""

    def weights(progress: float, num_grounded: torch.Tensor, num_readouts: torch.Tensor) -> torch.Tensor:
        if stage.objective == "stage1":
            return stage1_weights(stage.lambdas, progress, num_grounded, num_readouts)
        if stage.objective == "interchange":
            return stage1_weights("constant", progress, num_grounded, num_readouts)
        if stage.objective == "stage2":
            alphas = stage2_weights(num_readouts)
            # Rows that keep their steps weigh every readout alike: their steps are there to be remembered.
            return torch.where((num_grounded > 0)[:, None], (alphas > 0) / num_readouts[:, None].float(), alphas)
        return torch.ones(len(num_readouts), 1, device=num_readouts.device)

    return weights
