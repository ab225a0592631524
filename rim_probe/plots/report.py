"""The report page of `python -m rim_probe probe`: every probe's results in one HTML file that needs no network.

A view without coordinates is drawn as rows of values, one over one coordinate as lines, one over two as heat maps.
Knows the shape of results. Knows nothing of models and probes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from rim_probe.files import write_atomic
from rim_probe.numbers import format_number, is_number
from rim_probe.plots import theme
from rim_probe.plots.colours import CONTROLS, SERIES
from rim_probe.plots.frame import Table, render, standalone
from rim_probe.probing.artifacts import load_report, report_to_dict
from rim_probe.probing.probes import PROBES
from rim_probe.probing.results import Cloud, Report, Result, View, views
from rim_probe.probing.tables import format_counts, format_estimate, format_headline, target_rows, view_table

PAGE_FILE = "report.html"


def draw_page(folder: str | Path) -> Path:
    """Writes report.html from the report.json of a folder; an interrupted run leaves the old page or the new one.

    Raises:
        ArtifactError: no report, or a damaged one.
    """
    path = Path(folder) / PAGE_FILE
    write_atomic(path, make_page(*load_report(folder)).encode())
    return path


def make_page(reports: Sequence[Report], provenance: Mapping[str, Any]) -> str:
    """The whole report as one HTML document.

    Args:
        reports: in the order of the page.
        provenance: as `artifacts.describe_study` gives it; what is missing is not shown. `provenance["probes"][name]`
            replaces entries for one probe, such as the command and the date of a run that did only that one.
    """
    stored = report_to_dict(reports, provenance)  # numpy numbers and NaN are out of the way from here on
    provenance = stored["provenance"]
    name = str(provenance.get("checkpoint", "this checkpoint")).rstrip("/").rsplit("/", 1)[-1]
    shown = [_section(Report.from_dict(report), provenance) for report in stored["reports"]]
    shared = {key: value for key, value in provenance.items() if key != "probes"}
    body = render("report.html", name=name, date=str(provenance.get("date", ""))[:10], sections=shown, shared=shared)
    return standalone(body, f"RiM probe report: {name}")


def _section(report: Report, provenance: Mapping[str, Any]) -> dict[str, Any]:
    own = {**provenance, **provenance.get("probes", {}).get(report.name, {})}
    keys = ("checkpoint", "fingerprint", "layout", "date", "command", "seed", "data", "machine")
    return {
        "name": report.name,
        "about": PROBES[report.name],
        "told": format_headline(report),
        "counts": format_counts(report),
        "targets": target_rows(report),
        "figures": list(figures(report)),
        "how": {"settings": report.settings, **{key: own[key] for key in keys if key in own}},
    }


# ------------------------------------------------------------------------------------------------------------ figures


def figures(report: Report) -> Iterator[tuple[str, Any, Table | None]]:
    """Title, `plotly.graph_objects.Figure` and table of everything a report shows."""
    for view in views(report):
        if not any(is_number(one.estimate.value) for one in view.results):
            continue
        if len(view.place) == 2:
            names = list(dict.fromkeys(one.name for one in view.results))
            for name in names:
                part = View(**{**vars(view), "results": [one for one in view.results if one.name == name]})
                if not any(is_number(one.estimate.value) for one in part.results):
                    continue
                yield f"{view.title}: {name}", heat_map(part), Table(*view_table(part))
        else:
            yield view.title, (lines if view.place else bars)(view), Table(*view_table(view))
    for title, cloud in report.clouds.items():
        yield title, scatter(cloud), None


def _say(result: Result) -> str:
    return f"{format_estimate(result.estimate, result.share, ' %' if result.share else '')}, n = {result.estimate.n:,}"


def bars(view: View, tones: Mapping[str, str] | None = None) -> Any:
    """A row for every result of a view without coordinates; `tones`: colours by what a result is of."""
    entries = [
        {"name": one.name, "text": _say(one), "control": one.role == "control", **vars(one.estimate)}
        | ({"tone": tones[one.of]} if one.of in (tones or {}) else {})
        for one in view.results
    ]
    return theme.rows(entries, view.title, rangemode="tozero")


def lines(view: View, tones: Mapping[str, str] | None = None) -> Any:
    """A line with its band for every series over one coordinate; `tones`: colours by what a result is of."""
    series: dict[tuple[str, bool], list[Result]] = {}
    for one in view.results:
        series.setdefault((one.name, one.role == "control"), []).append(one)
    (name,), traces = view.place, []
    for (called, _), look, of in zip(series, looks([control for _, control in series]), series.values(), strict=True):
        x, y, low, high = zip(
            *((one.place[name], one.estimate.value, one.estimate.low, one.estimate.high) for one in of), strict=True
        )
        texts = [theme.hover(f"{called}: {_say(one)}", f"{name} {one.place[name]}") for one in of]
        tone = (tones or {}).get(of[0].of, look.pop("tone"))
        traces += theme.line(called, x, y, low, high, tone, texts, **look)
    axis: dict[str, Any] = {"title": name, "showgrid": False, "ticks": "outside"}
    values = sorted({one.place[name] for one in view.results}) if _numeric(view, name) else []
    if not values:
        axis["type"] = "category"
    elif values[-1] - values[0] <= 20:
        axis["dtick"] = 1
    steps = [after - before for before, after in pairwise(values)]
    if steps and len(values) <= 20:
        axis["range"] = [values[0] - 0.35 * min(steps), values[-1] + 0.35 * min(steps)]
    return theme.figure(traces, axis, view.title, 340 + 11 * len(series))


def heat_map(view: View) -> Any:
    """The cells of one series over two coordinates; a metric that goes below 0 has 0 in the middle of its scale."""
    y_name, x_name = view.place
    cells = {(one.place[y_name], one.place[x_name]): one for one in view.results}
    ys, xs = (list(dict.fromkeys(key[i] for key in cells)) for i in (0, 1))
    z = [[cells[y, x].estimate.value if (y, x) in cells else None for x in xs] for y in ys]
    texts = [
        [
            theme.hover(f"{y_name} {y} · {x_name} {x}", f"{view.metric}: {_say(cells[y, x])}")
            if (y, x) in cells
            else ""
            for x in xs
        ]
        for y in ys
    ]
    values = [value for row in z for value in row if is_number(value)]
    below, most = min(values) < 0, max(map(abs, values)) or 1.0
    low, high = (-most, most) if below else (0.0, 1.0) if view.share else (min(values), max(values))
    ends = {"low": low, "high": high} if low < high else {"low": low - 0.5, "high": low + 0.5}
    x_axis, y_axis = theme.places(xs, x_name), theme.places(ys, y_name)
    return theme.heat_map(z, x_axis, y_axis, texts, title=view.title, diverging=below, **ends)


def scatter(cloud: Cloud) -> Any:
    """Points of known questions."""
    import plotly.graph_objects as go

    traces = []
    for (name, (xs, ys)), look in zip(cloud.groups.items(), looks([False] * len(cloud.groups)), strict=True):
        few = len(xs) <= 60
        marker = {"color": look["tone"], "symbol": look["symbol"], "size": 9 if few else 6}
        said = [theme.hover(name, f"({format_number(x)}, {format_number(y)})") for x, y in zip(xs, ys, strict=True)]
        more = {"mode": "markers", "name": theme.plain(name), "hoverinfo": "text", "hovertext": said}
        traces.append(go.Scatter(x=xs, y=ys, marker=marker | {"opacity": 0.9 if few else 0.65}, **more))
    return theme.figure(traces, cloud.x_title, cloud.y_title, 420)


def looks(controls: Sequence[bool]) -> list[dict[str, Any]]:
    """Colour, symbol and dash of every series; controls share greys and have dashes of their own."""
    found, count = [], {True: 0, False: 0}
    for control in controls:
        i, count[control] = count[control], count[control] + 1
        colours = CONTROLS if control else SERIES
        turn = i // (len(theme.DASHES) if control else len(colours))
        look: dict[str, Any] = {"tone": colours[turn % len(colours) if control else i % len(colours)][0]}
        look |= {"control": control, "dash": theme.DASHES[i % len(theme.DASHES)] if control or turn else "solid"}
        look["symbol"] = theme.SYMBOLS[i % len(theme.SYMBOLS)] + ("-open" if control else "")
        found.append(look)
    return found


def _numeric(view: View, name: str) -> bool:
    return all(is_number(one.place[name]) for one in view.results)
