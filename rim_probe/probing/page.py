"""The report page: all sections of a study in one HTML file that opens anywhere and asks nothing of the network.

Method:
1. every section becomes HTML: question, findings, figures, tables, how it was measured; every number stands in a table;
2. figures (`figures.figure_json`), their data and the whole report go into one gzipped payload, plotly.js into another
   (1.9 instead of 4.8 MB), both as base64 inside the page; the browser unpacks them (DecompressionStream) and draws;
3. a content security policy forbids the page every outside request.
A browser without scripts or without DecompressionStream shows a sentence and the tables.

Knows HTML and the shape of a report. Knows nothing of models and probes; plotly is imported when a page is made.
"""

import base64
import csv
import functools
import gzip
import html
import importlib.util
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rim_probe.errors import RiMError
from rim_probe.files import write_atomic
from rim_probe.probing.artifacts import report_to_dict
from rim_probe.probing.captions import describe, figure_rows, how_to_read
from rim_probe.probing.figures import dark_colours, figure_json, legend
from rim_probe.probing.section import Estimate, Figure, Section, Table, Target
from rim_probe.probing.text import (
    format_cell,
    format_counts,
    format_goal,
    format_rows,
    format_target_value,
    format_verdict,
    parse_goal,
    says_percent,
)

PAGE_FILE = "report.html"
MAX_SHOWN_ROWS = 300  # of a figure's numbers; a download has them all
WIDE_FROM = 12  # columns of a heat map that get the whole width

_HERE = Path(__file__).parent
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
_HEADLINE_KEYS = ("checkpoint", "fingerprint", "layout", "date", "command", "seed", "data", "machine")
_DASHES = {
    "solid": "",
    "longdash": "7 3",
    "dash": "4 3",
    "dot": "1.5 2.5",
    "dashdot": "5 2 1 2",
    "longdashdot": "7 2 1 2",
}


def can_draw() -> bool:
    """Whether plotly, which the page needs, is installed."""
    return importlib.util.find_spec("plotly") is not None


def write_page(path: str | Path, sections: Sequence[Section], provenance: Mapping[str, Any]) -> Path:
    """Writes the page of `make_page`; an interrupted run leaves the old page or the new one, never half of one."""
    path = Path(path)
    write_atomic(path, make_page(sections, provenance).encode())
    return path


def make_page(sections: Sequence[Section], provenance: Mapping[str, Any]) -> str:
    """The whole report as one HTML document.

    Args:
        sections: in the order of the page.
        provenance: as `artifacts.describe_study` gives it; what is missing is not shown. `provenance["probes"][name]`
            replaces entries for one probe, such as the command and the date of a run that did only that one.

    Raises:
        RiMError: plotly is not installed.
    """
    report = report_to_dict(sections, provenance)
    # Through JSON and back, so that numpy numbers and NaN are out of the way from here on.
    sections = [Section.from_dict(section) for section in report["sections"]]
    provenance = report["provenance"]
    name = str(provenance.get("checkpoint", "this checkpoint")).rstrip("/").rsplit("/", 1)[-1]
    payload = {"report": report, "dark": dark_colours(), "figures": {}, "items": {}}
    body = [_masthead(name, sections, provenance), _verdict(sections)]
    for number, section in enumerate(sections):
        _add_to_payload(payload, number, section)
        body.append(_section(section, _own_provenance(provenance, section.name)))
    body.append(_provenance_section(provenance))
    return _DOCUMENT.format(
        title=_text(f"RiM probe report: {name}"),
        policy=_POLICY,
        css=(_HERE / "page.css").read_text(encoding="utf-8"),
        nav=_navigation(sections),
        body="\n".join(body),
        payload=_packed(json.dumps(payload, allow_nan=False, ensure_ascii=False, separators=(",", ":"))),
        plotly=_packed_plotly(),
        js=(_HERE / "page.js").read_text(encoding="utf-8"),
    )


@functools.cache  # a page is written after every probe
def _packed_plotly() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise RiMError("The report page draws with plotly, which is not installed; run `pip install plotly`.") from None
    return _packed(get_plotlyjs())


def _packed(text: str) -> str:
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()


def _own_provenance(provenance: Mapping[str, Any], probe: str) -> dict[str, Any]:
    return {**provenance, **provenance.get("probes", {}).get(probe, {})}


def _add_to_payload(payload: dict[str, Any], number: int, section: Section) -> None:
    for place, figure in enumerate(section.figures):
        item = f"{section.name}-figure-{place + 1}"
        payload["figures"][item] = figure_json(figure)
        entry = {"section": number, "list": "figures", "place": place, "file": item, "csv": _csv(*figure_rows(figure))}
        # For plotly, which reads markup.
        payload["items"][item] = entry | {"title": html.escape(figure.title, quote=False)}
    for place, table in enumerate(section.tables):
        item = f"{section.name}-table-{place + 1}"
        entry = {"section": number, "list": "tables", "place": place, "file": item, "csv": _csv(*_spread_out(table))}
        payload["items"][item] = entry


