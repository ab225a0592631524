"""The page around the panels as HTML: tabs, the head of the open panel, history, files to save. Pure functions.

Does not know Gradio, models or what a panel shows.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from app import figures
from app.parts import shorten
from app.view import PANELS

if TYPE_CHECKING:
    from app.runs import Run
    from app.session import Session
    from app.view import Looking


_drawn = itertools.count()  # the page's script hears of what has changed alone, and waits for it


def tabs() -> str:
    """The row of panels. Which one is open is marked by the page's script, which knows it before the server does."""
    row = "".join(
        f'<button type="button" role="tab" id="tab-{name}" data-panel="{name}" aria-controls="panel-{name}" '
        f'aria-selected="{"true" if name == "race" else "false"}" tabindex="{0 if name == "race" else -1}" '
        f'title="{label} (key {number})">{label}</button>'
        for number, (name, label) in enumerate(PANELS.items(), start=1)
    )
    return f'<div class="tabs" role="tablist" aria-label="What to look at">{row}</div>'


def panel(name: str, body: str, address: str, run: Run | None) -> str:
    """The open panel, under a line that says whose memory it is."""
    head = ""
    if run is not None and name not in ("race", "evidence"):
        head = f'<p class="whose"><q>{escape(run.question)}</q> {escape(figures.verdict(run))}</p>'
    return (
        f'<div class="panel" id="panel-{name}" role="tabpanel" tabindex="-1" aria-labelledby="tab-{name}" '
        f'data-open="{name}" data-address="{escape(address, quote=True)}" data-drawn="{next(_drawn)}">'
        f"{head}{body}</div>"
    )


def pending(words: str) -> str:
    return f'<p class="pending-panel" role="status">{escape(words)}</p>'


def side_by_side(pictures: Sequence[tuple[Run, str]]) -> str:
    """One picture, or two with the run each belongs to."""
    if len(pictures) == 1:
        return pictures[0][1]
    # By hand one works on the current run alone; the attribute cannot come from a text, where quotes are escaped.
    (run, first), *others = pictures
    still = [(other, re.sub(r" (?=data-do(-input)?=['\"])", " disabled ", picture)) for other, picture in others]
    columns = "".join(
        f'<section class="compared"><p class="whose"><q>{escape(run.question)}</q> '
        f"{escape(run.checkpoint)}, K = {run.num_blocks}. {escape(figures.verdict(run))}</p>{picture}</section>"
        for run, picture in [(run, first), *still]
    )
    return f'<div class="comparison">{columns}</div>'


def history(session: Session, looking: Looking) -> str:
    """The runs of this session, newest first: show one, or lay it beside the current one."""
    items = ""
    for index, run in reversed(list(enumerate(session.runs))):
        current = run is session.run
        compared = run is looking.compared
        label = f"{run.checkpoint}, K = {run.num_blocks}: {shorten(run.question, 70)}"
        beside = (
            ""
            if current
            else _do("apart" if compared else "compare", index, "Put apart" if compared else "Compare", compared)
        )
        items += f"<li>{_do('show', index, label, current, 'shown')}{beside}</li>"
    if not items:
        return ""
    save = '<button type="button" class="link" data-save>Save this run (JSON)</button>'
    return (
        f'<section class="history" aria-label="History"><h2>Runs of this session</h2><ol reversed>{items}</ol>'
        f"{save}</section>"
    )


def _do(act: str, index: int, label: str, pressed: bool, kind: str = "") -> str:
    wanted = escape(json.dumps({"act": act, "index": str(index)}), quote=True)
    state = "true" if pressed else "false"
    return f'<button type="button" class="{kind}" aria-pressed="{state}" data-do="{wanted}">{escape(label)}</button>'


def file(name: str, content: str) -> str:
    """A file that the page's script saves as soon as it comes."""
    return f'<template data-file="{escape(name, quote=True)}" data-drawn="{next(_drawn)}">{escape(content)}</template>'
