"""English word problems of one to four steps and more, as people write them, filled into frames.

The frames are data, read by `everyday_frames`: number slots, steps as formulas over them, several tellings of the same
problem, and the split each belongs to. This module fills them. It knows no phrasing.

Method:
1. A frame and, for its people and things, words are drawn; then numbers, until every result is whole and positive.
2. One telling is drawn and its alternatives and words are settled. What is left open are the numbers.
3. Variants put other numbers into that same text: partners for interchange training, equal but for their digits.
"""

import math
import random
import re
from collections.abc import Iterator

from rim_probe.datasets.everyday_frames import PRONOUN_FORMS, SPLITS, Frame, Thing, Verb, frames, words
from rim_probe.errors import RecipeError
from rim_probe.problems import Problem

_MAX_RESULT = 9999
_MAX_DRAWS = 3000
_MAX_REPEATS = 2000
_SHARE = {"words": 0.18, "lower": 0.05, "I": 0.2, "relation": 0.2, "currency": 0.08, "equal numbers": 0.1}
_NUMBER_WORDS = dict(enumerate("two three four five six seven eight nine ten eleven twelve".split(), start=2))
_FRACTIONS = {2: "half", 3: "a third", 4: "a quarter", 5: "a fifth", 6: "a sixth", 8: "an eighth", 10: "a tenth"}
_RELATIONS = {
    "he": "brother father dad uncle grandfather cousin friend neighbor".split(),
    "she": "sister mother mom aunt grandmother cousin friend neighbor".split(),
}
_PRONOUNS = {
    "he": {"he": "he", "him": "him", "his": "his", "himself": "himself"},
    "she": {"he": "she", "him": "her", "his": "her", "himself": "herself"},
    "I": {"he": "I", "him": "me", "his": "my", "himself": "myself"},
}
_PLURALS = {"they": "we", "them": "us", "their": "our"}  # {they} of several people, and what it is where I am one
_OPEN = re.compile(r"([$£€]?)\{(\w+)(?:\.(\w+))?\}(%?)")
_GAP = re.compile(r" +(?=[ .?,]|$)")  # left by an empty alternative
_SENTENCE = re.compile(r"(^|[.?!] )([a-z])")


def generate(split: str, rows: int, seed: int = 0, variants: int = 1) -> Iterator[Problem]:
    """`rows` problems of a split, no question twice, the same for the same arguments; fewer if the frames hold no more.

    Args:
        variants: rows that share everything but their numbers, one after another; the last group may be cut short.

    Raises:
        RecipeError: an unknown split (when the first problem is asked for).
    """
    if split not in SPLITS:
        raise RecipeError(f"Unknown split {split!r}; choose one of {', '.join(SPLITS)}.")
    chosen = [frame for frame in frames() if frame.split == split]
    rng = random.Random(f"{seed}/{split}/{variants}")
    seen: set[str] = set()
    repeats = 0
    while rows > 0 and repeats < _MAX_REPEATS:
        group = _fill(rng.choice(chosen), variants, rng)
        if len(group) < variants or any(problem.question in seen for problem in group):
            repeats += 1
            continue
        repeats = 0
        seen.update(problem.question for problem in group)
        yield from group[:rows]
        rows -= len(group)


def _fill(frame: Frame, variants: int, rng: random.Random) -> list[Problem]:
    """One frame filled `variants` times with different numbers; fewer where it has no more."""
    things = _draw_things(frame, rng)
    values = _draw_numbers(frame, things, {}, rng)
    if values is None:
        raise RecipeError(f"{frame.place}: no numbers were found that fit.")
    text = _Telling(frame, things, rng).text
    written = _wordings(frame, text, values, rng)
    if variants > 1 and written.keys() >= {match[2] for match in _OPEN.finditer(text)}:
        written = {name: word for name, word in written.items() if word not in _NUMBER_WORDS.values()}
    lower, asked = rng.random() < _SHARE["lower"], rng.random() < 0.7
    fixed = {name: values[name] for name in written}
    found: dict[str, Problem] = {}
    for _ in range(4 * variants):
        question = _OPEN.sub(lambda m: m[1] + written.get(m[2], str(values[m[2]])) + m[4], text)  # noqa: B023
        question = _SENTENCE.sub(lambda match: match[1] + match[2].upper(), question)
        if lower:
            question = question.lower() if asked else question.lower().removesuffix("?")
        results = [values[f"r{i}"] for i in range(1, len(frame.steps) + 1)]
        found.setdefault(question, Problem(question, _written_steps(frame, values), str(results[-1])))
        if len(found) == variants:
            break
        values = _draw_numbers(frame, things, fixed, rng) or values
    return list(found.values())


def _draw_things(frame: Frame, rng: random.Random) -> dict[str, Thing]:
    drawn: dict[str, Thing] = {}
    for name, categories in frame.things.items():
        pool = [thing for category in categories for thing in words()[1][category] if thing not in drawn.values()]
        drawn[name] = rng.choice(pool)
    return drawn


