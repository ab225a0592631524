"""The command line: `python -m rim_probe ask | train | eval | bench | data`.

Knows flags, help texts, printing and exit codes; every piece of work is done by the module a command calls. Those are imported
inside the commands, so that `--help` and a mistyped flag answer at once, without loading torch.

Exit codes: 0 done; 2 a mistake of the user or of a file (one sentence on stderr); 130 stopped by Ctrl-C.
"""

import argparse
import dataclasses
import json
import os
import random
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rim_probe.datasets.arithmetic import SPLITS, World, generate
from rim_probe.errors import RiMError, UnknownWordsError

if TYPE_CHECKING:
    from rim_probe.decoding import Answer
    from rim_probe.model import RiM
    from rim_probe.problems import Problem, ProblemFile

DEFAULT_CHECKPOINT = "checkpoints/rim-tiny"
METHOD_CHOICES = ("memory", "cot", "direct", "all")
OK, USER_ERROR, INTERRUPTED = 0, 2, 130
SHOWN_REJECTIONS = 5

METHOD_HELP = """methods:
  memory   the question is followed by K memory blocks; after each block an answer can be read out (RiM)
  cot      chain of thought: the steps are written out, then the answer
  direct   the answer at once, without steps and without memory
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (see the module docstring)."""
    try:
        arguments = _parser().parse_args(argv)
        arguments.command_line = shlex.join(["python", "-m", "rim_probe", *(sys.argv[1:] if argv is None else argv)])
        return arguments.run(arguments)
    except RiMError as error:
        return _complain(str(error))
    except BrokenPipeError:  # the reader of our output has gone (`| head`); nobody is left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except OSError as error:
        return _complain(f"{error.filename or 'A file'} cannot be used: {error.strerror or error}.")
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return INTERRUPTED


def _complain(sentence: str) -> int:
    print(sentence, file=sys.stderr)
    return USER_ERROR


class _Parser(argparse.ArgumentParser):
    """argparse with examples kept as typed and mistakes told in one sentence."""

    def __init__(self, **kwargs: Any):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        self.exit(USER_ERROR, f"{message[:1].upper()}{message[1:]}; `{self.prog} --help` explains.\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m rim_probe",
        description="Reasoning in Memory: ask, train and measure language models that think in memory blocks.",
        epilog='example:\n  python -m rim_probe ask "Anna has 3 apples and buys 4 more. How many apples does she have?"',
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (_add_ask, _add_train, _add_eval, _add_bench, _add_data):
        add(commands)
    return parser


def _command(commands: Any, name: str, run: Any, summary: str, description: str, example: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=summary, description=description, epilog=example)
    parser.set_defaults(run=run)
    return parser


def _whole(low: int) -> Any:
    """An argparse type: a whole number from `low` on."""

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} on")
        return value

    return convert


def _add_blocks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--num-blocks", type=_whole(0), metavar="K", help="memory blocks; the checkpoint's own number if left out, 0 removes them"
    )


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", metavar="NAME", help="cpu or cuda; the GPU if there is one, if left out")


# -- ask --------------------------------------------------------------------------------------------------------------


