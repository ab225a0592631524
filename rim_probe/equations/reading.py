"""One step as an equation: operands, operators and result, each with its span in the text.

Method: the left side becomes an expression in which numbers stand as names, Python's own `ast` parses it, and it is
evaluated with exact fractions. Only + - * / and parentheses are known.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from rim_probe.problems import Problem

MAX_STEP_CHARACTERS = 300  # what is longer is no equation to us, and deep parentheses must not stop the program
NUMBER = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_TOKEN = re.compile(rf"\s*(?:\$?(?P<number>(?:{NUMBER})%?)|(?P<sign>[-+*/()xX×·⋅∙÷−–]))\s*")
_RESULT = re.compile(rf"\s*\$?(?P<number>[-−–]?(?:{NUMBER})(?:/\d+)?%?)\s*")
# Nearly all steps of a training file, told fifty times faster than by reading them.
_PLAIN = re.compile(r"<<\d{1,9}(?:\.\d{1,4})?(?:[-+*/]\d{1,9}(?:\.\d{1,4})?){1,9}=\d{1,9}(?:\.\d{1,4})?>>")
_SIGNS = {"x": "*", "X": "*", "×": "*", "·": "*", "⋅": "*", "∙": "*", "÷": "/", "−": "-", "–": "-"}


@dataclass(frozen=True)
class Number:
    """A number in a text: its value (25% is 1/4) and the span `text[start:end]` that writes it."""

    value: Fraction
    text: str
    start: int
    end: int


def number_text(value: Fraction, like: str = "") -> str:
    """`value` as steps write it: whole, else an exact decimal, else `p/q`; commas and percent sign as in `like`."""
    if like.endswith("%"):
        return number_text(value * 100, like[:-1]) + "%"
    if value.denominator == 1:
        return f"{value.numerator:,}" if "," in like else str(value.numerator)
    rest = value.denominator
    twos = fives = 0
    while rest % 2 == 0:
        rest, twos = rest // 2, twos + 1
    while rest % 5 == 0:
        rest, fives = rest // 5, fives + 1
    if rest != 1 or "/" in like:
        return str(value)
    places = max(twos, fives)
    digits = str(abs(value.numerator) * 10**places // value.denominator).rjust(places + 1, "0")
    whole = "" if digits[:-places] == "0" and like.startswith(".") else digits[:-places]
    return ("-" if value < 0 else "") + f"{whole}.{digits[-places:]}"


def number_value(text: str) -> Fraction | None:
    """The exact value of a number as steps, questions and answers write it; None for anything else."""
    match = _RESULT.fullmatch(text)
    if not match:
        return None
    digits = match["number"].replace(",", "").replace("−", "-").replace("–", "-")
    top, slash, bottom = digits.rstrip("%").partition("/")
    if slash and not int(bottom):
        return None
    value = Fraction(top) / (int(bottom) if slash else 1)
    return value / 100 if digits.endswith("%") else value


@dataclass(frozen=True)
class Operator:
    """A binary operator, one of + - * /, and where it stands."""

    sign: str
    start: int
    end: int


@dataclass(frozen=True)
class Equation:
    """A step read as an equation.

    Attributes:
        text: the step as given, delimiters included; spans point into it.
        operands: the numbers of the left side in order (a leading minus belongs to its number).
        operators: the binary operators of the left side in order.
        result: the number on the right.
        expression: the left side with operand i as `n{i}` and spaces around binary operators alone.
    """

    text: str
    operands: tuple[Number, ...]
    operators: tuple[Operator, ...]
    result: Number
    expression: str = field(repr=False)

    def value(self, operands: Sequence[Fraction] | None = None, signs: Sequence[str] | None = None) -> Fraction | None:
        """The exact value of the left side, with other operands or operators where given; None for a division by 0."""
        values = [number.value for number in self.operands] if operands is None else operands
        expression = self.expression
        if signs is not None:
            parts = re.split(r" ([-+*/]) ", expression)  # binary operators alone stand between spaces
            parts[1::2] = signs
            expression = " ".join(parts)
        try:
            return _evaluate(ast.parse(expression, mode="eval").body, values)
        except ZeroDivisionError:
            return None

    @property
    def exact(self) -> bool:
        """Whether the result is the exact value of the left side."""
        return self.value() == self.result.value

    @property
    def holds(self) -> bool:
        """Whether the result is right, exactly or as far as its decimals go (`10/3=3.33`)."""
        value = self.value()
        places = len(self.result.text.rstrip("%").partition(".")[2]) + 2 * self.result.text.endswith("%")
        return value is not None and (
            value == self.result.value or (places > 0 and abs(value - self.result.value) <= Fraction(1, 2 * 10**places))
        )

    def rewritten(
        self,
        operands: Mapping[int, Fraction] | None = None,
        signs: Mapping[int, str] | None = None,
        result: Fraction | None = None,
    ) -> str:
        """The step's text with chosen operands and operators (by index) and the result written anew."""
        changes = [(self.operands[i], number_text(v, self.operands[i].text)) for i, v in (operands or {}).items()]
        changes += [(self.operators[i], sign) for i, sign in (signs or {}).items()]
        if result is not None:
            changes.append((self.result, number_text(result, self.result.text)))
        return replace_spans(self.text, [(place.start, place.end, text) for place, text in changes])


