"""Small parts that several drawings of a race share."""

from __future__ import annotations


def at(seconds: float | None) -> str:
    """The attribute of what appears at some time of the race."""
    return "" if seconds is None else f' data-t="{seconds:.6f}"'


def shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