def _csv(header: Sequence[str], rows: Sequence[Sequence[Any]], shares: Sequence[bool]) -> str:
    """Rows for a spreadsheet, shares in percent as their header says."""

    def scaled(cell: Any, share: bool) -> Any:
        return float(f"{100 * cell:.10g}") if share and isinstance(cell, float) else cell

    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(header)
    writer.writerows([scaled(cell, share) for cell, share in zip(row, shares, strict=True)] for row in rows)
    return out.getvalue()


def _spread_out(table: Table) -> tuple[list[str], list[list[Any]], list[bool]]:
    """A table whose columns of estimates have become value, low, high and n; header, rows, which columns are shares."""
    header: list[str] = []
    rows: list[list[Any]] = [[] for _ in table.rows]
    shares: list[bool] = []
    for column, title in enumerate(table.header):
        cells = [row[column] for row in table.rows]
        share = says_percent(title)
        if any(isinstance(cell, Estimate) for cell in cells):
            header += [title, f"{title}, low", f"{title}, high", f"{title}, n"]
            shares += [share, share, share, False]
            parts = [
                [cell.value, cell.low, cell.high, cell.n] if isinstance(cell, Estimate) else [cell, None, None, None]
                for cell in cells
            ]
        else:
            header.append(title)
            shares.append(share)
            parts = [[cell] for cell in cells]
        for row, part in zip(rows, parts, strict=True):
            row += part
    return header, rows, shares


# ---------------------------------------------------------------------------------------------------- parts of the page


def _masthead(name: str, sections: Sequence[Section], provenance: Mapping[str, Any]) -> str:
    date = str(provenance.get("date", ""))[:10]
    return f"""<header class="masthead">
<p class="eyebrow">{_text(" · ".join(part for part in ("RiM probe report", date) if part))}</p>
<h1>What the memory of {_text(name)} holds</h1>
<p class="lead">{len(sections)} {"probe" if len(sections) == 1 else "probes"} of the same memory blocks, each beside the
controls that could have refuted it. Point at a figure for its numbers; the tables below it hold them all.</p>
<noscript><p class="trouble">This browser runs no scripts, so the figures are not drawn; all numbers stand in the tables
under “Numbers”.</p></noscript>
<p class="trouble" id="trouble" hidden>This browser cannot draw the figures (<span id="trouble-reason"></span>); all
numbers stand in the tables.</p>
</header>"""


def _navigation(sections: Sequence[Section]) -> str:
    links = ['<li><a href="#verdict" aria-current="true">Verdict</a></li>']
    links += [f'<li><a href="#{_id(s.name)}">{_text(s.title)}{_nav_mark(s)}</a></li>' for s in sections]
    return "".join([*links, '<li><a href="#provenance">How it was made</a></li>'])


def _nav_mark(section: Section) -> str:
    if not section.targets:
        return ""
    met = all(target.met for target in section.targets)
    label = "all targets met" if met else "a target not met"
    return f'<span class="{"met" if met else "missed"}" role="img" aria-label="{label}">{"✓" if met else "✗"}</span>'


def _verdict(sections: Sequence[Section]) -> str:
    targets = [target for section in sections for target in section.targets]
    met = sum(target.met for target in targets)
    count = f'<p class="counts">{met} of {len(targets)} targets met.</p>' if targets else ""
    rows = "".join(
        f'<li{" class=judged" if section.targets else ""}><div><h3><a href="#{_id(section.name)}">'
        f"{_text(section.title)}</a></h3><p>{_text(section.summary)}</p></div>{_targets(section.targets)}</li>"
        for section in sections
    )
    return f'<section id="verdict"><h2>Verdict</h2>{count}<ol class="verdicts">{rows}</ol></section>'


def _targets(targets: Sequence[Target]) -> str:
    if not targets:
        return ""
    return f'<ul class="targets">{"".join(map(_target, targets))}</ul>'


def _target(target: Target) -> str:
    sign, verdict = ("✓ ", "met") if target.met else ("✗ ", "missed")
    return (
        f'<li><div class="what"><span>{_text(target.what)}</span><span class="{verdict}">{sign}'
        f"{_text(format_verdict(target))}</span></div>{_gauge(target)}"
        f'<div class="numbers">{_text(format_target_value(target))}; goal {_text(format_goal(target))}</div></li>'
    )


