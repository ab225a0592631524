"""Which rows a stage sees: the mix of files, equal rows for all methods, batches of like length, exact lengths."""

from collections import Counter
from collections.abc import Sequence
from functools import partial

import numpy as np
import pytest
from conftest import tiny_tokenizer

from rim_probe.datasets.arithmetic import World, generate
from rim_probe.encoding import Encoder
from rim_probe.memory import MemoryLayout
from rim_probe.packing import cot_row, direct_row, stage1_row, stage2_row
from rim_probe.problems import Problem
from rim_probe.training.rows import bucketed_order, draw, padding, row_sizes, sized_batches, token_batches
from rim_probe.training.tokens import tokenise

SIZES = (6, 40)


def drawn(start: int, rows: int, repeats: Sequence[float] = (2.0, 0.25), seed: int = 0, usable=None) -> list[int]:
    usable = np.ones(sum(SIZES), dtype=bool) if usable is None else usable
    numbers, ends = draw(SIZES, repeats, usable, seed, start, rows)
    assert len(numbers) == rows == ends[-1]
    return numbers.tolist()


def test_a_pass_repeats_one_file_and_takes_a_fresh_share_of_another():
    passes = [drawn(22 * i, 22) for i in range(5)]  # 2 * 6 + 0.25 * 40 rows
    for rows in passes:
        seen = Counter(rows)
        assert all(seen[i] == 2 for i in range(6)) and sum(seen[i] for i in range(6, 46)) == 10
    shares = [set(rows) - set(range(6)) for rows in passes]
    assert set.union(*shares[:4]) == set(range(6, 46))  # no row again before the file is used up
    assert shares[4] not in shares[:4]  # then it is dealt anew
    assert passes[0] != sorted(passes[0]) and len({tuple(rows) for rows in passes}) == 5


def test_the_seed_alone_decides():
    whole = drawn(0, 300)
    assert whole[37:150] == drawn(37, 113) and whole[:22] == drawn(0, 22)
    assert whole != drawn(0, 300, seed=1) and Counter(whole[:88]) == Counter(drawn(0, 88, seed=1))


def test_what_cannot_be_used_is_not_drawn_and_moves_nothing_else():
    usable = np.ones(46, dtype=bool)
    usable[[2, 9]] = False
    with_all = [i for i in drawn(0, 46, (1.0, 1.0)) if i not in (2, 9)]
    without = drawn(0, 44, (1.0, 1.0), usable=usable)
    assert sorted(without) == sorted(with_all)
    usable[:6] = False
    assert min(drawn(0, 200, usable=usable)) >= 6
    seen = Counter(drawn(0, 5, (1.0, 0.001)))  # a share is one row at least
    assert sum(count for i, count in seen.items() if i < 6) < 6


# --------------------------------------------------------------------------------------------------------------- order


@pytest.mark.parametrize(("problems", "batch_size"), [(1000, 8), (1003, 8), (20, 8), (3, 8), (7, 1)])
def test_order_holds_every_row_of_a_pass_in_that_pass(problems, batch_size):
    rows = 3 * problems + 2
    numbers, ends = draw([problems], [1.0], np.ones(problems, dtype=bool), 5, 0, rows)
    lengths = (37 * numbers) % 101
    order = bucketed_order(lengths, ends, batch_size, seed=5)
    assert sorted(order) == list(range(rows))
    for start in range(0, 3 * problems, problems):
        assert sorted(numbers[order[start : start + problems]]) == list(range(problems))
    assert np.array_equal(order, bucketed_order(lengths, ends, batch_size, seed=5))
    if problems > 3:
        assert not np.array_equal(order, bucketed_order(lengths, ends, batch_size, seed=6))


def test_batches_hold_rows_of_like_length_in_every_pass():
    numbers, ends = draw([203], [1.0], np.ones(203, dtype=bool), 0, 0, 5 * 203)  # 203 = 25 batches of 8 and a rest
    lengths = (37 * numbers) % 101 + 1
    ordered = lengths[bucketed_order(lengths, ends, 8, seed=0)]
    spans = [np.ptp(ordered[i : i + 8]) for i in range(0, len(ordered) - 8, 8)]
    # All but the few batches in which a pass ends and the next begins.
    assert sum(span > 12 for span in spans) <= 5
    assert spans != sorted(spans)  # but short and long batches come in turns
    unsorted = np.split(np.arange(len(lengths)), range(8, len(lengths), 8))
    assert padding(lengths, sized_batches(lengths, ends, 8, seed=0)) < 0.1 < padding(lengths, unsorted)


@pytest.mark.parametrize("budget", [1, 101, 400])
def test_batches_by_tokens_hold_every_row_of_a_pass_and_no_more_than_the_budget(budget):
    numbers, ends = draw([500], [1.0], np.ones(500, dtype=bool), 0, 0, 1200)
    lengths = (37 * numbers) % 101 + 1
    batches = token_batches(lengths, ends, budget, seed=3)
    assert sorted(np.concatenate(batches)) == list(range(1200))
    assert all(len(b) == 1 or lengths[b].max() * len(b) <= budget for b in batches)
    passes = [int(np.searchsorted(ends, b[0], side="right")) for b in batches]
    assert passes == sorted(passes) and all(len({*np.searchsorted(ends, b, side="right")}) == 1 for b in batches)
    again = token_batches(lengths, ends, budget, seed=3)
    assert all(np.array_equal(one, other) for one, other in zip(batches, again, strict=True))
    if budget == 400:
        assert len({len(b) for b in batches}) > 5 and padding(lengths, batches) < 0.1


# ------------------------------------------------------------------------------------------------------------- lengths


def test_sizes_are_those_of_the_rows():
    problems = [
        *generate(World(max_steps=6), "train", 40, seed=1),
        Problem("What is 3 + 4?", (), "7"),
        Problem("What is 3 + 4?", ("<<3+4=7>>",), "7"),
        Problem("A step longer than all that follows.", ("<<1>>", "<<" + "1+" * 30 + "1=31>>"), "31"),
        Problem("A long answer.", ("<<1>>", "<<2>>"), "3" * 80),
    ]
    layout = MemoryLayout()
    tokenizer = tiny_tokenizer(bos=True)
    tokenizer.add_special_tokens({"additional_special_tokens": list(layout.tokens)})
    tokens = tokenise(Encoder(tokenizer, layout), problems, print)
    cases = [("cot", None, cot_row, True), ("direct", None, direct_row, True)]
    cases += [("stage2", blocks, stage2_row, True) for blocks in (1, 8)]
    cases += [("stage1", blocks, stage1_row, True) for blocks in (None, 1, 4, 12)]
    cases += [("stage1", 8, partial(stage1_row, memory=False), False)]
    for objective, blocks, make, memory in cases:
        rows = [make(tokens, entry, *([blocks] if blocks else [])) for entry in tokens]
        sizes = row_sizes(tokens, objective, blocks, memory)
        assert sizes.lengths.tolist() == [len(row) for row in rows], objective
        assert sizes.ends.tolist() == [max(row.positions) + 1 for row in rows], objective
