"""Results as text: an evaluation, a bench; tables are Markdown, padded so that a terminal shows them too.

Knows the report dicts of `comparison.compare` and `bench.run_bench` and the published figures, and nothing of models;
imports nothing heavy. Model cards are made from what stands here, so that no figure is ever typed by hand.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rim_probe.errors import RiMError

Report = Mapping[str, Any]

COMPARISON_FORMAT = "rim-probe-comparison/1"
EVALUATION_FORMAT = "rim-probe-evaluation/1"  # of one file: part of a comparison, and once a report of its own
METHOD_NAMES = {"memory": "RiM", "cot": "chain of thought", "direct": "direct"}
LEAST_DISCORDANT = 10  # problems that one method alone has right, below which a ratio of accuracies has no interval
Z_95 = 1.959963984540054  # two-sided 95 % quantile of the standard normal

# Aichberger and Hochreiter, arXiv:2605.30343, by several public summaries:
# model, method, GSM8K %, GSM-Hard %, first token ms, full answer ms.
PUBLISHED = (
    ("GPT-2, direct", 15.4, 3.5, 7.6, None),
    ("GPT-2, Coconut", 31.1, 7.1, 53.4, None),
    ("GPT-2, RiM, final block", 33.6, 7.8, 7.6, None),
    ("GPT-2, chain of thought", 39.8, 8.4, 213.7, None),
    ("Llama-3.2-1B, direct", 23.9, 5.3, 16.1, 126.0),
    ("Llama-3.2-1B, Coconut", 36.9, 8.5, 108.3, 304.7),
    ("Llama-3.2-1B, RiM, final block", 42.1, 10.5, 16.1, 126.5),
    ("Llama-3.2-1B, chain of thought", 49.1, 11.2, 420.3, 1108.7),
)
_PUBLISHED_FILES = ("GSM8K", "GSM-Hard")
_ROWS = (  # method, which figure, how it is called: in the order that was published
    ("direct", "final", "direct"),
    ("memory", "final", "RiM, final block"),
    ("memory", "any_block", "RiM, any block (right if one of them is)"),
    ("cot", "final", "chain of thought"),
)
_MEASURES = {"ttft_ms": "first answer token", "total_ms": "full answer"}


# ---------------------------------------------------------------------------------------------------------------- parts


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns: the first one left, the others right."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return "| " + " | ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]) + " |"

    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"
    return "\n".join([line(header), rule, *map(line, rows)])


def count(number: int, one: str, many: str) -> str:
    """A number with its noun: `1 pass`, `2 passes`."""
    return f"{number:,} {one if number == 1 else many}"


def format_machine(machine: Report) -> str:
    """Processor, threads, device and versions, as `evaluation.describe_machine` found them."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return f"{machine['cpu']}, {count(machine['threads'], 'thread', 'threads')}, device {machine['device']}; {versions}"


def format_share(share: Report) -> str:
    """Per cent with the 95 % interval; "none" of no problems."""
    if share["accuracy"] is None:
        return "none"
    return f"{100 * share['accuracy']:.1f} ({100 * share['low']:.1f} to {100 * share['high']:.1f})"


def format_spread(values: Mapping[str, float] | None) -> str:
    """Median (quartiles)."""
    if not values:
        return "none"
    return f"{format_number(values['median'])} ({format_number(values['q1'])} to {format_number(values['q3'])})"


