"""What was measured of a checkpoint, short enough for one screen: its evaluation and its probe report as plain data.

`metrics.json` (of `python -m rim_probe eval`) and `probes/report.json` (of `... probe`) are read; a missing or damaged
one becomes a sentence that names the command which makes it. Of each probe the view is kept that its headline stands
in (`results.headline`).

Knows files and the shape of results. Knows no model, and nothing of how evidence is drawn.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rim_probe.errors import ArtifactError
from rim_probe.evaluation import REPORT_FORMAT
from rim_probe.probing.artifacts import FOLDER, REPORT_FILE, load_report
from rim_probe.probing.probes import PROBES
from rim_probe.probing.results import Report, headline, is_clear, views
from rim_probe.probing.tables import format_estimate, format_headline, target_rows
from rim_probe.report import COMPARISON_FORMAT, METHOD_NAMES, format_machine

FORMAT = "rim-probe-evidence/2"
METRICS_FILE = "metrics.json"
CAUSAL = ("interchange", "importance")  # the probes that intervene


def load_evidence(checkpoint: str | Path) -> dict[str, Any]:
    """Everything that was measured of one checkpoint. Never raises for missing or damaged files.

    Returns:
        JSON-ready: `format`; `checkpoint` (its name); `metrics` (see `_metrics`) and `probes` (see `_probe`), None and
        empty where they are missing; `causes`: [{probe, verdict}] of the probes that intervene; `complaints`, sentences
        on what is missing and which command makes it.
    """
    folder = Path(checkpoint)
    complaints: list[str] = []
    metrics = _evaluation(folder, complaints)
    try:
        reports, provenance = load_report(folder / FOLDER)
    except ArtifactError as error:
        reports, provenance = [], {}
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
        "probes": [_probe(report, provenance) for report in reports],
        "causes": [
            {"probe": one.name, "verdict": one.verdict} for one in reports if one.name in CAUSAL and one.verdict
        ],
        "complaints": complaints,
    }


def interchange_sentence(checkpoint: str | Path) -> tuple[str, str] | None:
    """Whether the answers of a checkpoint are made from what is decoded of its blocks, as its interchange test found.

    Returns:
        A few words and the figures behind them in a sentence; None where the test was not made.
    """
    try:
        reports, _ = load_report(Path(checkpoint) / FOLDER)
    except ArtifactError:
        return None
    report = next((one for one in reports if one.name == "interchange"), None)
    found = report and headline(report)
    if not found or found[1] is None:
        return None
    score, control = found
    clear = is_clear(score.estimate, control.estimate)
    met = score.goal is not None and score.goal.met(score.estimate)
    short = "We tested: yes." if clear and met else "We tested: in part." if clear else "We tested: not shown."
    told, beside = (format_estimate(one.estimate, True, " %").replace("(", "(95 % interval ") for one in found)
    return short, (
        f"In {score.estimate.n:,} pairs of questions that differ in one number, exchanging the block that holds the "
        f"changed step gave the predicted answer in {told}, a control ({control.of}) in {beside}."
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


def _probe(report: Report, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """`name`, `title`, `question`, `told` (the headline as a sentence), `targets` ([what, goal, measured, verdict]),
    `report` (`Report.to_dict` of the view its headline stands in) and `made`."""
    own = {**provenance, **provenance.get("probes", {}).get(report.name, {})}
    found = headline(report)
    shown = [view for view in views(report) if found and found[0] in view.results]
    kept = replace(report, results=shown[0].results if shown else [], clouds={})
    return {
        "name": report.name,
        "title": PROBES[report.name].title,
        "question": PROBES[report.name].question,
        "told": format_headline(report),
        "targets": target_rows(report),
        "report": kept.to_dict(),
        "made": _made(own, own.get("seed"), report.n),
    }
