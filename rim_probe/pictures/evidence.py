"""Evidence: what was measured of a checkpoint, readable in a minute: accuracy and time, causes, probes, commands.

Knows the dictionary of `rim_probe.probing.evidence.load_evidence`; every number on the page stands in it. Does not know
files, and does not choose which number stands for a probe.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from rim_probe.pictures.chart import Axis, Line, Whisker, axis, chart, legend, named_axis, whiskers
from rim_probe.pictures.evidence_probes import draw_probes
from rim_probe.pictures.parts import Picture, Table, escape, percent, term
from rim_probe.pictures.surgery_words import unbroken

_TONES = {"memory": "memory", "cot": "cot", "direct": "ink"}
_SHAPES = {"memory": "dot", "cot": "square", "direct": "triangle"}


def draw_evidence(evidence: Mapping[str, Any], *, report_url: str = "") -> Picture:
    """The panel of one checkpoint.

    Args:
        evidence: as `load_evidence` gives it.
        report_url: where the whole report page lies, if it is served: a path, or an http(s) address.
    """
    metrics, probes = evidence["metrics"], evidence["probes"]
    link = ""
    if probes and report_url and urlsplit(report_url).scheme in ("", "http", "https"):
        link = f'<p class="evidence-link"><a href="{escape(report_url)}">The whole report, with every figure</a></p>'
    body = (
        (_race(metrics) if metrics else "")
        + _causes(evidence["causes"])
        + (draw_probes(probes) if probes else "")
        + link
        + _commands(evidence)
    )
    return Picture(
        "evidence",
        f"Evidence: {evidence['checkpoint']}",
        "What was measured of this checkpoint, read from its own reports. Whiskers are 95 % intervals (of times: "
        f"quartiles); hollow dots and dashed ticks are {term('control', 'controls')}.",
        "A score means something only as far as it lies above its control: what the question alone, or an untrained "
        "model, would give. And a decode is a claim; only the causal tests say whether the answer depends on it.",
        body,
        _table(metrics, probes) if metrics or probes else None,
        notes=evidence["complaints"],
    )


# ------------------------------------------------------------------------------------------------- accuracy and time


def _race(metrics: Mapping[str, Any]) -> str:
    small = _by_steps(metrics) + _sweep(metrics)
    return (
        f'<p class="evidence-lead">{escape(unbroken(_told(metrics)))}</p>'
        f'<div class="evidence-two">{_accuracy(metrics)}{_latency(metrics)}</div>'
        + (f'<div class="evidence-two">{small}</div>' if small else "")
        + _paired(metrics)
        + _elsewhere(metrics)
    )


def _told(metrics: Mapping[str, Any]) -> str:
    """The race in a sentence or two."""
    shares = {one["method"]: one["all"]["value"] for one in metrics["accuracy"] if one["all"]["value"] is not None}
    times = {one["method"]: one["total_ms"]["median"] for one in metrics["latency"]}
    text = ""
    if "memory" in shares:
        others = [f"{name} {100 * shares[key]:.1f} %" for key, name in _OTHERS.items() if key in shares]
        named = f" of {metrics['data']}" if metrics["data"] else ""
        text = f"RiM is right in {100 * shares['memory']:.1f} % of {metrics['n']:,} problems{named}"
        text += f" ({', '.join(others)})." if others else "."
    if times.get("memory") and times.get("cot"):
        factor = times["cot"] / times["memory"]
        text += f" It answers in {times['memory']:.1f} ms, {factor:.1f} times as fast as chain of thought (medians)."
    return text


_OTHERS = {"cot": "chain of thought", "direct": "direct answer"}


def _accuracy(metrics: Mapping[str, Any]) -> str:
    rows = [
        Whisker(
            _name(one),
            one["all"]["value"],
            one["all"]["low"],
            one["all"]["high"],
            _share_text(one["all"]),
            _TONES[one["method"]],
            tip=f"n = {one['all']['n']:,}",
        )
        for one in metrics["accuracy"]
    ]
    for entry in metrics["sweep"]:
        if entry["num_blocks"] == 0:
            rows.append(
                Whisker(
                    "control: RiM, blocks removed",
                    entry["value"],
                    entry["low"],
                    entry["high"],
                    _share_text(entry),
                    "soft",
                    control=True,
                    tip=f"n = {entry['n']:,}; the same weights, no memory block after the question",
                )
            )
    return _part("How often the answer is right", whiskers(rows, _share_axis("right"), "Accuracy of all methods"))


def _latency(metrics: Mapping[str, Any]) -> str:
    if not metrics["latency"]:
        return ""
    rows = []
    for one in metrics["latency"]:
        total = one["total_ms"]
        text = f"{total['median']:.1f} ms ({total['q1']:.1f} to {total['q3']:.1f})"
        passes, cache = one["forward_passes"]["median"], one["kv_cache_bytes"]["median"] / 1024
        tip = f"{passes:g} passes, {cache:,.0f} KiB of KV cache (medians), n = {one['n']}"
        rows.append(
            Whisker(_name(one), total["median"], total["q1"], total["q3"], text, _TONES[one["method"]], tip=tip)
        )
    highest = max(one["total_ms"]["q3"] for one in metrics["latency"])
    across = axis([highest], "milliseconds for one answer: median and quartiles", low=0, high=highest * 1.08)
    costs = "; ".join(
        f"{_name(one)} {one['forward_passes']['median']:g} passes, {one['kv_cache_bytes']['median'] / 1024:,.0f} KiB"
        for one in metrics["latency"]
    )
    note = f'<p class="evidence-note">Passes and {term("KV cache")} (medians): {escape(costs)}.</p>'
    return _part("How long one answer takes", whiskers(rows, across, "Latency of all methods") + note)


def _by_steps(metrics: Mapping[str, Any]) -> str:
    steps = list(metrics["accuracy"][0]["by_steps"]) if metrics["accuracy"] else []
    if len(steps) < 2:
        return ""
    lines = []
    for one in metrics["accuracy"]:
        shares = [one["by_steps"].get(count) for count in steps]
        lines.append(
            _line(
                range(len(steps)),
                shares,
                [f"{_name(one)}, {count} {'step' if count == '1' else 'steps'}" for count in steps],
                _TONES[one["method"]],
                _SHAPES[one["method"]],
            )
        )
    keys = legend([(_SHAPES[one["method"]], _TONES[one["method"]], _name(one)) for one in metrics["accuracy"]])
    plot = chart(
        named_axis(steps, "steps the problem needs"), _share_axis("right"), lines, "Accuracy by steps", height=11
    )
    return _part("By number of steps", plot + keys)


def _sweep(metrics: Mapping[str, Any]) -> str:
    sweep = metrics["sweep"]
    if len(sweep) < 2:
        return ""
    blocks = [entry["num_blocks"] for entry in sweep]
    asked = metrics["num_blocks"]
    tips = [f"K = {k}{' (as used above)' if k == asked else ''}" for k in blocks]
    across = axis(blocks, "memory blocks K at the time of asking", low=min(blocks) - 0.3, high=max(blocks) + 0.3)
    lines = [_line(blocks, sweep, tips, "memory", "dot")]
    used = next((entry for entry in sweep if entry["num_blocks"] == asked), None)
    note = f'<p class="evidence-note">Above, K = {asked}: {percent(used["value"])}.</p>' if used else ""
    return _part(
        "More blocks, fewer blocks", chart(across, _share_axis("right"), lines, "Accuracy over K", height=11) + note
    )


def _line(
    x: Sequence[float], shares: Sequence[Mapping[str, Any] | None], names: Sequence[str], tone: str, shape: str
) -> Line:
    def column(key: str) -> list[float | None]:
        return [share[key] if share else None for share in shares]

    tips = [
        f"{name}: {_share_text(share)}, n = {share['n']:,}" if share else f"{name}: none"
        for name, share in zip(names, shares, strict=True)
    ]
    return Line(list(x), column("value"), tone, low=column("low"), high=column("high"), tips=tips, shape=shape)


def _paired(metrics: Mapping[str, Any]) -> str:
    told = [
        f"RiM against {_OTHERS[pair['second']]}: only RiM right in {pair['only_first']:,}, only the other in "
        f"{pair['only_second']:,}, both in {pair['both_right']:,}, neither in {pair['both_wrong']:,} of "
        f"{pair['n']:,} (exact McNemar {_p(pair['p_value'])})."
        for pair in metrics["paired"]
        if pair["first"] == "memory" and pair["second"] in _OTHERS
    ]
    if not told:
        return ""
    items = "".join(f"<li>{escape(text)}</li>" for text in told)
    return f'<div class="evidence-paired"><h3>The same problems, pair by pair</h3><ul>{items}</ul></div>'


def _elsewhere(metrics: Mapping[str, Any]) -> str:
    """The other files of problems, in a line each."""
    told = [
        f"{other['name']}, n = {other['n']:,}: "
        + "; ".join(f"{_name(one)} {_share_text(one['all'])}" for one in other["accuracy"])
        for other in metrics["others"]
    ]
    if not told:
        return ""
    items = "".join(f"<li>{escape(text)}</li>" for text in told)
    return f'<div class="evidence-paired"><h3>Other problems</h3><ul>{items}</ul></div>'


def _p(value: float) -> str:
    return f"p = {value:.2f}" if value >= 0.01 else f"p = {value:.3f}" if value >= 0.001 else "p < 0.001"


def _name(one: Mapping[str, Any]) -> str:
    return "direct answer" if one["method"] == "direct" else one["name"]


def _share_text(share: Mapping[str, Any]) -> str:
    if share["value"] is None:
        return "none"
    return f"{100 * share['value']:.1f} % ({100 * share['low']:.1f} to {100 * share['high']:.1f})"


def _share_axis(title: str) -> Axis:
    return axis([], title, low=0, high=1, form=percent)


def _part(title: str, body: str) -> str:
    return f'<section class="evidence-part"><h3>{escape(title)}</h3>{body}</section>'


# ----------------------------------------------------------------------------------------------------------- causes


def _causes(causes: Sequence[Mapping[str, Any]]) -> str:
    if not causes:
        return ""
    items = "".join(
        f"<li><b>{escape(cause['verdict'])}</b> <span>{escape(unbroken(cause['text']))}</span></li>" for cause in causes
    )
    return f'<section class="evidence-causes"><h3>Does the answer depend on it?</h3><ul>{items}</ul></section>'


# ---------------------------------------------------------------------------------------------------- how it was made


def _commands(evidence: Mapping[str, Any]) -> str:
    """Each command once, with what it made."""
    sources = [("accuracy and time", evidence["metrics"]["made"])] if evidence["metrics"] else []
    sources += [(probe["title"], probe["made"]) for probe in evidence["probes"]]
    commands: dict[str, list[str]] = {}
    for what, made in sources:
        if made["command"]:
            commands.setdefault(made["command"], []).append(f"{what} ({made['date']}, seed {made['seed']})")
    if not commands:
        return ""
    items = "".join(
        f"<li><code>{escape(command)}</code><p>{escape('; '.join(made))}</p></li>" for command, made in commands.items()
    )
    machines = dict.fromkeys(made["machine"] for _, made in sources if made["machine"])
    on = f'<p class="evidence-note">{escape(" / ".join(machines))}</p>' if machines else ""
    return (
        '<details class="evidence-commands"><summary>The commands that made these figures</summary>'
        f"<ul>{items}</ul>{on}</details>"
    )


def _table(metrics: Mapping[str, Any] | None, probes: Sequence[Mapping[str, Any]]) -> Table:
    rows: list[list[Any]] = []
    if metrics:
        for one in metrics["accuracy"]:
            for what, share in (("all", one["all"]), *one["by_steps"].items()):
                problems = "all problems" if what == "all" else f"problems of steps: {what}"
                rows.append([f"right, {_name(one)}", problems, *_numbers(share), share["n"]])
        rows += [
            ["right, RiM", f"K = {entry['num_blocks']}", *_numbers(entry), entry["n"]] for entry in metrics["sweep"]
        ]
        for one in metrics["latency"]:
            spread = one["total_ms"]
            numbers = [round(spread[key], 2) for key in ("median", "q1", "q3")]
            rows.append([f"ms for one answer, {_name(one)}", "median, quartiles", *numbers, one["n"]])
    for probe in probes:
        for row in probe["rows"]:
            rows.append([f"{probe['title']}: {probe['measure']}", row["name"], *_numbers(row), None])
            if row["against"]:
                control = row["against"]
                rows.append(
                    [probe["title"], f"best control of {row['name']}: {control['name']}", *_numbers(control), None]
                )
    return Table(["what", "of", "value", "low", "high", "n"], rows)


def _numbers(row: Mapping[str, Any]) -> list[float | None]:
    return [None if row[key] is None else round(row[key], 4) for key in ("value", "low", "high")]
