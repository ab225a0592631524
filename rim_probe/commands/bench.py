"""`bench`: speed as ratios within one run."""

import argparse
from typing import Any

from rim_probe.datasets.arithmetic import World, generate
from rim_probe.options import (
    DEFAULT_CHECKPOINT,
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
from rim_probe.report import format_bench, format_probing_bench


def add_bench(commands: Any) -> None:
    parser = add_command(
        commands,
        _bench,
        summary="measure speed as ratios with targets",
        description="Measure five ratios within one run: first token of memory to direct; all readouts to the final\n"
        "one; chain of thought to memory; separate training rows to one packed row; our greedy loop to\n"
        "generate of transformers. A base model (folder or GGUF file) gets untrained memory tokens, and then\n"
        "the numbers of generated tokens are fixed to those of the gold answers.\n"
        "With --probing: speed and peak memory of capturing hidden states and attention, beside TransformerLens\n"
        "(which has to be installed) and transformers, and speed of patching beside one pass per cell.",
        example="  python -m rim_probe bench\n"
        "  python -m rim_probe bench SmolLM2-135M-Instruct.Q4_1.gguf --questions 10 --json bench.json\n"
        "  python -m rim_probe bench --probing",
    )
    parser.add_argument(
        "checkpoint",
        nargs="?",
        default=DEFAULT_CHECKPOINT,
        metavar="CHECKPOINT",
        help="folder, Hugging Face id or GGUF file (default: %(default)s)",
    )
    add_number(parser, "--num-blocks", "memory blocks; the targets are for 8", low=1, default=8, metavar="K")
    parser.add_argument("--data", metavar="FILE", help="problems, one a line; the procedural world's own if left out")
    parser.add_argument(
        "--probing", action="store_true", help="measure probing instead; its --card marks are bench-probing"
    )
    add_number(parser, "--questions", "problems (default: 30 timed one by one, 256 with --probing)", low=1)
    add_number(parser, "--batch-size", "questions captured at once (--probing)", low=1, default=32)
    add_number(parser, "--train-batch", "problems in a training step", low=1, default=4)
    add_number(parser, "--train-steps", "training steps timed", low=1, default=5)
    add_seed(parser, "of the choice of problems")
    add_device(parser)
    parser.add_argument("--json", metavar="FILE", help="write the report as JSON")
    add_card(parser, "bench")


def _bench(arguments: argparse.Namespace) -> int:
    mark = "bench-probing" if arguments.probing else "bench"
    output, cards = writable(arguments.json), [open_card(path, mark) for path in arguments.card]
    questions = arguments.questions or (256 if arguments.probing else 30)
    if arguments.data is None:
        problems = list(generate(World(), "test", questions, arguments.seed))
    else:
        problems = draw(read_data(arguments.data).problems, questions, arguments.seed)

    from rim_probe.bench import load_bench_models, run_bench

    silence_transformers()
    models = load_bench_models(arguments.checkpoint, arguments.device, show_progress())
    if arguments.probing:
        from rim_probe.probing.bench import run_probing_bench

        report = run_probing_bench(
            models["memory"], problems, num_blocks=arguments.num_blocks, batch_size=arguments.batch_size
        )
    else:
        report = run_bench(
            models,
            problems,
            num_blocks=arguments.num_blocks,
            train_batch=arguments.train_batch,
            train_steps=arguments.train_steps,
        )
    report |= {"checkpoint": arguments.checkpoint, "command": arguments.command_line}
    finish(output, report, format_probing_bench(report) if arguments.probing else format_bench(report), cards)
    return OK
