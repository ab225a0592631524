"""What the commands of the command line share: their parser, common options, files read and reports written.

Knows argparse, files and printing. Knows no command.
"""

import argparse
import json
import os
import random
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rim_probe.errors import RiMError
from rim_probe.files import begins_with, check_file, write_atomic
from rim_probe.report import count

if TYPE_CHECKING:
    from rim_probe.model import RiM
    from rim_probe.problems import Problem, ProblemFile

DEFAULT_CHECKPOINT = "checkpoints/rim-tiny"
METHOD_CHOICES = ("memory", "cot", "direct", "all")

METHOD_HELP = """
methods:
  memory   K memory blocks follow the question; after each an answer can be read out
  cot      chain of thought: the steps are written out, then the answer
  direct   the answer at once, without steps and without memory blocks"""

LINE_FORMAT = "question||<<16-3-4=9>> <<9*2=18>> #### 18"
EXAMPLE_QUESTION = '"Ann has 3 apples. Ann buys 4 more apples. How many apples does Ann have now?"'

OK, USER_ERROR, INTERRUPTED = 0, 2, 130
TIME_OVER = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, the same command with --resume goes on
SHOWN_REJECTIONS = 5
IS_REPORT = begins_with('{"format": "rim-probe-')  # whether a file is a report that a command wrote


class Parser(argparse.ArgumentParser):
    """argparse with examples kept as typed and mistakes told in one sentence."""

    def __init__(self, **kwargs: Any):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Ends the program with the mistake in one sentence."""
        self.exit(USER_ERROR, f"{message[:1].upper()}{message[1:]}; `{self.prog} --help` explains.\n")


def add_command(commands: Any, run: Any, *, summary: str, description: str, example: str) -> argparse.ArgumentParser:
    """A sub-command named after its function `run` (`_ask` -> `ask`)."""
    name = run.__name__.removeprefix("_")
    parser = commands.add_parser(name, help=summary, description=description, epilog=f"example:\n{example}")
    parser.set_defaults(run=run)
    return parser


def add_number(parser: Any, flag: str, text: str, *, low: int, default: int | None = None, metavar: str = "N") -> None:
    """An option that takes a whole number from `low` on."""

    def whole(typed: str) -> int:
        try:
            value = int(typed)
        except ValueError:
            value = low - 1
        if value < low:
            raise argparse.ArgumentTypeError(f"{typed!r} is not a whole number from {low} on")
        return value

    shown = text if default is None else f"{text} (default: {default})"
    parser.add_argument(flag, type=whole, default=default, metavar=metavar, help=shown)


def add_seed(parser: Any, text: str) -> None:
    """An option for a random seed."""
    parser.add_argument("--seed", type=int, default=0, metavar="N", help=f"{text} (default: 0)")


def add_device(parser: Any) -> None:
    """An option for where a model runs."""
    parser.add_argument("--device", metavar="NAME", help="cpu or cuda (default: the GPU where there is one)")


def add_layout(parser: Any) -> None:
    """An option for the memory layout of a checkpoint that another program made."""
    parser.add_argument(
        "--layout",
        metavar="FILE",
        help="memory layout of a checkpoint of another program, which has no memory_layout.json: such a file, or "
        "`detected` for what its tokens tell",
    )


def silence_transformers() -> None:
    """Loading bars and advice of transformers would stand between our own lines."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def show_progress() -> Callable[[str, int, int | None], None]:
    """What `bases.Progress` is told, as a bar for each thing that is being done; nothing is drawn before the first."""
    from tqdm import tqdm

    bar, drawn = None, ""

    def show(what: str, done: int, total: int | None) -> None:
        nonlocal bar, drawn
        if what != drawn:
            if bar is not None:
                bar.close()
            bar, drawn = tqdm(desc=what, total=total, unit="B", unit_scale=True), what
        bar.update(done - bar.n)
        if done == total:
            bar.close()

    return show


def read_data(path: str) -> "ProblemFile":
    """The problems of a file; what was rejected goes to stderr."""
    from rim_probe.problems import read_problems

    data = read_problems(path)
    report_rejected(path, data)
    return data


def report_rejected(path: str, data: "ProblemFile") -> None:
    """What had to be left out of a file, and how many of its steps cannot be read, on stderr."""
    from rim_probe.equations import unread_steps

    for line in data.rejected[:SHOWN_REJECTIONS]:
        print(line, file=sys.stderr)
    if data.rejected:
        kept = count(len(data.problems), "problem", "problems")
        print(f"{path}: {count(len(data.rejected), 'line', 'lines')} rejected, {kept} kept.", file=sys.stderr)
    if unread := unread_steps(data.problems):
        many = count(len(unread), "step is no equation", "steps are no equation")
        print(f"{path}: {many}, such as {unread[0]}.", file=sys.stderr)


