"""Results as text: one answer, an evaluation, a bench; tables are Markdown, padded so that a terminal shows them too.

Knows the report dicts of `evaluation.evaluate`, `bench.run_bench` and `probing.bench.run_probing_bench`, and nothing of
models; imports nothing heavy.
Model cards are made from what stands here, so that no figure is ever typed by hand.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rim_probe.decoding import Answer

METHOD_NAMES = {"memory": "RiM", "cot": "chain of thought", "direct": "direct"}


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


def format_answer(given: "Answer") -> str:
    """What stands under an answer's text: the readouts of memory, then the parsed answer and what it cost."""
    lines = []
    for readout in given.readouts:
        place = f"block {readout.block}" if readout.block else "no block"
        lines.append(f"  {place:<8}  {readout.text}  (probability {readout.probability:.2f})")
    value = "no answer" if given.value is None else f"answer {given.value}"
    first = "" if given.ttft_seconds is None else f"first answer token after {1000 * given.ttft_seconds:.1f} ms, "
    passes = count(given.forward_passes, "pass", "passes")
    tokens = count(given.generated_tokens, "token", "tokens")
    cut = "; cut off by --max-new-tokens or the end of the context" if given.truncated else ""
    whole = f"all {len(given.readouts)} readouts" if len(given.readouts) > 1 else "all"
    lines.append(f"  {value}: {first}{whole} after {1000 * given.total_seconds:.1f} ms, {passes}, {tokens}{cut}")
    return "\n".join(lines)


def format_report(report: Mapping[str, Any]) -> str:
    """An evaluation report as Markdown: where it comes from, accuracy, comparisons, controls, cost."""
    parts = [_provenance(report), "### Accuracy", _accuracy_table(report), _accuracy_notes(report)]
    if report["paired"]:
        parts += ["### Paired comparison on the same problems", _paired_table(report["paired"])]
    if report["sweep"]:
        parts += [
            "### Number of memory blocks at inference (0 = blocks removed)",
            table(
                ["K", "final readout right, % (95 % interval)"],
                [[str(entry["num_blocks"]), format_share(entry)] for entry in report["sweep"]],
            ),
        ]
    if report["latency"]:
        parts += ["### Cost of one answer (batch size 1)", _latency_table(report["latency"])]
    return "\n\n".join(part for part in parts if part) + "\n"


def format_bench(report: Mapping[str, Any]) -> str:
    """A bench report as Markdown: each ratio beside its target."""
    same, asked = report["generate_same_tokens"], report["problems"]
    notes = [
        "Medians with quartiles; the two sides of a ratio were measured in turn within one run.",
        f"Our loop and generate gave the same tokens on {same} of {asked} problems; that ratio leaves out the others.",
        f"A training step holds {report['train_batch']} problems; relative difference of the two losses "
        + f"{report['loss_difference']:.0e}.",
    ]
    if len(set(report["models"].values())) == 1:
        notes.append("One model served memory, chain of thought and direct.")
    return _ratios(report, ("first, ms", "second, ms"), _side, notes)


def format_probing_bench(report: Mapping[str, Any]) -> str:
    """A bench of probing as Markdown: each ratio of speed or memory beside its target."""
    states, weights = (max(d[kind] for d in report["differences"].values()) for kind in ("states", "attention"))
    questions, size, blocks, sweep = (report[key] for key in ("questions", "batch_size", "num_blocks", "sweep"))
    on_gpu = "" if report["machine"]["device"] == "cpu" else " as far as it lies on the GPU"
    notes = [
        "Medians with quartiles; the sides were measured in turn within one run, n times (per batch, and per question "
        "for patching).",
        f"States and attention of {questions} questions with {blocks} memory blocks in batches of {size}; "
        "every side goes from text to the same tensors.",
        f"Largest difference to our capture: {states:.0e} of the largest state, {weights:.0e} in attention weight.",
        f"Peak memory of one batch: the tensors alive at once beyond the weights, with what is captured{on_gpu}.",
        f"Patching fills {sweep['layers']} x {sweep['blocks']} cells (layers x blocks) per question; "
        f"largest difference of a log probability: {sweep['difference']:.0e}.",
    ]
    return _ratios(
        report, ("first", "second"), lambda side, entry: f"{format_spread(side['value'])} {entry['unit']}", notes
    )


def _ratios(
    report: Mapping[str, Any],
    columns: tuple[str, str],
    side: Callable[[Mapping[str, Any], Mapping[str, Any]], str],
    notes: Sequence[str],
) -> str:
    """Where a bench comes from, its ratios as a table, notes; `side` words one side of an entry."""
    rows = []
    for entry in report["ratios"]:
        met = {None: "", True: "met", False: "NOT MET"}[entry["met"]]
        rows.append(
            [
                entry["what"],
                str(entry["n"]),
                *(side(entry[place], entry) for place in ("first", "second")),
                format_spread(entry["ratio"]) if entry["ratio"] else "none",
                entry["target"] or "",
                met,
            ]
        )
    parts = [
        f"`{report['checkpoint']}`; {report['date'][:10]}; {format_machine(report['machine'])}.\n`{report['command']}`",
        table(["first / second", "n", *columns, "ratio", "target", ""], rows),
        "\n".join(f"- {note}" for note in notes),
    ]
    return "\n\n".join(parts) + "\n"


