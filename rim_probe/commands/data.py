"""`data`: problems of a procedural world or of a known data set as files; what two files share."""

import argparse
import dataclasses
from typing import Any

from rim_probe.datasets import everyday
from rim_probe.datasets.arithmetic import SPLITS, World, generate
from rim_probe.datasets.gsm import SETS
from rim_probe.errors import RiMError
from rim_probe.options import LINE_FORMAT, OK, add_number, add_seed, report_rejected, writable
from rim_probe.report import count

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
    "held_out_steps": "chains of at least so many steps belong to one split, shorter ones to all",
}

SET_HELP = {
    "gsm8k": "\n\nGSM8K has no validation split of its own: valid is the 500 training problems that work on implicit\n"
    "chain of thought holds out, train is the rest.",
    "gsm8k-platinum": "\n\nGSM8K-Platinum is GSM8K's test split with labels revised and ambiguous questions taken out\n"
    "(1,209 of 1,319).",
    "svamp": "\n\nThe equation of a problem is its one step.",
    "multiarith": "\n\nMultiArith has no steps.",
    "gsm-hard": "\n\nGSM-Hard is GSM8K's test split with large numbers; it has no steps.",
}


def add_data(commands: Any) -> None:
    """Adds `data` to the command line."""
    parser = commands.add_parser(
        "data",
        help="write problems to a file, or compare files",
        description=f"Write problems to a file, one a line, or compare files of them:\n  {LINE_FORMAT}",
        epilog="example:\n"
        "  python -m rim_probe data arithmetic --split test --rows 1000 --max-steps 4 --output test.txt\n"
        "  python -m rim_probe data gsm8k-aug --split train --output train.txt.gz\n"
        "  python -m rim_probe data check train.txt.gz --against valid.txt test.txt",
    )
    sources = parser.add_subparsers(title="what", metavar="WHAT", required=True)
    _add_data_arithmetic(sources)
    _add_data_everyday(sources)
    for name in SETS:
        _add_data_set(sources, name)
    _add_data_check(sources)


def _add_data_arithmetic(sources: Any) -> None:
    parser = sources.add_parser(
        "arithmetic",
        help="English word problems over + - * /, made here",
        description="Write problems of a procedural world. No two splits share a chain of numbers (see\n"
        "--held-out-steps). The test split is also told in phrasings, and about pairs of person and thing, that no\n"
        "other split uses. Files of valid and test hold no question twice.",
    )
    parser.set_defaults(run=_data_arithmetic)
    parser.add_argument("--split", choices=SPLITS, required=True)
    add_number(parser, "--rows", "how many problems", low=1, default=1000)
    _add_problem_output(parser)
    add_seed(parser, "of the draw")
    world = parser.add_argument_group("the world")
    for field in dataclasses.fields(World):
        world.add_argument(
            "--" + field.name.replace("_", "-"),
            type=type(field.default),
            default=field.default,
            metavar="X",
            help=f"{WORLD_HELP[field.name]} (default: {field.default})",
        )


def _add_data_everyday(sources: Any) -> None:
    parser = sources.add_parser(
        "everyday",
        help="English word problems as people write them, made here",
        description="Write problems of one to four steps and more, filled into frames: buying, sharing, comparing,\n"
        "ages, distances, pay, time, percentages and others. No two splits share a frame, and no file holds\n"
        "a question twice.",
    )
    parser.set_defaults(run=_data_everyday)
    parser.add_argument("--split", choices=SPLITS, required=True)
    add_number(parser, "--rows", "how many problems", low=1, default=1000)
    add_number(
        parser,
        "--variants",
        "so many rows, one after another, are the same but for their numbers: partners for interchange",
        low=1,
        default=1,
    )
    _add_problem_output(parser)
    add_seed(parser, "of the draw")


def _add_data_set(sources: Any, name: str) -> None:
    known = SETS[name]
    parser = sources.add_parser(
        name,
        help=f"{known.title} from the Hugging Face Hub ({', '.join(known.files)})",
        description=f"Write a split of {known.title} ({known.repo} on the Hugging Face Hub) in our line format.\n"
        "Answers are written as the grader reads them, duplicates stay, rows that are no problem are left out and\n"
        f"counted. Recipes and `data check` also take {_sources_of(name)} in the place of a file."
        + SET_HELP.get(name, ""),
    )
    parser.set_defaults(run=_data_set, dataset=name)
    parser.add_argument(
        "--split", choices=tuple(known.files), required=len(known.files) > 1, default=next(iter(known.files))
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--from",
        dest="source",
        metavar="FILE",
        help="convert this file of the data set instead of downloading it: .parquet, .json(l) or our lines as .txt",
    )
    where.add_argument(
        "--revision",
        metavar="COMMIT",
        help=f"commit of the Hub to download (default: {known.revision or 'the newest, which is printed'})",
    )
    _add_problem_output(parser)


