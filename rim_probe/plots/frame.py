"""What all panels share: the frame around them, their choices, their table, the words that need explaining.

A panel is a Jinja2 template over plain data. Every text is escaped by Jinja2 (`autoescape`); what is passed on as HTML
is `Markup`. Charts are empty boxes with a figure as JSON, which `plots.js` draws when they come into sight.

Knows HTML. Does not know what a panel shows.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup, escape

from rim_probe import __version__
from rim_probe.files import write_atomic
from rim_probe.numbers import percent
from rim_probe.plots.colours import dark_colours, variables
from rim_probe.probing.matches import spelled

HERE = Path(__file__).parent
POLICY = (  # a saved file asks nothing of the network
    "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; script-src 'unsafe-inline'; "
    "style-src 'unsafe-inline'; img-src data: blob:\">"
)
PRETTY = {"ensure_ascii": False, "indent": 1, "default": str}
GLOSSARY = {
    "memory block": "A few fixed special tokens placed after the question. The model reads them in one pass, instead "
    "of writing reasoning steps.",
    "slot": "One of the memory tokens inside a block. What it holds is a list of numbers that only probes can read.",
    "readout": "What the model would answer if it had to answer right after this block.",
    "explicit step": "A line of arithmetic such as 3+4=7, as a chain of thought would write it.",
    "logit lens": "Reads a hidden state as if it were the last layer's: which word would the model say now?",
    "cosine": "How alike two directions are: 1 is the same, 0 is unrelated.",
    "control": "The same measurement where there should be nothing to find. Only what lies above it counts.",
    "activation patching": "Replacing a hidden state while the model runs, to see whether the answer depends on it.",
    "KV cache": "What the model keeps in memory of the tokens it has read.",
    "layer": "One of the processing stages a token passes through, from words (0) to the answer (the last).",
}


def caption(model: str, num_blocks: int | None, question: str = "", weights: str = "") -> str:
    """What stands under a figure that is taken away: model, question and version."""
    blocks = "" if num_blocks is None else f", K = {num_blocks}"
    asked = f" “{' '.join(question.split())}”" if question else ""
    return f"{model}{blocks}{f', weights {weights[:8]}' if weights else ''}.{asked} RiM Probe {__version__}"


def term(word: str, shown: str | None = None) -> Markup:
    """A word of the glossary, explained on hover and focus."""
    text = '<dfn class="term" tabindex="0" data-tip="{}">{}</dfn>'
    return Markup(text).format(GLOSSARY[word], shown or word)


def unbroken(text: Any) -> str:
    """The same with each number and its % sign kept on one line."""
    return str(text).replace(" %", "\u00a0%")


def slot(figure: Any, label: str, wide: int = 0) -> Markup:
    """The box of a chart.

    Args:
        figure: a `plotly.graph_objects.Figure` with a height.
        label: what it shows, for those who do not see it.
        wide: px below which it is scrolled sideways rather than drawn narrower.
    """
    text = (
        '<div class="chart-scroll" tabindex="0" role="region" aria-label="{0}"><div class="chart-slot" role="group" '
        'aria-label="{0}" style="height:{1}px;min-width:{2}px" data-figure="{3}"></div></div>'
    )
    return Markup(text).format(label, figure.layout.height, wide, figure.to_json())


@functools.cache
def _templates() -> Environment:
    places = FileSystemLoader(HERE / "templates")
    env = Environment(loader=places, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    env.globals |= {"term": term, "slot": slot}
    env.filters |= {
        "percent": percent,
        "unbroken": unbroken,
        "spelled": spelled,
        "pretty": functools.partial(json.dumps, **PRETTY),
    }
    return env


def render(template: str, **data: Any) -> str:
    """A file of the folder `templates`, filled in."""
    return _templates().get_template(template).render(**data)


# ------------------------------------------------------------------------------------------------------------ choosing


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
    options: Callable[[Mapping[str, Any]], Mapping[str, str]]
    default: Callable[[Mapping[str, Any]], str]


def resolve(choices: Sequence[Choice], reading: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, str]:
    """A complete view: given values where they are valid, defaults elsewhere."""
    view = {}
    for choice in choices:
        options = choice.options(reading)
        value = str(given.get(choice.name, ""))
        view[choice.name] = value if value in options else choice.default(reading) if options else ""
    return view


def buttons(choice: Choice, reading: Mapping[str, Any], view: Mapping[str, str]) -> Markup:
    """The values of a choice as a row of buttons, or as a list where there are many; nothing where there is one."""
    options = choice.options(reading)
    return Markup(render("choice.html", choice=choice, options=options, value=view[choice.name])) if options else ""


# -------------------------------------------------------------------------------------------------------------- panels


@dataclass(frozen=True)
class Table:
    """A panel's data: what screen readers read and what is downloaded as CSV."""

    header: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True)