def _gauge(target: Target) -> str:
    """The measured value as a bar with its interval and a tick at the goal; nothing where the goal is no number."""
    goal = parse_goal(target.goal)
    estimate = target.value if isinstance(target.value, Estimate) else Estimate(target.value, None, None, 0)
    if goal is None or estimate.value is None:
        return ""
    ends = [value for value in (estimate.value, estimate.low, estimate.high, goal.value, 0.0) if value is not None]
    # Shares, AUROC and the like lie in 0..1; differences and small numbers get a scale of their own.
    start, end = min(ends), (1.0 if 0.3 < max(ends) <= 1 else 1.15 * max(ends))

    def place(value: float) -> float:
        return round(100 * (value - start) / ((end - start) or 1.0), 2)

    def span(kind: str, one: float, other: float) -> str:
        left, right = sorted((place(one), place(other)))
        return f'<i class="{kind}" style="left:{left}%;width:{round(right - left, 2)}%"></i>'

    parts = [span("value", 0.0, estimate.value)]
    if estimate.low is not None and estimate.high is not None:
        parts.append(span("interval", estimate.low, estimate.high))
    parts.append(f'<i class="goal" style="left:{place(goal.value)}%"></i>')
    return f'<div class="gauge" aria-hidden="true">{"".join(parts)}</div>'


def _section(section: Section, provenance: Mapping[str, Any]) -> str:
    figures = "".join(
        _figure(figure, f"{section.name}-figure-{place + 1}") for place, figure in enumerate(section.figures)
    )
    tables = "".join(_table(table, f"{section.name}-table-{place + 1}") for place, table in enumerate(section.tables))
    counts = f'<p class="counts">n: {_text(format_counts(section.n))}</p>' if section.n else ""
    how = {"settings": section.settings, **{key: provenance[key] for key in _HEADLINE_KEYS if key in provenance}}
    return f"""<section class="probe" id="{_id(section.name)}">
<p class="eyebrow"><code>{_text(section.name)}</code></p>
<h2>{_text(section.title)}</h2>
<p class="question">{_text(section.question)}</p>
<p class="summary">{_text(section.summary)}</p>
{_targets(section.targets)}
{counts}
{f'<div class="figures">{figures}</div>' if figures else ""}
{f'<div class="tables">{tables}</div>' if tables else ""}
<details class="measured"><summary>How this was measured: settings, data, command</summary>{_definitions(how)}</details>
</section>"""


def _figure(figure: Figure, item: str) -> str:
    height = figure_json(figure)["layout"]["height"]
    hint = how_to_read(figure)
    wide = figure.kind == "heatmap" and len(figure.data["x"]) > WIDE_FROM
    return f"""<figure{" class=wide" if wide else ""}>
<figcaption><h3>{_text(figure.title)}</h3>{f'<p class="how">{_text(hint)}</p>' if hint else ""}</figcaption>
{_legend(figure)}
<div class="plot" role="img" aria-label="{_text(describe(figure))}" data-figure="{_text(item)}"
style="height:{height}px"></div>
{f'<p class="note">{_text(figure.note)}</p>' if figure.note else ""}
<div class="tools"><details class="numbers"><summary>Numbers</summary>{_figure_numbers(figure)}</details>
{_saves(item, figure.title, ("png", "svg", "csv", "json"))}</div>
</figure>"""


def _legend(figure: Figure) -> str:
    entries = legend(figure)
    if not entries:
        return ""
    dark = dark_colours()
    rows = "".join(
        f'<li><button type="button" disabled aria-pressed="true" data-group="{number}">'
        f"{_swatch(entry, dark, figure.kind == 'lines')}{_text(entry['name'])}</button></li>"
        for number, entry in enumerate(entries)
    )
    return f'<ul class="legend" aria-label="Series; press to hide or show">{rows}</ul>'


def _swatch(entry: Mapping[str, str], dark: Mapping[str, str], line: bool) -> str:
    """A piece of a series as its figure draws it."""
    symbol, is_open = entry["symbol"].removesuffix("-open"), entry["symbol"].endswith("-open")
    shape = {
        "circle": '<circle cx="13" cy="6" r="3.6"/>',
        "square": '<rect x="9.6" y="2.6" width="6.8" height="6.8"/>',
        "diamond": '<path d="M13 1.2 17.8 6 13 10.8 8.2 6Z"/>',
        "triangle-up": '<path d="M13 1.6 17.4 9.4H8.6Z"/>',
        "x": '<path d="M9 3.6 10.6 2 13 4.4 15.4 2 17 3.6 14.6 6 17 8.4 15.4 10 13 7.6 10.6 10 9 8.4 11.4 6Z"/>',
        "star": '<path d="M13 .8 14.5 4.3 18.2 4.6 15.4 7 16.3 10.7 13 8.7 9.7 10.7 10.6 7 7.8 4.6 11.5 4.3Z"/>',
    }[symbol]
    stroke = (
        f'<path d="M0 6H26" stroke="currentcolor" stroke-width="2" stroke-dasharray="{_DASHES[entry["dash"]]}"/>'
        if line
        else ""
    )
    fill = 'fill="var(--paper)" stroke="currentcolor" stroke-width="1.4"' if is_open else 'fill="currentcolor"'
    colours = f"--light:{entry['colour']};--dark:{dark[entry['colour']]}"
    return (
        f'<svg width="26" height="12" viewBox="0 0 26 12" aria-hidden="true" style="{colours}">'
        f"{stroke}<g {fill}>{shape}</g></svg>"
    )


