"""The words of the procedural world of `arithmetic`: its people and things, its sentences, its closed vocabulary.

Knows words and which of them are for the test split alone. Knows nothing about chains or operations.

A sentence is a verb in a shape. A quarter of all pairs of verb and shape, and a sixth of all pairs of person and thing
asked about, are for the test split: every verb, shape, person and thing occurs in training, these pairs never.
"""

import random
import re
import zlib
from collections.abc import Sequence
from functools import cache

WOMEN = (
    "Alice Amy Ann Anna Clara Cleo Dora Ella Emma Eva Gina Grace Hannah Helen Ida Ines Iris Jane Julia Kate Laura Lea "
    "Lily Lucy Mary Maya Mia Nora Olga Olivia Paula Rita Rosa Ruth Sara Tina Vera Yara Zara Zoe"
).split()
MEN = (
    "Adam Alex Ben Carl Dan David Emil Eric Felix Finn Frank Fred George Henry Hugo Ivan Jack Jacob James John Karl "
    "Leo Luis Max Milo Nick Noah Omar Oscar Otto Paul Peter Ralph Robert Sam Simon Tom Umar Victor Walter"
).split()
NAMES = (*WOMEN, *MEN)
THINGS = (
    "apples bags balls bananas baskets beads beans bells belts biscuits blocks boats books bottles bowls boxes bricks "
    "brooms buckets buns buttons cakes cameras candles caps cards carpets carrots cars chairs chains clocks coats "
    "coins combs cookies cups curtains dolls doors drums eggs envelopes feathers flags flowers forks games grapes "
    "guitars hammers hats helmets jackets jars jewels keys kites ladders lamps lanterns lemons letters locks magnets "
    "maps marbles medals melons mirrors mugs nails napkins needles notebooks nuts onions oranges paintings pans "
    "papers pears pencils pens phones pictures pies pillows pins planks plants plates plums pots purses puzzles "
    "ribbons rings robots ropes rulers saucers seeds shells shirts shoes spoons stamps stars sticks stones tables "
    "tents tickets tools towels toys trees trucks vases wagons wheels whistles"
).split()
_SINGULAR = {thing: "box" if thing == "boxes" else thing.removesuffix("s") for thing in THINGS}
_ONE = re.compile(rf"\b1 (more |fewer )?({'|'.join(THINGS)})\b")
OPENERS = ("", "", "", "Then", "Later", "Next")

