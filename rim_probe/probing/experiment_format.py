"""The form of experiments on one question: the results of `surgery` and `trial`, checked when they come from outside.

Knows JSON and the entries. Knows nothing of models, nor whether an experiment fits the question it stands beside.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rim_probe.memory import MAX_BLOCKS
from rim_probe.probing.checks import Damage, each, maybe, number, one_of, record, text, truth, whole

probability = number(0, 1.001)
block = whole(0, MAX_BLOCKS)
_logs = record({"before": number(), "after": number()})
_told = record(
    {
        "text": text,
        "value": maybe(text),
        "probability": probability,
        "right": maybe(truth),
        "readouts": each(
            record({"block": block, "text": text, "value": maybe(text), "probability": probability}), most=MAX_BLOCKS
        ),
    }
)


def _actions(value: Any, at: str) -> dict[str, str]:
    if not isinstance(value, Mapping) or not {str(k) for k in range(1, MAX_BLOCKS + 1)}.issuperset(value):
        raise Damage(f"{at} should name actions by block")
    return {key: one_of("blank", "noise", "swap")(action, f"{at}.{key}") for key, action in value.items()}


surgery = record(
    {
        "format": one_of("rim-probe-surgery/1"),
        "question": text,
        "num_blocks": block,
        "actions": _actions,
        "layers": each(whole(0, 512), 2),
        "partner": maybe(text),
        "seed": whole(-(2**63), 2**63),
        "gold": maybe(text),
        "before": _told,
        "after": _told,
        "answer_changed": truth,
        "changed_blocks": each(block, most=MAX_BLOCKS),
        "answer_log_probability": _logs,
        "gold_probability": maybe(_logs),
        "control": maybe(
            record({"what": text, "value": maybe(text), "answer_changed": truth, "answer_log_probability": number()})
        ),
    },
    optional={"unrelated": maybe(text)},
)
_problem = record({"question": text, "steps": each(text, most=100), "answer": text})
counterfactual = record(
    {
        "format": one_of("rim-probe-counterfactual/1"),
        "problem": _problem,
        "partner": _problem,
        "change": text,
        "step": whole(1, 100),
        "blocks": each(block, most=MAX_BLOCKS),
        "claimed": text,
        "brought": text,
        "layers": each(whole(0, 512), 2),
        **dict.fromkeys(("expected", "own", "partner_answer", "said"), text),
        "outcome": one_of("expected", "own", "partner", "other"),
        "came": truth,
        "surgery": surgery,
        "control": maybe(record({"what": text, "said": text, "outcome": text})),
        "sentence": text,
    }
)
