"""The probes of the evidence panel: a line each, score beside its best control, that unfolds into findings and targets.

Knows one entry of `probes` in the dictionary of `load_evidence`. Does not choose which number stands for a probe.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rim_probe.pictures.chart import Axis, Whisker, axis, whiskers
from rim_probe.pictures.parts import escape, percent
from rim_probe.pictures.surgery_words import unbroken


def draw_probes(probes: Sequence[Mapping[str, Any]]) -> str:
    rows = "".join(map(_probe, probes))
    key = (
        '<p class="evidence-key" aria-hidden="true"><span><i class="evidence-dot"></i> score with its interval</span>'
        '<span><i class="evidence-tick"></i> its best control</span></p>'
    )
    return (
        '<section class="evidence-probes"><h3>What probes read in the memory</h3><p class="evidence-note">Each probe '
        f"with its score beside the best control; open one for its findings, its targets and how it was made.</p>{key}"
        f"{rows}</section>"
    )


def _probe(probe: Mapping[str, Any]) -> str:
    return (
        f'<details class="evidence-probe"><summary><span class="evidence-name">{escape(probe["title"])}</span>'
        f"{_headline(probe)}{_marks(probe['targets'])}</summary>"
        f'<div class="evidence-inside"><p class="evidence-question">{escape(probe["question"])}</p>'
        f"<p>{escape(unbroken(probe['summary']))}</p>{_targets(probe)}{_scores(probe)}"
        f"{_made(probe['made'])}</div></details>"
    )


_RELATIONS = {"above": "above", "overlapping": "not clear of", "below": "below"}


def _headline(probe: Mapping[str, Any]) -> str:
    row = probe["headline"]
    if row is None:
        return '<span class="evidence-rail"></span><span class="evidence-score">no single score</span>'
    across, control = _probe_axis(probe), row["against"]
    places = {key: 100 * across.share(row[key]) for key in ("value", "low", "high") if row[key] is not None}
    marks = ""
    if control:
        marks += f'<i class="evidence-tick" style="left:{100 * across.share(control["value"]):.1f}%"></i>'
    if "low" in places and "high" in places:
        width = places["high"] - places["low"]
        marks += f'<i class="evidence-line" style="left:{places["low"]:.1f}%;width:{width:.1f}%"></i>'
    marks += f'<i class="evidence-dot" style="left:{places["value"]:.1f}%"></i>'
    said = f"<b>{escape(_short(row))}</b>"
    if control:
        said += f" {_RELATIONS[row['relation']]} {escape(_short(control))}"
    return (
        f'<span class="evidence-rail" aria-hidden="true">{marks}</span><span class="evidence-score">{said}'
        f"<small>{escape(row['name'])}{', beside: ' + escape(_bare(control['name'])) if control else ''}</small></span>"
    )


def _short(row: Mapping[str, Any]) -> str:
    return unbroken(row["text"].partition(" (")[0])


def _bare(name: str) -> str:
    return name.removeprefix("control: ").removeprefix("control, ")


def _marks(targets: Sequence[Mapping[str, Any]]) -> str:
    if not targets:
        return '<span class="evidence-marks"></span>'
    met = sum(target["met"] for target in targets)
    sign = "✓" if met == len(targets) else "✗" if not met else "~"
    word = "target" if len(targets) == 1 else "targets"
    return (
        f'<span class="evidence-marks"><span aria-hidden="true">{sign}</span> {met} of {len(targets)} {word} met</span>'
    )


def _targets(probe: Mapping[str, Any]) -> str:
    if not probe["targets"]:
        return ""
    rows = "".join(
        f"<tr><td>{escape(target['what'])}</td><td>{escape(target['goal'])}</td><td>{escape(target['measured'])}</td>"
        f'<td class="{"met" if target["met"] else "missed"}"><span aria-hidden="true">{"✓" if target["met"] else "✗"}'
        f"</span> {escape(target['verdict'])}</td></tr>"
        for target in probe["targets"]
    )
    return (
        f'<div class="evidence-targets" tabindex="0" role="region" aria-label="Targets of {escape(probe["title"])}">'
        "<table><thead><tr>"
        '<th scope="col">target</th><th scope="col">goal</th><th scope="col">measured</th><th scope="col">verdict</th>'
        f"</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _scores(probe: Mapping[str, Any]) -> str:
    if not probe["rows"]:
        return ""
    rows = []
    for row in probe["rows"]:
        against = row["against"]
        tip = f"best control, {against['name']}: {against['text']}" if against else ""
        rows.append(
            Whisker(
                row["name"],
                row["value"],
                row["low"],
                row["high"],
                row["text"],
                "soft" if row["control"] else "memory",
                control=row["control"],
                tip=tip,
                mark=against["value"] if against else None,
            )
        )
    clear = ""
    if probe["clear"]:
        above, many = probe["clear"]
        clear = (
            f'<p class="evidence-note">In {above} of {many} rows the whole interval lies above that of the best '
            "control (dashed tick).</p>"
        )
    return f"<h4>{escape(probe['measure'])}</h4>{whiskers(rows, _probe_axis(probe), probe['title'])}{clear}"


def _probe_axis(probe: Mapping[str, Any]) -> Axis:
    """From 0 (or below) to 1 for shares and scores, further where the values go further."""
    values = [
        value
        for row in probe["rows"]
        for part in (row, row["against"] or {})
        for value in (part.get("value"), part.get("low"), part.get("high"))
        if value is not None
    ]
    high = 1.0 if max(values, default=1.0) <= 1.0 else None
    low = 0.0 if min(values, default=0.0) >= 0.0 else None
    return axis(values, "", low=low, high=high, form=percent if probe["percent"] and low == 0.0 else None)


def _made(made: Mapping[str, Any]) -> str:
    counts = " · ".join(f"{name} {count:,}" for name, count in made["n"].items())
    facts = [made["date"], "" if made["seed"] is None else f"seed {made['seed']}", f"n: {counts}" if counts else ""]
    facts.append(made["machine"] or "")
    line = escape("; ".join(fact for fact in facts if fact))
    command = f"<code>{escape(made['command'])}</code>" if made["command"] else ""
    return f'<p class="evidence-made">{line}{"." if line else ""}</p>{command}'
