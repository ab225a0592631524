"""`python -m rim_probe.glassbox OUTPUT WORK`: see rim_probe.glassbox.build."""

import sys

from rim_probe.glassbox.build import build
from rim_probe.options import OK, USER_ERROR, Parser, silence_transformers


def main() -> int:
    """Writes both folders and returns the exit code."""
    parser = Parser(
        prog="python -m rim_probe.glassbox",
        description="Write the glass box, a model whose weights are set by hand, as a checkpoint folder.",
        epilog="example:\n  python -m rim_probe.glassbox checkpoints/glass-box runs/glass-box",
    )
    parser.add_argument("output", metavar="OUTPUT", help="the checkpoint: memory model, base/ and examples.json")
    parser.add_argument("work", metavar="WORK", help="fit.txt, choose.txt, report.txt, and start/ for the recipes")
    arguments = parser.parse_args()
    silence_transformers()
    try:
        build(arguments.output, arguments.work)
    except OSError as error:
        print(f"{error.filename or 'A file'} cannot be written: {error.strerror or error}.", file=sys.stderr)
        return USER_ERROR
    print(f"Wrote {arguments.output} and {arguments.work}.")
    return OK


sys.exit(main())