def _saves(item: str, title: str, kinds: Sequence[str]) -> str:
    buttons = "".join(
        f'<button type="button" hidden data-save="{kind}" data-item="{_text(item)}" '
        f'aria-label="Download {_text(title)} as {kind.upper()}">{kind.upper()}</button>'
        for kind in kinds
    )
    return f'<span class="saves">{buttons}</span>'


def _figure_numbers(figure: Figure) -> str:
    """The numbers of a figure as a table; a heat map as it is drawn, rows by columns."""
    if figure.kind == "heatmap":
        data = figure.data
        percent = says_percent(data.get("z_title") or "")
        corner = " / ".join(part for part in (figure.y_title, figure.x_title) if part)
        header = [f"{corner}{', %' if percent else ''}", *map(str, data["x"])]
        shares = [False] + [percent] * len(data["x"])
        rows = [[str(label), *values] for label, values in zip(data["y"], data["z"], strict=True)]
    else:
        header, rows, shares = figure_rows(figure)
    cells = [
        [format_cell(cell, share) for cell, share in zip(row, shares, strict=True)] for row in rows[:MAX_SHOWN_ROWS]
    ]
    more = f'<p class="note">The first {MAX_SHOWN_ROWS} of {len(rows):,} rows; the CSV file has all.</p>'
    return _html_table(figure.title, header, cells) + (more if len(rows) > MAX_SHOWN_ROWS else "")


def _table(table: Table, item: str) -> str:
    return f"""<div class="table"><h3>{_text(table.title)}</h3>
{_html_table(table.title, table.header, format_rows(table))}
{f'<p class="note">{_text(table.note)}</p>' if table.note else ""}
<div class="tools">{_saves(item, table.title, ("csv", "json"))}</div></div>"""


def _html_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{_text(cell)}</th>' for cell in header)
    body = "".join(
        f'<tr><th scope="row">{_text(first)}</th>{"".join(map(_td, others))}</tr>' for first, *others in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{_text(title)}"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _td(cell: str) -> str:
    value, bracket, interval = cell.partition(" (")
    if bracket and " to " in interval:
        return f"<td>{_text(value)} <small>({_text(interval)}</small></td>"
    return f'<td class="words">{_text(cell)}</td>' if len(cell) > 28 else f"<td>{_text(cell)}</td>"


def _provenance_section(provenance: Mapping[str, Any]) -> str:
    shown = {key: value for key, value in provenance.items() if key != "probes"}
    return f"""<section class="probe" id="provenance"><h2>How it was made</h2>{_definitions(shown)}
<p class="tools"><button type="button" hidden data-save="report">Download the whole report as JSON</button></p>
</section>"""


def _definitions(values: Mapping[str, Any], depth: int = 1) -> str:
    rows = "".join(
        f"<dt>{_text(str(key).replace('_', ' '))}</dt><dd>{_value(key, value, depth)}</dd>"
        for key, value in values.items()
    )
    return f"<dl>{rows}</dl>"


def _value(key: str, value: Any, depth: int = 1) -> str:
    if isinstance(value, Mapping):
        if depth == 1 and value:
            return _definitions(value, depth + 1)
        return "; ".join(f"{_text(name)} {_value(name, item, depth + 1)}" for name, item in value.items()) or "–"
    if isinstance(value, list):
        return _text(
            ", ".join(item if isinstance(item, str) else json.dumps(item, ensure_ascii=False) for item in value)
        )
    if isinstance(value, (bool, int, type(None))):
        return _text(format_cell(value) if key != "seed" else str(value))
    if isinstance(value, float):
        return f"{value:g}"
    coded = key in ("command", "fingerprint", "sha256")
    return f"<code>{_text(value)}</code>" if coded else _text(value)


def _id(name: str) -> str:
    return _text(f"probe-{name}")


def _text(value: Any) -> str:
    return html.escape(str(value)).replace(" %", "\u00a0%")  # a number and its % stay in one line


_DOCUMENT = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title}</title>
<style>{css}</style>
</head>
<body>
<a class="skip" href="#main">To the report</a>
<div class="frame">
<nav aria-label="Contents"><ol>{nav}</ol></nav>
<main id="main">
{body}
</main>
</div>
<script type="text/plain" id="payload">{payload}</script>
<script type="text/plain" id="plotly">{plotly}</script>
<script>{js}</script>
</body>
</html>
"""
