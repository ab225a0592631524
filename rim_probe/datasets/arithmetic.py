"""A procedural world of English arithmetic word problems, small enough to be mastered by a small model.

Knows phrasings, numbers, splits and the closed vocabulary they need. Knows nothing about models or memory blocks.

A problem is a chain `v_0 op_1 b_1 = v_1, ..., op_T b_T = v_T` told in one of three ways:
- *story*: one person's things change over time (order matters);
- *relation*: people compared with each other (sentences are shuffled, the chain must be found);
- *bare*: the sum in words and signs (`What is 3 + 4, then * 2?`), for drill.
Stories and relations may hold facts that have nothing to do with the question.

Splits never share a chain of `held_out_steps` steps or more: a hash of the chain decides. (Chains of one step are the
arithmetic table itself, which a world may share; then a hash of the question keeps train and valid apart.) The test
split is also told in phrasings, and asks for pairs of person and thing, that no other split uses (its words are the
same, for the vocabulary is closed).
"""

import math
import random
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rim_probe.errors import RecipeError
from rim_probe.problems import Problem

SPLITS = ("train", "valid", "test")
OPERATIONS = "+-*/"
_MAX_DRAWS = 100_000  # about a second; a world where so many draws find no chain holds none, or almost none

NAMES = (
    "Ann Ben Cleo Dan Eva Finn Gina Hugo Iris Jack Kim Leo Mia Nick Olga Paul Rosa Sam Tina Umar Vera Will Yara Zoe"
).split()
THINGS = (
    "apples balls books boxes cards coins cups flowers hats keys lamps maps nuts pens rings shells stones toys"
).split()
_SINGULAR = {thing: "box" if thing == "boxes" else thing.removesuffix("s") for thing in THINGS}
_ONE = re.compile(rf"\b1 (more |fewer )?({'|'.join(THINGS)})\b")
_OPENERS = ("", "", "", "Then", "Later", "Next")

