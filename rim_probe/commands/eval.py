"""`eval`: accuracy and costs on files of problems, as tables, cards and figures."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rim_probe.comparison_report import COMPARISON_FORMAT, format_comparison, read_comparison
from rim_probe.errors import RiMError
from rim_probe.options import (
    INTERRUPTED,
    LINE_FORMAT,
    METHOD_HELP,
    OK,
    add_asking,
    add_card,
    add_command,
    add_number,
    add_seed,
    draw,
    finish,
    name_files,
    open_card,
    read_data,
    show_progress,
    silence_transformers,
    writable,
)
from rim_probe.report import format_report

if TYPE_CHECKING:
    from rim_probe.model import RiM


def add_eval(commands: Any) -> None:
    parser = add_command(
        commands,
        _eval,
        summary="measure accuracy and latency on files of problems",
        description="Ask every problem of a file by each method and report: accuracy with 95 % intervals (each memory\n"
        "block, by number of steps), paired comparisons, controls (memory blocks removed, K from 0 to 16),\n"
        "latency. Ctrl-C stops early and still reports what is done.\n\n"
        "Several files, or one as NAME=FILE, make a comparison: one table beside the published figures, costs at\n"
        "batch sizes 1 and 32, and figures (--card marks: comparison). It keeps what is done beside --output, and the\n"
        "same command goes on from there.\n"
        "A base that was never trained (folder, GGUF file, known name) can be measured too; its times are real.\n"
        "With --from a report is made into tables and figures again, without a model.\n\n"
        f"One problem a line, in .txt or .txt.gz; the steps may be missing:\n  {LINE_FORMAT}\n" + METHOD_HELP,
        example="  python -m rim_probe data arithmetic --split test --rows 1000 --output test.txt\n"
        "  python -m rim_probe eval checkpoints/rim-tiny --data test.txt --output report.json\n"
        "  python -m rim_probe eval checkpoints/rim-tiny --data GSM8K=a.txt GSM-Hard=b.txt --output metrics.json "
        "--figures docs\n"
        "  python -m rim_probe eval --from metrics.json --card README.md --figures docs",
    )
    parser.add_argument("checkpoint", nargs="?", metavar="CHECKPOINT", help="folder, Hugging Face id or base model")
    parser.add_argument(
        "--data",
        nargs="+",
        metavar="FILE",
        default=[],
        help="the problems; FILE or NAME=FILE, costs on the first; a NAME that begins with valid is one that chose the "
        "checkpoints: figures, no verdict",
    )
    parser.add_argument("--from", dest="source", metavar="JSON", help="a report that --output wrote, instead")
    add_number(parser, "--limit", "a random sample of N problems of each file (see --seed); all if left out", low=1)
    add_asking(parser)
    add_number(parser, "--batch-size", "problems asked at once for accuracy; by device if left out", low=1)
    add_number(parser, "--latency-samples", "problems timed one by one", low=0, default=50)
    parser.add_argument(
        "--cost-devices",
        nargs="+",
        metavar="NAME",
        default=[],
        help="measure the costs of a comparison there, such as cuda cpu (default: where it runs)",
    )
    add_seed(parser, "of the sample and the order")
    parser.add_argument("--output", metavar="FILE", help="write the report as JSON")
    parser.add_argument("--figures", metavar="FOLDER", help="draw a comparison as SVG files")
    add_card(parser, "eval")


def _eval(arguments: argparse.Namespace) -> int:
    if arguments.source is None and (arguments.checkpoint is None or not arguments.data):
        raise RiMError("Give a CHECKPOINT and --data FILE, or a report with --from; `eval --help` explains.")
    if arguments.figures:
        from rim_probe.plots.comparison import check_svg

        check_svg()  # before the work
    if arguments.source is not None:
        if arguments.checkpoint or arguments.data or arguments.output:
            raise RiMError("--from makes tables and figures of a report; leave out CHECKPOINT, --data and --output.")
        return _retell(arguments)
    files, named = name_files(arguments.data)
    if named or len(files) > 1:
        return _compare(arguments, files)
    if arguments.figures or arguments.cost_devices:
        raise RiMError("--figures and --cost-devices belong to a comparison; give the file a name, as NAME=FILE.")
    return _evaluate(arguments)


def _evaluate(arguments: argparse.Namespace) -> int:
    """One file without a name."""
    output, cards = writable(arguments.output), [open_card(path, "eval") for path in arguments.card]
    [file] = arguments.data
    data = read_data(file)

    from rim_probe.evaluation import describe_run, evaluate, usual_batch

    methods = _load_measured(arguments, arguments.device)
    report = evaluate(
        methods,
        draw(data.problems, arguments.limit, arguments.seed),
        num_blocks=arguments.num_blocks,
        batch_size=arguments.batch_size or usual_batch(methods),
        max_new_tokens=arguments.max_new_tokens,
        latency_samples=arguments.latency_samples,
        seed=arguments.seed,
    )
    device = next(iter(methods.values())).device
    report["run"] = describe_run(arguments.checkpoint, data, file, arguments.limit, device, arguments.command_line)
    finish(output, report, format_report(report), [] if report["interrupted"] else cards)
    return INTERRUPTED if report["interrupted"] else OK


def _compare(arguments: argparse.Namespace, files: dict[str, str]) -> int:
    """Several files, or one with a name."""
    output, cards = writable(arguments.output), {path: open_card(path, "comparison") for path in arguments.card}
    data = {name: read_data(path) for name, path in files.items()}

    from rim_probe.comparison import DataFile, compare, forget
    from rim_probe.evaluation import usual_batch
    from rim_probe.probing.artifacts import fingerprint

    methods = _load_measured(arguments, arguments.device)
    report = compare(
        methods,
        [
            DataFile(name, files[name], one, draw(one.problems, arguments.limit, arguments.seed))
            for name, one in data.items()
        ],
        load=lambda device: _load_measured(arguments, device),
        checkpoint=arguments.checkpoint,
        fingerprints={method: fingerprint(rim) for method, rim in methods.items()},
        output=output,
        cost_devices=arguments.cost_devices,
        num_blocks=arguments.num_blocks,
        batch_size=arguments.batch_size or usual_batch(methods),
        max_new_tokens=arguments.max_new_tokens,
        latency_samples=arguments.latency_samples,
        limit=arguments.limit,
        seed=arguments.seed,
        command=arguments.command_line,
    )
    if report["interrupted"]:
        print(format_comparison(report), end="", flush=True)
        if output is not None:
            print(f"Stopped; what is done is kept beside {output}, and the same command goes on.", file=sys.stderr)
        return INTERRUPTED
    # The report comes last: whatever breaks before it, the same command makes the rest from what is kept.
    _publish(report, arguments.figures, cards)
    finish(output, report, format_comparison(report), [])
    forget(output)
    return OK


def _retell(arguments: argparse.Namespace) -> int:
    """Tables and figures from a report alone."""
    report = read_comparison(arguments.source)
    if report["format"] != COMPARISON_FORMAT:
        if arguments.figures:
            raise RiMError(f"{arguments.source} is of one file; figures are drawn of a comparison (--data NAME=FILE).")
        finish(None, report, format_report(report), [open_card(path, "eval") for path in arguments.card])
        return OK
    cards = {path: open_card(path, "comparison") for path in arguments.card}
    try:
        print(format_comparison(report), end="", flush=True)
        _publish(report, arguments.figures, cards)
    except (KeyError, IndexError, TypeError, AttributeError):
        raise RiMError(f"{arguments.source} lacks parts of a comparison; have it measured anew.") from None
    return OK


def _publish(report: dict[str, Any], folder: str | None, cards: dict[str, Callable[[str], object]]) -> None:
    """Draws the figures and puts the tables into the cards, each with the figures' places as seen from it."""
    from rim_probe.plots.comparison import draw_measures, save_svg

    drawn = []
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, figure in draw_measures(report).items():
            file = Path(folder) / f"{name}.svg"
            save_svg(figure, file)
            drawn.append((figure.layout.title.text, file))
    for path, write in cards.items():
        home = Path(path).resolve().parent
        write(
            format_comparison(
                report, [(title, Path(os.path.relpath(file.resolve(), home)).as_posix()) for title, file in drawn]
            )
        )


def _load_measured(arguments: argparse.Namespace, device: str | None) -> "dict[str, RiM]":
    """The chosen methods of a checkpoint or of an untrained base."""
    from rim_probe.untrained import load_methods_or_base

    silence_transformers()
    methods = load_methods_or_base(arguments.checkpoint, device, show_progress())
    return methods if arguments.method == "all" else {arguments.method: methods[arguments.method]}
