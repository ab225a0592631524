"""A procedural world of English arithmetic word problems, small enough to be mastered by a small model.

Knows phrasings, numbers, splits and the closed vocabulary they need. Knows nothing about models or memory blocks.

A problem is a chain `v_0 op_1 b_1 = v_1, ..., op_T b_T = v_T` told in one of three ways:
- *story*: a person's things change over time, alone or by giving and taking (order and direction matter);
- *relation*: people compared with each other, from either side (`Ann has 2 fewer than Ben` may tell of Ben); the
  sentences may be shuffled, the chain must be found by its names;
- *bare*: the sum in words and signs (`What is 3 + 4, then * 2?`), for drill.
Stories and relations also tell what has nothing to do with the question: what else happens to another owner of the same
things (who may have taken part), whom else somebody is compared with, and other things.

A sentence is a verb in a shape. Words and randomness come before numbers: chains of the same operators are told in the
same words from the same random state.

Splits never share a chain of `held_out_steps` steps or more: a hash of the chain decides. (Chains of one step are the
arithmetic table itself, which a world may share; then a hash of the question keeps train and valid apart.) The test
split is told in pairs of verb and shape, and asks for pairs of person and thing, that no other split uses: every verb,
every shape, every person and every thing occur in training, these pairs of them never.
"""

import math
import random
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rim_probe.datasets.phrasings import (
    ASK,
    BARE,
    EVENTS,
    INVERSE,
    NAMES,
    OPENERS,
    RELATIONS,
    START,
    THINGS,
    capitalise,
    draw_thing,
    frame,
    join,
    sentence,
    vocabulary,
)
from rim_probe.errors import RecipeError
from rim_probe.problems import Problem

__all__ = ["NAMES", "OPERATIONS", "SPLITS", "THINGS", "Chain", "World", "generate", "vocabulary"]
SPLITS = ("train", "valid", "test")
OPERATIONS = "+-*/"
_MAX_DRAWS = 100_000  # about a second; a world where so many draws find no chain holds none, or almost none

# A longer chain is kept with the chance that its hash falls to the split (0.8, 0.1, 0.1), a shared one with these, so
# that no length is drawn more often than another; of its train and valid questions `_question_allowed` then keeps 0.9
# and 0.1.
_SHARED_ACCEPTANCE = {"train": 8 / 9, "valid": 1.0, "test": 0.1}


@dataclass(frozen=True)
class World:
    """Which problems exist.

    Attributes:
        min_steps, max_steps: T, drawn uniformly.
        max_value: every number, also in between, lies in 1..max_value.
        operations: a subset of `+-*/`; division is exact.
        story, relation, bare: relative weights of the three ways of telling.
        shuffle: probability that the sentences of a relation problem are shuffled.
        distract: probability of each of two kinds of irrelevant facts: other people's things, and other things.
        held_out_steps: chains of at least so many steps belong to one split; shorter ones to all.

    Raises:
        RecipeError: values that describe no world.
    """

    min_steps: int = 1
    max_steps: int = 3
    max_value: int = 9
    operations: str = OPERATIONS
    story: float = 0.5
    relation: float = 0.5
    bare: float = 0.0
    shuffle: float = 0.5
    distract: float = 0.3
    held_out_steps: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.min_steps <= self.max_steps <= 8:
            raise RecipeError("World: steps must satisfy 1 <= min_steps <= max_steps <= 8.")
        if not 4 <= self.max_value <= 999:
            raise RecipeError("World: max_value must lie between 4 and 999.")
        if not self.operations or set(self.operations) - set(OPERATIONS):
            raise RecipeError(f"World: operations must be a subset of {OPERATIONS}, not {self.operations!r}.")
        if not ("+" in self.operations or "-" in self.operations):
            raise RecipeError("World: operations need + or -, so that every chain can go on.")
        weights = (self.story, self.relation, self.bare)
        if not (min(weights) >= 0 and 0 < sum(weights) < math.inf):
            raise RecipeError("World: the weights story, relation and bare must be at least 0 and not all 0.")
        if not (0 <= self.shuffle <= 1 and 0 <= self.distract <= 1):
            raise RecipeError("World: shuffle and distract are probabilities; they must lie between 0 and 1.")
        if self.held_out_steps < 1:
            raise RecipeError(f"World: held_out_steps must be at least 1, not {self.held_out_steps}.")