# {n} owner, {m} another person, {b} operand, {t} things. First the frames of train and valid, then those of test: each
# of its words and turns occurs in training with another operation or in another place, the frame itself never.
_STORY = {
    "+": (
        (
            "{n} buys {b} more {t}",
            "{n} finds {b} {t}",
            "{n} gets {b} {t} from {m}",
            "{m} gives {n} {b} more {t}",
            "{n} gets {b} more {t}",
            "{n} buys {b} {t} from {m}",
            "{m} gives {b} {t} to {n}",
            "{n} buys {b} {t}",
            "{m} gives {n} {b} {t}",
        ),
        ("{n} finds {b} more {t}", "{n} gets {b} {t}", "{m} gives {b} more {t} to {n}"),
    ),
    "-": (
        (
            "{n} loses {b} {t}",
            "{n} gives {b} {t} to {m}",
            "{n} sells {b} of the {t}",
            "{n} gives {m} {b} {t}",
            "{n} sells {b} {t} to {m}",
            "{n} gives {m} {b} of the {t}",
            "{m} gets {b} of the {t} from {n}",
        ),
        ("{n} sells {b} {t}", "{n} loses {b} of the {t}", "{n} gives {b} of the {t} to {m}"),
    ),
    "*": (
        (
            "now {n} has {b} times as many {t}",
            "the {t} of {n} become {b} times as many",
            "{n} has {b} times as many {t} now",
            "the {t} of {n} are now {b} times as many",
            "now there are {b} times as many {t} with {n}",
        ),
        ("{n} now has {b} times as many {t}", "now the {t} of {n} become {b} times as many"),
    ),
    "/": (
        (
            "{n} makes {b} equal parts of the {t} and keeps one part",
            "{n} splits the {t} by {b} and keeps one part",
            "{n} splits the {t} by {b} and now has one part",
            "{n} keeps one of {b} equal parts of the {t}",
            "{n} makes {b} equal parts and keeps one of the parts",
        ),
        ("{n} splits the {t} by {b} and now keeps one part", "{n} makes {b} equal parts and keeps one part of the {t}"),
    ),
}
_RELATION = {
    "+": (
        (
            "{m} has {b} more {t} than {n}",
            "{m} has {b} {t} more than {n}",
            "there are {b} more {t} with {m} than with {n}",
        ),
        ("{m} has {b} more than {n}",),
    ),
    "-": (
        (
            "{m} has {b} fewer {t} than {n}",
            "{m} has {b} fewer than {n}",
            "{m} has {b} {t} fewer than {n}",
            "there are {b} fewer {t} with {m} than with {n}",
        ),
        ("with {m} there are {b} fewer {t} than with {n}",),
    ),
    "*": (
        (
            "{m} has {b} times as many {t} as {n}",
            "the {t} of {m} are {b} times as many as those of {n}",
            "{m} has {b} times as many as {n}",
        ),
        ("there are {b} times as many {t} with {m} as with {n}",),
    ),
    "/": (
        (
            "{m} has the {t} of {n} split by {b}",
            "split the {t} of {n} by {b} and {m} has one part",
            "{m} has one of {b} equal parts of the {t} of {n}",
            "split those {t} of {n} by {b} and one part is with {m}",
        ),
        ("split those {t} of {n} by {b} and {m} has one part",),
    ),
}
_START = (
    (
        "{n} has {b} {t}",
        "there are {b} {t} with {n}",
        "{n} has {b} of the {t}",
        "{n} now has {b} {t}",
        "there are now {b} {t} with {n}",
        "with {n} there are now {b} {t}",
    ),
    ("now {n} has {b} {t}", "with {n} there are {b} {t}"),
)
_ASK_STORY = (
    (
        "how many {t} does {n} have now?",
        "how many {t} are with {n} now?",
        "how many {t} are there with {n} now?",
        "now how many {t} are with {n}?",
    ),
    ("now how many {t} does {n} have?", "how many {t} are now with {n}?"),
)
_ASK_RELATION = (
    (
        "how many {t} does {n} have?",
        "how many {t} are with {n}?",
        "how many {t} are there with {n}?",
        "how many of the {t} are with {n}?",
    ),
    ("how many of the {t} does {n} have?",),
)
_BARE = (("what is {chain}?", "{chain} = ?"), ("what {chain} is?",))
# A longer chain is kept with the chance that its hash falls to the split (0.8, 0.1, 0.1), a shared one with these, so
# that no length is drawn more often than another; of its train and valid questions `_question_allowed` then keeps 0.9
# and 0.1.
_SHARED_ACCEPTANCE = {"train": 8 / 9, "valid": 1.0, "test": 0.1}
_SIGNS = ("+", "-", "*", "/", "=", "<<", ">>", "####", "?", ".", ",")


