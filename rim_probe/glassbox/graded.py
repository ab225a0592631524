"""Power and false alarms of the interchange and bypass tests, on glass boxes whose routes to the answer are known.

`python -m rim_probe.glassbox.graded --output docs/graded-glass-box.md` writes one Markdown table.

Method:
1. Versions (`glassbox(memory_share=...)`): the answer takes its result from the memory alone, from memory and question
   with the larger share from either, or from the question alone. The memory holds the steps in all of them.
2. Noise: every token's and every position's embedding gets Gaussian noise in the dimensions that hold numbers and
   signs, drawn anew for every test. The shares of right answers show what it does.
3. Each test is the probe's own, `interchange.measure`, on problems of its own. Counted is how often each sign is seen
   (`interchange.signs`) and how often the verdict is the truth. A sign seen where its cause is absent is a false alarm.
"""

import argparse
import itertools
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from rim_probe.glassbox.box import DIMS, GlassBox, glassbox
from rim_probe.glassbox.problems import draw_problems
from rim_probe.numbers import format_interval
from rim_probe.options import OK, Parser, add_number, add_seed, silence_transformers
from rim_probe.probing.interchange import RIGHT, measure, route, signs
from rim_probe.probing.results import Result, proportion_estimate
from rim_probe.probing.study import Study
from rim_probe.report import table

TRUE, FALSE = {1: [1], 2: [2], 3: [3]}, {1: [3], 2: [1], 3: [2]}  # step -> blocks claimed to hold it
VERSIONS = [  # what the memory is, its share, the claims, the verdict that is true
    ("the only route", 1.0, TRUE, "only"),
    ("the only route, false claims", 1.0, FALSE, "only"),
    ("one of two, the larger share", 0.7, TRUE, "one of two"),
    ("one of two, the smaller share", 0.3, TRUE, "one of two"),
    ("no route", 0.0, TRUE, "none"),
]
NOISES = (0.0, 0.015, 0.025)
SIGNS = {  # as the table calls them, and whether each ought to be seen
    "claim": ("block t holds step t", lambda share, claims: share > 0.5 and claims == TRUE),
    "follows": ("answer follows the memory", lambda share, claims: share > 0.5),
    "holds": ("so with the question cut", lambda share, claims: share > 0),
    "bypass": ("bypass", lambda share, claims: share < 1),
}
NOISY = [dim for name in ("digit", "sign", "left", "operator", "right", "result") for dim in DIMS[name]]
FIT_PROBLEMS = 50  # they bound the numbers of partners


def noisy_box(memory_share: float, noise: float, seed: int) -> GlassBox:
    """A glass box with Gaussian noise of that width in what its embeddings hold of numbers and signs."""
    box, generator = glassbox(memory_share=memory_share), torch.Generator().manual_seed(seed)
    transformer = box.rim.model.transformer
    with torch.no_grad():
        for weights in (transformer.wte.weight, transformer.wpe.weight):
            weights[:, NOISY] += noise * torch.randn(len(weights), len(NOISY), generator=generator)
    return box


def tests(
    memory_share: float, claims: Mapping[int, Sequence[int]], noise: float, *, pairs: int, repeats: int, seed: int
) -> Iterator[list[Result]]:
    """The results of `repeats` tests, each with noise and problems of its own."""
    for number in range(seed, seed + repeats):
        rim = noisy_box(memory_share, noise, number).rim
        splits = {"fit": FIT_PROBLEMS, "choose": 1, "report": pairs}
        problems = {name: draw_problems(number, count, name) for name, count in splits.items()}
        with Study({"memory": rim}, problems, seed=number, progress=False) as study:
            yield measure(study, rim, claims, pairs)


def main() -> int:
    """Writes the table and returns the exit code."""
    parser = Parser(
        prog="python -m rim_probe.glassbox.graded",
        description="Measure power and false alarms of the interchange and bypass tests on graded glass boxes.",
        epilog="example:\n  python -m rim_probe.glassbox.graded --output docs/graded-glass-box.md",
    )
    parser.add_argument("--output", metavar="FILE", help="a Markdown file; the screen if left out")
    add_number(parser, "--pairs", "problems of a test", low=10, default=60)
    add_number(parser, "--repeats", "tests of each version and noise", low=1, default=8)
    add_seed(parser, "of noise and problems")
    arguments = parser.parse_args()
    text = _text(arguments)
    if arguments.output is None:
        print(text, end="")
    else:
        Path(arguments.output).write_text(text, encoding="utf-8")
    return OK


def _text(arguments: argparse.Namespace) -> str:
    silence_transformers()
    pairs, repeats, seed = arguments.pairs, arguments.repeats, arguments.seed
    rows = []
    for (name, share, claims, truth), noise in itertools.product(VERSIONS, NOISES):
        found = list(tests(share, claims, noise, pairs=pairs, repeats=repeats, seed=seed))
        right = [r.estimate for results in found for r in results if (r.metric, r.of) == (RIGHT, "nothing cut")]
        shown, verdicts = [signs(results) for results in found], [route(results) for results in found]
        cells = [
            _percent(one[sign] for one in shown) + ("" if wanted(share, claims) else " ✗")
            for sign, (_, wanted) in SIGNS.items()
        ]
        told = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in sorted(set(verdicts)))
        accuracy = sum(e.value * e.n for e in right) / sum(e.n for e in right)
        true = _percent(verdict == truth for verdict in verdicts)
        n = sum(results[0].estimate.n for results in found) / repeats  # the headline: pairs that differ in one number
        rows.append([name, f"{noise:g}", f"{100 * accuracy:.0f}", f"{n:.0f}", *cells, true, told])
        print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
    head = ["the memory is", "noise", "right, %", "pairs", *(title for title, _ in SIGNS.values())]
    head += ["verdict true", "verdicts"]
    return f"""# What the interchange and bypass tests can see

Glass boxes whose routes to the answer are known; {repeats} tests of each version and noise, each on {pairs} problems.
Pairs: those answered right both times, mean over tests. Then percent of tests in which a sign was seen, with the 95 %
Wilson interval over tests: its power. With ✗ its cause is absent, and what is seen is a false alarm.
Noise: standard deviation added to what embeddings hold, where a number or sign is 1. Signs and verdicts:
`rim_probe/probing/interchange.py::signs`, `route`; "unknown" means that the test calls itself too weak.

`{shlex.join(["python", "-m", "rim_probe.glassbox.graded", *sys.argv[1:]])}`

{table(head, rows)}
"""


def _percent(seen: Iterable[bool]) -> str:
    estimate = proportion_estimate(seen)
    return format_interval(estimate.value, estimate.low, estimate.high, True)


if __name__ == "__main__":
    sys.exit(main())