def format_number(value: float) -> str:
    """Three significant digits without an exponent."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


# ----------------------------------------------------------------------------------------------------------- evaluation


def read_report(path: str | Path) -> dict[str, Any]:
    """The report in a JSON file that `python -m rim_probe eval` wrote.

    Raises:
        RiMError: no such file, or not a report.
    """
    again = "give one that `python -m rim_probe eval --output` wrote"
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise RiMError(f"{path} cannot be read ({error.strerror or error}); {again}.") from None
    except ValueError:
        raise RiMError(f"{path} is no JSON; {again}.") from None
    kind = report.get("format") if isinstance(report, dict) else None
    if kind == EVALUATION_FORMAT:
        return _of_one_file(report)
    if kind != COMPARISON_FORMAT:
        raise RiMError(f"{path} is no report of an evaluation; {again}.")
    return report


def _of_one_file(report: dict[str, Any]) -> dict[str, Any]:
    """A comparison made of the report of one file, as it was written up to version 0.1."""
    run = report["run"]
    latency = report.get("latency") or {}
    n = max((costs["n"] for costs in latency.values()), default=0)
    batch = {"batch_size": 1, "n": n, "methods": latency, "ratios": []}
    return {
        "format": COMPARISON_FORMAT,
        "interrupted": report["interrupted"],
        "run": run,
        "settings": report["settings"] | {"limit": run["limit"]},
        "files": [{"name": Path(run["data"]["file"]).stem, "report": report}],
        "costs": [{"machine": run["machine"], "batches": [batch]}] if latency else [],
    }


def format_report(report: Report, figures: Sequence[tuple[str, str]] = ()) -> str:
    """An evaluation as Markdown; `figures` are (what it shows, address), linked under the first table."""
    files = report["files"]
    parts = [_provenance(report)]
    if len(files) > 1 or _has_published(files):
        parts.append(_main_table(report))
    parts.append("\n".join(f"- [{title}]({address})" for title, address in figures))
    for entry in files:
        parts += [f"### Accuracy on {entry['name']}", _accuracy_table(entry["report"])]
    parts.append("\n".join(f"- {note}" for note in _notes(report)))
    pairs = [(entry["name"], pair) for entry in files for pair in entry["report"]["paired"]]
    for title, body in (
        ("Paired comparison on the same problems", _paired_table(pairs)),
        (
            "Number of memory blocks at inference (0 = blocks removed), and controls of the place of the readout",
            _blocks_table(files),
        ),
        ("Shallow baselines", _baselines_table(files)),
        ("Cost of an answer", "\n\n".join(_costs(place) for place in report["costs"])),
    ):
        parts += [f"### {title}", body] if body else []
    return "\n\n".join(part for part in parts if part) + "\n"


def _provenance(report: Report) -> str:
    run, lines = report["run"], []
    if report["interrupted"]:
        done = ", ".join(
            f"{entry['name']} {entry['report']['done']:,} of {entry['report']['requested']:,}"
            for entry in report["files"]
        )
        lines.append(f"**Interrupted: {done} problems done.**")
    told = [
        f"{entry['name']} `{source['file']}` (sha256 {source['sha256'][:12]}…, {source['problems']:,} problems, "
        f"{count(source['rejected'], 'line', 'lines')} rejected, n = {entry['report']['done']:,})"
        for entry in report["files"]
        for source in [entry["report"]["run"]["data"]]
    ]
    drawn = f", drawn with seed {report['settings']['seed']}" if report["settings"]["limit"] else ""
    lines += [
        f"`{run['checkpoint']}` on {'; '.join(told)}{drawn}; {run['date'][:10]}.",
        format_machine(run["machine"]) + ".",
        f"`{run['command']}`",
    ]
    return "\n".join(lines)


def _has_published(files: Sequence[Report]) -> bool:
    return any(entry["name"] in _PUBLISHED_FILES for entry in files)


def _main_table(report: Report) -> str:
    """The paper's table: methods by files, with the costs of one answer on the first device."""
    files = report["files"]
    names = [entry["name"] for entry in files]
    alone = next((batch for place in report["costs"][:1] for batch in place["batches"]), {"methods": {}})
    rows = []
    for method, what, called in _ROWS:
        cells = [entry["report"]["accuracy"].get(method, {"all": {}})["all"].get(what) for entry in files]
        if not any(cells):
            continue
        costs = alone["methods"].get(method) if what == "final" else None
        times = [format_number(costs[key]["median"]) if costs and costs[key] else "" for key in _MEASURES]
        tokens = f"{costs['generated_tokens']['mean']:.1f}" if costs else ""
        shares = [f"{format_share(cell)}, n = {cell['n']:,}" if cell else "" for cell in cells]
        rows.append([called, *shares, *times, tokens])
    for called, gsm8k, hard, first, full in PUBLISHED if _has_published(files) else ():
        known = {"GSM8K": f"{gsm8k:.1f}", "GSM-Hard": f"{hard:.1f}"}
        times = [f"{value:.1f}" if value else "" for value in (first, full)]
        rows.append(
            [f"*{called}: published, other model and hardware*", *(known.get(n, "") for n in names), *times, ""]
        )
    return table(["% right (95 % Wilson interval)", *names, *(f"{m}, ms" for m in _MEASURES.values()), "tokens"], rows)


