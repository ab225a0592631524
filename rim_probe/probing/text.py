"""A section as text: cells, tables, targets; Markdown for the terminal and for model cards.

Knows the shape of a report. Knows nothing of figures, pages and probes. A value under a title that says % is a share
(`rim_probe.numbers`).
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rim_probe.numbers import NOTHING, format_interval, format_number, says_percent
from rim_probe.probing.section import Estimate, Section, Table, Target
from rim_probe.report import table as markdown_table

_GOAL = re.compile(r"(>=|<=|≥|≤|>|<)\s*(-?\d+(?:\.\d+)?)\s*(%|points)?")
_HTML_TAG = re.compile(r"<[/!?A-Za-z]")

Cell = str | int | float | Estimate | None


class Goal(NamedTuple):
    """A goal as a comparison with one number; a share from 0 to 1 where its unit is % or points."""

    sign: str
    value: float
    unit: str


def format_goal(target: Target) -> str:
    """The goal with the signs of print."""
    return target.goal.replace(">=", "≥").replace("<=", "≤")


def format_cell(value: Cell, percent: bool = False) -> str:
    """One cell of a table; whole numbers are counts and never shown in percent."""
    if isinstance(value, Estimate):
        return format_interval(value.value, value.low, value.high, percent)
    if value is None or isinstance(value, float):
        return format_number(value, percent)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)


def format_rows(table: Table) -> list[list[str]]:
    """The cells of a table as text."""
    percent = [says_percent(title) for title in table.header]
    return [[format_cell(cell, is_share) for cell, is_share in zip(row, percent, strict=True)] for row in table.rows]


def format_target_value(target: Target) -> str:
    """What was measured, in the unit of the goal: `83.4 % (82.2 to 84.6)`."""
    goal = parse_goal(target.goal)
    unit = goal.unit if goal else ""
    text = format_cell(target.value, bool(unit))
    if not unit or text == NOTHING:
        return text
    value, space, interval = text.partition(" ")
    return f"{value} {unit}{space}{interval}"


def format_verdict(target: Target) -> str:
    """`met`, or `NOT MET by …` where the goal is a comparison with a number that the value itself misses."""
    if target.met:
        return "met"
    value = target.value.value if isinstance(target.value, Estimate) else target.value
    goal = parse_goal(target.goal)
    if goal is None or value is None or not math.isfinite(value):
        return "NOT MET"
    missing = value - goal.value if goal.sign in ("<", "<=", "≤") else goal.value - value
    if missing < 0:
        return "NOT MET: its interval reaches over the goal"
    return f"NOT MET by {100 * missing:.1f} points" if goal.unit else f"NOT MET by {format_number(missing)}"


def parse_goal(goal: str) -> Goal | None:
    """The first comparison in a goal's text, such as `>= 90 %` or `<= 0.5`; None where there is none."""
    found = _GOAL.search(goal)
    if found is None:
        return None
    sign, number, unit = found.groups()
    return Goal(sign, float(number) / (100 if unit else 1), unit or "")


def format_counts(n: Mapping[str, int]) -> str:
    """`fit 6,000 · report 1,500`."""
    return " · ".join(f"{name} {count:,}" for name, count in n.items())


def format_section(section: Section) -> str:
    """One probe's report as Markdown that a terminal shows, too: question, summary, targets, tables with notes, n."""
    parts = [f"### {section.title}", section.question, f"**{section.summary}**"]
    if section.targets:
        parts.append(format_targets([section]))
    for table in section.tables:
        parts += [f"**{table.title}**", _markdown(table.header, format_rows(table)), table.note]
    parts.append(f"n: {format_counts(section.n)}" if section.n else "")
    return "\n\n".join(part for part in parts if part) + "\n"


def format_targets(sections: Sequence[Section]) -> str:
    """Every target as one Markdown table; empty where there is none."""
    rows = [
        [target.what, format_goal(target), format_target_value(target), format_verdict(target)]
        for section in sections
        for target in section.targets
    ]
    return _markdown(["target", "goal", "measured (95 % interval)", ""], rows) if rows else ""


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return markdown_table([_legible(cell) for cell in header], [[_legible(cell) for cell in row] for row in rows])


def _legible(cell: str) -> str:
    """A cell that Markdown neither splits nor swallows: a token such as `<m>` would vanish as an unknown tag."""
    cell = " ".join(cell.replace("|", r"\|").split())
    return f"`{cell}`" if _HTML_TAG.search(cell) else cell
