"""Reasoning steps as equations: how a step is read, what it depends on, and what would follow from other numbers.

`reading` reads one step, `chains` finds what each step depends on, `counterfactuals` changes a number of the question,
`variants` finds problems told alike and interchanges their results, `distractors` makes wrong steps that look right.
All of it knows arithmetic and text, and nothing of models or tokens.
"""

from rim_probe.equations.chains import Chain, Recomputed, Source, chain, question_numbers
from rim_probe.equations.counterfactuals import Change, Partner, counterfactual, value_bounds
from rim_probe.equations.distractors import Distractor, distractors
from rim_probe.equations.reading import (
    Equation,
    Number,
    Operator,
    number_text,
    number_value,
    read_equation,
    unread_steps,
)
from rim_probe.equations.variants import Variants

__all__ = [
    "Chain",
    "Change",
    "Distractor",
    "Equation",
    "Number",
    "Operator",
    "Partner",
    "Recomputed",
    "Source",
    "Variants",
    "chain",
    "counterfactual",
    "distractors",
    "number_text",
    "number_value",
    "question_numbers",
    "read_equation",
    "unread_steps",
    "value_bounds",
]
