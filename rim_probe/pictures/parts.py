"""What all pictures share: the frame around a figure, its choices, its table, and the words that need explaining.

Knows HTML and escaping. Does not know what a panel shows. Every text that comes from a visitor or a model goes through
`escape`; what is passed on as HTML says so in its name (`body`).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape as _escape
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent

GLOSSARY = {
    "memory block": "A few fixed special tokens placed after the question. The model reads them in one pass, instead "
    "of writing reasoning steps.",
    "slot": "One of the memory tokens inside a block. What it holds is a list of numbers that only probes can read.",
    "readout": "What the model would answer if it had to answer right after this block.",
    "chain of thought": "Reasoning that the model writes out, step by step, before its answer.",
    "explicit step": "A line of arithmetic such as 3+4=7, as a chain of thought would write it.",
    "logit lens": "Reads a hidden state as if it were the last layer's: which word would the model say now?",
    "tuned lens": "A logit lens with a small correction learned for each layer, so that early layers read fairly.",
    "cosine": "How alike two directions are: 1 is the same, 0 is unrelated.",
    "control": "The same measurement where there should be nothing to find. Only what rises above it counts.",
    "activation patching": "Replacing a hidden state while the model runs, to see whether the answer depends on it.",
    "KV cache": "What the model keeps in memory of the tokens it has read.",
    "head": "One of several attention units of a layer, each looking for something of its own.",
    "layer": "One of the processing stages a token passes through, from words (0) to the answer (the last).",
}


def escape(text: Any) -> str:
    """Text for HTML content and for double-quoted attributes."""
    return _escape(str(text), quote=True)


def term(word: str, shown: str | None = None) -> str:
    """A word of the glossary, explained on hover and focus."""
    return f'<dfn class="term" tabindex="0" data-tip="{escape(GLOSSARY[word])}">{escape(shown or word)}</dfn>'


def percent(share: float) -> str:
    """A probability for people: "98 %", "<1 %", ">99 %"."""
    if 0 < share < 0.01:
        return "<1 %"
    return ">99 %" if 0.99 < share < 1 else f"{100 * share:.0f} %"


def plain_step(step: str) -> str:
    """ "3+4=7" of "<<3+4=7>>": the marks of the data format are noise to a reader."""
    return step.replace("<<", "").replace(">>", "").strip()


@dataclass(frozen=True)
class Choice:
    """One parameter of a view.

    Attributes:
        name: as it stands in the address and in `draw(..., name=value)`.
        label: as it stands beside the buttons.
        options: from a reading to {value: label}, in order; empty where there is nothing to choose.
        default: from a reading to one of the values.
    """

    name: str
    label: str
    options: Callable[[Mapping[str, Any]], dict[str, str]]
    default: Callable[[Mapping[str, Any]], str]


def resolve(choices: Sequence[Choice], reading: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, str]:
    """A complete view: given values where they are valid, defaults elsewhere."""
    view = {}
    for choice in choices:
        options = choice.options(reading)
        value = str(given.get(choice.name, ""))
        view[choice.name] = value if value in options else choice.default(reading) if options else ""
    return view


def buttons(choice: Choice, reading: Mapping[str, Any], view: Mapping[str, str]) -> str:
    """A labelled row of buttons, one for each value; nothing where there is no choice."""
    options = choice.options(reading)
    if len(options) < 2:
        return ""
    row = "".join(
        f'<button type="button" aria-pressed="{"true" if view[choice.name] == value else "false"}" '
        f"{set_view({choice.name: value})}>{escape(label)}</button>"
        for value, label in options.items()
    )
    label = escape(choice.label)
    return f'<div class="pic-choice" role="group" aria-label="{label}"><span>{label}</span>{row}</div>'


def menu(choice: Choice, reading: Mapping[str, Any], view: Mapping[str, str]) -> str:
    """The same as a drop-down list, for many values."""
    options = choice.options(reading)
    if len(options) < 2:
        return ""
    row = "".join(
        f'<option value="{escape(value)}"{" selected" if view[choice.name] == value else ""}>{escape(label)}</option>'
        for value, label in options.items()
    )
    return (
        f'<label class="pic-choice"><span>{escape(choice.label)}</span>'
        f'<select data-view-key="{escape(choice.name)}">{row}</select></label>'
    )


def set_view(change: Mapping[str, str]) -> str:
    """The attribute of a mark that changes the view when it is pressed."""
    return f'data-view="{escape(json.dumps(dict(change)))}"'


def do(act: str, **details: str) -> str:
    """The attribute of a mark that asks the page for an action."""
    return f'data-do="{escape(json.dumps({"act": act, **details}))}"'


@dataclass(frozen=True)
class Table:
    """A picture's data: what screen readers read and what is downloaded as CSV."""

    header: Sequence[str]
    rows: Sequence[Sequence[Any]]

    def html(self, caption: str) -> str:
        head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in self.header)
        rows = "".join(
            "<tr>" + "".join(f"<td>{'' if cell is None else escape(cell)}</td>" for cell in row) + "</tr>"
            for row in self.rows
        )
        return f"<table><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


