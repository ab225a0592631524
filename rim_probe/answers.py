r"""Reading an answer out of a text, and grading it: one rule for what a model wrote and for gold answers.

The rule:

1. *One spelling.* The last 10,000 characters are brought to NFKC; dashes, fraction bars, superscripts, LaTeX and markup
   get one spelling: `２½` and `2\frac{1}{2}` are `2 1/2`, `1{,}234` is `1,234`, `3 \times 10^{2}` is `3e2`.
2. *Own part.* Steps `<<…>>`, unfinished ones too, are taken out: an equation is never an answer. What follows the start
   of a next question, or a token such as `<|im_end|>`, is cut off.
3. *Place.* The first of these that there is: the line after the last `####`; the inside of the last `\boxed{…}`; the
   line after the last “answer is” or “answer:”; the whole text. A stated place is read from its front, a whole text
   from its end. A place of one short line without number, letter or yes/no is an answer in words.
4. *Grammar.*

       answer   = number [unit] | ratio | "A" … "E" | "yes" | "no" | "true" | "false" | words
       number   = [sign] [currency] (mixed | decimal [exponent] ["/" digits])
       mixed    = decimal " " digits "/" digits                              the fraction below 1: 3 1/2
       decimal  = digits ["." digits] | "." digits
                | 1,234,567[.8] | 12,34,567[.8]                              thousands, also Indian
                | 1.234.567 | 1.234,56                                       two points, or a comma near the end
                | 1 234 567[.8] | 1'234'567[.8] | 1_234_567[.8]              any kind of blank or apostrophe
       ratio    = digits ":" digits [":" digits [":" digits]]                5:45 is not 45

   Operands are no answers: what stands before an operator or "=", or after an operator. The right side of "=" is one,
   unless the place is an equation and nothing else.
5. *In doubt, None.* A number that the grammar does not hold (`1,23`, `4 10/3`, `5/12/2020`, `1/0`); one under a root,
   power or bound (`\sqrt{16}`, `2^3`, `2\pi`, `≥ 5`); one of two different numbers joined by a blank, a comma, “and”,
   “or”, “to” or “of” (`5 apples and 3 pears`); the end of a text that is a sum not worked out (`16 - 3`) or a question
   (“… 3 pens. How many?”).

Canonical forms: `1,000`, `$1000`, `1000.0` and `1e3` give "1000"; `.50` gives "0.5"; `2/4` gives "1/2". A percent sign
is a unit, as are “million” and “dozen”: the number is taken as written.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from decimal import Decimal
from fractions import Fraction

ANSWER_MARKER = "#### "
"""Stands before the answer where the text has one (chain of thought and direct)."""

# Numbers beyond these bounds are not read as numbers: 1e999999999 or a megabyte of digits must not stop the program.
_MAX_CHARACTERS = 10_000
_MAX_DIGITS = 100
_MAX_EXPONENT = 100
_MAX_WORD_ANSWER = 60
_MAX_GAP = 40  # characters between two numbers that can belong together

_MARKER = ANSWER_MARKER.strip()

# ------------------------------------------------------------------------------------------------------- one spelling

_VULGAR = "¼½¾⅐⅑⅒⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞↉"
_BEFORE_NFKC = (
    (re.compile(rf"(?<=\d)(?=[{_VULGAR}])|(?<=[{_VULGAR}])(?=\d)"), " "),
    (re.compile("(?=[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻])(?<![⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻])"), "^"),
)
_SIGNS = str.maketrans(
    dict.fromkeys("⁄∕", "/")
    | dict.fromkeys("‐‑‒–−", "-")
    | dict.fromkeys("’‘ʼ", "'")
    | dict.fromkeys("⋅∙", "·")
    | dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\u00ad\u200e\u200f")
)
# In order. What is left of LaTeX at the end stands as √: no number beside it is read.
_LATEX = tuple(
    (re.compile(pattern), new)
    for pattern, new in (
        (r"\{,\}", ","),
        (r"\\!", ""),
        (r"\\[,;:()\[\] ]|\\q?quad\b|\\displaystyle\b|\\(?:left|right)(?![A-Za-z])", " "),
        (r"\\([$%#&_{}])", r"\1"),
        (r"\^ ?\{? ?\\circ ?\}?|\\degree\b", "°"),
        (r"\\(?:text(?:bf|it|rm)?|math(?:bf|it|rm)|mbox)(?![A-Za-z]) ?", " "),
        (r"\\(?:times|cdot|ast)(?![A-Za-z])", "×"),
        (r"\\div(?![A-Za-z])", "÷"),
        (r"\\approx(?![A-Za-z])", "≈"),
        (r"(?<=\d) ?\\[cdt]?frac", r" \\frac"),
        (r"\\[cdt]?frac ?(?:\{ ?(-?[0-9]{1,99}) ?\}|([0-9])) ?(?:\{ ?([0-9]{1,99}) ?\}|([0-9]))", r"\1\2/\3\4 "),
        (r"\\(?!f?boxed)[A-Za-z]+", "√"),
    )
)
_MARKUP = tuple(
    (re.compile(pattern), new)
    for pattern, new in (
        (r"</?[A-Za-z][A-Za-z0-9_-]{0,19}>|\*\*+|__+|``+", " "),
        (r"(?<=[A-Za-z])\^\{?[23]\}?(?![0-9])", ""),  # of m^2
        (r"(?<=[0-9]) ?[×*·xX] ?10 ?\^ ?\{? ?([-+]?[0-9]{1,4})\b\}?", r"e\1"),
        (r"(?<=[0-9]) ?[xX] ?(?=[0-9])", " × "),
        (r"(?<=[0-9%]) ?\([A-Za-z=≈~][^()\n]{1,80}\)", ""),  # a remark: 25 (or 30)
    )
)
_FOREIGN_DIGIT = re.compile(r"(?![0-9])\d")


def _spelled(text: str) -> str:
    text = text[-_MAX_CHARACTERS:]
    if not text.isascii():
        for pattern, new in _BEFORE_NFKC:
            text = pattern.sub(new, text)
        text = unicodedata.normalize("NFKC", text).translate(_SIGNS)
        text = _FOREIGN_DIGIT.sub(lambda digit: str(unicodedata.decimal(digit.group())), text)
    for pattern, new in (*_LATEX, *_MARKUP) if "\\" in text or "{" in text else _MARKUP:
        text = pattern.sub(new, text)
    return text.strip()


# ------------------------------------------------------------------------------------------------------------ own part

_STEP = re.compile(r"<<.*?(?:>>|$)", re.MULTILINE)
_END_OF_STEP = re.compile(r"^.*>>", re.MULTILINE)
_SAID = re.compile(r"^(?!\s{0,9}[0-9]{1,3}[.)] ).*?[0-9]|\b(?i:yes|no|true|false)\b|^\W{0,3}[A-E]\b", re.MULTILINE)
_NEXT = re.compile(
    r"<\|[^|<>\n]{1,30}\|>"
    r"|(?<=[\n.!?;)\]}>*\"'0-9])[\s#*_-]{0,10}(?:Next )?(?:Question|QUESTION|Problem|Exercise|Q|Human|User)"
    r" ?#?[0-9]{0,5} ?(?:\*\*)? ?:"
)
_ANSWER_LINE = re.compile(r"#### {0,4}[-+]?[$€£¥]?[0-9][0-9,./]*(?![0-9.:)])")
_ASKS = re.compile(r"\b(?i:how|what)\b")


def _own_part(text: str) -> str:
    """The text without steps, up to where a next question starts: a label, or after a marked answer a “How … ?”."""
    said = _SAID.search(text)
    if said and (following := _NEXT.search(text, said.end())):
        text = text[: following.start()]
    if answered := _ANSWER_LINE.search(text):
        end = text.find("?", answered.end())
        if 0 <= end < text.rfind(_MARKER) and (asks := _ASKS.search(text, answered.end(), end)):
            text = text[: asks.start()]
    return _END_OF_STEP.sub(" ", _STEP.sub(" ", text)).strip()


# --------------------------------------------------------------------------------------------------------------- place

_BOXED = re.compile(r"\\f?boxed\b")
_STATED = re.compile(r"(?i)\banswer(?: is\b(?! not\b)|:| =)")


def _place(text: str) -> tuple[str, bool]:
    """Where the answer stands, and whether it is stated as such."""
    _before, marker, tail = text.rpartition(_MARKER)
    if marker:
        return _line(tail), True
    for match in reversed([*_BOXED.finditer(text)][-1:]):
        return _inside(text, match.end()), True
    for match in reversed([*_STATED.finditer(text)][-1:]):
        line = _line(text[match.end() :])
        if _TOKEN.search(line) or text.endswith(line):
            return line, True
    return text, False


def _line(text: str) -> str:
    return text.strip().partition("\n")[0]


def _inside(text: str, start: int) -> str:
    """What stands in the braces that open at `start`, to the end of the text if they never close."""
    depth, opening = 0, start
    for brace in re.finditer(r"[{}]", text[start:]):
        depth += 1 if brace.group() == "{" else -1
        if depth <= 0:
            return text[opening : start + brace.start()]
    return _line(text[start:])


# ------------------------------------------------------------------------------------------------------------- grammar

# Every repetition below is bounded or starts only where no digit or letter stands before it, so that the time to search
# a text grows with its length alone.
_DECIMAL = r"[0-9]+(?:[.,'][0-9]+|[ _][0-9]{3}(?![0-9]))*"
_TOKEN = re.compile(
    rf"""
      (?P<ratio> (?<![\w:]) [0-9]{{1,9}} (?: : [0-9]{{1,9}} ){{1,3}} (?![\w:]) )
    | (?P<number>
        (?P<sign> (?<![\w)\]%.]) - )?                                                     # not the minus of 16-3
        [$€£¥]? (?P<inner_sign> (?<=[$€£¥]) - )?
        (?<!\w) (?<![0-9]\.)
        (?: (?P<whole> [0-9][0-9,]{{0,15}} ) [ ] (?= [0-9]{{1,9}} [ ]? / [ ]? [0-9] ) )?    # 2 of 2 1/2
        (?P<decimal> {_DECIMAL} | (?<!\.) \. [0-9]+ )
        (?P<exponent> [eE] [-+]? [0-9]+ (?!\w) )?
        (?: [ ]? / [ ]? (?P<denominator> [0-9]+ ) )?
      )
    | (?P<option> (?<!\w) \( [A-Ea-e] \) | (?<![\w(]) [A-E] \)                              # (b), B)
        | \A [A-Ea-e] \Z | \A [A-E] (?= [.:] \s ) | (?<![\w'°]) (?<![0-9]\s) [A-E] \Z )      # b, "B. ", "… is B"
    | (?P<word> \A (?i: yes | no | true | false ) \b | \b (?i: yes | no | true | false ) \Z )
    """,
    re.VERBOSE,
)
_THOUSANDS = re.compile(
    r"[1-9][0-9]{0,2}(?:,[0-9]{3})+(?:\.[0-9]+)?"
    r"|[1-9][0-9]?(?:,[0-9]{2})+,[0-9]{3}(?:\.[0-9]+)?"
    r"|[1-9][0-9]{0,2}([ '_])[0-9]{3}(?:\1[0-9]{3})*(?:\.[0-9]+)?"
)
_THOUSANDS_COMMA = re.compile(
    r"[1-9][0-9]{0,2}(?:\.[0-9]{3}){2,}"
    r"|[1-9][0-9]{0,2}([. '])[0-9]{3}(?:\1[0-9]{3})*,(?:[0-9]{1,2}|[0-9]{4,})"
)
_GLUED_BEFORE = re.compile(r"(?:[√^_±≤≥≠\\] ?[({]?|[0-9][:/.,'])-?\Z")
_GLUED_AFTER = re.compile(r" ?[)}]? ?[√^π∞]|[xX](?![A-Za-z])|[A-Za-z]+[0-9]|[ ]?/[ ]?[0-9]|[:,.'_][0-9]")

_SIDE = re.compile(r"[^,.;:!?\n]*[=≈][^.;!?\n]*")
_OPENING = r"[\s$€£¥(\[{]*"
_OPERATION = re.compile(
    r"[^\w,.;:!?\n=≈]*(?:[A-Za-z]+ ?){0,3}"
    rf"(?:[+*/×÷·^√]|(?<![A-Za-z])-|\b(?:plus|minus|times|(?:divided|multiplied) by)\b){_OPENING}"
)
_JOINED = re.compile(
    rf"[)\]]?(?:[^\w,.;:!?\n=≈]*|(?: ?[A-Za-z%]+){{0,2}},? ?(?:and|or|to|of|&|/) {_OPENING}"
    rf"| (?:years?|months?|weeks?|days?|hours?|hrs?|minutes?|mins?|feet|foot|ft|pounds?|lbs?|dollars?) {_OPENING})"
)


def _read(place: str, stated: bool) -> str | None:
    """The answer that stands at a place, in canonical form."""
    # Braces have done their work: those between two groups of a command that is not known are kept as such.
    place = re.sub(r"\} ?\{", "√", place).replace("{", "").replace("}", "")
    outer = " \t\r\n\"'“”`*_"
    place = place.lstrip(":=>" + outer).rstrip(".,;:!?" + outer)
    tokens = [*_TOKEN.finditer(place)]
    if not tokens:
        return _word_answer(place)
    gaps = [place[left.end() : right.start()] for left, right in itertools.pairwise(tokens)]
    gaps = [gap if len(gap) <= _MAX_GAP else "." for gap in gaps]
    sides = [bool(_SIDE.fullmatch(gap)) for gap in gaps] + [False]
    operations = [False, *(bool(_OPERATION.fullmatch(gap)) for gap in gaps), False]  # before and after each
    if any(sides) and not re.search(r"[^\W\d_]", place):
        return None  # an equation and nothing else
    if stated:
        free = (i for i in range(len(tokens)) if not (operations[i] or operations[i + 1] or sides[i]))
        chosen = next(free, None)
    else:
        chosen = len(tokens) - 1
        rest = place[tokens[chosen].end() :]
        asked = rest.rfind("?")
        if operations[chosen] or (asked >= 0 and _ASKS.search(rest, 0, asked)):
            chosen = None
    if chosen is None:
        return None
    value = _token_value(place, tokens[chosen])
    for i in (chosen - 1, chosen):
        if 0 <= i < len(gaps) and _joined(place, tokens[i], gaps[i], tokens[i + 1]):
            other = tokens[i if i < chosen else i + 1]
            if not _same(_token_value(place, other), value):
                return None
    return value


def _joined(place: str, left: re.Match[str], gap: str, right: re.Match[str]) -> bool:
    """Whether two numbers stand side by side, so that neither is the answer. A list's comma counts at the end alone."""
    if any(token["option"] or token["word"] for token in (left, right)):
        return False
    return bool(_JOINED.fullmatch(gap)) or (not gap.strip(" ,") and not place[right.end() :].strip(" .)]"))


def _token_value(place: str, match: re.Match[str]) -> str | None:
    if match["option"]:
        return match["option"].strip("()").upper()
    if match["word"]:
        return match.group().casefold()
    start, end = match.span()
    if _GLUED_BEFORE.search(place, max(0, start - 4), start) or _GLUED_AFTER.match(place, end):
        return None
    return match.group() if match["ratio"] else _number_text(match)


def _number_text(match: re.Match[str]) -> str | None:
    """The canonical text of a number; None beyond the grammar and the bounds, and for a division by 0."""
    digits, exponent, denominator = _digits(match["decimal"]), match["exponent"] or "", match["denominator"]
    if digits is None or len(denominator or "") > _MAX_DIGITS or len(exponent) > 5:
        return None
    if exponent and abs(int(exponent[1:])) > _MAX_EXPONENT:
        return None
    negative = bool(match["sign"]) != bool(match["inner_sign"])
    plain = format(Decimal(digits + exponent), "f")  # exact: the context's precision rounds arithmetic only
    if denominator is None:
        if "." in plain:
            plain = plain.rstrip("0").rstrip(".")
        plain = plain.lstrip("0") or "0"
        plain = "0" + plain if plain.startswith(".") else plain
        return "-" + plain if negative and plain != "0" else plain
    if not int(denominator):
        return None
    value = Fraction(plain) / int(denominator)
    if match["whole"]:
        whole = _digits(match["whole"])
        if whole is None or not 0 < value < 1:
            return None
        value += int(whole)
    return str(-value if negative else value)


def _digits(text: str) -> str | None:
    """A decimal without its separators of thousands, with a point; None where they can't be told apart."""
    if len(text) > _MAX_DIGITS:
        return None
    if _THOUSANDS_COMMA.fullmatch(text):
        return re.sub(r"[. ']", "", text).replace(",", ".")
    if _THOUSANDS.fullmatch(text):
        return re.sub(r"[, '_]", "", text)
    return text if re.fullmatch(r"[0-9]*\.?[0-9]+", text) else None


def _word_answer(text: str) -> str | None:
    # "İ" is the one letter whose lower case is two characters, and the second would end the word before it.
    words = unicodedata.normalize("NFKC", " ".join(text.replace("İ", "i").lower().split()))
    fits = len(words) <= _MAX_WORD_ANSWER and "\n" not in text and not re.search(r"[√\\]|<<|>>|answer", words)
    return words if fits and re.search(r"\w", words) else None


def extract_answer(text: str) -> str | None:
    """The answer a text gives, in canonical form, or None where there is none or it is in doubt. Never raises.

    The rule stands at the head of this module. Time grows with the length of the text alone.
    """
    spelled = _spelled(text)
    place, stated = _place(_own_part(spelled))
    if not stated and (_STEP.search(spelled) or _END_OF_STEP.search(spelled)) and not _TOKEN.search(place):
        return None  # what stands between steps is no answer in words
    return _read(place, stated)


# ------------------------------------------------------------------------------------------------------------- grading

_RELATIVE_TOLERANCE = Fraction(1, 10**6)
_LARGEST_TOLERANCE = Fraction(1, 10**3)
_SMALLEST_TOLERANCE = Fraction(1, 2 * 10**10)


def is_correct(prediction: str | None, gold: str) -> bool:
    """Whether a prediction (what `extract_answer` gave, or any text) gives the gold answer.

    Both are read by the one rule. Two whole numbers must be equal, exactly. Where either has a fractional part they may
    differ by a millionth of the larger, though by no more than 0.001: gold answers such as 0.3333333 stand for 1/3, and
    GSM-Hard's carry float noise (3244047.0999999996). GSM-Hard rounds to ten decimals, so half a unit of the tenth
    always passes. Everything else must be the same text. What is in doubt is never right, not even against itself.

    A percent sign is a unit: `12%` equals `12` and not `0.12`.
    """
    given, wanted = extract_answer(prediction or ""), extract_answer(gold)
    if given is None or wanted is None:
        return False
    if given == wanted:
        return True
    left, right = _as_fraction(given), _as_fraction(wanted)
    if left is None or right is None or (left.denominator == 1 and right.denominator == 1):
        return False
    tolerance = min(_LARGEST_TOLERANCE, _RELATIVE_TOLERANCE * max(abs(left), abs(right)))
    return abs(left - right) <= max(_SMALLEST_TOLERANCE, tolerance)


def _same(left: str | None, right: str | None) -> bool:
    """Whether two canonical answers are exactly the same value."""
    return left == right or (None not in (left, right) and None is not _as_fraction(left) == _as_fraction(right))


def _as_fraction(canonical: str) -> Fraction | None:
    """The exact value of a canonical number; None for letters, words and ratios."""
    return Fraction(canonical) if re.fullmatch(r"-?[0-9]+(?:[./][0-9]+)?", canonical) else None