def _provenance(report: Mapping[str, Any]) -> str:
    lines = []
    if report["interrupted"]:
        lines.append(f"**Interrupted: {report['done']:,} of {report['requested']:,} problems done.**")
    run = report.get("run")
    if run is None:
        return "\n".join([*lines, f"n = {report['done']:,}"])
    data = run["data"]
    counts = f"{data['problems']:,} problems, {data['rejected']} lines rejected"
    source = f"`{data['file']}` (sha256 {data['sha256'][:12]}…, {counts})"
    drawn = f", drawn with seed {report['settings']['seed']}" if run["limit"] else ""
    lines.append(f"`{run['checkpoint']}` on {source}: n = {report['done']:,}{drawn}; {run['date'][:10]}.")
    return "\n".join([*lines, format_machine(run["machine"]) + ".", f"`{run['command']}`"])


def format_machine(machine: Mapping[str, Any]) -> str:
    """Processor, threads, device and versions, as `evaluation.describe_machine` found them."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return f"{machine['cpu']}, {count(machine['threads'], 'thread', 'threads')}, device {machine['device']}; {versions}"


def _accuracy_table(report: Mapping[str, Any]) -> str:
    accuracy = report["accuracy"]
    first = next(iter(accuracy.values()))
    header = ["% right (95 % Wilson interval)", f"all (n = {first['all']['final']['n']:,})"]
    header += [f"{format_steps(count)} (n = {cell['final']['n']:,})" for count, cell in first["by_steps"].items()]
    rows = []
    for method, figures in accuracy.items():
        cells = [figures["all"], *figures["by_steps"].values()]
        name = METHOD_NAMES[method]
        if "blocks" in figures["all"]:
            rows.append([f"{name}, final block"] + [format_share(cell["final"]) for cell in cells])
            rows.append([f"{name}, any block"] + [format_share(cell["any_block"]) for cell in cells])
            for k in range(len(figures["all"]["blocks"])):
                rows.append([f"{name}, block {k + 1}"] + [format_share(cell["blocks"][k]) for cell in cells])
        else:
            rows.append([name] + [format_share(cell["final"]) for cell in cells])
    return table(header, rows)


def _accuracy_notes(report: Mapping[str, Any]) -> str:
    notes = []
    for method, figures in report["accuracy"].items():
        name = METHOD_NAMES[method]
        if report["models"][method]["shares_memory_weights"]:
            notes.append(f"{name}: answered by the weights of RiM, so this is no matched control.")
        if figures["refused"]:
            reason = "too long or with unknown words, never asked and counted as wrong"
            notes.append(f"{name}: {figures['refused']} questions were {reason}.")
        if figures["truncated"]:
            limit = report["settings"]["max_new_tokens"]
            notes.append(f"{name}: {figures['truncated']} answers were cut after {limit} tokens.")
    return "\n".join(f"- {note}" for note in notes)


def _paired_table(pairs: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for pair in pairs:
        difference = 100 * (pair["only_first"] - pair["only_second"]) / pair["n"] if pair["n"] else 0.0
        rows.append(
            [
                f"{METHOD_NAMES[pair['first']]} (first) against {METHOD_NAMES[pair['second']]} (second)",
                *(str(pair[key]) for key in ("both_right", "only_first", "only_second", "both_wrong")),
                f"{difference:+.1f}",
                format_p(pair["p_value"]),
            ]
        )
    header = [
        "final answers",
        "both right",
        "only first",
        "only second",
        "both wrong",
        "difference, points",
        "McNemar p (exact)",
    ]
    return table(header, rows)


def _latency_table(latency: Mapping[str, Any]) -> str:
    rows = []
    for method, costs in latency.items():
        rows.append(
            [
                METHOD_NAMES[method],
                str(costs["n"]),
                format_spread(costs["ttft_ms"]) if costs["ttft_ms"] else "none",
                format_spread(costs["total_ms"]),
                *(
                    f"{costs[key]['mean']:.1f} / {costs[key]['median']:g}"
                    for key in ("forward_passes", "generated_tokens")
                ),
                f"{costs['kv_cache_bytes']['median'] / 1024:,.0f}",
            ]
        )
    header = [
        "median (quartiles)",
        "n",
        "first answer token, ms",
        "full answer, ms",
        "passes, mean / median",
        "tokens, mean / median",
        "KV cache, KiB",
    ]
    return table(header, rows)


def format_steps(count: str) -> str:
    return {"0": "no steps given", "1": "1 step"}.get(count, f"{count} steps")


def format_share(share: Mapping[str, Any]) -> str:
    if share["accuracy"] is None:
        return "none"
    return f"{100 * share['accuracy']:.1f} ({100 * share['low']:.1f} to {100 * share['high']:.1f})"


def format_spread(values: Mapping[str, float]) -> str:
    return " ".join(
        [format_number(values["median"]), f"({format_number(values['q1'])} to {format_number(values['q3'])})"]
    )


def format_number(value: float) -> str:
    """Three significant digits without an exponent."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def format_p(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else f"{p:.1e}"


def _side(side: Mapping[str, Any], _: Mapping[str, Any]) -> str:
    """One side of a bench ratio: its times and, where it generates, the median number of tokens."""
    if side["ms"] is None:
        return f"{side['name']}: none"
    tokens = f", {side['tokens']['median']:g} tokens" if side["tokens"] else ""
    return f"{side['name']}: {format_spread(side['ms'])}{tokens}"
