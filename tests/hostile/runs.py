"""Saved runs with one thing changed: refused in one sentence, or loaded and drawn."""

import copy
import json
import random
import tempfile
import traceback
from pathlib import Path
from typing import Any

from app import files, recorded
from rim_probe.errors import RiMError

from . import Count

DERIVED = {"status", "answered_seconds"}  # of a loaded run they follow from the rest
VALUES = [None, True, -1, 0, 1e308, float("nan"), 10**30, "", "x" * 5000, "<script>", "\ud800", [], {}, [[]], {"a": {}}]


def places(data: Any, path: tuple = ()) -> list[tuple]:
    """The path of every value in nested data."""
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [place for key, value in inner for place in [(*path, key), *places(value, (*path, key))]]


def forms(data: Any) -> list[list[tuple]]:
    """The paths of every value, those that differ in a list's index alone together."""
    found: dict[tuple, list[tuple]] = {}
    for place in places(data):
        found.setdefault(tuple(key for key in place if isinstance(key, str)), []).append(place)
    return list(found.values())


def changed(data: Any, where: list[list[tuple]], chance: random.Random) -> tuple[Any, str]:
    """A copy with one value replaced, left out or repeated, and what was done."""
    path = chance.choice(chance.choice(where))
    data = copy.deepcopy(data)
    holder = data
    for key in path[:-1]:
        holder = holder[key]
    what, old = chance.choice(("left out", "replaced", "repeated", "nudged", "nudged")), holder[path[-1]]
    if what == "left out":
        del holder[path[-1]]
    elif what == "repeated" and isinstance(holder, list):
        holder.extend(copy.deepcopy(old) for _ in range(chance.choice((1, 5000))))
    elif what == "nudged" and isinstance(old, bool | str | int | float):
        holder[path[-1]] = not old if isinstance(old, bool) else old + "x" if isinstance(old, str) else old + 1
    else:
        holder[path[-1]] = chance.choice(VALUES)
    return data, f"{what} {'.'.join(map(str, path))}"


def plain(data: dict[str, Any]) -> dict[str, Any]:
    """A run without what follows from the rest of it."""
    return {
        key: plain(value) if isinstance(value, dict) and "events" in value else value
        for key, value in data.items()
        if key not in DERIVED
    }


def attempt(count: int, seed: int) -> Count:
    """Changes a recorded run `count` times, once as data and once as the bytes of its file."""
    chance, found = random.Random(seed), Count()
    whole = json.loads(json.dumps(next(iter(recorded.load("rim-tiny"))).run.to_dict()))
    where, file = forms(whole), Path(tempfile.mkdtemp()) / "run.json"
    for number in range(count):
        data, what = changed(whole, where, chance)
        text = json.dumps(data)
        if number % 5 == 0:  # the file itself
            cut = chance.randrange(len(text))
            text = text[:cut] + chance.choice(("", "\x00", "{", '"')) + text[cut + chance.choice((0, 1, 10**9)) :]
            what = f"the file at {cut}"
        file.write_text(text, encoding="utf-8")
        try:
            run, _ = files.load(str(file))  # which draws all panels
            loaded, data = plain(run.to_dict()), plain(json.loads(text))
            wrong = [key for key in loaded.keys() & data.keys() if loaded[key] != data[key]]
            found.note("loaded equal", f"{what}: {wrong} differ" if wrong else None)
        except RiMError as error:
            found.note("refused", f"{what}: {error}" if "\n" in str(error) else None)
        except Exception:
            found.note("traceback", f"{what}: {traceback.format_exc()[-400:]}")
    return found