def _add_data_check(sources: Any) -> None:
    parser = sources.add_parser(
        "check",
        help="look for training problems that are in a test file",
        description="Count the questions of training files that are in test files: the same, or the same but for\n"
        "their numbers and punctuation. If there is one, the command ends with exit code 2. Paraphrases are not\n"
        "found, and a number is one in digits: “four” is a word, so “4 pears” and “four pears” differ.",
    )
    parser.set_defaults(run=_data_check)
    sets = ", ".join(_sources_of(name) for name in SETS)
    parser.add_argument("train", nargs="+", metavar="TRAIN", help=f"files, hub:owner/dataset/file.txt, or of {sets}")
    parser.add_argument("--against", nargs="+", required=True, metavar="TEST", help="likewise")


def _sources_of(name: str) -> str:
    return ", ".join(f"{name}:{split}" for split in SETS[name].files)


def _add_problem_output(parser: Any) -> None:
    parser.add_argument("--output", required=True, metavar="FILE", help=".txt, or .txt.gz to pack")


def _data_arithmetic(arguments: argparse.Namespace) -> int:
    from rim_probe.problems import write_problems

    _check_output(arguments)
    world = World(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(World)})
    unique = arguments.split != "train"
    problems = list(generate(world, arguments.split, arguments.rows, arguments.seed, unique=unique))
    write_problems(arguments.output, problems)
    _report_written(arguments, len(problems), "this world holds")
    return OK


def _data_everyday(arguments: argparse.Namespace) -> int:
    from rim_probe.problems import write_problems

    _check_output(arguments)
    problems = list(everyday.generate(arguments.split, arguments.rows, arguments.seed, arguments.variants))
    write_problems(arguments.output, problems)
    _report_written(arguments, len(problems), "the frames hold")
    return OK


def _check_output(arguments: argparse.Namespace) -> None:
    from rim_probe.problems import is_problem_file

    writable(arguments.output, is_problem_file, "a file of problems")


def _report_written(arguments: argparse.Namespace, written: int, holder: str) -> None:
    short = "" if written == arguments.rows else f", not {arguments.rows:,}: {holder} no more of this split"
    print(f"{arguments.output}: {count(written, 'problem', 'problems')}{short}")


def _data_set(arguments: argparse.Namespace) -> int:
    from rim_probe.datasets.sources import commit_of, download_split, load_split
    from rim_probe.problems import write_problems

    name, split, known = arguments.dataset, arguments.split, SETS[arguments.dataset]
    _check_output(arguments)
    path = arguments.source or download_split(name, split, arguments.revision)
    found = load_split(name, split, path)
    write_problems(arguments.output, found.problems)
    report_rejected(path, found)
    without = sum(not problem.steps for problem in found.problems)
    print(f"{arguments.output}: {count(len(found.problems), 'problem', 'problems')}, {without:,} of them without steps")
    commit = None if arguments.source else commit_of(path)
    print(f"From {arguments.source or known.repo}{f' at commit {commit}' if commit else ''}.")
    return OK


def _data_check(arguments: argparse.Namespace) -> int:
    from rim_probe.datasets.overlap import find_overlap
    from rim_probe.datasets.sources import iter_source, load_problems
    from rim_probe.problems import Problem

    tests = [load_problems(source).problems for source in arguments.against]
    shared = 0
    for source in arguments.train:
        overlaps = find_overlap((line for line in iter_source(source) if isinstance(line, Problem)), tests)
        if not overlaps[0].rows:
            raise RiMError(f"{source} holds no problem, so that nothing can be said of it; check the file.")
        print(f"{source}: {count(overlaps[0].rows, 'problem', 'problems')}")
        for test, overlap in zip(arguments.against, overlaps, strict=True):
            print(f"  {test}: {overlap.same:,} the same, {overlap.renumbered:,} more the same but for numbers")
            for question in overlap.examples:
                print(f"    {question}")
            shared += overlap.shared
    if shared:
        raise RiMError("Training problems are in a test file; take them out before you train.")
    return OK
