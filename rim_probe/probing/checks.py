"""Checks of plain data that comes from outside, with pydantic: bounded values, and lists whose lengths go together.

Method: a form (a `TypedDict`) states the keys of a dictionary once; data stays plain dictionaries and lists. Values are
strict (no text for a number, no truth value for 1) and finite; keys that a form does not know are left out. Sizes that
several entries share (K blocks, L layers) are kept in pydantic's validation context by name, and `shaped` and `upto`
refer to them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError, ValidationInfo, with_config
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict

MAX_TEXT = 20_000
MAX_ITEMS = 20_000
LARGEST = 1e9
SHOWN = 120  # characters of a place and of what is wrong there

Number = Annotated[int | float, Field(ge=-LARGEST, le=LARGEST)]
Probability = Annotated[int | float, Field(ge=0, le=1.001)]
Cosine = Annotated[int | float, Field(ge=-1.001, le=1.001)]
Seed = Annotated[int, Field(ge=-(2**63), le=2**63)]
Texts = Annotated[list[str], Field(max_length=MAX_ITEMS)]


class Damage(ValueError):
    """Where data is damaged, and what should stand there."""


def form(**entries: Any) -> Any:
    """The form of a dictionary with these entries."""
    return TypedDict("form", entries)  # type: ignore[operator]


def adapter(form: Any) -> TypeAdapter:
    """The validator of a form, with the limits that hold for every one."""
    config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, str_max_length=MAX_TEXT)
    return TypeAdapter(with_config(config)(form))


def checked(form: TypeAdapter, data: Any, sizes: Mapping[str, int] | None = None) -> Any:
    """The data with what the form knows of it.

    Args:
        sizes: by name, for `shaped` and `upto`.

    Raises:
        Damage: the first entry that is not as it should be.
    """
    try:
        return form.validate_python(data, context=dict(sizes or {}))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"])) or "the whole"
        raise Damage(f"{place[:SHOWN]}: {first['msg'][:SHOWN]}") from None


def wrong(words: str) -> PydanticCustomError:
    return PydanticCustomError("form", words)  # type: ignore[arg-type]


def named(name: str) -> AfterValidator:
    """Keeps a number, or the length of a list, as the size `name` for the entries after it."""

    def keep(value: Any, info: ValidationInfo) -> Any:
        info.context[name] = value if isinstance(value, int) else len(value)
        return value

    return AfterValidator(keep)


def shaped(*sizes: str | int) -> AfterValidator:
    """Lists in lists of these lengths, the outermost first."""

    def check(value: list, info: ValidationInfo) -> list:
        rows = [value]
        for size in sizes:
            length = info.context.get(size, -1) if isinstance(size, str) else size
            if any(len(row) != length for row in rows):
                raise wrong(f"A list here should have {length} entries")
            rows = [item for row in rows for item in row]
        return value

    return AfterValidator(check)


def upto(size: str) -> AfterValidator:
    def check(value: int, info: ValidationInfo) -> int:
        if value > info.context.get(size, -1):
            raise wrong(f"Input should be at most {info.context.get(size)}")
        return value

    return AfterValidator(check)


def _rising(value: list) -> list:
    if value != sorted(set(value)):
        raise wrong("Input should be in order, none twice")
    return value


RISING = AfterValidator(_rising)


def _by_block(value: list[dict[str, Any]]) -> list[dict[str, Any]]:
    _rising([entry["block"] for entry in value])
    return value


BY_BLOCK = AfterValidator(_by_block)
"""For a list of records with a `block` each: in order."""
