"""A comparison as Markdown: the paper's table for one checkpoint, what it says of the published order, and the figures
behind it. Every word and number comes from the report's JSON, so cards are made again without asking a model.

Knows the report dict of `comparison.compare` and the published figures; imports nothing heavy. Does not know how
figures are drawn (plots.comparison).
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rim_probe.errors import RiMError
from rim_probe.report import (
    METHOD_NAMES,
    count,
    format_machine,
    format_number,
    format_p,
    format_share,
    format_spread,
    format_steps,
    table,
)

COMPARISON_FORMAT = "rim-probe-comparison/1"
EVALUATION_FORMAT = "rim-probe-evaluation/1"
SURE = 0.05  # a McNemar p below it shows a difference
GOAL = 0.95  # of chain of thought's accuracy, for RiM
LEAST_DISCORDANT = 10  # problems that one method alone has right, below which a ratio of accuracies has no interval
Z_95 = 1.959963984540054

# Aichberger and Hochreiter, arXiv:2605.30343, by several public summaries:
# method, GSM8K %, GSM-Hard %, first token ms, full answer ms.
PUBLISHED = {
    "GPT-2": (
        ("direct", 15.4, 3.5, 7.6, None),
        ("Coconut", 31.1, 7.1, 53.4, None),
        ("RiM, final block", 33.6, 7.8, 7.6, None),
        ("chain of thought", 39.8, 8.4, 213.7, None),
    ),
    "Llama-3.2-1B": (
        ("direct", 23.9, 5.3, 16.1, 126.0),
        ("Coconut", 36.9, 8.5, 108.3, 304.7),
        ("RiM, final block", 42.1, 10.5, 16.1, 126.5),
        ("chain of thought", 49.1, 11.2, 420.3, 1108.7),
    ),
}
_PUBLISHED_FILES = ("GSM8K", "GSM-Hard")
_CHOOSING = "valid"  # how the name of a file begins that chooses checkpoints
_ROWS = (  # method, which figure, how it is called: in the order that was published
    ("direct", "final", "direct"),
    ("memory", "final", "RiM, final block"),
    ("memory", "any_block", "RiM, any block (right if one of them is)"),
    ("cot", "final", "chain of thought"),
)
_MEASURES = {"ttft_ms": "first answer token", "total_ms": "full answer"}


def read_comparison(path: str | Path) -> dict[str, Any]:
    """The report in a JSON file that `python -m rim_probe eval` wrote, of one file of problems or a comparison.

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
    if kind not in (COMPARISON_FORMAT, EVALUATION_FORMAT):
        raise RiMError(f"{path} is no report of an evaluation; {again}.")
    return report


def format_comparison(report: Mapping[str, Any], figures: Sequence[tuple[str, str]] = ()) -> str:
    """The whole comparison; `figures` are (what it shows, address) of pictures that stand under the first table."""
    files = report["files"]
    parts = [_provenance(report)]
    if files:
        parts += [_main_table(report), "\n".join(f"- {note}" for note in [*_findings(report), *_notes(report)])]
    parts += [f"![{title}]({address})" for title, address in figures]
    for title, body in (
        ("After how many blocks", _blocks_table(files)),
        ("By number of steps", _steps_table(files)),
        ("What an answer costs", _costs(report["costs"])),
    ):
        if body:
            parts += [f"### {title}", body]
    return "\n\n".join(part for part in parts if part) + "\n"


# ------------------------------------------------------------------------------------------------------- the main table


def _provenance(report: Mapping[str, Any]) -> str:
    run = report["run"]
    lines = []
    if report["interrupted"]:
        done = ", ".join(
            f"{e['name']} {e['report']['done']:,} of {e['report']['requested']:,}" for e in report["files"]
        )
        lines.append(f"**Interrupted: {done} problems done.**")
    data = "; ".join(
        f"{entry['name']} `{source['file']}` (sha256 {source['sha256'][:12]}…, n = {entry['report']['done']:,})"
        for entry in report["files"]
        for source in [entry["report"]["run"]["data"]]
    )
    drawn = f", drawn with seed {report['settings']['seed']}" if report["settings"]["limit"] else ""
    lines += [
        f"`{run['checkpoint']}` on {data}{drawn}; {run['date'][:10]}.",
        format_machine(run["machine"]) + ".",
        f"`{run['command']}`",
    ]
    return "\n".join(lines)