@dataclass(frozen=True)
class World:
    """Which problems exist.

    Attributes:
        min_steps, max_steps: T, drawn uniformly.
        max_value: every number, also in between, lies in 1..max_value.
        operations: a subset of `+-*/`; division is exact.
        story, relation, bare: relative weights of the three ways of telling.
        shuffle: probability that the sentences of a relation problem are shuffled.
        distract: probability of one irrelevant fact.
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
        if not belongs(chain, problem.question, world, split):
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


def vocabulary() -> list[str]:
    """Every token a problem of this world can hold, lower case, digits one by one; sorted."""
    frames = [frame for table in (_STORY, _RELATION) for pair in table.values() for half in pair for frame in half]
    frames += [frame for pair in (_START, _ASK_STORY, _ASK_RELATION, _BARE) for half in pair for frame in half]
    words = {word for frame in frames for word in frame.replace("?", " ").split() if "{" not in word}
    words |= {word.lower() for word in (*NAMES, *THINGS, *_SINGULAR.values(), *_OPENERS) if word}
    return sorted({word.lower() for word in words} | set(_SIGNS) | set("0123456789"))


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
    """The chain of these operations and operands, or None where it leaves the world."""
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


def tell(chain: Chain, world: World, split: str, rng: random.Random) -> Problem:
    """The chain as a problem; chains of the same operators get the same words from the same random state."""
    style = rng.choices(("story", "relation", "bare"), (world.story, world.relation, world.bare))[0]
    if style == "bare":
        question = _capitalise(_frame(_BARE, split, rng).format(chain=_sum(chain)))
    else:
        question = (_tell_story if style == "story" else _tell_relation)(chain, world, split, rng)
    return Problem(question, chain.gold_steps(), str(chain.value))


def _sum(chain: Chain) -> str:
    """`9 - 5, then / 2 + 6`: a pause stands where * or / would otherwise bind tighter than the + or - before it."""
    told, before = str(chain.start), ""
    for op, operand, _ in chain.steps:
        told += f", then {op} {operand}" if op in "*/" and before in ("+", "-") else f" {op} {operand}"
        before = op
    return told


def _tell_story(chain: Chain, world: World, split: str, rng: random.Random) -> str:
    people = rng.sample(NAMES, 3)
    owner, thing = people[0], _draw_thing(people[0], split, rng)
    sentences = [_frame(_START, split, rng).format(n=owner, b=chain.start, t=thing)]
    for op, operand, _ in chain.steps:
        frame = _frame(_STORY[op], split, rng)
        sentences.append(
            " ".join(filter(None, (rng.choice(_OPENERS), frame))).format(n=owner, m=people[1], b=operand, t=thing)
        )
    _distract(sentences, world, split, people[2], [owner], thing, rng)
    ask = _frame(_ASK_STORY, split, rng).format(n=owner, t=thing)
    return _join(sentences, ask)


def _tell_relation(chain: Chain, world: World, split: str, rng: random.Random) -> str:
    people = rng.sample(NAMES, len(chain.steps) + 2)
    cast = people[: len(chain.steps) + 1]
    thing = _draw_thing(cast[-1], split, rng)
    sentences = [_frame(_START, split, rng).format(n=cast[0], b=chain.start, t=thing)]
    for i, (op, operand, _) in enumerate(chain.steps):
        frame = _frame(_RELATION[op], split, rng)
        sentences.append(frame.format(n=cast[i], m=cast[i + 1], b=operand, t=thing))
    if rng.random() < world.shuffle:
        rng.shuffle(sentences)
    _distract(sentences, world, split, people[-1], cast, thing, rng)
    ask = _frame(_ASK_RELATION, split, rng).format(n=cast[-1], t=thing)
    return _join(sentences, ask)


def _distract(
    sentences: list[str], world: World, split: str, outsider: str, cast: list[str], thing: str, rng: random.Random
) -> None:
    """Adds one fact that cannot matter: somebody else's things, or other things of somebody in the cast."""
    if rng.random() >= world.distract:
        return
    number = rng.randint(1, world.max_value)
    # Other things of the cast would leave it open what "2 more than Ann" are; and "now there are 3 times as many lamps
    # with Ann" right after somebody else's lamps, as many as what.
    names_all = all(thing in sentence for sentence in sentences)
    places = [i for i, after in enumerate([*sentences, ""]) if "times as many" not in after]
    if not names_all or rng.random() < 0.5:
        name, other = outsider, thing
    else:
        name, other = rng.choice(cast), rng.choice([other for other in THINGS if other != thing])
    fact = _frame(_START, split, rng).format(n=name, b=number, t=other)
    sentences.insert(rng.choice(places), fact)


def _frame(pair: tuple[tuple[str, ...], tuple[str, ...]], split: str, rng: random.Random) -> str:
    return rng.choice(pair[split == "test"])


def _draw_thing(name: str, split: str, rng: random.Random) -> str:
    """A thing for the person asked about; a sixth of all pairs of person and thing is for the test split alone."""
    held_out = [thing for thing in THINGS if zlib.crc32(f"{name} {thing}".encode()) % 6 == 0]
    if split == "test":
        return rng.choice(held_out or THINGS)
    return rng.choice([thing for thing in THINGS if thing not in held_out])


def _join(sentences: list[str], ask: str) -> str:
    told = " ".join(_capitalise(sentence) + "." for sentence in sentences)
    told = _ONE.sub(lambda match: f"1 {match[1] or ''}{_SINGULAR[match[2]]}", told)
    told = re.sub(r"(?<=here) are (now )?(?=1 )", lambda match: f" is {match[1] or ''}", told)
    return told + " " + _capitalise(ask)


def _capitalise(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]
