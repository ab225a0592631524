"""`eval`: accuracy and costs on files of problems, as tables, cards and figures."""

import argparse
import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rim_probe.errors import RiMError
from rim_probe.files import check_file, write_atomic
from rim_probe.options import (
    INTERRUPTED,
    IS_REPORT,
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
    report_outside,
    show_progress,
    silence_transformers,
    writable,
)
from rim_probe.report import format_report, read_report

if TYPE_CHECKING:
    from rim_probe.model import RiM


def add_eval(commands: Any) -> None:
    """Adds `eval` to the command line."""
    parser = add_command(
        commands,
        _eval,
        summary="measure accuracy and latency on files of problems",
        description="Ask every problem of a file by each method and report: accuracy with 95 % intervals (each memory\n"
        "block, by number of steps), paired comparisons, controls (memory blocks removed, K from 0 to 16),\n"
        "costs of an answer alone and in batches of 32. A file called GSM8K or GSM-Hard stands beside the published\n"
        "figures. Ctrl-C stops early and tells what is done; with --output it is kept, and the same command goes on.\n"
        "With --from a report is made into tables and figures again, without a model.\n\n"
        f"One problem a line, in .txt or .txt.gz; the steps may be missing:\n  {LINE_FORMAT}\n" + METHOD_HELP,
        example="  python -m rim_probe data arithmetic --split test --rows 1000 --output test.txt\n"
        "  python -m rim_probe eval checkpoints/rim-tiny --data test.txt --output report.json\n"
        "  python -m rim_probe eval checkpoints/rim-tiny --data GSM8K=a.txt GSM-Hard=b.txt --output metrics.json "
        "--figures docs\n"
        "  python -m rim_probe eval --from metrics.json --card README.md --figures docs",
    )
    parser.add_argument("checkpoint", nargs="?", metavar="CHECKPOINT", help="folder or Hugging Face id")
    parser.add_argument(
        "--data",
        nargs="+",
        metavar="FILE",
        default=[],
        help="the problems; FILE or NAME=FILE, costs on the first; a NAME that begins with valid tells that this file "
        "chose the checkpoints",
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
        help="measure the costs there, such as cuda cpu (default: where it runs)",
    )
    add_number(
        parser, "--placed", "problems of the controls of place: K blocks against a later position", low=0, default=300
    )
    parser.add_argument(
        "--baselines", metavar="FILE", help="training problems, to fit shallow baselines on (majority, bag of words)"
    )
    add_seed(parser, "of the sample and the order")
    parser.add_argument("--output", metavar="FILE", help="write the report as JSON")
    parser.add_argument("--figures", metavar="FOLDER", help="draw figures as HTML files, with plotly")
    add_card(parser, "eval")


def _eval(arguments: argparse.Namespace) -> int:
    if arguments.figures and find_spec("plotly") is None:
        raise RiMError("--figures needs plotly; run `pip install plotly`, or leave it out.")
    if arguments.source is None and (arguments.checkpoint is None or not arguments.data):
        raise RiMError("Give a CHECKPOINT and --data FILE, or a report with --from; `eval --help` explains.")
    if arguments.source is not None:
        if arguments.checkpoint or arguments.data or arguments.output:
            raise RiMError("--from makes tables and figures of a report; leave out CHECKPOINT, --data and --output.")
        return _retell(arguments)
    return _measure(arguments, name_files(arguments.data))


def _measure(arguments: argparse.Namespace, files: dict[str, str]) -> int:
    output = writable(arguments.output, IS_REPORT, "a report of this program")
    cards = _open_cards(arguments)
    data = {name: read_data(path) for name, path in files.items()}

    from rim_probe.comparison import DataFile, compare
    from rim_probe.evaluation import usual_batch
    from rim_probe.probing.artifacts import fingerprint

    methods = _load(arguments, arguments.device)
    for name, one in data.items():
        report_outside(files[name], one.problems, methods.values())
    report, kept = compare(
        methods,
        [
            DataFile(name, files[name], one, draw(one.problems, arguments.limit, arguments.seed))
            for name, one in data.items()
        ],
        load=lambda device: _load(arguments, device),
        checkpoint=arguments.checkpoint,
        fingerprints={method: fingerprint(rim) for method, rim in methods.items()},
        output=output,
        cost_devices=arguments.cost_devices,
        num_blocks=arguments.num_blocks,
        batch_size=arguments.batch_size or usual_batch(methods),
        max_new_tokens=arguments.max_new_tokens,
        latency_samples=arguments.latency_samples,
        placed=arguments.placed,
        train=read_data(arguments.baselines).problems if arguments.baselines else [],
        limit=arguments.limit,
        seed=arguments.seed,
        command=arguments.command_line,
    )
    if report["interrupted"]:
        print(format_report(report), end="", flush=True)
        if output is not None:
            print(f"Stopped; what is done is kept beside {output}, and the same command goes on.", file=sys.stderr)
        return INTERRUPTED
    # The report comes last: whatever breaks before it, the same command makes the rest from what is kept.
    _publish(report, arguments.figures, cards)
    finish(output, report, format_report(report), [])
    kept.forget()
    return OK


def _retell(arguments: argparse.Namespace) -> int:
    """Tables and figures from a report alone."""
    cards = _open_cards(arguments)
    try:
        report = read_report(arguments.source)
        print(format_report(report), end="", flush=True)
        _publish(report, arguments.figures, cards)
    except (KeyError, IndexError, TypeError, AttributeError):
        raise RiMError(f"{arguments.source} lacks parts of a report; have it measured anew.") from None
    return OK


def _open_cards(arguments: argparse.Namespace) -> dict[str, Callable[[str], object]]:
    return {path: open_card(path, "eval") for path in arguments.card}


def _publish(report: dict[str, Any], folder: str | None, cards: dict[str, Callable[[str], object]]) -> None:
    """Draws the figures and puts the tables into the cards, each with the figures' places as seen from it."""
    drawn = []
    if folder is not None:
        from plotly.offline import get_plotlyjs

        from rim_probe.plots.comparison import draw_measures

        Path(folder).mkdir(parents=True, exist_ok=True)
        write_atomic(Path(folder) / "plotly.min.js", get_plotlyjs().encode())  # one copy beside all figures
        for name, (title, figure) in draw_measures(report).items():
            file = Path(folder) / f"{name}.html"
            check_file(file, lambda path: b"Plotly.newPlot" in path.read_bytes(), "a figure of this program")
            write_atomic(file, figure.to_html(include_plotlyjs="directory").encode())
            drawn.append((title, file))
    for path, write in cards.items():
        home = Path(path).resolve().parent
        links = [(title, Path(os.path.relpath(file.resolve(), home)).as_posix()) for title, file in drawn]
        write(format_report(report, links))


def _load(arguments: argparse.Namespace, device: str | None) -> "dict[str, RiM]":
    """The chosen methods of a checkpoint."""
    from rim_probe.model import load_methods

    silence_transformers()
    methods = load_methods(arguments.checkpoint, device, progress=show_progress(), layout=arguments.layout)
    return methods if arguments.method == "all" else {arguments.method: methods[arguments.method]}
