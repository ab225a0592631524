"""`bench`: speed as ratios within one run."""

import argparse
from typing import Any

from rim_probe.datasets.arithmetic import World, generate
from rim_probe.options import (
    DEFAULT_CHECKPOINT,
    IS_REPORT,
    OK,
    add_card,
    add_command,
    add_device,
    add_number,
    add_seed,
    draw,
    finish,
    open_card,
    read_data,
    show_progress,
    silence_transformers,
    writable,
)
from rim_probe.report import format_bench


def add_bench(commands: Any) -> None:
    """Adds `bench` to the command line."""
    parser = add_command(
        commands,
        _bench,
        summary="measure speed as ratios with targets",
        description="Measure five ratios within one run: first token of memory to direct; all readouts to the final\n"
        "one; chain of thought to memory; separate training rows to one packed row; our greedy loop to\n"
        "generate of transformers.",
        example="  python -m rim_probe bench\n"
        "  python -m rim_probe bench checkpoints/rim-tiny --questions 10 --json bench.json",
    )
    parser.add_argument(
        "checkpoint",
        nargs="?",
        default=DEFAULT_CHECKPOINT,
        metavar="CHECKPOINT",
        help="folder or Hugging Face id (default: %(default)s)",
    )
    add_number(parser, "--num-blocks", "memory blocks; the targets are for 8", low=1, default=8, metavar="K")
    parser.add_argument("--data", metavar="FILE", help="problems, one a line; the procedural world's own if left out")
    add_number(parser, "--questions", "problems, timed one by one", low=1, default=30)
    add_number(parser, "--train-batch", "problems in a training step", low=1, default=4)
    add_number(parser, "--train-steps", "training steps timed", low=1, default=5)
    add_seed(parser, "of the choice of problems")
    add_device(parser)
    parser.add_argument("--json", metavar="FILE", help="write the report as JSON")
    add_card(parser, "bench")


def _bench(arguments: argparse.Namespace) -> int:
    output, cards = (
        writable(arguments.json, IS_REPORT, "a report of this program"),
        [open_card(path, "bench") for path in arguments.card],
    )
    questions = arguments.questions
    if arguments.data is None:
        problems = list(generate(World(), "test", questions, arguments.seed))
    else:
        problems = draw(read_data(arguments.data).problems, questions, arguments.seed)

    from rim_probe.bench import run_bench
    from rim_probe.model import load_methods

    silence_transformers()
    report = run_bench(
        load_methods(arguments.checkpoint, arguments.device, progress=show_progress()),
        problems,
        num_blocks=arguments.num_blocks,
        train_batch=arguments.train_batch,
        train_steps=arguments.train_steps,
    )
    report |= {"checkpoint": arguments.checkpoint, "command": arguments.command_line}
    finish(output, report, format_bench(report), cards)
    return OK
