"""Which rows a stage sees and in what order: passes over the files, batches of like length, padding.

Knows tokenised problems, objectives and random numbers. Knows nothing about models, recipes or how rows are trained on.
Everything is decided before the first step by the seed alone, so a resumed run sees what an uninterrupted one sees.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Dataset

from rim_probe.packing import Row
from rim_probe.training.tokens import Tokens

_GROUP = 64  # batches that are sorted together
_GROUP_ROWS = 4096  # rows that are sorted together where batches are cut by tokens


class Batches(Dataset):
    """Batches of training rows in their final order, made when they are needed.

    Args:
        problems: what was drawn, in the order in which it was drawn.
        batches: places in `problems`, an array for each batch, in the order of training.
        make_row: a row from a problem and its place in `problems`.
    """

    def __init__(self, problems: Sequence, batches: Sequence[np.ndarray], make_row: Callable[[object, int], Row]):
        self.problems, self.batches, self.make_row = problems, batches, make_row

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> list[Row]:
        return [self.make_row(self.problems[place], place) for place in self.batches[number].tolist()]


# -------------------------------------------------------------------------------------------------------------- passes


def draw(
    sizes: Sequence[int], repeats: Sequence[float], usable: np.ndarray, seed: int, start: int, rows: int
) -> tuple[np.ndarray, list[int]]:
    """A piece of the endless row of problems that a pool of files gives.

    Of a file with n usable problems and repeat r each pass holds r * n (rounded, at least one), dealt from a shuffled
    deck of the whole file; when the deck is used up, the next one is shuffled. So r = 1 is every problem once a pass,
    r = 2 every one twice, and r = 0.25 another quarter in each of four passes. A pass is shuffled across its files.

    Args:
        sizes: problems of each file; the pool holds the first file's problems, then the second's, and so on.
        repeats: one for each file.
        usable: which problems of the pool may be drawn, bool [sum(sizes)].
        seed: decides everything.
        start: rows of the piece before this one; stages follow one another, so a share is fresh in the next stage, too.
        rows: length of the piece.

    Returns:
        Numbers of problems, [rows]; and where each pass ends in it, the last end being `rows`.
    """
    parts, ends, done = [], [], 0
    for dealt in _passes(sizes, repeats, usable, seed):
        part = dealt[max(0, start - done) : max(0, start + rows - done)]
        done += len(dealt)
        if len(part):
            parts.append(part)
            ends.append(min(done - start, rows))
        if done >= start + rows:
            return np.concatenate(parts), ends


def _passes(sizes: Sequence[int], repeats: Sequence[float], usable: np.ndarray, seed: int) -> Iterator[np.ndarray]:
    """The numbers of the problems of pass after pass, without end."""
    places = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    decks = [_deal(numbers, usable, (seed, file)) for file, numbers in enumerate(places)]
    counts = [int(usable[numbers].sum()) for numbers in places]
    takes = [max(1, round(repeat * count)) if count else 0 for repeat, count in zip(repeats, counts, strict=True)]
    held = [np.empty(0, dtype=np.int64) for _ in sizes]
    number = 0
    while True:
        for file, take in enumerate(takes):
            while len(held[file]) < take:
                held[file] = np.concatenate([held[file], next(decks[file])])
        dealt = np.concatenate([cards[:take] for cards, take in zip(held, takes, strict=True)])
        held = [cards[take:] for cards, take in zip(held, takes, strict=True)]
        yield np.random.default_rng((seed, len(sizes), number)).permutation(dealt)
        number += 1


def _deal(numbers: np.ndarray, usable: np.ndarray, seed: tuple[int, ...]) -> Iterator[np.ndarray]:
    """Deck after deck of a file. The whole file is shuffled, so that what cannot be used moves nothing else."""
    deck = 0
    while True:
        shuffled = np.random.default_rng((*seed, deck)).permutation(numbers)
        yield shuffled[usable[shuffled]]
        deck += 1


# --------------------------------------------------------------------------------------------------------------- order


def bucketed_order(lengths: np.ndarray, ends: Sequence[int], batch_size: int, seed: int) -> np.ndarray:
    """The places of rows with these lengths, [rows], in an order in which batches hold rows of like length.

    Each pass is cut into groups of 64 batches, sorted by length inside a group, and its batches are shuffled. Every
    pass keeps its own rows; the batch in which one pass ends and the next begins is of mixed length.

    Args:
        lengths: of the rows as they were drawn, that is shuffled.
        ends: where each pass ends, see `draw`.
    """
    generator = np.random.default_rng(seed)
    parts, begin = [], 0
    for end in ends:
        filling = min(-begin % batch_size, end - begin)  # or every batch of this pass would be cut in two
        parts.append(np.arange(begin, begin + filling))
        batches, rest = [], []
        for start in range(begin + filling, end, _GROUP * batch_size):
            nearby = np.arange(start, min(start + _GROUP * batch_size, end))
            nearby = nearby[np.argsort(lengths[nearby], kind="stable")]
            whole = len(nearby) // batch_size * batch_size
            batches.append(nearby[:whole].reshape(-1, batch_size))
            rest.append(nearby[whole:])
        if batches:
            parts.append(generator.permutation(np.concatenate(batches)).reshape(-1))
        parts += rest
        begin = end
    return np.concatenate(parts)


def sized_batches(lengths: np.ndarray, ends: Sequence[int], batch_size: int, seed: int) -> list[np.ndarray]:
    """Batches of `batch_size` rows each, but for the last; see `bucketed_order`."""
    order = bucketed_order(lengths, ends, batch_size, seed)
    return np.split(order, range(batch_size, len(order), batch_size))


def token_batches(lengths: np.ndarray, ends: Sequence[int], budget: int, seed: int) -> list[np.ndarray]:
    """Batches of at most `budget` tokens, padding counted; a longer row is a batch of its own.

    Each pass is cut into groups of 4,096 rows, sorted by length inside a group, and its batches are shuffled.
    """
    generator = np.random.default_rng(seed)
    found, begin = [], 0
    for end in ends:
        batches = []
        for start in range(begin, end, _GROUP_ROWS):
            nearby = np.arange(start, min(start + _GROUP_ROWS, end))
            nearby = nearby[np.argsort(lengths[nearby], kind="stable")]
            first = 0
            for last in range(1, len(nearby) + 1):
                if last == len(nearby) or lengths[nearby[last]] * (last + 1 - first) > budget:
                    batches.append(nearby[first:last])
                    first = last
        found += [batches[i] for i in generator.permutation(len(batches))]
        begin = end
    return found


def padding(lengths: np.ndarray, batches: Sequence[np.ndarray]) -> float:
    """The share of positions that batches of rows with these lengths spend on padding."""
    return 1 - sum(lengths[b].sum() for b in batches) / sum(lengths[b].max() * len(b) for b in batches)


# ------------------------------------------------------------------------------------------------------------- lengths


@dataclass(frozen=True)
class Sizes:
    """How long the rows of n problems are, without making them.

    Attributes:
        lengths: tokens of each row, [n].
        ends: one more than the highest position id of each row, [n]; readouts do not advance positions.
    """

    lengths: np.ndarray
    ends: np.ndarray


def row_sizes(tokens: Tokens, objective: str, blocks: int | None, memory: bool = True) -> Sizes:
    """The sizes of the rows that `packing` makes of all problems.

    Args:
        objective: stage1, stage2, interchange (as stage1: pairs are longer), cot or direct.
        blocks: as in `packing.stage1_row` and `packing.stage2_row`; unused for text rows.
        memory: as in `packing.stage1_row`.
    """
    question = len(tokens.prefix_ids) + tokens.questions.lengths
    answer = tokens.answers.lengths[tokens.answer_numbers]
    block = len(tokens.block_ids)
    if objective in ("cot", "direct"):
        target = len(tokens.marker_ids) + answer + (tokens.chains.lengths if objective == "cot" else 0)
        return Sizes(question + target, question + target)
    if objective == "stage2":
        return Sizes(question + blocks * (block + answer), question + blocks * block + answer)
    # Stage 1: readout k states step k + 1, and the readouts after the last step state the answer.
    own = tokens.step_numbers
    problem = np.repeat(np.arange(len(tokens)), own.lengths)
    place = np.arange(len(own.flat)) - own.starts[problem]
    step = tokens.steps.lengths[own.flat]
    grounded = np.maximum(own.lengths - 1, 0)
    count = np.maximum(grounded + 1, blocks or 0)
    told = np.bincount(problem, np.where(place > 0, step, 0), len(tokens)).astype(np.int64)
    ends = question + count * block + answer
    later = place > 0
    np.maximum.at(ends, problem[later], (question[problem] + place * block + step)[later])
    return Sizes(question + count * (block if memory else 1) + told + (count - grounded) * answer, ends)
