"""What `rim_probe.answers` reads, beside math-verify and lm-eval's GSM8K filters, where the right answer is known.

    python -m tools.compare_grading gsm/train_real.txt.gz --output docs/grading.md

The strings: every value in every spelling in every frame (`made`), texts in doubt, whose right answer is None, and the
chains of a file of problems (`chains`). It takes a minute or two and needs math-verify (requirements-dev.txt).
"""

import argparse
import collections
import itertools
import logging
import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from rim_probe.answers import extract_answer
from rim_probe.problems import Problem, read_problems

ROWS = 400


@dataclass(frozen=True)
class Text:
    """A text of one kind, and the answer it gives: exact, or None where it gives none."""

    kind: str
    text: str
    value: Fraction | None


FRAMES = {
    "alone": "{}",
    "after ####": "He has 3 and gets more. #### {}",
    "“The answer is …”": "There are 3 kinds of 4. The answer is {}.",
    "between $ and $": "There are 3 kinds of 4. The answer is ${}$.",
    "\\boxed": "There are 3 kinds of 4, thus $\\boxed{{{}}}$.",
    "last in a sentence": "He had 3 at first, so in the end it is {}.",
    "a next question follows": "The answer is {}.\n\nQuestion: Bob has 3 pens and buys 4. How many has he?",
    "a next problem follows": "#### {}\nBob has 3 pens and buys 4. How many has he?||<<3+4=7>> #### 7",
}

_WHOLE = (18, 250, -3, 1234, 12345, 1234567)
_GROUPED = (1234, 12345, 1234567)
_MIXED = ((2, 1, 2), (7, 3, 4), (12, 1, 3))


def spellings() -> Iterator[tuple[str, str, Fraction]]:
    """(kind, text, value) of numbers as models and data sets write them."""
    for number in _WHOLE:
        for dress in ("{}", "{}.0", "{} apples", "**{}**"):
            yield "whole numbers, units, markup", dress.format(number), Fraction(number)
        yield "percent", f"{number}%", Fraction(number)
        yield "percent", f"{number} %", Fraction(number)
        yield "percent", f"{number}\\%", Fraction(number)
        yield "dollars", f"${number}".replace("$-", "-$"), Fraction(number)
        full = str(number).translate({ord(digit): ord(digit) + 0xFEE0 for digit in "0123456789"})
        yield "full-width digits", full, Fraction(number)
    for number in _GROUPED:
        for mark, kind in (
            (",", "thousands: comma"), ("{,}", "thousands: LaTeX"), ("\\,", "thousands: LaTeX"),
            (" ", "thousands: blank"), ("\u00a0", "thousands: blank"), ("\u202f", "thousands: blank"),
            ("'", "thousands: apostrophe"), ("’", "thousands: apostrophe"), ("_", "thousands: underscore"),
        ):  # fmt: skip
            yield kind, f"{number:,}".replace(",", mark), Fraction(number)
        yield "thousands: point, decimal comma", f"{number:,}".replace(",", ".") + ",56", Fraction(f"{number}.56")
        yield "decimals", f"{number:,}.75", Fraction(f"{number}.75")
        yield "powers of ten", f"{number / 1000:g} \\times 10^{{3}}", Fraction(f"{number / 1000:g}") * 1000
        yield "powers of ten", f"{number / 1000:g}×10³", Fraction(f"{number / 1000:g}") * 1000
        yield "powers of ten", f"{number / 1000:g}e3", Fraction(f"{number / 1000:g}") * 1000
    for number in ("3.5", "0.25", "-7.125", "2.0"):
        yield "decimals", number, Fraction(number)
    for whole, numerator, denominator in _MIXED:
        fraction = Fraction(numerator, denominator)
        for text in ("{}/{}", "\\frac{{{}}}{{{}}}", "\\dfrac{{{}}}{{{}}}", "\\frac{}{}"):
            yield "fractions", text.format(numerator, denominator), fraction
        for text in ("{} {}/{}", "{}\\frac{{{}}}{{{}}}"):
            yield "mixed numbers", text.format(whole, numerator, denominator), whole + fraction
    for text, value in (("½", "1/2"), ("2½", "5/2"), ("7 ¾", "31/4")):
        yield "mixed numbers", text, Fraction(value)


DOUBT = {
    "steps alone": [
        *("<<3+4=7>>", "<<3+4=7>> <<7*2=14>>", "<<3+4=7>> <<7*2=", "<<7*2=14", "7*2=14>>", "3+4=7", "16-3*2=10"),
    ],
    "two numbers": [
        *(
            "5 apples and 3 pears",
            "18 dollars and 50 cents",
            "2 hours 30 minutes",
            "5 to 6",
            "10-12",
            "3 of 5",
            "5 or 6",
        ),
        *("3, 4", "12 34"),
    ],
    "formulas": ["16-3", "5 + 3", "3 x 4", "2^3", "2³", "3x", "2\\pi", "\\sqrt{16}", "\\frac{x}{4}", "\\geq 5"],
    "numbers of no known form": ["1,23", "1,2345", "0,123", "4 10/3", "5/12/2020", "3.14.15", "5'10", "2h30", "1/0"],
}