def _main_table(report: Mapping[str, Any]) -> str:
    names = [entry["name"] for entry in report["files"]]
    single = _single(report["costs"])
    header = ["% right (95 % interval)", *names, "first answer token, ms", "full answer, ms", "tokens"]
    rows = []
    for method, what, called in _ROWS:
        cells = [_share_of(entry["report"], method, what) for entry in report["files"]]
        if not any(cells):
            continue
        costs = single["methods"].get(method) if single and what == "final" else None
        rows.append(
            [
                called,
                *(f"{format_share(cell)}, n = {cell['n']:,}" if cell else "" for cell in cells),
                _median(costs, "ttft_ms"),
                _median(costs, "total_ms"),
                f"{costs['generated_tokens']['mean']:.1f}" if costs else "",
            ]
        )
    for model, published in PUBLISHED.items() if _has_published(report) else ():
        for method, gsm8k, hard, first, full in published:
            known = dict(zip(_PUBLISHED_FILES, (gsm8k, hard), strict=True))
            cells = [f"{known[name]:.1f}" if name in known else "" for name in names]
            times = [f"{value:.1f}" if value else "" for value in (first, full)]
            rows.append([f"*{model}, {method}: published, other model and hardware*", *cells, *times, ""])
    return table(header, rows)


def _has_published(report: Mapping[str, Any]) -> bool:
    return any(entry["name"] in _PUBLISHED_FILES for entry in report["files"])


def _share_of(report: Mapping[str, Any], method: str, what: str) -> Mapping[str, Any] | None:
    """A share over all problems of one file, or None where it was not measured."""
    return report["accuracy"].get(method, {"all": {}})["all"].get(what)