@dataclass(frozen=True)
class Picture:
    """One panel, drawn.

    Attributes:
        panel, title: what it is.
        lead: at most two lines in plain words: what is seen here. HTML, so that words can carry `term`.
        look_for: what to look for, and what it cannot show. HTML.
        body: the figure itself, HTML.
        table: its data.
        view: what is selected, complete.
        controls: ready HTML of `buttons` and `menu` above the figure.
        notes: sentences on what is missing and why, plain text.
    """

    panel: str
    title: str
    lead: str
    look_for: str
    body: str
    table: Table | None = None
    view: Mapping[str, str] = field(default_factory=dict)
    controls: str = ""
    notes: Sequence[str] = ()

    def html(self, python: str = "") -> str:
        """The figure with its frame. `python`: the lines that reproduce it, offered by "copy as Python"."""
        table = data_table(self.table, self.title) if self.table else ""
        notes = "".join(f"<li>{escape(note)}</li>" for note in self.notes)
        tools = ["full", "png"] + (["csv"] if self.table else []) + (["python"] if python else [])
        code = f'<pre class="pic-python" hidden>{escape(python)}</pre>' if python else ""
        return (
            f'<figure class="pic pic-{self.panel}" data-panel="{self.panel}" aria-label="{escape(self.title)}">'
            f'<figcaption><h2>{escape(self.title)}</h2><p class="pic-lead">{self.lead}</p></figcaption>'
            + (f'<div class="pic-controls">{self.controls}</div>' if self.controls else "")
            + f'<div class="pic-body">{self.body}</div>'
            '<p class="pic-tip" aria-live="polite"></p>'
            f'<p class="pic-look"><b>What to look for.</b> {self.look_for}</p>'
            + (f'<ul class="pic-notes">{notes}</ul>' if notes else "")
            + table
            + code
            + toolbar(tools)
            + "</figure>"
        )

    def save(self, path: str | Path) -> None:
        """Writes a file that any browser shows, without a network."""
        Path(path).write_text(standalone(self.html(), self.title), encoding="utf-8")

    def _repr_html_(self) -> str:
        return f"<style>{stylesheet()}</style>{self.html()}"


_TOOLS = {"full": "Full screen", "png": "PNG", "csv": "CSV", "python": "Copy as Python"}


def data_table(table: Table, title: str) -> str:
    """A figure's data, folded away until it is wanted."""
    return (
        '<details class="pic-table"><summary>Data as a table</summary><div class="pic-scroll" tabindex="0" '
        f'role="region" aria-label="Data of {escape(title)}">{table.html(title)}</div></details>'
    )


def toolbar(tools: Sequence[str]) -> str:
    """Buttons that the script `pictures` understands, of "full", "png", "csv" and "python"."""
    row = "".join(f'<button type="button" data-tool="{tool}">{_TOOLS[tool]}</button>' for tool in tools)
    return f'<div class="pic-tools" role="group" aria-label="Take it with you">{row}</div>'


def missing(panel: str, title: str, why: str, view: Mapping[str, str] | None = None) -> Picture:
    """A panel that has nothing to show says why instead."""
    return Picture(
        panel, title, escape(why), "Another checkpoint, question or number of blocks may have it.", "", view=view or {}
    )


@functools.cache
def stylesheet() -> str:
    """The rules of all pictures."""
    paths = [HERE / "picture.css", *sorted(HERE.glob("picture-*.css"))]  # what a panel says goes before the frame
    return "\n".join(path.read_text(encoding="utf-8") for path in paths)


@functools.cache
def script() -> str:
    """What pictures do in a browser: the function `pictures(root, act)`."""
    return (HERE / "picture.js").read_text(encoding="utf-8")


def standalone(body: str, title: str) -> str:
    """A whole HTML document around pictures."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<style>{stylesheet()}</style></head><body class="pic-page"><main>{body}</main>'
        f"<script>{script()}\npictures(document.body, () => {{}});</script></body></html>"
    )
