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
    from rim_probe.trained_on import outside

    methods = _load(arguments.model, arguments.method, arguments.device, arguments.layout)
    unlike = outside(methods.values(), arguments.question)
    if unlike and not arguments.json:
        print(f"{unlike}\n")
    try:
        answers = [
            _ask_one(rim, method, arguments, method != "memory" and rim is methods.get("memory"))
            for method, rim in methods.items()
        ]
    except UnknownWordsError as error:
        raise RiMError(f"{error}{nearest(arguments.question, arguments.model)}") from None
    if arguments.json:
        told = {"question": arguments.question, "outside": unlike, "answers": [given.to_dict() for given in answers]}
        print(json.dumps(told, indent=2))
    return OK


def _ask_one(rim: "RiM", method: str, arguments: argparse.Namespace, shared: bool) -> "Answer":
    """One method's answer, printed while it comes unless JSON is wanted; `shared`: by the weights of memory."""
    from rim_probe.decoding import answer, format_answer, stream

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


def _load(checkpoint: str, method: str, device: str | None, layout: str | None) -> "dict[str, RiM]":
    """The chosen methods of a checkpoint."""
    from rim_probe.model import load_methods

    silence_transformers()
    methods = load_methods(checkpoint, device, progress=show_progress(), layout=layout)
    return methods if method == "all" else {method: methods[method]}