@dataclass(frozen=True)
class Chain:
    """A start value and T steps (operation, operand, result)."""

    start: int
    steps: tuple[tuple[str, int, int], ...] = ()

    @property
    def value(self) -> int:
        """What has come out so far."""
        return self.steps[-1][2] if self.steps else self.start

    def then(self, op: str, operand: int) -> "Chain":
        """This chain and one more step."""
        return Chain(self.start, (*self.steps, (op, operand, _apply(op, self.value, operand))))

    @property
    def split(self) -> str:
        """The one split that may use this chain: a tenth each for test and valid."""
        told = f"{self.start}" + "".join(f"{op}{operand}" for op, operand, _ in self.steps)
        bucket = zlib.crc32(told.encode()) % 10
        return {0: "test", 1: "valid"}.get(bucket, "train")

    def gold_steps(self) -> tuple[str, ...]:
        """The steps as `<<a+b=c>>`."""
        values = [self.start] + [result for _, _, result in self.steps]
        return tuple(f"<<{values[i]}{op}{b}={c}>>" for i, (op, b, c) in enumerate(self.steps))


def generate(world: World, split: str, rows: int, seed: int = 0, unique: bool = False) -> Iterator[Problem]:
    """`rows` problems of a split, the same for the same arguments.

    Args:
        unique: leave out repeated questions (test and valid files); ends early if the world is exhausted.

    Raises:
        RecipeError: an unknown split, or a world without chains for it (when the first problem is asked for).
    """
    return (problem for problem, _, _ in tellings(world, split, rows, seed, unique))


def tellings(
    world: World, split: str, rows: int, seed: int, unique: bool = False
) -> Iterator[tuple[Problem, Chain, tuple]]:
    """What `generate` yields, each with its chain and the random state from which it was told."""
    if split not in SPLITS:
        raise RecipeError(f"Unknown split {split!r}; choose one of {', '.join(SPLITS)}.")
    rng = random.Random(f"{seed}/{split}")
    seen: set[str] = set()
    repeats = 0
    while rows > 0 and repeats < 10_000:
        chain = _draw_chain(world, split, rng)
        state = rng.getstate()
        problem = tell(chain, world, split, rng)
        if problem is None or not belongs(chain, problem.question, world, split):
            repeats += 1  # a very small world may have no question for this split
            continue
        if unique:
            if problem.question in seen:
                repeats += 1
                continue
            seen.add(problem.question)
        repeats = 0
        rows -= 1
        yield problem, chain, state


def _draw_chain(world: World, split: str, rng: random.Random) -> Chain:
    for _ in range(_MAX_DRAWS):
        chain = Chain(rng.randint(1, world.max_value))
        for _ in range(rng.randint(world.min_steps, world.max_steps)):
            choices = {op: operands(op, chain.value, world.max_value) for op in world.operations}
            choices = {op: numbers for op, numbers in choices.items() if numbers}
            if not choices:
                break
            op = rng.choice(sorted(choices))
            chain = chain.then(op, rng.choice(choices[op]))
        if len(chain.steps) < world.min_steps:
            continue
        if (
            chain.split == split
            if len(chain.steps) >= world.held_out_steps
            else rng.random() < _SHARED_ACCEPTANCE[split]
        ):
            return chain
    raise RecipeError(
        f"World: no {split} problem of {world.min_steps} steps or more was found with {world.operations} and "
        f"numbers up to {world.max_value}; allow fewer steps, larger numbers or more operations."
    )


def belongs(chain: Chain, question: str, world: World, split: str) -> bool:
    """Whether a split may ask this question about this chain.

    A tenth of the questions about a shared chain is for valid; those of test are phrased like no other.
    """
    if len(chain.steps) >= world.held_out_steps:
        return chain.split == split
    return split == "test" or (zlib.crc32(question.encode()) % 10 == 1) == (split == "valid")


def follow(start: int, operations: Sequence[tuple[str, int]], world: World) -> Chain | None:
    """The chain of these operations and operands, or None where it lanterns the world."""
    chain = Chain(start)
    for op, operand in operations:
        if operand not in operands(op, chain.value, world.max_value):
            return None
        chain = chain.then(op, operand)
    return chain