def made() -> Iterator[Text]:
    """Every spelling in every frame, and what is in doubt, alone and after ####."""
    for kind, spelled, value in spellings():
        for frame, template in FRAMES.items():
            if "$" in spelled and "$" in template:
                continue  # a dollar there opens or closes a formula
            follows = frame.startswith("a next")
            yield Text(frame if follows else kind, template.format(spelled), value)
    for kind, texts in DOUBT.items():
        for text in texts:
            yield Text("in doubt: " + kind, text, None)
            yield Text("in doubt: " + kind, "#### " + text, None)


def chains(problems: Iterable[Problem]) -> Iterator[Text]:
    """Chains of real problems: with their answer, without, cut off, and running on into the next problem."""
    problems = [problem for problem in problems if problem.steps and extract_answer(problem.answer) is not None]
    for problem, following in itertools.pairwise(problems):
        chain, value = " ".join(problem.steps), Fraction(extract_answer(problem.answer))
        after = f"\nQuestion: {following.question}\n{' '.join(following.steps)} #### {following.answer}"
        yield Text("chains of a file, with ####", f"{chain} #### {problem.answer}", value)
        yield Text("chains of a file, no answer yet", chain, None)
        yield Text("chains of a file, cut off", chain[:-3], None)
        yield Text("chains of a file, a next question follows", f"{chain} #### {problem.answer}{after}", value)


# ------------------------------------------------------------------------------------------------------------- readers

Verdict = str  # "right", "none" or "wrong"


def ours(text: Text) -> Verdict:
    """By `extract_answer`."""
    read = extract_answer(text.text)
    if read is None:
        return "none"
    return "right" if text.value is not None and Fraction(read) == text.value else "wrong"


def math_verify(text: Text) -> Verdict:
    """By math-verify with its defaults; an answer of several sides counts as right if any of them is."""
    import math_verify
    from sympy import Float, Rational

    read = math_verify.parse(text.text, parsing_timeout=None)
    if not read:
        return "none"
    if text.value is None:
        return "wrong"
    gold = Rational(text.value.numerator, text.value.denominator)
    return "right" if math_verify.verify([gold, Float(gold)], read, timeout_seconds=None) else "wrong"


# The two filters of lm-eval's task gsm8k, and what its exact match ignores.
_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")


def lm_eval_strict(text: Text) -> Verdict:
    """By lm-eval's strict-match: the first number after ####."""
    return _exact(_STRICT.findall(text.text)[:1], text.value)


def lm_eval_flexible(text: Text) -> Verdict:
    """By lm-eval's flexible-extract: the last number."""
    return _exact(["".join(match.groups(default="")) for match in _FLEXIBLE.finditer(text.text)][-1:], text.value)


def _exact(found: list[str], value: Fraction | None) -> Verdict:
    if not found:
        return "none"
    read = re.sub(r"[,$]|\.$", "", found[0])
    try:
        return "right" if Fraction(read) == value else "wrong"
    except (ValueError, ZeroDivisionError):
        return "wrong"


READERS: dict[str, Callable[[Text], Verdict]] = {
    "ours": ours,
    "math-verify": math_verify,
    "lm-eval strict": lm_eval_strict,
    "lm-eval flexible": lm_eval_flexible,
}

# Why math-verify differs, by kind of text; `table` refuses a difference that is not explained here.
WHY = {
    "whole numbers, units, markup": "It does not read bold marks inside a formula.",
    "percent": "It takes a percent sign as a hundredth; only for positive numbers does it also try the number alone. "
    "Here the sign is a unit: problems ask “what percent”, and their gold answers stand without it.",
    "dollars": "A single dollar before the number opens a formula for it.",
    "decimals": "A formula with a comma of thousands and a decimal point is split.",
    "full-width digits": "It does not normalise Unicode.",
    "thousands: LaTeX": "Outside $…$ it stops at the brace; `\\,` it reads as a sum of a whole and a part (1 + 234).",
    "thousands: blank": "In a formula it reads a blank as a sum of a whole and a part (1 + 234).",
    "thousands: apostrophe": "Outside a formula it stops at the apostrophe.",
    "thousands: underscore": "It stops at the underscore, or reads an index.",
    "thousands: point, decimal comma": "It reads English numbers alone.",
    "powers of ten": "Outside a formula it stops at the times sign or the letter e.",
    "fractions": "Without $…$ or \\boxed it misses some LaTeX commands.",
    "mixed numbers": "“2 1/2” it multiplies outside a formula and reads as (2 + 1)/2 inside one; ½ is not normalised.",
    "a next question follows": "It finds “The answer is” before a plain number; otherwise it reads the next question.",
    "a next problem follows": "It has no notion of a next problem, and takes the last answer.",
    "in doubt: steps alone": "It takes the right side of an equation, as is right for free text. In this format a step "
    "is no answer: a model that has only written steps has not answered.",
    "in doubt: two numbers": "It takes one of them; here neither is the answer.",
    "in doubt: formulas": "It works them out, which is more than was said; here a formula is no answer.",
    "in doubt: numbers of no known form": "It takes a part of the number.",
    "chains of a file, no answer yet": "The last step's result is no answer (see “steps alone”).",
    "chains of a file, cut off": "Likewise; a cut number is even another one.",
    "chains of a file, a next question follows": "It has no notion of a next question.",
}