def _accuracy_table(report: Report) -> str:
    """One file: methods and blocks by number of steps."""
    accuracy = report["accuracy"]
    first = next(iter(accuracy.values()))
    header = ["% right (95 % Wilson interval)", f"all (n = {first['all']['final']['n']:,})"]
    header += [f"{_steps(number)} (n = {cell['final']['n']:,})" for number, cell in first["by_steps"].items()]
    rows = []
    for method, figures in accuracy.items():
        cells = [figures["all"], *figures["by_steps"].values()]
        name = METHOD_NAMES[method]
        blocks = len(figures["all"].get("blocks", ()))
        rows.append([f"{name}, final block" if blocks else name, *(format_share(cell["final"]) for cell in cells)])
        if blocks:
            rows.append([f"{name}, any block", *(format_share(cell["any_block"]) for cell in cells)])
        for k in range(blocks):
            rows.append([f"{name}, block {k + 1}", *(format_share(cell["blocks"][k]) for cell in cells)])
    return table(header, rows)


def _steps(number: str) -> str:
    return {"0": "no steps given", "1": "1 step"}.get(number, f"{number} steps")


def _notes(report: Report) -> list[str]:
    """What keeps a figure from meaning what it seems to mean."""
    notes = []
    limit = report["settings"]["max_new_tokens"]
    for name, model in report["files"][0]["report"]["models"].items() if report["files"] else ():
        if model["shares_memory_weights"]:
            notes.append(f"{METHOD_NAMES[name]}: answered by the weights of RiM, so this is no matched control.")
    for entry in report["files"]:
        if entry["name"].casefold().startswith("valid"):
            notes.append(f"{entry['name']}: chose the checkpoints, so its figures are no test.")
        for method, one in entry["report"].get("chains", {}).items():
            span = f"{100 * one['low']:.1f} to {100 * one['high']:.1f}"
            notes.append(f"{entry['name']}, {METHOD_NAMES[method]}: over {one['clusters']:,} chains {span}.")
        for method, figures in entry["report"]["accuracy"].items():
            for what, told in (
                ("refused", "questions were too long or with unknown words, never asked and counted as wrong"),
                ("truncated", f"answers were cut after {limit} tokens"),
            ):
                if figures[what]:
                    notes.append(f"{entry['name']}, {METHOD_NAMES[method]}: {figures[what]:,} {told}.")
    if _has_published(report["files"]):
        notes.append("Published figures: arXiv:2605.30343 by public summaries of it; other models, hardware, training.")
    return notes


def _paired_table(pairs: Sequence[tuple[str, Report]]) -> str:
    rows = []
    for name, pair in pairs:
        difference = 100 * (pair["only_first"] - pair["only_second"]) / pair["n"] if pair["n"] else 0.0
        ratio, low, high = relative_accuracy(pair)
        interval = "no interval" if low is None or high is None else f"{100 * low:.1f} to {100 * high:.1f}"
        rows.append(
            [
                f"{name}: {METHOD_NAMES[pair['first']]} (first) against {METHOD_NAMES[pair['second']]} (second)",
                *(f"{pair[key]:,}" for key in ("both_right", "only_first", "only_second", "both_wrong")),
                f"{difference:+.1f}",
                f"{pair['p_value']:.3f}" if pair["p_value"] >= 0.001 else f"{pair['p_value']:.1e}",
                "none" if ratio is None else f"{100 * ratio:.1f} ({interval})",
            ]
        )
    header = ["final answers", "both right", "only first", "only second", "both wrong"]
    header += ["difference, points", "McNemar p (exact)", "first / second, % (95 % interval)"]
    return table(header, rows) if rows else ""


def relative_accuracy(pair: Report) -> tuple[float | None, float | None, float | None]:
    """First method's accuracy over the second's, with its 95 % Wald interval of the logarithm for paired data.

    The variance of the logarithm is (b + c) / ((a + b)(a + c)) by the delta method, with a both right, b and c one
    alone. None where the second is never right; no interval below LEAST_DISCORDANT = b + c or where the first is never
    right, as it would have no width.
    """
    first, second = (pair["both_right"] + pair[f"only_{side}"] for side in ("first", "second"))
    discordant = pair["only_first"] + pair["only_second"]
    if not second:
        return None, None, None
    if not first or discordant < LEAST_DISCORDANT:
        return first / second, None, None
    half = Z_95 * math.sqrt(discordant / (first * second))
    return first / second, first / second * math.exp(-half), first / second * math.exp(half)