def _single(costs: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Costs at batch size 1 on the first device."""
    return next((batch for place in costs[:1] for batch in place["batches"] if batch["batch_size"] == 1), None)


def _device(place: Mapping[str, Any]) -> str:
    machine = place["machine"]
    device = machine["device"] if machine["device"] != "cpu" else f"CPU, {machine['cpu']}"
    return f"{device}, {place['dtype']}" if "dtype" in place else device


def _median(costs: Mapping[str, Any] | None, measure: str) -> str:
    if costs is None:
        return ""
    if not costs[measure]:
        return "none"
    n = costs[measure].get("n", costs["n"])  # the first token has its own: not every question is answered
    return format_number(costs[measure]["median"]) + (f", n = {n:,}" if n < costs["n"] else "")


# ------------------------------------------------------------------------------------------------------- what it says


def _findings(report: Mapping[str, Any]) -> list[str]:
    """Sentences on the order of the methods and the goal, from the paired tests of every file.

    None where methods share weights: then nobody trained them to differ, and the tests say nothing of the methods. None
    of a file that chose the checkpoints.
    """
    if _sharing(report):
        return []
    told = []
    for entry in report["files"]:
        if _chooses(entry):
            continue
        pairs = {pair["second"]: pair for pair in entry["report"]["paired"] if pair["n"]}
        if {"direct", "cot"} <= set(pairs):
            told += [
                f"{entry['name']}: {sentence}" for sentence in (_order(entry["name"], pairs), _distance(pairs["cot"]))
            ]
    return told


def _chooses(entry: Mapping[str, Any]) -> bool:
    return entry["name"].casefold().startswith(_CHOOSING)


def _order(name: str, pairs: Mapping[str, Mapping[str, Any]]) -> str:
    published = name in _PUBLISHED_FILES
    verdicts, claims = [], []
    for second, sign in (("direct", 1), ("cot", -1)):
        pair = pairs[second]
        lead = sign * (pair["only_first"] - pair["only_second"])
        verdict = "not shown" if pair["p_value"] >= SURE else "shown" if lead > 0 else "the other way round"
        mine, other = (100 * _right(pair, side) / pair["n"] for side in ("first", "second"))
        less = f"direct {other:.1f} % < RiM {mine:.1f} %" if sign > 0 else f"RiM {mine:.1f} % < CoT {other:.1f} %"
        verdicts.append(verdict)
        claims.append(
            f"{less}: {verdict} (RiM alone right in {pair['only_first']:,}, {'direct' if sign > 0 else 'CoT'} alone in "
            f"{pair['only_second']:,} of {pair['n']:,}, exact McNemar p = {format_p(pair['p_value'])})"
        )
    reversed_ = verdicts.count("the other way round")
    shown = "reproduced" if published else "shown"
    if reversed_:
        whole = "refuted" if reversed_ == len(verdicts) else "refuted in part"
    else:
        whole = shown if set(verdicts) == {"shown"} else f"neither {shown} nor refuted"
    if not published:
        return f"{'; '.join(claims)}. The order direct < RiM < CoT is {whole}."
    return (
        f"{'; '.join(claims)}. The published order direct < RiM < CoT is {whole} "
        "(Coconut, between direct and RiM, was not trained here)."
    )


def _right(pair: Mapping[str, Any], side: str) -> int:
    return pair["both_right"] + pair[f"only_{side}"]


def _distance(pair: Mapping[str, Any]) -> str:
    ratio, low, high = relative_accuracy(pair)
    if ratio is None:
        return "chain of thought is never right, so RiM's distance to it cannot be told."
    discordant = pair["only_first"] + pair["only_second"]
    if low is not None:
        interval = f"95 % interval {100 * low:.1f} to {100 * high:.1f}"
        verdict = "met" if low >= GOAL else "missed" if high < GOAL else "not decided: the interval holds it"
    else:
        alone = count(discordant, "problem", "problems")
        interval = (
            f"no interval: in {alone} only one of the two is right" if ratio else "no interval: RiM is never right"
        )
        verdict = "missed" if not ratio and discordant >= LEAST_DISCORDANT else "not decided"
    return (
        f"RiM reaches {100 * ratio:.1f} % ({interval}) of chain of thought's accuracy; the goal, at least "
        f"{100 * GOAL:.0f} %, is {verdict}."
    )


def relative_accuracy(pair: Mapping[str, Any]) -> tuple[float | None, float | None, float | None]:
    """First method's accuracy over the second's, with its 95 % Wald interval of the logarithm for paired data.

    The variance of the logarithm is (b + c) / ((a + b)(a + c)) by the delta method. None where a count of right answers
    is 0; no interval below LEAST_DISCORDANT = b + c, as it would have no width at 0.
    """
    first, second = _right(pair, "first"), _right(pair, "second")
    if not second:
        return None, None, None
    if not first:
        return 0.0, None, None
    discordant = pair["only_first"] + pair["only_second"]
    if discordant < LEAST_DISCORDANT:
        return first / second, None, None
    half = Z_95 * math.sqrt(discordant / (first * second))
    return first / second, first / second * math.exp(-half), first / second * math.exp(half)


def _notes(report: Mapping[str, Any]) -> list[str]:
    notes = []
    shared = _sharing(report)
    limit = report["settings"]["max_new_tokens"]
    if report["run"]["untrained"]:
        notes.append(
            "This is a base model that nobody trained for this format, nor its memory tokens: one set of weights "
            f"answers all three ways, and its answers are cut at {limit} tokens, so the accuracies say nothing. The "
            "times are real."
        )
    elif shared:
        notes.append(
            f"{' and '.join(shared)}: answered by the weights of RiM: no matched control, so nothing can be said of "
            "the order of the methods."
        )
    if any(place["gold_tokens"] for place in report["costs"]):
        notes.append(
            "Untrained weights never stop by themselves: for the costs each method writes exactly as many tokens as "
            "the gold text has, and chain of thought's first answer token is the one after the gold steps and marker."
        )
    chose = [] if report["run"]["untrained"] else [entry["name"] for entry in report["files"] if _chooses(entry)]
    if chose:
        notes.append(
            f"{' and '.join(chose)}: chose the checkpoints, so the figures are no test and nothing is judged by it."
        )
    notes += _counted(report, "refused", "Too long to be asked, counted as wrong")
    notes += _counted(report, "truncated", f"Answers cut after {limit} tokens")
    if single := _single(report["costs"]):
        asked = f"{count(single['n'], 'question', 'questions')} of {report['files'][0]['name']}"
        notes.append(f"Times: medians of {asked} asked one by one; mean tokens; {_device(report['costs'][0])}.")
    notes.append(_asking(report))
    if _has_published(report):
        notes.append(
            "Published figures: arXiv:2605.30343 by public summaries of it; other models, other hardware, other "
            "training."
        )
    return notes


def _sharing(report: Mapping[str, Any]) -> list[str]:
    """Names of the methods that the weights of RiM answer for."""
    models = report["files"][0]["report"]["models"]
    return [METHOD_NAMES[name] for name, model in models.items() if model["shares_memory_weights"]]


def _counted(report: Mapping[str, Any], what: str, told: str) -> list[str]:
    """One line on how often something happened, by file and method; none where it never did."""
    counts = [
        f"{entry['name']}, {METHOD_NAMES[method]} {figures[what]:,}"
        for entry in report["files"]
        for method, figures in entry["report"]["accuracy"].items()
        if figures[what]
    ]
    return [f"{told}: {'; '.join(counts)}."] if counts else []


def _asking(report: Mapping[str, Any]) -> str:
    """How long it took, by file and method; the further runs of memory (K = 0 and the largest) apart."""
    told = []
    for entry in report["files"]:
        asked = entry["report"]["settings"]["num_blocks"]
        spent: dict[str, float] = {}
        for one in entry["seconds"]:
            own = one["method"] != "memory" or one["num_blocks"] == asked
            name = METHOD_NAMES[one["method"]] if own else "other K"
            spent[name] = spent.get(name, 0.0) + one["seconds"]
        told.append(f"{entry['name']} " + ", ".join(f"{name} {_duration(s)}" for name, s in spent.items()))
    size = report["settings"]["batch_size"]
    return f"Asking took ({report['run']['machine']['device']}, batches of {size}): {'; '.join(told)}."


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


# ------------------------------------------------------------------------------------------------------ further tables


def _blocks_table(files: Sequence[Mapping[str, Any]]) -> str:
    """Accuracy after 0, 1, 2, ... blocks, a column per file."""
    sweeps = {entry["name"]: {one["num_blocks"]: one for one in entry["report"]["sweep"]} for entry in files}
    counts = sorted({k for sweep in sweeps.values() for k in sweep})
    if not counts:
        return ""
    used = files[0]["report"]["settings"]["num_blocks"]
    names = {0: "0 (blocks removed)", used: f"{used} (used above)"}
    rows = [
        [names.get(k, str(k)), *(format_share(sweep[k]) if k in sweep else "" for sweep in sweeps.values())]
        for k in counts
    ]
    lead = "% right (95 % interval) after block k, which no later block can change: what RiM answers with K = k."
    return f"{lead}\n\n{table(['k', *sweeps], rows)}"


def _steps_table(files: Sequence[Mapping[str, Any]]) -> str:
    """Accuracy by number of gold steps, of the files that state steps."""
    rows: list[list[str]] = []
    columns: list[tuple[str, str, str]] = []
    for entry in files:
        accuracy = entry["report"]["accuracy"]
        columns = columns or [row for row in _ROWS if row[1] in accuracy.get(row[0], {"all": {}})["all"]]
        for steps in next(iter(accuracy.values()))["by_steps"]:
            if steps == "0":  # none stated
                continue
            cells = [accuracy[method]["by_steps"][steps].get(what) for method, what, _ in columns]
            n = next(cell["n"] for cell in cells if cell)
            shares = [format_share(cell) if cell else "" for cell in cells]
            rows.append([f"{entry['name']}, {format_steps(steps)}", f"{n:,}", *shares])
    return table(["% right (95 % interval)", "n", *(called for *_, called in columns)], rows) if rows else ""


def _costs(costs: Sequence[Mapping[str, Any]]) -> str:
    return "\n\n".join(_costs_on(place) for place in costs)


def _costs_on(place: Mapping[str, Any]) -> str:
    rows, ratios = [], []
    for batch in place["batches"]:
        size = batch["batch_size"]
        for method, costs in batch["methods"].items():
            rows.append(
                [
                    f"{METHOD_NAMES[method]}, batch {size}",
                    str(costs["n"]),
                    format_spread(costs["ttft_ms"]) if costs["ttft_ms"] else "none",
                    format_spread(costs["total_ms"]),
                    format_number(costs["answers_per_second"]["median"]),
                    f"{costs['forward_passes']['median']:g}",
                    f"{costs['generated_tokens']['mean']:.1f}",
                    f"{costs['kv_cache_bytes']['median'] / 2**20:,.1f}",
                ]
            )
        for ratio in batch["ratios"]:
            ratios.append(f"batch {size}: {_ratio(ratio)}")
        missing = {m: costs["unanswered"] for m, costs in batch["methods"].items() if costs["unanswered"]}
        for method, number in missing.items():
            ratios.append(f"batch {size}: {METHOD_NAMES[method]} showed no answer to {number:,} questions.")
    header = [
        f"{_device(place)}: median (quartiles)",
        "n",
        "first answer token, ms",
        "full answer, ms",
        "answers/s",
        "passes",
        "tokens per answer",
        "peak KV cache, MiB",
    ]
    notes = [
        f"{format_machine(place['machine'])}; the methods took turns in random order.",
        "n counts turns; of a batch the first answer token is the median over its rows, the full answer is the time of "
        "all its answers, and the KV cache is that of the whole batch with its padding.",
        *ratios,
    ]
    return table(header, rows) + "\n\n" + "\n".join(f"- {note}" for note in notes)


def _ratio(ratio: Mapping[str, Any]) -> str:
    first, second = METHOD_NAMES[ratio["first"]], METHOD_NAMES[ratio["second"]]
    what = f"{_MEASURES[ratio['of']]}, {first} / {second}"
    if ratio["median"] is None:
        return f"{what}: none."
    interval = (
        f"no interval from {count(ratio['n'], 'turn', 'turns')}"
        if ratio["low"] is None
        else f"95 % interval {format_number(ratio['low'])} to {format_number(ratio['high'])}, n = {ratio['n']}"
    )
    return f"{what}: {format_number(ratio['median'])} ({interval})."
