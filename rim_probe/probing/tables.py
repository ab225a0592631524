"""A report as text: its headline, targets and tables, as Markdown for the terminal and for model cards.

One renderer for every probe: it knows the shape of results and none of the probes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from rim_probe.numbers import NOTHING, format_interval, format_number, is_number
from rim_probe.probing.results import Estimate, Goal, Report, Result, View, headline, relation, views
from rim_probe.report import table

_HTML_TAG = re.compile(r"<[/!?A-Za-z]")
Rows = list[list[str]]


def format_estimate(estimate: Estimate, share: bool, unit: str = "") -> str:
    """`49.6 (47.7 to 51.4)`, a share in percent; the unit stands behind the value."""
    if not estimate.n and not is_number(estimate.value):
        return NOTHING
    value, space, interval = format_interval(estimate.value, estimate.low, estimate.high, share).partition(" ")
    return f"{value}{unit}{space}{interval}"


def format_goal(goal: Goal, share: bool) -> str:
    """`≥ 90 %`; a goal for the whole interval says so."""
    sign = {">=": "≥", "<=": "≤"}[goal.sign]
    number = f"{100 * goal.value:g} %" if share else format_number(goal.value)
    return f"{sign} {number}{', the whole interval' if goal.whole else ''}"


def format_verdict(result: Result) -> str:
    """`met`, or by how much the value misses its goal."""
    goal, value = result.goal, result.estimate.value
    if goal.met(result.estimate):
        return "met"
    if not is_number(value):
        return "NOT MET"
    missing = goal.value - value if goal.sign == ">=" else value - goal.value
    if missing < 0:
        return "NOT MET: its interval reaches over the goal"
    return f"NOT MET by {f'{100 * missing:.1f} points' if result.share else format_number(missing)}"


def format_headline(report: Report) -> str:
    """What came out, beside the strongest control, in one sentence; with the probe's verdict where it has one."""
    found = headline(report)
    if found is None:
        return report.verdict or "No result stands for this probe."
    score, control = found
    unit = " %" if score.share else ""
    told = format_estimate(score.estimate, score.share, unit)
    text = f"{_upper(score.metric)}, {score.of}{_where(score)}: {told}, n = {score.estimate.n:,}"
    if control:
        beside = format_estimate(control.estimate, control.share, unit)
        text += f"; strongest control, {control.of}: {beside}"
        text += {
            "above": "; the whole interval lies above it",
            "below": "; below it",
            "not clear of": "; not clear of it",
        }[relation(score.estimate, control.estimate)]
    return f"{text}. {report.verdict}".strip()


def format_targets(reports: Sequence[Report]) -> str:
    """Every target as one Markdown table; empty where there is none."""
    rows = [row for report in reports for row in target_rows(report)]
    return _markdown(["target", "goal", "measured (95 % interval)", ""], rows) if rows else ""


def target_rows(report: Report) -> Rows:
    """What, goal, measured, verdict of every result with a goal."""
    return [
        [
            f"{one.metric}: {one.name}{_where(one)}",
            format_goal(one.goal, one.share),
            format_estimate(one.estimate, one.share, " %" if one.share else ""),
            format_verdict(one),
        ]
        for one in report.results
        if one.goal
    ]


def view_table(view: View) -> tuple[list[str], Rows]:
    """Header and rows of one view.

    Without coordinates a row per result and a column per group; with one a row per place; with two a row per cell.
    """
    results = view.results
    if len(view.place) == 2:
        header = ["of", *view.place, view.title, "n"]
        return header, [[one.name, *_place(one, view), _cell(one), f"{one.estimate.n:,}"] for one in results]
    if view.place:
        names = list(dict.fromkeys(one.name for one in results))
        by_place: dict[str, dict[str, str]] = {}
        for one in results:
            by_place.setdefault(_place(one, view)[0], {})[one.name] = _cell(one)
        rows = [[at, *(cells.get(name, "") for name in names)] for at, cells in by_place.items()]
        return [view.place[0], *names], rows
    groups = list(dict.fromkeys(one.group for one in results))
    by_name: dict[tuple[str, str], dict[str, Result]] = {}
    for one in results:
        by_name.setdefault((one.role, one.of), {})[one.group] = one
    counts = {group: {one.estimate.n for one in results if one.group == group} for group in groups}
    header = ["", *(f"{group} (n = {min(ns):,})" if len(ns) == 1 else group for group, ns in counts.items())]
    rows = []
    for cells in by_name.values():
        name = "" if (first := next(iter(cells.values()))).role == "score" else f"{first.role}: "
        told = [_cell(cells[g], len(counts[g]) > 1) if g in cells else "" for g in groups]
        rows.append([f"{name}{first.of}", *told])
    return header, rows


def _where(result: Result) -> str:
    return "".join(f", {name} {value}" for name, value in result.place.items())


def _place(result: Result, view: View) -> list[str]:
    return [str(result.place[name]) for name in view.place]


def _cell(result: Result, count: bool = False) -> str:
    text = format_estimate(result.estimate, result.share)
    return f"{text}, n = {result.estimate.n:,}" if count and text != NOTHING else text


def format_counts(report: Report) -> str:
    """`fit 6,000 · report 1,500`."""
    return " · ".join(f"{name} {count:,}" for name, count in report.n.items())


def format_report(report: Report, title: str, question: str) -> str:
    """One probe's report as Markdown: question, headline, targets, tables, n; what has layers is left to the page."""
    parts = [f"### {title}", question, f"**{format_headline(report)}**", format_targets([report])]
    for view in views(report):
        if len(view.place) < 2 and view.place != ("layer",):
            parts += [f"**{view.title}** (95 % interval)", _markdown(*view_table(view))]
    parts.append(f"n: {format_counts(report)}" if report.n else "")
    return "\n\n".join(part for part in parts if part) + "\n"


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return table([_legible(cell) for cell in header], [[_legible(cell) for cell in row] for row in rows])


def _legible(cell: str) -> str:
    """A cell that Markdown neither splits nor swallows: a token such as `<m>` would vanish as an unknown tag."""
    cell = " ".join(cell.replace("|", r"\|").split())
    return f"`{cell}`" if _HTML_TAG.search(cell) else cell


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]