def _blocks_table(files: Sequence[Report]) -> str:
    """Accuracy with K = 0, 1, 2, ... blocks, a column per file, and beside it the controls of place."""
    columns: dict[str, dict[int, str]] = {}
    for entry in files:
        report = entry["report"]
        columns[entry["name"]] = {one["num_blocks"]: format_share(one) for one in report["sweep"]}
        for one in report.get("placed", ()):
            title = f"{entry['name']}, control: {one['place']} (n = {one['n']:,})"
            columns.setdefault(title, {})[one["num_blocks"]] = format_share(one)
    counts = sorted({k for cells in columns.values() for k in cells})
    rows = [[str(k), *(cells.get(k, "") for cells in columns.values())] for k in counts]
    return table(["K, final readout right, % (95 % interval)", *columns], rows) if rows else ""


def _baselines_table(files: Sequence[Report]) -> str:
    """What rules and counts reach that understand nothing."""
    told = {entry["name"]: entry["report"].get("baselines", {}) for entry in files}
    names = dict.fromkeys(name for shares in told.values() for name in shares)
    rows = [
        [name, *(format_share(shares[name]) if name in shares else "" for shares in told.values())] for name in names
    ]
    return table(["shallow baseline, % right (95 % interval)", *told], rows) if rows else ""


def _costs(place: Report) -> str:
    """One device: a row per method and batch size, the ratios turn by turn."""
    machine, rows, notes = place["machine"], [], []
    for batch in place["batches"]:
        size = batch["batch_size"]
        for method, costs in batch["methods"].items():
            rows.append(
                [
                    f"{METHOD_NAMES[method]}, batch {size}",
                    str(costs["n"]),
                    format_spread(costs["ttft_ms"]),
                    format_spread(costs["total_ms"]),
                    f"{costs['forward_passes']['mean']:.1f}",
                    f"{costs['generated_tokens']['mean']:.1f}",
                    format_number(costs["kv_cache_bytes"]["median"] / 2**20),
                ]
            )
            if costs.get("unanswered"):
                notes.append(f"batch {size}, {METHOD_NAMES[method]}: {costs['unanswered']:,} answers without a token.")
        notes += [f"batch {size}: {_ratio(ratio)}" for ratio in batch["ratios"] if ratio["median"] is not None]
    device = machine["device"] if machine["device"] != "cpu" else f"CPU, {machine['cpu']}"
    header = [f"{device}, {place['dtype']}" if "dtype" in place else device, "turns"]
    header += [f"{name}, ms: median (quartiles)" for name in _MEASURES.values()]
    header += ["passes, mean", "tokens, mean", "peak KV cache, MiB"]
    return table(header, rows) + "\n\n" + "\n".join(f"- {note}" for note in notes)


def _ratio(ratio: Report) -> str:
    first, second = METHOD_NAMES[ratio["first"]], METHOD_NAMES[ratio["second"]]
    turns = count(ratio["n"], "turn", "turns")
    interval = (
        f"no interval from {turns}"
        if ratio["low"] is None
        else f"95 % interval {format_number(ratio['low'])} to {format_number(ratio['high'])}, {turns}"
    )
    return f"{_MEASURES[ratio['of']]}, {first} / {second}: {format_number(ratio['median'])} ({interval})."


# ---------------------------------------------------------------------------------------------------------------- bench


def format_bench(report: Report) -> str:
    """A bench report as Markdown: each ratio beside its target."""
    rows = [
        [
            entry["what"],
            str(entry["n"]),
            _side(entry["first"]),
            _side(entry["second"]),
            format_spread(entry["ratio"]),
            entry["target"] or "",
            {None: "", True: "met", False: "NOT MET"}[entry["met"]],
        ]
        for entry in report["ratios"]
    ]
    notes = [
        "Medians with quartiles; the two sides of a ratio were measured in turn within one run.",
        f"Our loop and generate gave the same tokens on {report['generate_same_tokens']} of {report['problems']} "
        "problems; that ratio leaves out the others.",
        f"A training step holds {report['train_batch']} problems; relative difference of the two losses "
        f"{report['loss_difference']:.0e}.",
    ]
    parts = [
        f"`{report['checkpoint']}`; {report['date'][:10]}; {format_machine(report['machine'])}.\n`{report['command']}`",
        table(["first / second", "n", "first, ms", "second, ms", "ratio", "target", ""], rows),
        "\n".join(f"- {note}" for note in notes),
    ]
    return "\n\n".join(parts) + "\n"


def _side(side: Report) -> str:
    """One side of a bench ratio: its times and, where it generates, the median number of tokens."""
    tokens = f", {side['tokens']['median']:g} tokens" if side["tokens"] else ""
    return f"{side['name']}: {format_spread(side['ms'])}{tokens}"