Kind = tuple[Sequence[str], Sequence[str]]
# Verbs and the shapes they stand in. {n} who does it, {m} the other person, {b} number, {t} things, {p} her or his.
_HAVE = ("has", "holds", "owns", "keeps", "counts", "stores")
START = (_HAVE, ("{n} {v} {b} {t}", "we know that {n} {v} {b} {t}", "{n} {v} just {b} {t}", "{n} {v} exactly {b} {t}"))
EVENTS = {
    "+": (
        ("finds", "gets", "makes", "collects", "wins", "buys"),
        ("{n} {v} {b} {t}", "{n} {v} {b} more {t}", "today {n} {v} {b} {t}", "{n} {v} another {b} {t}"),
    ),
    "-": (
        ("loses", "sells", "breaks", "drops", "uses", "burns"),
        ("{n} {v} {b} {t}", "{n} {v} {b} of {p} {t}", "today {n} {v} {b} {t}", "today {n} {v} {b} of {p} {t}"),
    ),
    "*": (
        _HAVE,
        (
            "now {n} {v} {b} times as many {t} as before",
            "{n} now {v} {b} times as many {t} as before",
            "{n} {v} {b} times as many {t} as before",
            "today {n} {v} {b} times as many {t} as before",
        ),
    ),
    "/": (
        ("splits", "divides", "sorts", "puts", "parts", "packs"),
        (
            "{n} {v} {p} {t} into {b} equal groups and keeps one",
            "{n} {v} {p} {t} into {b} equal piles and keeps one",
            "today {n} {v} {p} {t} into {b} equal groups and keeps one",
            "{n} {v} the {t} into {b} equal piles and keeps one pile",
        ),
    ),
    "give": (
        ("gives", "sends", "hands", "lends", "sells", "brings"),
        (
            "{n} {v} {b} {t} to {m}",
            "{n} {v} {m} {b} {t}",
            "{n} {v} {b} of {p} {t} to {m}",
            "{n} {v} {m} {b} of {p} {t}",
            "today {n} {v} {b} {t} to {m}",
        ),
    ),
    "take": (
        ("takes", "gets", "buys", "borrows", "collects", "wins"),
        (
            "{n} {v} {b} {t} from {m}",
            "from {m} {n} {v} {b} {t}",
            "{n} {v} {b} more {t} from {m}",
            "today {n} {v} {b} {t} from {m}",
        ),
    ),
}
# What {m} has, from what {n} has. The inverse operation is the same, told of {n} from {m}.
RELATIONS = {
    "+": (
        _HAVE,
        (
            "{m} {v} {b} more {t} than {n}",
            "{n} {v} {b} fewer {t} than {m}",
            "compared with {n} {m} {v} {b} more {t}",
            "compared with {m} {n} {v} {b} fewer {t}",
        ),
    ),
    "*": (
        _HAVE,
        (
            "{m} {v} {b} times as many {t} as {n}",
            "compared with {n} {m} {v} {b} times as many {t}",
            "we know that {m} {v} {b} times as many {t} as {n}",
        ),
    ),
}
INVERSE = {"-": "+", "/": "*"}
ASK = (
    ("have", "hold", "own", "keep", "count", "store"),
    (
        "how many {t} does {n} {v}?",
        "how many {t} does {n} {v} now?",
        "now how many {t} does {n} {v}?",
        "how many {t} does {n} {v} in the end?",
    ),
)
BARE = (("what", "then what", "now what"), ("{v} is {chain}?", "{v} comes out of {chain}?", "{v} does {chain} give?"))
_SIGNS = ("+", "-", "*", "/", "=", "<<", ">>", "####", "?", ".", ",")


def vocabulary() -> list[str]:
    """Every token a problem of this world can hold, lower case, digits one by one; sorted."""
    told = [
        word
        for verbs, shapes in (*EVENTS.values(), *RELATIONS.values(), START, ASK, BARE)
        for text in (*verbs, *shapes)
        for word in re.sub(r"\?|{.}|{chain}", " ", text).split()
    ]
    told += [*NAMES, *THINGS, *_SINGULAR.values(), *filter(None, OPENERS), "her", "his"]
    return sorted({word.lower() for word in told} | set(_SIGNS) | set("0123456789"))


def sentence(kind: Kind, n: str, m: str, b: int, thing: str, split: str, rng: random.Random) -> str:
    """A sentence of a kind about persons n and m, the number b and things."""
    return frame(kind, split, rng).format(n=n, m=m, b=b, t=thing, p="her" if n in WOMEN else "his")


def frame(kind: Kind, split: str, rng: random.Random) -> str:
    """A shape with its verb, as the split may use them."""
    return rng.choice(_frames(*kind, split == "test"))


@cache
def _frames(verbs: Sequence[str], shapes: Sequence[str], test: bool) -> list[str]:
    """The shapes with their verbs: a quarter of the pairs is for the test split alone."""
    pairs = [(i, j) for i in range(len(verbs)) for j in range(len(shapes)) if ((i + j) % 4 == 2) == test]
    return [shapes[j].replace("{v}", verbs[i]) for i, j in pairs]


def draw_thing(name: str, split: str, rng: random.Random) -> str:
    """A thing for the person asked about; a sixth of all pairs of person and thing is for the test split alone."""
    held_out = [thing for thing in THINGS if zlib.crc32(f"{name} {thing}".encode()) % 6 == 0]
    return rng.choice(held_out if split == "test" else [thing for thing in THINGS if thing not in held_out])


def join(sentences: list[str], ask: str) -> str:
    """The question of a problem; one thing is told in the singular."""
    told = " ".join(capitalise(sentence) + "." for sentence in sentences)
    told = _ONE.sub(lambda match: f"1 {match[1] or ''}{_SINGULAR[match[2]]}", told)
    return told + " " + capitalise(ask)


def capitalise(sentence: str) -> str:
    """A sentence with its first letter large."""
    return sentence[:1].upper() + sentence[1:]
