"""What was measured of a checkpoint, short enough for one screen: its evaluation and its probe report as plain data.

Method:
1. `metrics.json` (of `python -m rim_probe eval`) and `probes/report.json` (of `... probe`) are read; a missing or
   damaged one becomes a sentence that names the command which makes it;
2. of each probe the rows that stand for it are chosen: the bars of its first bar figure, or a column of the first table
   that has controls (in rows or columns of their own), else of its first table;
3. its headline is the value of its first target, else a row named in `_HEADLINES`, else the row with the greatest lead
   over its best control; "above" means that the whole interval lies above that control's.
4. The causal tests (interchange, importance) are told in plain sentences made from those rows.

Knows files and the shape of reports. Knows no model, and nothing of how evidence is drawn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rim_probe.errors import ArtifactError
from rim_probe.evaluation import REPORT_FORMAT
from rim_probe.numbers import NOTHING, format_interval, is_number, says_percent
from rim_probe.probing.artifacts import FOLDER, REPORT_FILE, load_report
from rim_probe.probing.interchange_report import INSTRUMENT_FLOOR
from rim_probe.probing.section import Estimate, Section, plain
from rim_probe.probing.text import (
    format_goal,
    format_target_value,
    format_verdict,
)
from rim_probe.report import COMPARISON_FORMAT, METHOD_NAMES, format_machine

FORMAT = "rim-probe-evidence/1"
METRICS_FILE = "metrics.json"


# Columns and axes that hold shares without saying "%".
_SHARES = ("share of pairs", "right", "to all blocks", "P(gold)", "trained", "gold answer said")
_UNIT = re.compile(r", (%|MRR)$")


@dataclass(frozen=True)
class _Headline:
    """Which column of a probe's tables, which rows of it (by how they begin), and which row stands for the probe."""

    column: str
    row: str = ""
    rows: str = ""


# For probes whose own targets name no row. `geometry` has measures in different units; those with one unit are shown.
_HEADLINES = {
    "adaptive": _Headline("right", row="adaptive, half the time"),
    "attention": _Headline("to all blocks", row="the answer"),
    "commitment": _Headline("P(gold)"),
    "geometry": _Headline("trained", row="share of variance of block and question", rows="share of variance"),
    "importance": _Headline("gold answer said", row="all memory tokens but the one read: set to zero"),
}


def load_evidence(checkpoint: str | Path) -> dict[str, Any]:
    """Everything that was measured of one checkpoint. Never raises for missing or damaged files.

    Returns:
        JSON-ready: `format`; `checkpoint` (its name); `metrics` (see `_metrics`) and `probes` (see `_probe`), None and
        empty where they are missing; `causes`, sentences on the causal tests; `complaints`, sentences on what is
        missing and which command makes it.
    """
    folder = Path(checkpoint)
    complaints: list[str] = []
    metrics = _evaluation(folder, complaints)
    try:
        sections, provenance = load_report(folder / FOLDER)
    except ArtifactError as error:
        sections, provenance = [], {}
        there = (folder / FOLDER / REPORT_FILE).exists()
        complaints.append(
            str(error)
            if there
            else f"No probe was run on {folder.name} yet; `python -m rim_probe probe {checkpoint} --data FILE` makes "
            "this part."
        )
    return {
        "format": FORMAT,
        "checkpoint": folder.name,
        "metrics": metrics,
        "probes": [plain(_probe(section, provenance)) for section in sections],
        "causes": list(_causes({section.name: section for section in sections})),
        "complaints": complaints,
    }


def interchange_sentence(checkpoint: str | Path) -> tuple[str, str] | None:
    """Whether the answers of a checkpoint are made from what is decoded of its blocks, as its interchange test found.

    Returns:
        A few words and the figures behind them in a sentence; None where the test was not made.
    """
    probes = {probe["name"]: probe for probe in load_evidence(checkpoint)["probes"]}
    if "interchange" not in probes:
        return None
    probe = probes["interchange"]
    swapped = next((row for row in probe["rows"] if not row["control"] and is_number(row["value"])), None)
    control = max(filter(_can_refute, probe["rows"]), key=lambda row: row["value"], default=None)
    if swapped is None or control is None:
        return None
    met = bool(probe["targets"]) and probe["targets"][0]["met"]
    clear = _is_clear({**swapped, "against": control})
    short = "We tested: yes." if clear and met else "We tested: in part." if clear else "We tested: not shown."
    pairs = next((n for what, n in probe["n"].items() if what.endswith("answered right")), None)
    of = "pairs" if pairs is None else f"{pairs:,} pairs"
    found = swapped["text"].replace("(", "(95 % interval ")
    return short, (
        f"In {of} of questions that differ in one number, exchanging the block that seems to hold the changed step "
        f"gave the predicted answer in {found}, a control in {control['text']}."
    )


