"""The frames of the everyday problems, read from `frames/*.txt`, and the names and things of `frames/words.txt`.

`frames/README.md` explains their language. What is read here is part of this package, never a user's text.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from types import CodeType

from rim_probe.errors import RecipeError

SPLITS = ("train", "valid", "test")
PRONOUN_FORMS = ("he", "him", "his", "himself")  # as frames write them, whoever is meant
_BARE_VERBS = {"has": "have", "is": "am", "does": "do", "goes": "go"}
_TOKEN = re.compile(r"\[|\||\]|\{[^}]*\}|<\w+>|[^][|{}<>]+")


@dataclass(frozen=True)
class Slot:
    """One token of a frame's header about numbers, in order: a slot drawn or derived, or a condition (no name)."""

    name: str
    low: CodeType | None = None
    high: CodeType | None = None
    choices: tuple[int, ...] = ()
    formula: CodeType | None = None
    price_of: str = ""
    most_of: str = ""


@dataclass(frozen=True)
class Open:
    """A place of a telling that is filled from what has been drawn: `{name}` or `{name.form}`."""

    name: str
    form: str


@dataclass(frozen=True)
class Verb:
    """A verb of the first person of a telling, written in the third person singular."""

    word: str

    @property
    def bare(self) -> str:
        """The verb as it stands after "to"."""
        if self.word.endswith("ies"):
            return self.word[:-3] + "y"
        return _BARE_VERBS.get(self.word) or re.sub(r"(?<=ss|sh|ch)es$|s$", "", self.word)


@dataclass(frozen=True)
class Frame:
    """One problem in several tellings.

    Attributes:
        kind: what it is about ("buying", "ages", ...).
        split: the one split it belongs to.
        place: file and line, to name it in messages.
        slots: numbers and conditions, in the order in which they are drawn.
        things: thing slot -> categories of words.
        steps: the formulas as written: `n*p`, `b-#1`.
        tellings: each a list of text, `Open`, `Verb` and tuples of alternatives (lists again).
        never: "I" where the first person never speaks himself, "R" where the second is no relative of the first.
        shown: number slots that a telling writes, and the results.
    """

    kind: str
    split: str
    place: str
    slots: tuple[Slot, ...]
    things: dict[str, tuple[str, ...]]
    steps: tuple[str, ...]
    codes: tuple[CodeType, ...] = field(repr=False)
    tellings: tuple[list, ...] = field(repr=False)
    never: frozenset[str] = frozenset()
    shown: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Thing:
    """A word for things: singular, plural, units of measure, sensible prices and the most that one person has."""

    one: str
    many: str
    units: tuple[tuple[str, str], ...]
    price: tuple[int, int]
    most: int


@cache
def frames() -> tuple[Frame, ...]:
    """Every frame, in the order of the files."""
    found = []
    for file in sorted(files("rim_probe.datasets").joinpath("frames").iterdir(), key=lambda file: file.name):
        if file.name.endswith(".txt") and file.name != "words.txt":
            number = 1
            for block in file.read_text(encoding="utf-8").split("\n\n"):
                if block.strip():
                    found.append(_frame(block.strip().split("\n"), f"{file.name}:{number}"))
                number += block.count("\n") + 2
    return tuple(found)


@cache
def words() -> tuple[dict[str, tuple[str, ...]], dict[str, tuple[Thing, ...]]]:
    """Names by pronoun ("he", "she"), and things by category."""
    names, things = {}, {}
    text = files("rim_probe.datasets").joinpath("frames", "words.txt").read_text(encoding="utf-8")
    for line in filter(str.strip, text.split("\n")):
        head, _, rest = line.partition(": ")
        category, price, most, units = (*head.split(), "", "", "")[:4]
        listed = rest.split(", ")
        if category in ("he", "she"):
            names[category] = tuple(listed)
        else:
            low, _, high = (price or "0-0").partition("-")
            pairs = tuple(_pair(unit) for unit in filter(None, units.split("|")))
            limits = (int(low), int(high)), int(most or 0)
            things[category] = tuple(Thing(*_pair(word), pairs, *limits) for word in listed)
    return names, things


def _pair(word: str) -> tuple[str, str]:
    """Singular and plural of `knife=knives`, or of `box`, which needs no help."""
    one, _, many = word.partition("=")
    if many:
        return one, many
    if re.search(r"(s|x|ch|sh)$", one):
        return one, one + "es"
    return one, re.sub(r"(?<=[^aeiou])y$", "ie", one) + "s"


def _frame(lines: list[str], place: str) -> Frame:
    mark, kind, split, *header = lines[0].split()
    if mark != "@" or split not in SPLITS or not lines[1].startswith("= ") or len(lines) < 3:
        raise RecipeError(f"{place}: a frame is a line '@ kind split slots', a line '= steps' and its tellings.")
    slots, things, never = [], {}, set()
    for token in header:
        if token.startswith("-"):
            never.add(token[1:])
        elif token.startswith("?"):
            slots.append(Slot("", formula=_code(token[1:])))
        elif ":=" in token:
            name, _, formula = token.partition(":=")
            slots.append(Slot(name, formula=_code(formula)))
        elif ":" in token:
            name, _, categories = token.partition(":")
            things[name] = tuple(categories.split("|"))
        else:
            slots.append(_number_slot(*token.split("=", 1)))
    steps = tuple(lines[1][2:].split(", "))
    tellings = tuple(_parse(iter(_TOKEN.findall(line))) for line in lines[2:])
    codes = tuple(map(_code, steps))
    shown = set(re.findall(r"\{(\w+)", "".join(lines[2:]))) & {slot.name for slot in slots}
    shown |= {f"r{i}" for i in range(1, len(steps) + 1)}
    return Frame(kind, split, place, tuple(slots), things, steps, codes, tellings, frozenset(never), frozenset(shown))


def _number_slot(name: str, what: str) -> Slot:
    if what.startswith("$"):
        return Slot(name, price_of=what[1:])
    if ".." not in what:
        return Slot(name, choices=tuple(map(int, what.split(","))))
    low, _, high = what.partition("..")
    high, _, thing = high.partition("@")
    return Slot(name, low=_code(low), high=_code(high), most_of=thing)


def _code(formula: str) -> CodeType:
    """A formula of a frame, with `#1` for the first step's result."""
    return compile(re.sub(r"#(\d)", r"r\1", formula), formula, "eval")


def _parse(tokens: Iterator[str]) -> list:
    """The parts of a text up to the end or a closing bracket; alternatives become a tuple of lists."""
    parts: list = []
    for token in tokens:
        if token == "[":
            parts.append(_alternatives(tokens))
        elif token.startswith("{"):
            name, _, form = re.sub(r"'s$", ".'s", token[1:-1]).partition(".")
            parts.append(Open("A", name) if name in PRONOUN_FORMS else Open(name, form))
        elif token.startswith("<"):
            parts.append(Verb(token[1:-1]))
        else:
            parts.append(token)
    return parts


def _alternatives(tokens: Iterator[str]) -> tuple[list, ...]:
    inside: list[list[str]] = [[]]
    depth = 0
    for token in tokens:
        if token == "]" and depth == 0:
            return tuple(_parse(iter(one)) for one in inside)
        depth += (token == "[") - (token == "]")
        if token == "|" and depth == 0:
            inside.append([])
        else:
            inside[-1].append(token)
    raise RecipeError(f"A bracket is left open before “{''.join(inside[0])}”.")