class Panel:
    """One panel, drawn.

    Attributes:
        panel, title: what it is. The template `<panel>.html` draws it.
        data: what the template is filled with.
        table: its numbers.
        view: what is selected, complete.
        figures: its charts by name, as `plotly.graph_objects.Figure`.
        controls: ready HTML of `buttons`.
        notes: sentences on what is missing and why.
        template: another than `<panel>.html`.
        caption: what stands under the figure as a file: model, question and version.
    """

    panel: str
    title: str
    data: Mapping[str, Any] = field(default_factory=dict)
    table: Table | None = None
    view: Mapping[str, str] = field(default_factory=dict)
    figures: Mapping[str, Any] = field(default_factory=dict)
    controls: Sequence[Markup] = ()
    notes: Sequence[str] = ()
    template: str = ""
    caption: str = ""

    def html(self, python: str = "") -> str:
        """The panel with its frame. `python`: the lines that reproduce it, offered by "copy as Python"."""
        name = self.template or f"{self.panel}.html"
        return render(name, p=self, python=python, tools=tools(self.table, python), **self.data)

    def save(self, path: str | Path) -> None:
        """Writes a file that any browser shows, without a network."""
        write_atomic(Path(path), standalone(self.html(), self.title).encode())

    def _repr_html_(self) -> str:
        page = escape(standalone(self.html(), self.title))
        return (
            f'<iframe style="width:100%;height:46rem;border:0" title="{escape(self.title)}" srcdoc="{page}"></iframe>'
        )


def missing(panel: str, title: str, why: str, view: Mapping[str, str] | None = None) -> Panel:
    """A panel that has nothing to show says why instead."""
    return Panel(panel, title, {"why": why}, view=view or {}, template="missing.html")


def tools(table: Table | None, python: str = "") -> list[tuple[str, str]]:
    """The buttons under a picture."""
    shown = {"full": "Full screen", "svg": "SVG", "png": "PNG", "csv": "CSV" if table else ""}
    shown |= {"python": python and "Copy as Python"}
    return [(name, label) for name, label in shown.items() if label]


def data_and_tools(table: Table, title: str, caption: str = "") -> str:
    """A picture's data, folded away, and its buttons: for pictures that bring a frame of their own."""
    return render("data.html", table=table, title=title, tools=tools(table), caption=caption)


# --------------------------------------------------------------------------------------------------------------- files


@functools.cache
def stylesheet() -> str:
    """The rules of all panels."""
    return variables() + (HERE / "plots.css").read_text(encoding="utf-8")


@functools.cache
def script() -> str:
    """What panels do in a browser: the function `pictures(root, act)`."""
    code = "".join((HERE / name).read_text(encoding="utf-8") for name in ("export.js", "plots.js"))
    return f"{code}\npictures.dark = {json.dumps(dark_colours())};\n"


def standalone(body: str, title: str) -> str:
    """A whole HTML document around panels; plotly.js comes along where there is a chart."""
    plotly = ""
    if 'class="chart-slot"' in body:
        from plotly.offline import get_plotlyjs

        plotly = f"<script>{get_plotlyjs()}</script>"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">{POLICY}'
        f'<style>{stylesheet()}</style></head><body class="pic-page"><main>{body}</main>{plotly}'
        f"<script>{script()}\npictures(document.body, () => {{}});</script></body></html>"
    )