def _add_ask(commands: Any) -> None:
    parser = _command(
        commands,
        "ask",
        _ask,
        "answer one question",
        "Answer one question by memory blocks, by chain of thought, directly, or by all three, and say what it cost.\n\n"
        + METHOD_HELP,
        "example:\n"
        '  python -m rim_probe ask "Anna has 3 apples and buys 4 more. How many apples does she have?" --method all',
    )
    parser.add_argument("question", help="the word problem, in quotes")
    parser.add_argument(
        "--model", default=DEFAULT_CHECKPOINT, metavar="CHECKPOINT", help="folder or Hugging Face id (default: %(default)s)"
    )
    parser.add_argument("--method", choices=METHOD_CHOICES, default="all", help="default: %(default)s")
    _add_blocks(parser)
    parser.add_argument(
        "--max-new-tokens", type=_whole(1), default=256, metavar="N", help="longest answer in tokens (default: %(default)s)"
    )
    _add_device(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def _ask(arguments: argparse.Namespace) -> int:
    methods = _load(arguments.model, arguments.method, arguments.device)
    answers = []
    try:
        for method, rim in methods.items():
            answers.append(_ask_one(rim, method, arguments))
    except UnknownWordsError as error:
        raise RiMError(f"{error}{_nearest(arguments.question, arguments.model)}") from None
    if arguments.json:
        print(json.dumps({"question": arguments.question, "answers": [given.to_dict() for given in answers]}, indent=2))
    return OK


def _ask_one(rim: "RiM", method: str, arguments: argparse.Namespace) -> "Answer":
    from rim_probe.decoding import answer, stream

    blocks = arguments.num_blocks if method == "memory" else None
    # The first pass through a model pays for allocation and kernel choice; without this the method asked first looks slow.
    answer(rim, arguments.question, method, num_blocks=blocks, max_new_tokens=2)
    talk = not arguments.json
    if talk:
        print(f"{method}:", end=" ", flush=True)
    for event in stream(rim, arguments.question, method, num_blocks=blocks, max_new_tokens=arguments.max_new_tokens):
        if talk and event.kind == "token" and method != "memory":
            print(event.text, end="", flush=True)
    given = event.answer
    if talk:
        print(_answer_text(given))
    return given


def _answer_text(given: "Answer") -> str:
    """What follows the streamed text: the readouts of memory, then one line with the answer and its cost."""
    lines = [""]
    for readout in given.readouts:
        place = f"block {readout.block:>2}" if readout.block else "no block"
        lines.append(f"  {place}: {readout.text}  (probability {readout.probability:.2f})")
    value = "no answer" if given.value is None else f"answer {given.value}"
    first = "" if given.ttft_seconds is None else f"first answer token after {1000 * given.ttft_seconds:.1f} ms, "
    passes, tokens = _count(given.forward_passes, "pass", "passes"), _count(given.generated_tokens, "token", "tokens")
    cut = "; cut at the longest allowed answer (--max-new-tokens)" if given.truncated else ""
    lines.append(f"  {value}: {first}all after {1000 * given.total_seconds:.1f} ms, {passes}, {tokens}{cut}")
    return "\n".join(lines)


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _nearest(question: str, checkpoint: str) -> str:
    """A clause that offers the gallery's nearest example, or nothing where the checkpoint has no gallery."""
    from rim_probe.gallery import load_examples, nearest_example

    examples = load_examples(checkpoint)
    return f" Try for example: “{nearest_example(question, examples).question}”" if examples else ""


def _load(checkpoint: str, method: str, device: str | None) -> "dict[str, RiM]":
    """The chosen methods of a checkpoint."""
    from rim_probe.model import load_methods

    _silence_transformers()
    methods = load_methods(checkpoint, device)
    return methods if method == "all" else {method: methods[method]}


def _silence_transformers() -> None:
    """Loading bars and advice of transformers would stand between our own lines."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


# -- eval -------------------------------------------------------------------------------------------------------------


def _add_eval(commands: Any) -> None:
    parser = _command(
        commands,
        "eval",
        _eval,
        "measure accuracy and latency on a file of problems",
        "Ask every problem of a file by each method and report accuracy (95 % Wilson intervals; every memory block, by number of\n"
        "steps), paired comparisons, controls (blocks removed, K from 0 to 16) and latency. Ctrl-C keeps what is done.\n\n"
        "The file has one problem a line:  question||<<16-3-4=9>> <<9*2=18>> #### 18   (.txt or .txt.gz; steps may be missing)\n\n"
        + METHOD_HELP,
        "example:\n"
        "  python -m rim_probe data arithmetic --split test --rows 1000 --seed 1 --output test.txt\n"
        "  python -m rim_probe eval checkpoints/rim-tiny --data test.txt --output report.json",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder or Hugging Face id")
    parser.add_argument("--data", required=True, metavar="FILE", help="problems in the line format")
    parser.add_argument("--limit", type=_whole(1), metavar="N", help="a random sample of N problems (see --seed); all if left out")
    parser.add_argument("--method", choices=METHOD_CHOICES, default="all", help="default: %(default)s")
    _add_blocks(parser)
    parser.add_argument("--batch-size", type=_whole(1), default=64, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--max-new-tokens", type=_whole(1), default=256, metavar="N", help="longest answer in tokens (default: %(default)s)"
    )
    parser.add_argument(
        "--latency-samples", type=_whole(0), default=50, metavar="N", help="problems timed one by one (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of samples and order (default: %(default)s)")
    _add_device(parser)
    parser.add_argument("--output", metavar="FILE", help="write the report as JSON")


def _eval(arguments: argparse.Namespace) -> int:
    output = _writable(arguments.output)
    data = _read_problems(arguments.data)

    from rim_probe.evaluation import describe_run, evaluate
    from rim_probe.report import format_report

    methods = _load(arguments.checkpoint, arguments.method, arguments.device)
    report = evaluate(
        methods,
        _sample(data.problems, arguments.limit, arguments.seed),
        num_blocks=arguments.num_blocks,
        batch_size=arguments.batch_size,
        max_new_tokens=arguments.max_new_tokens,
        latency_samples=arguments.latency_samples,
        seed=arguments.seed,
    )
    device = next(iter(methods.values())).device
    report["run"] = describe_run(
        arguments.checkpoint, data, arguments.data, arguments.limit, device, arguments.command_line
    )
    _write_json(output, report)
    print(format_report(report), end="")
    return INTERRUPTED if report["interrupted"] else OK


def _read_problems(path: str) -> "ProblemFile":
    """The problems of a file; what was rejected goes to stderr."""
    from rim_probe.problems import read_problems

    data = read_problems(path)
    for line in data.rejected[:SHOWN_REJECTIONS]:
        print(line, file=sys.stderr)
    if data.rejected:
        print(f"{path}: {_count(len(data.rejected), 'line', 'lines')} rejected, {len(data.problems)} kept.", file=sys.stderr)
    return data


def _sample(problems: "list[Problem]", limit: int | None, seed: int) -> "list[Problem]":
    """All problems, or `limit` of them at random: files are often sorted, so the first lines would be a biased choice."""
    return problems if limit is None or limit >= len(problems) else random.Random(seed).sample(problems, limit)


def _writable(path: str | None) -> Path | None:
    """The output path, checked before hours of work are spent on what could then not be written."""
    if path is None:
        return None
    folder = Path(path).absolute().parent
    if Path(path).is_dir():
        raise RiMError(f"{path} is a folder; give the name of a file to write.")
    if not os.access(folder, os.W_OK):
        raise RiMError(f"{folder} does not exist or cannot be written to; make it first or choose another file.")
    return Path(path)


def _write_json(path: Path | None, report: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# -- train ------------------------------------------------------------------------------------------------------------


def _add_train(commands: Any) -> None:
    parser = _command(
        commands,
        "train",
        _train,
        "train what a recipe says",
        "Train a model by a YAML recipe: its base, its data and its stages (stage1, stage2, cot, direct). Ready recipes lie in\n"
        "rim_probe/training/recipes. The run's own files (checkpoints, TensorBoard logs) go to OUTPUT.run beside the result.",
        "examples:\n"
        "  python -m rim_probe train my-recipe.yaml --max-minutes 60\n"
        "  python -m rim_probe train my-recipe.yaml --resume\n"
        "  accelerate launch -m rim_probe train my-recipe.yaml        (several GPUs)",
    )
    parser.add_argument("recipe", metavar="RECIPE", help="YAML file")
    parser.add_argument("--output", metavar="FOLDER", help="where the checkpoint goes; the recipe's own folder if left out")
    parser.add_argument("--resume", action="store_true", help="go on where an earlier run stopped or was killed")
    parser.add_argument(
        "--max-minutes", type=_minutes, metavar="M", help="save and stop after M minutes; --resume goes on from there"
    )


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of minutes above 0")
    return minutes


def _train(arguments: argparse.Namespace) -> int:
    from rim_probe.training import train

    train(arguments.recipe, output=arguments.output, resume=arguments.resume, max_minutes=arguments.max_minutes)
    return OK


# -- bench ------------------------------------------------------------------------------------------------------------


def _add_bench(commands: Any) -> None:
    parser = _command(
        commands,
        "bench",
        _bench,
        "measure speed as ratios with targets",
        "Measure five ratios within one run: first token of memory to direct, all readouts to the final one, chain of thought to\n"
        "memory, separate training rows to one packed row, our greedy loop to transformers' generate.\n"
        "CHECKPOINT may also be a base model (a folder or a GGUF file): memory tokens are then added, untrained, and the numbers of\n"
        "generated tokens are fixed to those of the gold answers.",
        "examples:\n"
        "  python -m rim_probe bench\n"
        "  python -m rim_probe bench SmolLM2-135M-Instruct.Q4_1.gguf --questions 10 --json bench.json",
    )
    parser.add_argument(
        "checkpoint", nargs="?", default=DEFAULT_CHECKPOINT, metavar="CHECKPOINT", help="default: %(default)s"
    )
    parser.add_argument(
        "--num-blocks", type=_whole(1), default=8, metavar="K", help="memory blocks (default: %(default)s, as the targets say)"
    )
    parser.add_argument(
        "--data", metavar="FILE", help="problems in the line format; problems of the procedural world if left out"
    )
    parser.add_argument("--questions", type=_whole(1), default=30, metavar="N", help="timed problems (default: %(default)s)")
    parser.add_argument("--train-batch", type=_whole(1), default=4, metavar="N", help="problems in a training step (default: %(default)s)")
    parser.add_argument("--train-steps", type=_whole(1), default=5, metavar="N", help="timed training steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of problems (default: %(default)s)")
    _add_device(parser)
    parser.add_argument("--json", metavar="FILE", help="write the report as JSON")


def _bench(arguments: argparse.Namespace) -> int:
    output = _writable(arguments.json)
    if arguments.data is None:
        problems = list(generate(World(), "test", arguments.questions, arguments.seed))
    else:
        problems = _sample(_read_problems(arguments.data).problems, arguments.questions, arguments.seed)

    from rim_probe.bench import load_bench_models, run_bench
    from rim_probe.report import format_bench

    _silence_transformers()
    report = run_bench(
        load_bench_models(arguments.checkpoint, arguments.device),
        problems,
        num_blocks=arguments.num_blocks,
        train_batch=arguments.train_batch,
        train_steps=arguments.train_steps,
    )
    report |= {"checkpoint": arguments.checkpoint, "command": arguments.command_line}
    _write_json(output, report)
    print(format_bench(report), end="")
    return OK


# -- data -------------------------------------------------------------------------------------------------------------


def _add_data(commands: Any) -> None:
    parser = _command(
        commands,
        "data",
        _data,
        "write procedural problems to a file",
        "Write problems of a procedural world in the line format. The splits share no chain of numbers; the test split is also told in\n"
        "phrasings, and about pairs of person and thing, that no other split uses. Files of valid and test hold no question twice.",
        "example:\n  python -m rim_probe data arithmetic --split test --rows 1000 --seed 1 --max-steps 4 --output test.txt",
    )
    parser.add_argument("world", choices=("arithmetic",), help="arithmetic: English word problems over + - * / in 1 to 8 steps")
    parser.add_argument("--split", choices=SPLITS, required=True)
    parser.add_argument("--rows", type=_whole(1), required=True, metavar="N", help="how many problems")
    parser.add_argument("--output", required=True, metavar="FILE", help=".txt, or .txt.gz to pack")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    world = parser.add_argument_group("the world")
    for field in dataclasses.fields(World):
        flag = f"--{field.name.replace('_', '-')}"
        help_text = f"{WORLD_HELP[field.name]} (default: {field.default})"
        world.add_argument(flag, type=type(field.default), default=field.default, metavar="X", help=help_text)


WORLD_HELP = {
    "min_steps": "fewest steps",
    "max_steps": "most steps",
    "max_value": "every number, also in between, lies in 1..X",
    "operations": "some of +-*/",
    "story": "weight of stories: one person's things change over time",
    "relation": "weight of relations: people are compared with each other",
    "bare": "weight of bare sums",
    "shuffle": "probability that the sentences of a relation problem are shuffled",
    "distract": "probability of one irrelevant fact",
}


def _data(arguments: argparse.Namespace) -> int:
    from rim_probe.problems import write_problems

    world = World(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(World)})
    unique = arguments.split != "train"
    problems = list(generate(world, arguments.split, arguments.rows, arguments.seed, unique=unique))
    write_problems(arguments.output, problems)
    short = "" if len(problems) == arguments.rows else f", not {arguments.rows}: this world holds no more in this split"
    print(f"{arguments.output}: {_count(len(problems), 'problem', 'problems')}{short}")
    return OK