def read_equation(step: str) -> Equation | None:
    """A step (with or without `<<` and `>>`) as an equation, or None where it is none.

    Read are whole numbers of any length, decimals, thousands' commas, percent, a dollar sign before a number, fractions
    (as divisions), parentheses, spaces, and x ×·÷ for * and /. At least one operator must stand on the left and one
    number on the right of a single "=".
    """
    opening = len(step) - len(step.lstrip(" <")) if step.lstrip().startswith("<<") else 0
    end = len(step.rstrip(" >")) if step.rstrip().endswith(">>") else len(step)
    left, equals, right = step[opening:end].partition("=")
    result = _RESULT.fullmatch(right)
    if not equals or not result or len(step) > MAX_STEP_CHARACTERS:
        return None
    operands, operators, expression = [], [], ""
    place, after_value, minus = opening, False, None
    while place < opening + len(left):
        match = _TOKEN.match(step, place, opening + len(left))
        if not match:
            return None
        if text := match["number"]:
            value, start = number_value(text), match.start("number")
            if minus is not None:  # -3 is one number
                value, start = -value, minus
            expression += f"n{len(operands)}"
            operands.append(Number(value, step[start : match.end("number")], start, match.end("number")))
            after_value, minus = True, None
        else:
            sign = _SIGNS.get(match["sign"], match["sign"])
            if minus is not None:  # of -(3+4)
                expression, minus = expression + "-", None
            if sign in "()":
                expression, after_value = expression + sign, sign == ")"
            elif after_value:
                operators.append(Operator(sign, *match.span("sign")))
                expression, after_value = expression + f" {sign} ", False
            elif sign == "-":
                minus = match.start("sign")
            else:
                return None
        place = match.end()
    start = opening + len(left) + 1 + result.start("number")
    written = result["number"]
    value = number_value(written)
    if not operators or value is None:
        return None
    equation = Equation(
        step, tuple(operands), tuple(operators), Number(value, written, start, start + len(written)), expression
    )
    try:
        equation.value()
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # what `ast` raises for a text that is no sum
        return None
    return equation


def unread_steps(problems: Iterable[Problem]) -> list[str]:
    """The steps that are no equation to `read_equation`, in order: no chain can be read from them."""
    steps = (step for problem in problems for step in problem.steps if not _PLAIN.fullmatch(step))
    return [step for step in steps if read_equation(step) is None]


def replace_spans(text: str, changes: Iterable[tuple[int, int, str]]) -> str:
    """`text` with every span (start, end) replaced; spans must not overlap."""
    for start, end, new in sorted(changes, reverse=True):
        text = text[:start] + new + text[end:]
    return text


_OPERATIONS = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
}


def _evaluate(node: ast.expr, values: Sequence[Fraction]) -> Fraction:
    if isinstance(node, ast.Name):
        return values[int(node.id[1:])]
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        return _OPERATIONS[type(node.op)](_evaluate(node.left, values), _evaluate(node.right, values))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_evaluate(node.operand, values)
    raise ValueError(f"no arithmetic: {type(node).__name__}")