def name_files(given: Sequence[str]) -> dict[str, str]:
    """Paths by name of arguments `FILE` or `NAME=FILE`; a file without a name is called as it is, without its ending.

    Raises:
        RiMError: two files of one name, or an impossible one.
    """
    files: dict[str, str] = {}
    for one in given:
        name, sign, path = one.partition("=")
        if not sign or Path(one).exists():
            name, path = Path(one).name.removesuffix(".gz").removesuffix(".txt"), one
        elif not name.strip() or not path:
            raise RiMError(f"{one!r} is no NAME=FILE; write for example GSM8K=data/gsm/test.txt.")
        name = name.strip()
        if name in files:
            raise RiMError(f"Two files are called {name}; give each a name of its own, as NAME=FILE.")
        files[name] = path
    return files


def draw(problems: "list[Problem]", limit: int | None, seed: int) -> "list[Problem]":
    """All problems, or `limit` of them at random: files are often sorted, so the first would be a biased choice."""
    return problems if limit is None or limit >= len(problems) else random.Random(seed).sample(problems, limit)


def writable(path: str | None, is_own: Callable[[Path], bool], what: str) -> Path | None:
    """The output path, checked before hours of work are spent on what could then not be written.

    Raises:
        RiMError: a folder, a place that cannot be written to, a file that is not `what` (see `files.check_file`).
    """
    if path is None:
        return None
    folder = Path(path).absolute().parent
    if Path(path).is_dir():
        raise RiMError(f"{path} is a folder; give the name of a file to write.")
    if not os.access(folder, os.W_OK):
        raise RiMError(f"{folder} does not exist or cannot be written to; make it first or choose another file.")
    check_file(Path(path), is_own, what)
    return Path(path)


def add_card(parser: Any, mark: str) -> None:
    """An option for Markdown files that get the tables, between marks of this name."""
    places = f"<!-- {mark} --> and <!-- /{mark} -->"
    parser.add_argument(
        "--card", metavar="FILE", nargs="+", default=[], help=f"put the tables between {places} of Markdown files"
    )


def open_card(path: str, mark: str) -> Callable[[str], object]:
    """What puts tables between the marks of a Markdown file; the marks are looked for before the work is done."""
    file, begin, end = Path(path), f"<!-- {mark} -->\n", f"<!-- /{mark} -->"
    try:
        before, found, rest = file.read_text(encoding="utf-8").partition(begin)
    except UnicodeDecodeError:
        raise RiMError(f"{path} is not UTF-8 text; give a Markdown file.") from None
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise RiMError(f"{path} lacks the lines {begin.strip()} and {end}; add them where the tables shall stand.")
    return lambda text: write_atomic(file, (before + begin + text + end + after).encode())


def finish(output: Path | None, report: dict[str, Any], text: str, cards: Sequence[Callable[[str], object]]) -> None:
    """Writes the report and the cards where that was asked for, and prints the tables."""
    if output is not None:
        write_atomic(output, (json.dumps(report, indent=2, ensure_ascii=False) + "\n").encode())
    for card in cards:
        card(text)
    print(text, end="", flush=True)


def add_asking(parser: Any) -> None:
    """The options that `ask` and `eval` share: how a question is asked."""
    parser.add_argument("--method", choices=METHOD_CHOICES, default="all", help="default: %(default)s")
    add_number(
        parser,
        "--num-blocks",
        "memory blocks; the checkpoint's own number if left out, 0 removes them",
        low=0,
        metavar="K",
    )
    add_number(parser, "--max-new-tokens", "longest answer in tokens", low=1, default=256)
    add_layout(parser)
    add_device(parser)


def report_outside(path: str, problems: "Iterable[Problem]", models: "Collection[RiM]") -> None:
    """How many questions of a file are unlike those of the training, on stderr."""
    from rim_probe.trained_on import outside

    told = [sentence for problem in problems if (sentence := outside(models, problem.question))]
    if told:
        many = count(len(told), "question is", "questions are")
        print(f"{path}: {many} unlike those the model was made for. The first: {told[0]}", file=sys.stderr)


def nearest(question: str, checkpoint: str) -> str:
    """A sentence that offers the gallery's nearest example, or nothing where the checkpoint has no gallery."""
    from rim_probe.gallery import load_examples, nearest_example

    examples = load_examples(checkpoint)
    return f" Try for example: “{nearest_example(question, examples).question}”" if examples else ""
