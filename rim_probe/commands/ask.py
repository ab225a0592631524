"""`ask`: one question, answered by each method and told with what it cost."""

import argparse
import json
from typing import TYPE_CHECKING, Any

from rim_probe.errors import RiMError, UnknownWordsError
from rim_probe.options import (
    DEFAULT_CHECKPOINT,
    EXAMPLE_QUESTION,
    METHOD_HELP,
    OK,
    add_asking,
    add_command,
    nearest,
    show_progress,
    silence_transformers,
)
from rim_probe.report import count

if TYPE_CHECKING:
    from rim_probe.decoding import Answer
    from rim_probe.model import RiM


def add_ask(commands: Any) -> None:
    """Adds `ask` to the command line."""
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
    add_asking(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def _ask(arguments: argparse.Namespace) -> int:
    methods = _load(arguments.model, arguments.method, arguments.device)
    try:
        answers = [
            _ask_one(rim, method, arguments, method != "memory" and rim is methods.get("memory"))
            for method, rim in methods.items()
        ]
    except UnknownWordsError as error:
        raise RiMError(f"{error}{nearest(arguments.question, arguments.model)}") from None
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
        print(f"\n{_format_answer(event.answer)}")
    return event.answer


def _load(checkpoint: str, method: str, device: str | None) -> "dict[str, RiM]":
    """The chosen methods of a checkpoint."""
    from rim_probe.model import load_methods

    silence_transformers()
    methods = load_methods(checkpoint, device, progress=show_progress())
    return methods if method == "all" else {method: methods[method]}


def _format_answer(given: "Answer") -> str:
    """What stands under an answer's text: the readouts of memory, then the parsed answer and what it cost."""
    lines = []
    for readout in given.readouts:
        place = f"block {readout.block}" if readout.block else "no block"
        lines.append(f"  {place:<8}  {readout.text}  (probability {readout.probability:.2f})")
    value = "no answer" if given.value is None else f"answer {given.value}"
    first = "" if given.ttft_seconds is None else f"first answer token after {1000 * given.ttft_seconds:.1f} ms, "
    passes = count(given.forward_passes, "pass", "passes")
    tokens = count(given.generated_tokens, "token", "tokens")
    cut = "; cut off by --max-new-tokens or the end of the context" if given.truncated else ""
    whole = f"all {len(given.readouts)} readouts" if len(given.readouts) > 1 else "all"
    lines.append(f"  {value}: {first}{whole} after {1000 * given.total_seconds:.1f} ms, {passes}, {tokens}{cut}")
    return "\n".join(lines)
