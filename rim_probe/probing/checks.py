"""Checks of plain data that comes from outside: small ones that are put together to those of a whole file.

Method: a check is a function that takes a value and its place, and gives the value back cleaned or raises `Damage`,
whose text says in half a sentence what should stand at that place. Keys that a record does not know are left out.

Knows JSON values and shapes. Knows nothing of what they mean.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

MAX_TEXT = 20_000
MAX_ITEMS = 20_000
LARGEST = 1e9

Check = Callable[[Any, str], Any]
"""From a value and its place (for the complaint) to the cleaned value."""


class Damage(ValueError):
    """Where data is damaged, and what should stand there."""


def text(value: Any, at: str) -> str:
    if not isinstance(value, str) or len(value) > MAX_TEXT:
        raise Damage(f"{at} should be a text")
    return value.encode("utf-8", "replace").decode("utf-8")  # half of a surrogate pair could not be sent to a page


def truth(value: Any, at: str) -> bool:
    if not isinstance(value, bool):
        raise Damage(f"{at} should be true or false")
    return value


def number(low: float = -LARGEST, high: float = LARGEST) -> Check:
    def check(value: Any, at: str) -> int | float:
        fits = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not fits or not math.isfinite(value if isinstance(value, float) else 0) or not low <= value <= high:
            raise Damage(f"{at} should be a number from {low:g} to {high:g}")
        return value

    return check


def whole(low: int, high: int) -> Check:
    def check(value: Any, at: str) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise Damage(f"{at} should be a whole number from {low} to {high}")
        return value

    return check


def maybe(check: Check) -> Check:
    return lambda value, at: None if value is None else check(value, at)


def one_of(*values: str) -> Check:
    def check(value: Any, at: str) -> Any:
        if not isinstance(value, str) or value not in values:
            raise Damage(f"{at} should be one of {', '.join(values)}")
        return value

    return check


def either(first: Check, second: Check) -> Check:
    def check(value: Any, at: str) -> Any:
        try:
            return first(value, at)
        except Damage:
            return second(value, at)

    return check


def each(check: Check, length: int | None = None, *, most: int = MAX_ITEMS, least: int = 0) -> Check:
    """A list of `length` entries, or of `least` to `most`."""

    def check_all(value: Any, at: str) -> list:
        if not isinstance(value, list) or (length is not None and len(value) != length):
            raise Damage(f"{at} should be a list" + (f" of {length}" if length is not None else ""))
        if not least <= len(value) <= most:
            raise Damage(f"{at} should have {least} to {most} entries")
        return [check(item, f"{at}[{place}]") for place, item in enumerate(value)]

    return check_all


def rising(check: Check, most: int) -> Check:
    """Numbers in order, none twice."""
    every = each(check, most=most)

    def check_order(value: Any, at: str) -> list:
        found = every(value, at)
        if found != sorted(set(found)):
            raise Damage(f"{at} should be in order")
        return found

    return check_order


def grid(check: Check, *shape: int) -> Check:
    """Lists in lists of a fixed shape, the outermost first."""
    for length in reversed(shape):
        check = each(check, length)
    return check


def record(entries: Mapping[str, Check], optional: Mapping[str, Check] | None = None) -> Check:
    """A dictionary with all of `entries`, and those of `optional` that it has."""

    def check(value: Any, at: str) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            raise Damage(f"{at} should be a dictionary")
        if missing := next((key for key in entries if key not in value), None):
            raise Damage(f"{at}.{missing} is missing")
        known = dict(entries) | {key: own for key, own in (optional or {}).items() if key in value}
        return {key: own(value[key], f"{at}.{key}") for key, own in known.items()}

    return check
