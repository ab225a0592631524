"""Surgery by hand: the slots of every memory block kept, blanked, drowned in noise or taken from another question.

Method:
1. Each block has an action. `blank` sets its slots to 0; `noise` adds Gaussian noise, in every dimension as wide as
   the spread of the state's own values, drawn by seed; `swap` puts in the states of the partner question's same block,
   each layer into its own: the swap of the interchange test (`Patcher.edits`). The layers lo..hi are written, all of
   1..L by default.
2. Slots alone are written. The end of a block, where its readout is read, computes from what was put in: written as
   well it would say what was put in, whatever the model makes of it.
3. Clean run, operation and control are rows of one batch, and all K readouts of each are decoded greedily. The answer
   before and the gold answer are teacher-forced under the operation.
4. Control: the same slots and layers filled from an unrelated question, memory as good as any that knows nothing of
   this one. Without such a question, for blank and noise, the same action on as many other blocks, drawn by seed.

Nothing before the first written block can change, and an operation without effect gives the clean readouts.

Knows actions and what the answers become. Knows nothing of steps and predictions (see `trial`), and not
why an answer changes: that it stays does not show that a block holds nothing, only that it is not needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from rim_probe.decoding import Readout
from rim_probe.errors import RiMError
from rim_probe.model import RiM
from rim_probe.probing.hooks import num_layers
from rim_probe.probing.interventions import Donors, Variant
from rim_probe.probing.patching import Edit, Patcher
from rim_probe.problems import is_correct

FORMAT = "rim-probe-surgery/1"
ACTIONS = ("keep", "blank", "noise", "swap")
MAX_NEW_TOKENS = 48  # per readout: an answer is a few tokens, but a disturbed model may never end
_MODES = {"blank": "zero", "noise": "noise", "swap": "swap"}


def operate(
    rim: RiM,
    question: str,
    actions: Mapping[int, str],
    *,
    partner: str | None = None,
    unrelated: str | None = None,
    layers: tuple[int, int] | None = None,
    num_blocks: int | None = None,
    gold: str | None = None,
    seed: int = 0,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> dict[str, Any]:
    """What becomes of the answer and of every readout when blocks are blanked, disturbed or swapped.

    Args:
        actions: block 1..K -> one of `ACTIONS`; blocks not named are kept. Numbers as text will do (JSON has no other).
        partner: the question that `swap` takes its states from.
        unrelated: a question for the control; see the head of this module.
        layers: (lo, hi), both written, 0 to L; None for (1, L).
        num_blocks: K; None for the layout's own. With 0 there is one readout, numbered 0, and nothing to write.
        gold: an answer whose probability is followed, and by which answers are right or wrong.
        seed: of the noise and of the blocks of the control.
        max_new_tokens: bound on the tokens of every readout; what is cut off there counts as it stands.

    Returns:
        JSON-ready: `format`, `question`, `num_blocks`, `actions` (those not kept), `layers`, `partner`, `unrelated`,
        `seed`, `gold`; `before` and `after` with `text`, `value`, `probability`, `right` and `readouts` (`block`,
        `text`, `value`, `probability`); `answer_changed`, `changed_blocks` (whose readout says something else);
        `answer_log_probability` of the answer before, natural logarithm, and `gold_probability`, both with `before`
        and `after`; `control` with `what`, `value`, `answer_changed`, `answer_log_probability`, or None.

    Raises:
        RiMError: a question that cannot be asked; a block, action or layer that does not exist; a swap without partner.
    """
    K = rim.layout.check_blocks(num_blocks)
    chosen = _checked_actions(actions, K)
    span = _checked_layers(layers, num_layers(rim))
    _check_seed(seed)
    if "swap" in chosen.values() and partner is None:
        raise RiMError("A swap needs a second question to take the block from; give one, or choose another action.")
    result = {
        "format": FORMAT,
        "question": question,
        "num_blocks": K,
        "actions": {str(block): action for block, action in chosen.items()},
        "layers": list(span),
        "partner": partner,
        "unrelated": unrelated,
        "seed": seed,
        "gold": gold,
    }
    _check_readable(rim, partner if "swap" in chosen.values() else None, "second", K)
    _check_readable(rim, unrelated, "unrelated", K)
    if unrelated is not None and rim.encode_question(unrelated) == rim.encode_question(question):
        raise RiMError("The unrelated question is the question itself; give another one.")
    clean = Patcher(rim, question, num_blocks=K)
    donors = Donors(clean)
    what, others, origin = _control(chosen, unrelated, K, seed) if chosen else ("", {}, None)
    edits = _edits(donors, chosen, partner, span, seed), _edits(donors, others, origin, span, seed)
    before, after, instead = (told.readouts for told in clean.answers([[], *edits], max_new_tokens))
    targets = [list(before[-1].token_ids)] + ([] if gold is None else [rim.encoder.answer_ids(gold)])
    scores = Patcher(rim, question, targets, num_blocks=K).score(edits)
    logs = {"before": scores.clean[0], "after": scores.log_probability[0]}
    return result | {
        "before": _told(before, gold),
        "after": _told(after, gold),
        "answer_changed": _differ(before[-1], after[-1]),
        "changed_blocks": [one.block for one, other in zip(before, after, strict=True) if _differ(one, other)],
        "answer_log_probability": {when: _rounded(log[0]) for when, log in logs.items()},
        "gold_probability": None if gold is None else {when: _rounded(log[1].exp()) for when, log in logs.items()},
        "control": {
            "what": what,
            "value": instead[-1].value,
            "answer_changed": _differ(before[-1], instead[-1]),
            "answer_log_probability": _rounded(scores.log_probability[1, 0]),
        }
        if others
        else None,
    }


def named(blocks: Iterable[int]) -> str:
    """“block 2”, “blocks 2, 3 and 5”."""
    *others, last = blocks
    return f"blocks {', '.join(map(str, others))} and {last}" if others else f"block {last}"


# ---------------------------------------------------------------------------------------------------- what is written


def _edits(
    donors: Donors, actions: Mapping[int, str], partner: str | None, span: tuple[int, int], seed: int
) -> list[Edit]:
    """The edits of every action, in the slots."""
    found: list[Edit] = []
    for block, action in actions.items():
        source = partner if action == "swap" else None
        variant = Variant([block], range(span[0], span[1] + 1), None, _MODES[action], source)
        # A block's noise depends on nothing but the seed and its place, whatever is done to others.
        found += donors.edits(variant, np.random.default_rng([seed, block]))
    return found


def _control(
    actions: Mapping[int, str], unrelated: str | None, K: int, seed: int
) -> tuple[str, dict[int, str], str | None]:
    """What is done instead, in words and as actions with their source; no actions where there is no honest control."""
    if unrelated is not None:
        return f"{named(actions)} taken from an unrelated question instead", dict.fromkeys(actions, "swap"), unrelated
    others = [block for block in range(1, K + 1) if block not in actions]
    # The partner's other blocks may rightly bring its answer, too: for swaps this would be no control.
    if "swap" in actions.values() or len(others) < len(actions):
        return "", {}, None
    drawn = sorted(np.random.default_rng([seed, K]).choice(others, len(actions), replace=False).tolist())
    done = dict(zip(drawn, actions.values(), strict=True))
    return f"the same done to {named(done)} instead", done, None


# ------------------------------------------------------------------------------------------------------ what is told


def _told(readouts: Sequence[Readout], gold: str | None) -> dict[str, Any]:
    shown = readouts[-1]
    return {
        "text": shown.text,
        "value": shown.value,
        "probability": _rounded(shown.probability),
        "right": None if gold is None else is_correct(shown.value, gold),
        "readouts": [
            {"block": one.block, "text": one.text, "value": one.value, "probability": _rounded(one.probability)}
            for one in readouts
        ],
    }


def _differ(one: Readout, other: Readout) -> bool:
    """Whether two readouts say something else; the same number written otherwise is the same."""
    return (one.value or one.text) != (other.value or other.text)


def _rounded(value: float) -> float:
    return round(float(value), 4)


# ----------------------------------------------------------------------------------------------------------- bad input


def _checked_actions(actions: Mapping[int, str], K: int) -> dict[int, str]:
    """Block -> action, those kept left out, by block."""
    if not isinstance(actions, Mapping):
        raise RiMError('Name the actions by block, such as {2: "blank"}.')
    found = {}
    for block, action in actions.items():
        number = int(block) if isinstance(block, str) and block.isascii() and block.isdecimal() else block
        if not isinstance(number, int) or isinstance(number, bool) or not 1 <= number <= K:
            there = f"blocks are numbered 1 to {K}" if K else "without memory blocks there is nothing to operate on"
            raise RiMError(f"There is no block {str(block)[:30]!r}; {there}.")
        if action not in ACTIONS:
            raise RiMError(f"Unknown action {str(action)[:30]!r}; choose one of {', '.join(ACTIONS)}.")
        if action != "keep":
            found[number] = action
    return dict(sorted(found.items()))


def _checked_layers(layers: tuple[int, int] | None, count: int) -> tuple[int, int]:
    if layers is None:
        return 1, count
    bounds = list(layers) if isinstance(layers, (tuple, list)) else []
    if len(bounds) != 2 or not all(isinstance(x, int) and not isinstance(x, bool) and 0 <= x <= count for x in bounds):
        raise RiMError(f"Name the layers as a first and a last one, each from 0 (embeddings) to {count}.")
    if bounds[0] > bounds[1]:
        raise RiMError(f"The first layer, {bounds[0]}, comes after the last one, {bounds[1]}; turn them round.")
    return bounds[0], bounds[1]


def _check_seed(seed: int) -> None:
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise RiMError(f"The seed must be a whole number from 0 on, not {str(seed)[:30]!r}.")


def _check_readable(rim: RiM, question: str | None, which: str, K: int) -> None:
    if question is None:
        return
    try:
        rim.prompt_ids(question, "memory", K)
    except RiMError as error:
        message = str(error)
        raise RiMError(f"The {which} question cannot be used: {message[:1].lower()}{message[1:]}") from None
