"""The command line: `python -m rim_probe ask | train | eval | probe | bench | data | base | export`.

Knows which commands there are (`commands`, where their flags stand) and how a mistake ends. Whatever needs torch is
imported inside the commands, so that `--help` and a mistyped flag answer at once.

Exit codes: 0 done; 2 a mistake of the user or in a file (one sentence on stderr); 75 the minutes of
`train --max-minutes` are over; 130 stopped by Ctrl-C.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence

from rim_probe.commands.ask import add_ask
from rim_probe.commands.base import add_base, add_export
from rim_probe.commands.bench import add_bench
from rim_probe.commands.data import add_data
from rim_probe.commands.eval import add_eval
from rim_probe.commands.probe import add_probe
from rim_probe.commands.train import add_train
from rim_probe.errors import RiMError
from rim_probe.options import EXAMPLE_QUESTION, INTERRUPTED, OK, USER_ERROR, Parser


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


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m rim_probe",
        description="Reasoning in Memory: ask, train and measure language models that think in memory blocks.",
        epilog=f"example:\n  python -m rim_probe ask {EXAMPLE_QUESTION}\n\n`COMMAND --help` explains a command.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (add_ask, add_train, add_eval, add_probe, add_bench, add_data, add_base, add_export):
        add(commands)
    return parser
