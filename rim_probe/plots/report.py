"""The report page of `python -m rim_probe probe`: every section of a study in one HTML file that needs no network.

Each figure of a section becomes a `plotly.graph_objects.Figure` (`section_figure`); its numbers stand in a table below
it, where they can be downloaded as CSV. Knows the shape of a report. Knows nothing of models and probes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from rim_probe.files import write_atomic
from rim_probe.numbers import NOTHING, format_interval, format_number, is_number, says_percent
from rim_probe.plots import theme
from rim_probe.plots.colours import CONTROLS, SERIES
from rim_probe.plots.frame import Table, render, standalone
from rim_probe.probing.artifacts import load_report, report_to_dict
from rim_probe.probing.section import Figure, Section
from rim_probe.probing.text import (
    format_cell,
    format_counts,
    format_goal,
    format_rows,
    format_target_value,
    format_verdict,
)

PAGE_FILE = "report.html"
MAX_SHOWN_ROWS = 2000  # of a figure's numbers; report.json has them all


def draw_page(folder: str | Path) -> Path:
    """Writes report.html from the report.json of a folder; an interrupted run leaves the old page or the new one.

    Raises:
        ArtifactError: no report, or a damaged one.
    """
    path = Path(folder) / PAGE_FILE
    write_atomic(path, make_page(*load_report(folder)).encode())
    return path


def make_page(sections: Sequence[Section], provenance: Mapping[str, Any]) -> str:
    """The whole report as one HTML document.

    Args:
        sections: in the order of the page.
        provenance: as `artifacts.describe_study` gives it; what is missing is not shown. `provenance["probes"][name]`
            replaces entries for one probe, such as the command and the date of a run that did only that one.
    """
    report = report_to_dict(sections, provenance)  # numpy numbers and NaN are out of the way from here on
    provenance = report["provenance"]
    name = str(provenance.get("checkpoint", "this checkpoint")).rstrip("/").rsplit("/", 1)[-1]
    shown = [_section(Section.from_dict(section), provenance) for section in report["sections"]]
    shared = {key: value for key, value in provenance.items() if key != "probes"}
    body = render("report.html", name=name, date=str(provenance.get("date", ""))[:10], sections=shown, shared=shared)
    return standalone(body, f"RiM probe report: {name}")


def _section(section: Section, provenance: Mapping[str, Any]) -> dict[str, Any]:
    own = {**provenance, **provenance.get("probes", {}).get(section.name, {})}
    keys = ("checkpoint", "fingerprint", "layout", "date", "command", "seed", "data", "machine")
    return {
        "about": section,
        "counts": format_counts(section.n),
        "targets": [
            (one.what, format_target_value(one), format_goal(one), format_verdict(one), one.met)
            for one in section.targets
        ],
        "figures": [(one, section_figure(one), figure_table(one)) for one in section.figures if _has(one)],
        "tables": [(one, Table(one.header, format_rows(one))) for one in section.tables],
        "how": {"settings": section.settings, **{key: own[key] for key in keys if key in own}},
    }


def _has(figure: Figure) -> bool:
    return any(figure.data.get(key) for key in ("z", "series", "groups", "bars"))


# ------------------------------------------------------------------------------------------------------------ figures


def section_figure(figure: Figure) -> Any:
    """A `plotly.graph_objects.Figure`; values under a title that says % are shares."""
    return {"heatmap": _heat_map, "lines": _lines, "scatter": _scatter, "bars": _bars}[figure.kind](figure)


def _say(value: float | None, title: str, low: float | None = None, high: float | None = None) -> str:
    """`49.2 % (47.2 to 51.1)`, or three digits where it is no share."""
    share = says_percent(title)
    text, space, interval = format_interval(value, low, high, share).partition(" ")
    return f"{text}{' %' if share and text != NOTHING else ''}{space}{interval}"


def _heat_map(figure: Figure) -> Any:
    data, name = figure.data, figure.data.get("z_title") or "value"
    hover, low, high = data.get("hover"), data.get("low"), data.get("high")
    values = [value for row in data["z"] for value in row if is_number(value)] or [0.0, 1.0]
    if data.get("diverging") and low is None and high is None:
        high = max(map(abs, values)) or 1.0
        low = -high
    low, high = min(values) if low is None else low, max(values) if high is None else high
    texts = [
        [
            theme.hover(
                f"{figure.y_title} {data['y'][i]} · {figure.x_title} {data['x'][j]}",
                f"{name}: {_say(value, name)}",
                hover[i][j] if hover else "",
            )
            for j, value in enumerate(row)
        ]
        for i, row in enumerate(data["z"])
    ]
    x, y = theme.places(data["x"], figure.x_title), theme.places(data["y"], figure.y_title)
    ends = {"low": low, "high": high} if low < high else {"low": low - 0.5, "high": low + 0.5}
    return theme.heat_map(data["z"], x, y, texts, title=name, diverging=bool(data.get("diverging")), **ends)


def looks(many: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Colour, symbol and dash of every series; controls share greys and have dashes of their own."""
    found, count = [], {True: 0, False: 0}
    for one in many:
        control = bool(one.get("control"))
        i, count[control] = count[control], count[control] + 1
        colours = CONTROLS if control else SERIES
        turn = i // (len(theme.DASHES) if control else len(colours))
        tone = one.get("tone") or colours[turn % len(colours) if control else i % len(colours)][0]
        look = {"tone": tone, "control": control}
        look["symbol"] = theme.SYMBOLS[i % len(theme.SYMBOLS)] + ("-open" if control else "")
        found.append(look | {"dash": theme.DASHES[i % len(theme.DASHES)] if control or turn else "solid"})
    return found