def _draw_numbers(
    frame: Frame, things: dict[str, Thing], fixed: dict[str, int], rng: random.Random
) -> dict[str, int] | None:
    """Every slot and, as r1, r2, ..., every result; None where none were found that fit."""
    equal_allowed = rng.random() < _SHARE["equal numbers"]
    for attempt in range(_MAX_DRAWS):
        values = _attempt(frame, things, fixed, rng)
        # Equal numbers make it unclear where a step's number comes from; a few remain, as in life.
        if values and (equal_allowed or attempt > _MAX_DRAWS // 2 or _distinct(frame, values)):
            return values
    return None


def _attempt(frame: Frame, things: dict[str, Thing], fixed: dict[str, int], rng: random.Random) -> dict | None:
    values: dict[str, int] = {}
    for slot in frame.slots:
        if slot.formula is not None:
            value = eval(slot.formula, {}, values)
            if value < 1 or value != int(value):
                return None
            value = int(value)
        elif slot.name in fixed:
            value = fixed[slot.name]
        elif slot.choices:
            value = rng.choice(slot.choices)
        else:
            price = things[slot.price_of].price if slot.price_of else None
            low, high = price or (eval(slot.low, {}, values), eval(slot.high, {}, values))
            high = min(high, things[slot.most_of].most) if slot.most_of else high
            if low > high:
                return None
            value = _draw(int(low), int(high), rng)
        if slot.name:
            values[slot.name] = value
    for i, code in enumerate(frame.codes, start=1):
        value = eval(code, {}, values)
        if not 1 <= value <= _MAX_RESULT or value != int(value):
            return None
        values[f"r{i}"] = int(value)
    return values


def _draw(low: int, high: int, rng: random.Random) -> int:
    """A number as people choose one: of wide ranges small ones as often as large, and large ones often round."""
    if high >= 10 * low and rng.random() < 0.5:
        value = int(math.exp(rng.uniform(math.log(low), math.log(high + 1))))
    else:
        value = rng.randint(low, high)
    if value >= 50 and rng.random() < 0.3:
        value -= value % 10
    return max(value, low)


def _distinct(frame: Frame, values: dict[str, int]) -> bool:
    return len({values[name] for name in frame.shown}) == len(frame.shown)


def _wordings(frame: Frame, text: str, values: dict[str, int], rng: random.Random) -> dict[str, str]:
    """The number slots that are written in words: fractions, twice, and in some rows the small numbers.

    Variants keep these, so none is a slot that follows from others.
    """
    written = {}
    derived = {slot.name for slot in frame.slots if slot.formula}
    in_words = rng.random() < _SHARE["words"]
    for sign, name, form, percent in _OPEN.findall(text):
        value = values[name]
        if form == "frac":
            written[name] = _FRACTIONS[value]
        elif form == "times":
            written[name] = "twice" if value == 2 else f"{_NUMBER_WORDS[value] if in_words else value} times"
        elif in_words and value in _NUMBER_WORDS and name not in derived and not sign and not percent:
            written[name] = _NUMBER_WORDS[value]
    return written


def _written_steps(frame: Frame, values: dict[str, int]) -> tuple[str, ...]:
    def put(match: re.Match) -> str:
        return str(values[match[0].replace("#", "r")])

    left = (re.sub(r"#\d|[a-z]\w*", put, step) for step in frame.steps)
    return tuple(f"<<{sum_}={values[f'r{i}']}>>" for i, sum_ in enumerate(left, start=1))


class _Telling:
    """One telling with its alternatives, people and things settled; `text` leaves open the numbers alone."""

    def __init__(self, frame: Frame, things: dict[str, Thing], rng: random.Random) -> None:
        self.frame, self.things, self.rng = frame, things, rng
        system = rng.randrange(2)  # kilograms and liters, or pounds and gallons, throughout
        self.units = {name: thing.units[system] for name, thing in things.items() if thing.units}
        self.people: dict[str, tuple[str, str]] = {}  # slot -> name and pronoun
        text = _GAP.sub("", "".join(self._parts(rng.choice(frame.tellings)))).strip()
        if rng.random() < _SHARE["currency"] and not re.search("dollar|cents| bill", text):
            text = text.replace("$", rng.choice("£€"))
        self.text = text

    def _parts(self, parts: list) -> Iterator[str]:
        for part in parts:
            if isinstance(part, str):
                yield part
            elif isinstance(part, tuple):
                yield from self._parts(self.rng.choice(part))
            elif isinstance(part, Verb):
                yield part.bare if self._person("A")[1] == "I" else part.word
            else:
                yield self._say(part.name, part.form)

    def _say(self, name: str, form: str) -> str:
        if thing := self.things.get(name):
            unit = self.units.get(name, ("", ""))
            article = "an " if thing.one[0] in "aeiou" and not thing.one.startswith("u") else "a "
            forms = {"": thing.many, "1": thing.one, "a": article + thing.one, "u": unit[1], "u1": unit[0]}
            return forms[form]
        if name in _PLURALS:
            return _PLURALS[name] if self._person("A")[1] == "I" else name
        if name in ("A", "B", "C", "D"):
            called, pronoun = self._person(name)
            if form in PRONOUN_FORMS:
                return _PRONOUNS[pronoun][form]
            if form == "'s":
                return "my" if pronoun == "I" else f"{called}'s"
            if form == "me":
                return "me" if pronoun == "I" else called
            return called
        return "{" + name + ("." + form if form else "") + "}"

    def _person(self, slot: str) -> tuple[str, str]:
        if slot not in self.people:
            self.people[slot] = self._new_person(slot)
        return self.people[slot]

    def _new_person(self, slot: str) -> tuple[str, str]:
        rng = self.rng
        if slot == "A" and "I" not in self.frame.never and rng.random() < _SHARE["I"]:
            return "I", "I"
        first = self.people.get("A", self.people.get("B", ("", "")))[1]
        pronoun = {"he": "she", "she": "he"}.get(first) if slot in "AB" else None
        pronoun = pronoun or rng.choice(("he", "she"))
        if slot == "B" and "A" in self.people and "R" not in self.frame.never and rng.random() < _SHARE["relation"]:
            return f"{_PRONOUNS[first]['his']} {rng.choice(_RELATIONS[pronoun])}", pronoun
        taken = {called for called, _ in self.people.values()}
        return rng.choice([name for name in words()[0][pronoun] if name not in taken]), pronoun