def operands(op: str, value: int, limit: int) -> list[int]:
    """What an operator can be followed by, so that all numbers lie in 1..limit."""
    if op == "+":
        return list(range(1, limit - value + 1))
    if op == "-":
        return list(range(1, value))
    if op == "*":
        return list(range(2, limit // value + 1))
    return [b for b in range(2, value) if value % b == 0]


def _apply(op: str, value: int, operand: int) -> int:
    return {"+": value + operand, "-": value - operand, "*": value * operand, "/": value // operand}[op]


def tell(chain: Chain, world: World, split: str, rng: random.Random) -> Problem | None:
    """The chain as a problem; chains of the same operators get the same words from the same random state.

    None where no numbers were found for what else is told in these words.
    """
    style = rng.choices(("story", "relation", "bare"), (world.story, world.relation, world.bare))[0]
    if style == "bare":
        question = capitalise(frame(BARE, split, rng).format(chain=_sum(chain)))
    else:
        question = (_tell_story if style == "story" else _tell_relation)(chain, world, split, rng)
    return Problem(question, chain.gold_steps(), str(chain.value)) if question else None


def _sum(chain: Chain) -> str:
    """`9 - 5, then / 2 + 6`: a pause stands where * or / would otherwise bind tighter than the + or - before it."""
    told, before = str(chain.start), ""
    for op, operand, _ in chain.steps:
        told += f", then {op} {operand}" if op in "*/" and before in ("+", "-") else f" {op} {operand}"
        before = op
    return told


def _tell_story(chain: Chain, world: World, split: str, rng: random.Random) -> str | None:
    """What happens to the owner, and perhaps (chance `distract`) what another owner has and does meanwhile."""
    owner, second, outsider = rng.sample(NAMES, 3)
    thing, numbers = draw_thing(owner, split, rng), random.Random(rng.random())
    sentences = [sentence(START, owner, second, chain.start, thing, split, rng)]
    exchanged = []  # place, operation and number of what the second owner exchanges with the first
    for place, (op, b, _) in enumerate(chain.steps, start=1):
        other = rng.choice((second, outsider))
        event, shared = _event(op, owner, other, b, thing, split, rng)
        sentences.append(event)
        if shared and other == second:
            exchanged.append((place, "-" if op == "+" else "+", b))
    if rng.random() < world.distract:
        end = rng.randint(1, len(sentences))  # where the second owner's own event stands
        begin = rng.randint(0, min([end, *(place for place, _, _ in exchanged)]))
        op = rng.choice(world.operations)
        if (found := _second_history(exchanged, end, op, world, numbers)) is None:
            return None
        sentences.insert(end, _event(op, second, outsider, found[1], thing, split, rng)[0])
        sentences.insert(begin, sentence(START, second, owner, found[0], thing, split, rng))
    _tell_other_thing(sentences, (owner, second, outsider), thing, world, split, rng)
    return join(sentences, sentence(ASK, owner, second, 0, thing, split, rng))


def _second_history(
    exchanged: list[tuple[int, str, int]], place: int, op: str, world: World, numbers: random.Random
) -> tuple[int, int] | None:
    """What the second owner starts with, and the number of the own event, so that all stays inside the world."""
    for _ in range(20):
        value = start = numbers.randint(1, world.max_value)
        own = 0
        for _, change, b in sorted([*exchanged, (place - 0.5, op, 0)]):
            choices = operands(change, value, world.max_value)
            if not choices or (b and b not in choices):
                break
            b = b or (own := numbers.choice(choices))
            value = _apply(change, value, b)
        else:
            return start, own
    return None


def _event(op: str, who: str, other: str, b: int, thing: str, split: str, rng: random.Random) -> tuple[str, bool]:
    """A sentence by which the things of `who` change, and whether the other person's change the other way."""
    kind = rng.choice((op, "give", "take")) if op in "+-" else op
    acts = kind == op or (kind == "give") == (op == "-")  # else the other person gives to, or takes from `who`
    one, two = (who, other) if acts else (other, who)
    told = sentence(EVENTS[kind], one, two, b, thing, split, rng)
    return " ".join(filter(None, (rng.choice(OPENERS), told))), kind != op


def _tell_relation(chain: Chain, world: World, split: str, rng: random.Random) -> str | None:
    """Who has how many more than whom along the chain, and perhaps (chance `distract`) someone beside the chain."""
    *cast, aside = rng.sample(NAMES, len(chain.steps) + 2)
    thing, numbers = draw_thing(cast[-1], split, rng), random.Random(rng.random())
    values = [chain.start, *(result for _, _, result in chain.steps)]
    links = [(op, cast[i], cast[i + 1], b) for i, (op, b, _) in enumerate(chain.steps)]
    if rng.random() < world.distract:
        known, op = rng.randrange(len(cast)), rng.choice(world.operations)
        choices = operands(op, values[known], world.max_value)
        if not choices:
            return None
        links.insert(rng.randint(known, len(links)), (op, cast[known], aside, numbers.choice(choices)))
    sentences = [sentence(START, cast[0], cast[-1], chain.start, thing, split, rng)]
    for op, n, m, b in links:
        kind, one, two = (INVERSE[op], m, n) if op in INVERSE else (op, n, m)
        sentences.append(sentence(RELATIONS[kind], one, two, b, thing, split, rng))
    if rng.random() < world.shuffle:
        rng.shuffle(sentences)
    _tell_other_thing(sentences, (*cast, aside), thing, world, split, rng)
    return join(sentences, sentence(ASK, cast[-1], cast[0], 0, thing, split, rng))


def _tell_other_thing(
    sentences: list[str], people: Sequence[str], thing: str, world: World, split: str, rng: random.Random
) -> None:
    """Adds, with the chance `distract`, how many other things somebody has."""
    if rng.random() < world.distract:
        name, number = rng.choice(people), rng.randint(1, world.max_value)
        other = rng.choice([other for other in THINGS if other != thing])
        fact = sentence(START, name, name, number, other, split, rng)
        sentences.insert(rng.randint(0, len(sentences)), fact)