# ------------------------------------------------------------------------------------------------------- evaluation


def _evaluation(folder: Path, complaints: list[str]) -> dict[str, Any] | None:
    path = folder / METRICS_FILE
    again = f"`python -m rim_probe eval {folder} --data FILE --output {path}` makes it"
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        complaints.append(f"{folder.name} has no accuracy and latency yet; {again}.")
        return None
    except (OSError, ValueError):
        report = None
    if isinstance(report, dict) and report.get("format") in (REPORT_FORMAT, COMPARISON_FORMAT):
        try:
            return _comparison(report) if report["format"] == COMPARISON_FORMAT else _metrics(report)
        except (KeyError, IndexError, TypeError, AttributeError):  # cut off or edited by hand
            pass
    complaints.append(f"{path} cannot be read as an evaluation; {again} anew.")
    return None


def _comparison(report: Mapping[str, Any]) -> dict[str, Any]:
    """As `_metrics`, of the first file of a comparison, with the costs of one answer on its first device."""
    first, *others = report["files"]
    costs = report["costs"][0]["batches"][0]["methods"] if report["costs"] else {}
    metrics = _metrics({**first["report"], "run": report["run"], "latency": costs})
    return metrics | {
        "data": first["name"],
        "others": [
            {
                "name": other["name"],
                "n": other["report"]["done"],
                "accuracy": [
                    {"method": method, "name": METHOD_NAMES[method], "all": _share(figures["all"]["final"])}
                    for method, figures in other["report"]["accuracy"].items()
                ],
            }
            for other in others
        ],
    }


def _metrics(report: Mapping[str, Any]) -> dict[str, Any]:
    """`n`, `num_blocks` (K asked with), `accuracy`: per method `method`, `name`, `all` and `by_steps` {steps: share};
    `sweep`: shares with `num_blocks`; `latency`: per method `total_ms`, `ttft_ms`, `forward_passes`,
    `kv_cache_bytes` (median, q1, q3) and `n`; `paired`; `made`; `data`: the name of the problems or None; `others`:
    further problems, each `name`, `n`, `accuracy` without `by_steps`. A share has `value`, `low`, `high`, `n`.
    """
    run = report.get("run") or {}
    return {
        "n": report["done"],
        "num_blocks": report["settings"].get("num_blocks"),
        "accuracy": [
            {
                "method": method,
                "name": METHOD_NAMES[method],
                "all": _share(figures["all"]["final"]),
                "by_steps": {steps: _share(cell["final"]) for steps, cell in figures["by_steps"].items()},
            }
            for method, figures in report["accuracy"].items()
        ],
        "sweep": [{"num_blocks": entry["num_blocks"], **_share(entry)} for entry in report["sweep"]],
        "latency": [
            {"method": method, "name": METHOD_NAMES[method], **costs}
            for method, costs in (report.get("latency") or {}).items()
        ],
        "paired": report["paired"],
        "data": None,
        "others": [],
        "made": _made(run, report["settings"].get("seed"), {"test": report["done"]}),
    }