def _lines(figure: Figure) -> Any:
    series, traces = figure.data["series"], []
    for one, look in zip(series, looks(series), strict=True):
        nothing = [None] * len(one["x"])
        low, high = one.get("low") or nothing, one.get("high") or nothing
        texts = [
            theme.hover(f"{one['name']}: {_say(y, figure.y_title, *ends)}", f"{figure.x_title} {x}")
            for x, y, *ends in zip(one["x"], one["y"], low, high, strict=True)
        ]
        traces += theme.line(one["name"], one["x"], one["y"], low, high, look.pop("tone"), texts, **look)
    x: dict[str, Any] = {"title": figure.x_title, "showgrid": False, "ticks": "outside"}
    values = sorted({value for one in series for value in one["x"]} if all(map(is_number, series[0]["x"])) else [])
    if not values:
        x["type"] = "category"
    elif all(float(value).is_integer() for value in values) and values[-1] - values[0] <= 20:
        x["dtick"] = 1
    steps = [after - before for before, after in pairwise(values)]
    if steps and len(values) <= 20:
        x["range"] = [values[0] - 0.35 * min(steps), values[-1] + 0.35 * min(steps)]
    return theme.figure(traces, x, figure.y_title, 340 + 11 * len(series))


def _scatter(figure: Figure) -> Any:
    import plotly.graph_objects as go

    groups, traces = figure.data["groups"], []
    for one, look in zip(groups, looks(groups), strict=True):
        few, texts = len(one["x"]) <= 60, one.get("text") or [""] * len(one["x"])
        marker = {
            "color": look["tone"],
            "symbol": look["symbol"],
            "size": 9 if few else 6,
            "opacity": 0.9 if few else 0.65,
        }
        said = [
            theme.hover(text or "", one["name"], f"({format_number(x)}, {format_number(y)})")
            for x, y, text in zip(one["x"], one["y"], texts, strict=True)
        ]
        more = {"mode": "markers", "name": theme.plain(one["name"]), "hoverinfo": "text", "hovertext": said}
        traces.append(go.Scatter(x=one["x"], y=one["y"], marker=marker, **more))
    return theme.figure(traces, figure.x_title, figure.y_title, 420)


def _bars(figure: Figure) -> Any:
    title = figure.y_title or figure.x_title
    rows = [{"text": _say(bar["value"], title, bar["low"], bar["high"])} | bar for bar in figure.data["bars"]]
    return theme.rows(rows, title, rangemode="tozero")


def figure_table(figure: Figure) -> Table:
    """The data behind a figure, shares in percent as their titles say."""
    data, x, y = figure.data, figure.x_title or "x", figure.y_title or "y"
    if figure.kind == "heatmap":
        title = data.get("z_title") or "value"
        header = [y, x, title]
        rows = [[data["y"][i], data["x"][j], value] for i, row in enumerate(data["z"]) for j, value in enumerate(row)]
    elif figure.kind == "lines":
        header, rows = ["series", x, y, "low", "high"], []
        for one in data["series"]:
            ends = [one.get(key) or [None] * len(one["x"]) for key in ("low", "high")]
            rows += [[one["name"], *row] for row in zip(one["x"], one["y"], *ends, strict=True)]
    elif figure.kind == "scatter":
        header = ["group", x, y, "text"]
        texts = [(one, one.get("text") or [None] * len(one["x"])) for one in data["groups"]]
        rows = [[one["name"], *row] for one, text in texts for row in zip(one["x"], one["y"], text, strict=True)]
    else:
        header = [x if figure.y_title else "bar", figure.y_title or x, "low", "high"]
        rows = [[bar["name"], bar["value"], bar.get("low"), bar.get("high")] for bar in data["bars"]]
    title, shares = "", []
    for name in header:
        title = title if name in ("low", "high") else name
        shares.append(says_percent(title))
    cells = [
        [format_cell(cell, share) for cell, share in zip(row, shares, strict=True)] for row in rows[:MAX_SHOWN_ROWS]
    ]
    return Table(header, cells)
