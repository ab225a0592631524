"""`probe`: what the memory blocks hold, for a file of problems or for one question."""

import argparse
import sys
from pathlib import Path
from typing import Any

from rim_probe.errors import RiMError, UnknownWordsError
from rim_probe.files import check_folder
from rim_probe.options import (
    EXAMPLE_QUESTION,
    OK,
    add_card,
    add_command,
    add_device,
    add_layout,
    add_number,
    add_seed,
    draw,
    nearest,
    open_card,
    read_data,
    report_outside,
    show_progress,
    silence_transformers,
)
from rim_probe.report import count

PROBE_HELP = """
probes:
  steps        nearest explicit step of every block
  words        what the model itself says after every block
  lens         logit lens and tuned lens
  values       operands, operator and result by linear probes
  correctness  will this readout be right?
  adaptive     memory when the probe is confident, else chain of thought
  commitment   when the answer is settled, by block and by step
  attention    where attention goes, and which heads matter
  geometry     trajectories of blocks through PCA space
  importance   what removing or replacing each block does to the answer
  interchange  does a block of a partner problem give the predicted answer?"""


def add_probe(commands: Any) -> None:
    """Adds `probe` to the command line."""
    parser = add_command(
        commands,
        _probe,
        summary="look inside the memory blocks, with controls",
        description="With --data: fit every probe, measure it beside its controls, and write what was fitted and one\n"
        "report page into CHECKPOINT/probes. What is done already is not done again. Without --fit and --choose the\n"
        "file is cut in three: half to fit on, a fifth to choose on, the rest is reported.\n"
        "With --question: print what every block of this question holds.\n"
        "The folders base/ (before RiM training), stage1/, cot/ and direct/ in CHECKPOINT serve as controls.\n"
        + PROBE_HELP,
        example="  python -m rim_probe data arithmetic --split test --rows 1000 --output problems.txt\n"
        "  python -m rim_probe probe checkpoints/rim-tiny --data problems.txt --output probes\n"
        f"  python -m rim_probe probe checkpoints/rim-tiny --question \\\n    {EXAMPLE_QUESTION}",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder or Hugging Face id")
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--data", metavar="FILE", help="problems to report on (and to fit on, see above)")
    asked.add_argument("--question", metavar="TEXT", help="one word problem, in quotes")
    asked.add_argument(
        "--page", action="store_true", help="draw report.html from report.json (also of a run that was interrupted)"
    )
    parser.add_argument("--steps", metavar="TEXT", default="", help="its gold steps, such as '<<3+4=7>> <<7*2=14>>'")
    parser.add_argument("--fit", metavar="FILE", help="problems to fit on")
    parser.add_argument("--choose", metavar="FILE", help="problems to choose layers, slots and thresholds on")
    parser.add_argument(
        "--fit-heldout",
        metavar="FILE",
        help="problems like those of --data, to fit what tells right from wrong (few are wrong where a model trained)",
    )
    parser.add_argument("--choose-heldout", metavar="FILE", help="further such problems, to choose on")
    parser.add_argument(
        "--only", metavar="PROBE", nargs="+", default=[], help="these probes alone (and what they build on)"
    )
    parser.add_argument("--base", metavar="MODEL", help="the model before RiM training, as a control")
    add_number(parser, "--limit", "a random sample of N problems of each file; all if left out", low=10)
    add_number(parser, "--num-blocks", "memory blocks; the checkpoint's own number if left out", low=1, metavar="K")
    parser.add_argument("--output", metavar="FOLDER", help="default: CHECKPOINT/probes")
    add_seed(parser, "of every random draw")
    add_layout(parser)
    add_device(parser)
    add_card(parser, "probe")


def _probe(arguments: argparse.Namespace) -> int:
    if arguments.question is not None:
        return _probe_question(arguments)
    if arguments.page:
        return _probe_page(arguments)
    if arguments.card and arguments.only:
        raise RiMError("--card tells of every probe; leave out --only.")
    cards = [open_card(path, "probe") for path in arguments.card]
    files = {
        name: getattr(arguments, "data" if name == "report" else name.replace("-", "_"))
        for name in ("report", "fit", "choose", "fit-heldout", "choose-heldout")
    }
    data = {name: read_data(path).problems for name, path in files.items() if path is not None}

    from rim_probe.plots.report import draw_page
    from rim_probe.probing.artifacts import is_report, size_report
    from rim_probe.probing.probes import PROBES
    from rim_probe.probing.run import NotRun, Source, default_folder, run_probes, splits_of, summarise
    from rim_probe.probing.study import load_models
    from rim_probe.probing.tables import format_report
    from rim_probe.probing.verdict import verdict

    sources, left_out = splits_of(
        {name: Source(files[name], draw(problems, arguments.limit, arguments.seed)) for name, problems in data.items()},
        arguments.seed,
    )
    if left_out:
        print(f"{count(left_out, 'problem', 'problems')} left out: asked in more than one file.", file=sys.stderr)
    folder = Path(arguments.output) if arguments.output else default_folder(arguments.checkpoint)
    check_folder(folder, "probe", is_report)  # before the work is done
    silence_transformers()
    models = load_models(arguments.checkpoint, arguments.device, arguments.base, show_progress(), arguments.layout)
    print(verdict(models["memory"]), end="\n\n", flush=True)
    for source in sources.values():
        report_outside(source.path, source.problems, [models["memory"]])
    for report in run_probes(
        models,
        sources,
        folder=folder,
        command=arguments.command_line,
        only=arguments.only,
        num_blocks=arguments.num_blocks,
        seed=arguments.seed,
    ):
        if isinstance(report, NotRun):
            print(f"{report.name} was not run: {report.reason}", file=sys.stderr)
        else:
            print(format_report(report, PROBES[report.name].title, PROBES[report.name].question), flush=True)
    for write in cards:
        write(summarise(folder))
    print(f"{folder} holds {size_report(folder)['total'] / 1e6:.1f} MB.")
    print(f"Report: {draw_page(folder)}")
    return OK


def _probe_page(arguments: argparse.Namespace) -> int:
    from rim_probe.plots.report import draw_page
    from rim_probe.probing.run import default_folder

    folder = Path(arguments.output) if arguments.output else default_folder(arguments.checkpoint)
    print(f"Report: {draw_page(folder)}")
    return OK


def _probe_question(arguments: argparse.Namespace) -> int:
    from rim_probe.equations import read_equation
    from rim_probe.probing.question import format_question
    from rim_probe.probing.reading import Readers, explain_blocks
    from rim_probe.probing.run import default_folder
    from rim_probe.probing.study import load_models, observe
    from rim_probe.problems import parse_steps
    from rim_probe.trained_on import outside

    silence_transformers()
    models = load_models(arguments.checkpoint, arguments.device, arguments.base, show_progress(), arguments.layout)
    if unlike := outside([models["memory"]], arguments.question):
        print(f"{unlike}\n")
    try:
        seen = observe(models["memory"], arguments.question, arguments.num_blocks)
    except UnknownWordsError as error:
        raise RiMError(f"{error}{nearest(arguments.question, arguments.checkpoint)}") from None
    folder = Path(arguments.output) if arguments.output else default_folder(arguments.checkpoint)
    steps = parse_steps(arguments.steps)
    for step in steps:
        if read_equation(step) is None:
            print(f"{step} is no equation such as <<3+4=7>>; it is compared as text.", file=sys.stderr)
    readers = Readers.restore(folder, models["memory"])
    told, complaints = explain_blocks(models, readers, seen, steps)
    print(format_question(seen, told, steps), flush=True)
    for sentence in complaints:
        print(sentence, file=sys.stderr)
    return OK