def _share(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {"value": entry["accuracy"], "low": entry["low"], "high": entry["high"], "n": entry["n"]}


def _made(source: Mapping[str, Any], seed: int | None, n: Mapping[str, int]) -> dict[str, Any]:
    machine = source.get("machine")
    return {
        "command": source.get("command"),
        "date": str(source.get("date") or "")[:10],
        "seed": seed,
        "n": dict(n),
        "machine": format_machine(machine) if machine else None,
    }


# ----------------------------------------------------------------------------------------------------------- probes


def _probe(section: Section, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """`name`, `title`, `question`, `summary`, `n`; `measure` (what the rows are), `percent`, `rows`: each `name`,
    `value`, `low`, `high`, `text`, `control` (is it one) and `against` (the best control of its own: `name`, `value`,
    `high`, `text`) or None; `headline`: a row with `against` and `relation`, or None; `clear`: [how many, of how many
    rows with controls of their own] or None; `targets`: `what`, `goal`, `measured`, `verdict`, `met`; `made`.
    """
    own = {**provenance, **provenance.get("probes", {}).get(section.name, {})}
    measure, percent, rows = _rows(section)
    compared = [row for row in rows if row["against"]]
    return {
        **{key: getattr(section, key) for key in ("name", "title", "question", "summary", "n")},
        "measure": measure,
        "percent": percent,
        "rows": rows,
        "headline": _headline(section, rows),
        "clear": [sum(map(_is_clear, compared)), len(compared)] if compared else None,
        "targets": [
            {
                "what": target.what,
                "goal": format_goal(target),
                "measured": format_target_value(target),
                "verdict": format_verdict(target),
                "met": target.met,
            }
            for target in section.targets
        ],
        "made": _made(own, own.get("seed"), section.n),
    }


def _rows(section: Section) -> tuple[str, bool, list[dict[str, Any]]]:
    """What the rows measure, whether in percent, and the rows that stand for the probe."""
    for figure in section.figures:
        if figure.kind == "bars":
            measure = figure.y_title or figure.x_title
            percent = _in_percent(measure)
            bars = figure.data["bars"]
            return measure, percent, [_row(bar["name"], bar, percent, control=bool(bar["control"])) for bar in bars]
    wanted = _HEADLINES.get(section.name, _Headline(""))
    tables = [(table, _column(table, wanted.column)) for table in section.tables]
    tables = [(table, column) for table, column in tables if column is not None]
    if not tables:
        return "", False, []
    table, column = next((pair for pair in tables if _has_controls(pair[0])), tables[0])
    percent = _in_percent(table.header[column])
    against = [i for i, name in enumerate(table.header) if i != column and _names_control(name)]
    rows = []
    for cells in table.rows:
        name = str(cells[0])
        if not _is_measured(cells[column]) or not name.startswith(wanted.rows):
            continue
        controls = [
            _row(_plain_name(table.header[i]), vars(cells[i]), percent) for i in against if _is_measured(cells[i])
        ]
        rows.append(
            _row(
                f"{table.header[0]} {name}" if name.isdecimal() else name,
                vars(cells[column]),
                percent,
                control=_names_control(name),
                against=max(controls, key=lambda one: one["value"], default=None),
            )
        )
    return f"{table.title}: {_plain_name(table.header[column])}", percent, rows


def _column(table: Any, wanted: str) -> int | None:
    """The column of this name, else the first one that holds estimates and is no control."""
    if wanted:
        return table.header.index(wanted) if wanted in table.header else None
    for i, name in enumerate(table.header):
        if not _names_control(name) and any(isinstance(row[i], Estimate) for row in table.rows):
            return i
    return None


def _has_controls(table: Any) -> bool:
    return any(map(_names_control, table.header)) or any(_names_control(str(row[0])) for row in table.rows)


def _names_control(name: str) -> bool:
    return name.startswith(("control", "nothing (clean)", "untrained")) or name.endswith("(baseline)")


def _is_measured(cell: Any) -> bool:
    return isinstance(cell, Estimate) and is_number(cell.value)


def _in_percent(measure: str) -> bool:
    return says_percent(measure) or measure in _SHARES


def _plain_name(name: str) -> str:
    """ "majority class" of "control: majority class, %"."""
    return _UNIT.sub("", name.removeprefix("control: ").removeprefix("control, "))


def _row(
    name: str,
    value: Mapping[str, Any],
    percent: bool,
    control: bool = False,
    against: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    numbers = {key: value.get(key) for key in ("value", "low", "high")}
    return {"name": name, **numbers, "text": _text(numbers, percent), "control": control, "against": against}


def _text(row: Mapping[str, Any], percent: bool) -> str:
    """`49.2 % (47.2 to 51.1)`, or three digits where it is no share."""
    value, low, high = (row[key] if is_number(row[key]) else None for key in ("value", "low", "high"))
    if value is None:
        return NOTHING
    if not percent:
        return format_interval(value, low, high)
    return f"{100 * value:.1f} %" + ("" if low is None else f" ({100 * low:.1f} to {100 * high:.1f})")


def _can_refute(row: Mapping[str, Any]) -> bool:
    """Whether a row is a control that a score should lie above; a positive control should itself be high."""
    return row["control"] and not row["name"].startswith("positive control") and is_number(row["value"])


def _headline(section: Section, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    scores = [row for row in rows if not row["control"] and is_number(row["value"])]
    if not scores:
        return None
    row = _standing_for(section, scores)
    controls = [one for one in rows if _can_refute(one)]
    best = row["against"] or max(controls, key=lambda one: one["value"], default=None)
    row = {**row, "against": best}
    return row | {"relation": _relation(row) if best else None}


def _standing_for(section: Section, scores: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    wanted = _HEADLINES.get(section.name)
    if wanted and wanted.row:
        return next((row for row in scores if row["name"].startswith(wanted.row)), scores[0])
    if section.targets:
        value = section.targets[0].value
        value = value.value if isinstance(value, Estimate) else value
        return next((row for row in scores if row["value"] == value), scores[0])
    compared = [row for row in scores if row["against"]]
    return max(compared, key=lambda row: row["value"] - row["against"]["value"], default=scores[0])


def _relation(row: Mapping[str, Any]) -> str:
    """Where a row's whole interval lies beside that of its control: "above", "overlapping" or "below"."""
    if _is_clear(row):
        return "above"
    return "below" if _is_clear({**row["against"], "against": row}) else "overlapping"


def _is_clear(row: Mapping[str, Any]) -> bool:
    """Whether a row's whole interval lies above that of its control."""
    low = row["value"] if row["low"] is None else row["low"]
    control = row["against"]
    return low > (control["value"] if control["high"] is None else control["high"])


# ----------------------------------------------------------------------------------------------------- causal tests


def _causes(sections: Mapping[str, Section]) -> Iterator[dict[str, Any]]:
    """Each causal test as {`probe`, `verdict`, `text`}: a short verdict and the figures behind it."""
    tests: dict[str, Callable[[Section], dict[str, Any] | None]] = {
        "interchange": _interchange,
        "importance": _importance,
    }
    for name, tell in tests.items():
        told = tell(sections[name]) if name in sections else None
        if told:
            yield {"probe": name, **told}


def _interchange(section: Section) -> dict[str, Any] | None:
    _, _, rows = _rows(section)
    swapped = next((row for row in rows if not row["control"] and is_number(row["value"])), None)
    controls = [row for row in rows if _can_refute(row)]
    if swapped is None or not controls:
        return None
    control = max(controls, key=lambda row: row["value"])
    positive = next((row for row in rows if row["name"].startswith("positive control")), None)
    pairs = next((cell.n for table in section.tables for cell in table.rows[0] if isinstance(cell, Estimate)), None)
    text = (
        f"In {'the' if pairs is None else format(pairs, ',')} pairs of problems that differ in one number, the blocks "
        "that seem to hold the changed step were taken from the partner. The answer became the predicted one in "
        f"{_text(swapped, True)} of them; with the control ({_plain_name(control['name'])}) in {_text(control, True)}."
    )
    clear = _is_clear({**swapped, "against": control})
    if clear and section.targets and section.targets[0].met:
        return {"verdict": "What is decoded from the blocks is what the answer is made from.", "text": text}
    if positive and is_number(positive["value"]):
        sure = (positive["low"] or 0) > INSTRUMENT_FLOOR
        text += f" A swap that must work (the token where the answer is read) gave it in {_text(positive, True)}, " + (
            "so the test can see an effect."
            if sure
            else f"not surely above {100 * INSTRUMENT_FLOOR:.0f} %, so a weak effect could be missed."
        )
    verdict = (
        "What is decoded from the blocks makes part of the answers."
        if clear
        else "What is decoded from the blocks is not shown to be what the answer is made from."
    )
    return {"verdict": verdict, "text": text}


def _importance(section: Section) -> dict[str, Any] | None:
    _, _, rows = _rows(section)
    clean = next((row for row in rows if row["name"].startswith("nothing (clean)")), None)
    removed = _headline(section, rows)
    if clean is None or removed is None or removed["high"] is None or clean["low"] is None:
        return None
    sure = removed["high"] < clean["low"]
    return {
        "verdict": "Emptying the memory costs answers."
        if sure
        else "Emptying the memory costs no answers that this test could be sure of.",
        "text": f"With {removed['name'].replace(': set to zero', ' set to zero')}, the gold answer is said in "
        f"{removed['text']} of {next(iter(section.n.values())):,} problems; untouched in {clean['text']}.",
    }