def good(text: Text, verdict: Verdict) -> bool:
    """Whether a reader did what is to be done: the value read, or nothing where there is none."""
    return verdict == ("none" if text.value is None else "right")


def table(texts: Iterable[Text]) -> str:
    """The comparison as Markdown: by kind, how many texts each reader reads as they are, and how many wrong.

    Raises:
        SystemExit: math-verify differs on a kind without an explanation.
    """
    counts: dict[str, dict[str, collections.Counter]] = {}
    examples: dict[str, str] = {}
    for text in texts:
        verdicts = {name: read(text) for name, read in READERS.items()}
        kind = counts.setdefault(text.kind, {name: collections.Counter() for name in READERS})
        for name, verdict in verdicts.items():
            kind[name].update({"good": good(text, verdict), "wrong": verdict == "wrong"})
            kind[name]["all"] += 1
        if good(text, verdicts["ours"]) != good(text, verdicts["math-verify"]):
            examples.setdefault(text.kind, text.text)
    if missing := sorted(examples.keys() - WHY.keys()):
        raise SystemExit(f"No explanation for: {', '.join(missing)}.")
    lines = ["| kind of text | n | " + " | ".join(READERS) + " |", "|---|---|" + "---|" * len(READERS)]
    for kind, readers in {**counts, "all": _sum(counts.values())}.items():
        cells = [f"{c['good']:,}" + (f" ({c['wrong']:,} wrong)" if c["wrong"] else "") for c in readers.values()]
        lines.append(f"| {kind} | {readers['ours']['all']:,} | " + " | ".join(cells) + " |")
    lines += ["", "| kind of text | for example | why math-verify differs |", "|---|---|---|"]
    for kind, example in examples.items():
        shown = example if len(example) <= 90 else example[:90] + "…"
        shown = shown.replace("\n", "\\n").replace("|", "\\|")
        lines.append(f"| {kind} | `{shown}` | {WHY[kind]} |")
    return "\n".join(lines)


def _sum(kinds: Iterable[dict[str, collections.Counter]]) -> dict[str, collections.Counter]:
    total: dict[str, collections.Counter] = {name: collections.Counter() for name in READERS}
    for readers in kinds:
        for name, counter in readers.items():
            total[name].update(counter)
    return total


HEAD = """# Reading and grading answers

The rule stands at the head of `rim_probe/answers.py`. This page compares it with math-verify {version} (defaults) and
with the two filters of lm-eval's task `gsm8k`, on {n:,} texts whose right answer is known by construction: {made:,}
spellings in frames, and {chains:,} made of the chains of {rows:,} training problems (`{file}`). Made by

    python -m tools.compare_grading {file} --output docs/grading.md

The texts were chosen for what this project reads, hostile ones among them, and the rule was written with such texts in
view: the table shows what differs and why, and not which reader is better in general. A cell counts the texts read as
they are; where a text gives no answer, that means nothing read. “Wrong”: a value where another one, or none, is right.
lm-eval stops generating at “Question:”, so that its filters would not meet the texts that run on.

"""


GOLDS = """
## Wrong gold answers

GSM8K's test split is graded by its own gold answers, and some of them are wrong. GSM8K-Platinum (arXiv:2502.03461,
`madrylab/gsm8k-platinum`) keeps 1,209 of its 1,319 problems, with labels revised. Its corrections are named by

    python -m tools.wrong_golds                        # or: two files, GSM8K's test split first

They are not listed here, for the set was not at hand when this page was written. One case is public elsewhere
(openai/grade-school-math issue 25): “After scoring 14 points, Erin now has three times more points than Sara, who
scored 8”, gold 18, where three times as many gives 10.
"""


def main() -> None:
    from importlib.metadata import version

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="a file of problems with steps; training ones")
    parser.add_argument("--output", required=True, type=Path)
    arguments = parser.parse_args()
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of every call without a time limit
    problems = read_problems(arguments.file).problems
    rows = random.Random(0).sample(problems, min(ROWS, len(problems)))
    spelled, chained = list(made()), list(chains(rows))
    head = HEAD.format(
        version=version("math-verify"),
        n=len(spelled) + len(chained),
        made=len(spelled),
        chains=len(chained),
        rows=len(rows),
        file=Path(arguments.file).name,
    )
    arguments.output.write_text(head + table([*spelled, *chained]) + "\n" + GOLDS, encoding="utf-8")


if __name__ == "__main__":
    main()
