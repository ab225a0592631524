"""Depth: what every layer holds at every memory position of one question, each way of reading beside its control.

Method, mode by mode; in all of them layer 0 is the embeddings and layer L the last one:
1. "logit lens", "tuned lens": the likeliest tokens by the vocabulary lens (`lens`), in every slot and block end.
   Control: the base model's untrained memory on the same question, through the same translators and its own head. What
   is left of a token's probability when the control's is taken away (`minus`) is what training put there.
2. "nearest step": every block is read for the step that it lies nearest to, by the map that was fitted for it at one
   layer; that map is applied to all layers as it is. Control: the same maps on the base model's untrained memory.
3. "own words": the slots of one layer are carried into the stage-1 model, which then speaks after every block
   (`words`). Control: the same model with its own slots. Where the words are the same, that layer's slots did not
   matter. `minus` is how much likelier carrying made the words said, teacher-forced in the control's run.
4. The rank of the result of every known step among all tokens of the vocabulary, by the logit lens (1 is the top; ties
   share their mean, so that a state that says nothing has the middle rank): at the best position of each block, and of
   all blocks. The best of many positions is good by chance alone, so the control is the best of as many.

Knows states, lenses and maps. Knows nothing of how a lens or a map was fitted, of what is right, or of the screen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rim_probe.equations import read_equation
from rim_probe.errors import RiMError
from rim_probe.model import RiM
from rim_probe.probing.capture import Capture, capture
from rim_probe.probing.commitment import memory_course
from rim_probe.probing.hooks import causal_lm, num_layers
from rim_probe.probing.lens import VocabularyLens
from rim_probe.probing.lens_reading import LENSES, first_token, places, token_text

if TYPE_CHECKING:
    from rim_probe.decoding import Answer, Readout
    from rim_probe.probing.nearest_step.fit import StepDecoder
    from rim_probe.probing.study import Observation

TOP = 5
DIGITS = 4
UNTRAINED = "the base model's untrained memory on the same question"


@dataclass(frozen=True)
class Control:
    """The base model's untrained memory on the same question.

    Attributes:
        rim, capture: the base model and what it held; None where there is none to compare with.
        missing: why there is none, as a sentence; empty where there is one.
    """

    rim: RiM | None = None
    capture: Capture | None = None
    missing: str = ""

    @classmethod
    def of(cls, models: Mapping[str, RiM], observation: Observation) -> Control:
        """The control for a question; one that cannot be compared position by position is no control."""
        base, held = models.get("base"), observation.capture
        if base is None:
            return cls(missing="There is no base model beside this checkpoint, so the lenses have no control here.")
        if not same_shape(base, models["memory"]):
            return cls(missing="The base model has another shape than the memory model, so it is no control here.")
        try:
            own = capture(base, observation.question, attention=False, num_blocks=held.K)
        except RiMError as error:
            return cls(missing=f"The base model cannot be asked this question, so there is no control: {error}")
        if own.question_ids != held.question_ids or base.memory_ids != models["memory"].memory_ids:
            return cls(missing="The base model has other tokens than the memory model, so it is no control here.")
        return cls(base, own)


def same_shape(first: RiM, second: RiM) -> bool:
    """Whether states of one model can be read, or put in, at the same place of the other."""
    shapes = [
        (
            num_layers(rim),
            causal_lm(rim).config.hidden_size,
            causal_lm(rim).get_output_embeddings().weight.shape[0],
            rim.layout.slots_per_block,
        )
        for rim in (first, second)
    ]
    return shapes[0] == shapes[1]


# --------------------------------------------------------------------------------------------------- logit, tuned lens


def plain_lens(rim: RiM) -> VocabularyLens:
    """A lens without translators: its logit lens is all that may be asked of it."""
    return VocabularyLens(rim, range(num_layers(rim) + 1), torch.empty(0), torch.empty(0), {})


def lens_modes(lens: VocabularyLens, observation: Observation, control: Control, tuned: bool) -> list[dict[str, Any]]:
    """What the lenses read in every slot and block end: one mode, or two where the translators are fitted."""
    other = VocabularyLens(control.rim, lens.layers, lens.weights, lens.biases, {}) if control.rim is not None else None
    whats = {
        "logit": "Each state goes through the model's own last step, as if the model ended at that layer; early layers "
        "need not speak this language.",
        "tuned": "The same with a small correction fitted for every layer; the correction alone already favours usual "
        "words, which is why the control goes through it, too.",
    }
    modes = []
    for name in LENSES if tuned else LENSES[:1]:
        cells, control_cells, minus = [], [], []
        for layer in lens.layers:
            own = lens.logits(_states(observation.capture, layer), layer, name).softmax(-1)
            cells.append(_tokens(lens.rim, own))
            if other is not None:
                untrained = other.logits(_states(control.capture, layer), layer, name).softmax(-1).to(own.device)
                control_cells.append(_tokens(lens.rim, untrained))
                minus.append(_tokens(lens.rim, own - untrained))
        modes.append(
            {
                "name": f"{name} lens",
                "what": whats[name],
                "score_name": "probability",
                "layers": list(lens.layers),
                "positions": [{"block": block, "position": place} for block, place in places(observation.capture)],
                "cells": cells,
                "control": f"{UNTRAINED}, through the same lens and its own head" if other is not None else None,
                "control_cells": control_cells or None,
                "minus": minus or None,
            }
        )
    return modes


def _states(held: Capture, layer: int) -> np.ndarray:
    """float32 [K * (M + 1), d], in the order of `places`."""
    return np.concatenate([held.cell(layer, block, position) for block, position in places(held)])


def _tokens(rim: RiM, scores: torch.Tensor) -> list[list[dict[str, Any]]]:
    """The `TOP` tokens of each row of scores [P, V], best first."""
    best = scores.topk(min(TOP, scores.shape[1]))
    ids, found = best.indices.tolist(), best.values.tolist()
    texts = {id: token_text(rim, id) for id in {id for row in ids for id in row}}
    return [
        [{"text": texts[id], "score": round(score, DIGITS)} for id, score in zip(*row, strict=True)]
        for row in zip(ids, found, strict=True)
    ]


# -------------------------------------------------------------------------------------------------------- nearest step


def step_mode(decoder: StepDecoder, observation: Observation, control: Control) -> dict[str, Any] | None:
    """The nearest explicit steps at every layer, block by block; None where no block asked for has a map."""
    held = observation.capture
    blocks = [block for block in sorted({block for block, _ in decoder.maps}) if block <= held.K]
    chosen = [(block, decoder.headline(block)) for block in blocks]
    if not chosen:
        return None
    positions, columns = [], []
    for block, step in chosen:
        one = decoder.maps[block, step]
        positions.append({"block": block, "position": "slots", "step": step, "fitted_layer": one.layer})
        columns.append((block, one.mapped))

    def cosines(seen: Capture) -> np.ndarray:
        """[layers, positions, bank]"""
        return np.stack(
            [
                [m.cosines(seen.cell(layer, block, "slots"), decoder.bank.vectors)[0] for block, m in columns]
                for layer in held.layers
            ]
        )

    def named(scores: np.ndarray) -> list:
        order = np.argsort(-scores, axis=-1, kind="stable")[..., :TOP]
        return [
            [
                [{"text": decoder.bank.texts[i], "score": round(float(row[i]), DIGITS)} for i in best]
                for best, row in zip(of_layer, rows, strict=True)
            ]
            for of_layer, rows in zip(order, scores, strict=True)
        ]

    own = cosines(held)
    untrained = cosines(control.capture) if control.capture is not None else None
    return {
        "name": "nearest step",
        "what": "The explicit step that each block lies nearest to, by a map that was fitted for that block at one "
        f"layer ({_fitted_at(positions)}) and is applied to the other layers as it is, where it may well be at a loss.",
        "score_name": "cosine",
        "layers": list(held.layers),
        "positions": positions,
        "cells": named(own),
        "control": f"{UNTRAINED}, through the same maps" if untrained is not None else None,
        "control_cells": named(untrained) if untrained is not None else None,
        "minus": named(own - untrained) if untrained is not None else None,
    }


def _fitted_at(positions: Sequence[Mapping[str, Any]]) -> str:
    layers = sorted({place["fitted_layer"] for place in positions})
    if len(layers) == 1:
        return f"layer {layers[0]}"
    return ", ".join(f"block {place['block']}: layer {place['fitted_layer']}" for place in positions)


# ----------------------------------------------------------------------------------------------------------- own words


def words_mode(stage1: RiM, observation: Observation, plain: Answer, by_layer: Mapping[int, Answer]) -> dict[str, Any]:
    """What the stage-1 model says with the slots of one layer carried in.

    Args:
        plain: its answer with its own slots.
        by_layer: its answers with the slots of one of the layers 0..L carried, all readouts in each.
    """
    K = observation.capture.K
    room = stage1.max_length - len(stage1.prompt_ids(observation.question, "memory", K)) + 1
    # Babble after an early block may not fit after the last one.
    every = dict.fromkeys(readout.token_ids for given in by_layer.values() for readout in given.readouts)
    said = [ids for ids in every if len(ids) <= room]
    course = memory_course(stage1, [observation.question] * len(said), said, K).probability if said else []
    without = dict(zip(said, course, strict=True))  # words -> [K], said with its own slots

    def cell(readout: Readout, less: float = 0.0) -> list[dict[str, Any]]:
        return [{"text": readout.text.strip(), "score": round(readout.probability - less, DIGITS)}]

    def gain(readout: Readout) -> list[dict[str, Any]]:
        own = without.get(readout.token_ids)
        return [] if own is None else cell(readout, float(own[readout.block - 1]))

    return {
        "name": "own words",
        "what": "What the stage-1 model, which was trained to say its next step after every block, says when the slots "
        "of this layer are put in place of its own.",
        "score_name": "probability",
        "layers": list(by_layer),
        "positions": [{"block": block, "position": "slots"} for block in range(1, K + 1)],
        "cells": [[cell(readout) for readout in given.readouts] for given in by_layer.values()],
        "control": "the stage-1 model with its own slots; the same words mean that the slots carried in do not matter",
        "control_cells": [[cell(readout) for readout in plain.readouts] for _ in by_layer],
        "minus": [[gain(readout) for readout in given.readouts] for given in by_layer.values()],
    }


# --------------------------------------------------------------------------------------------------------------- ranks


def ranks(
    lens: VocabularyLens, observation: Observation, control: Control, steps: Sequence[str], whose: str
) -> list[dict[str, Any]]:
    """How high the result of every step ranks among all tokens, by the logit lens, layer by layer.

    Args:
        steps: such as "<<3+4=7>>"; those that are no equations have no result to look for.
        whose: "gold" or "chain of thought", as the sentences name the steps.
    """
    rim, held = lens.rim, observation.capture
    found = {step: equation for step, text in enumerate(steps, 1) if (equation := read_equation(text)) is not None}
    tokens = {step: first_token(rim, equation.result.text) for step, equation in found.items()}
    tokens = {step: token for step, token in tokens.items() if token != rim.tokenizer.unk_token_id}
    if not tokens:
        return []
    wanted = torch.tensor(list(tokens.values()), device=rim.device)
    own = _ranks(lens, held, wanted)  # [layers, K, values]
    best = own.min(1)
    if control.capture is not None:
        untrained = VocabularyLens(control.rim, lens.layers, lens.weights, lens.biases, {})
        against, name = _ranks(untrained, control.capture, wanted).min(1), UNTRAINED
    else:
        others = [[other for other in range(len(wanted)) if wanted[other] != wanted[own]] for own in range(len(wanted))]
        known = all(others)
        against = np.stack([np.median(best[:, other], axis=1) for other in others], 1) if known else None
        name = (
            "the results of the other steps (median rank)"
            if known
            else "none: there is no base model, and no other step to compare with"
        )
    last = len(steps)
    return [
        {
            "value": found[step].result.text,
            "step": step,
            "what": f"result of {whose} step {step}{', the last' if step == last else ''}"
            + _pieces(rim, found[step].result.text),
            "layers": list(lens.layers),
            "best": _plain(best[:, i]),
            "by_block": [_plain(own[:, block, i]) for block in range(held.K)],
            "control": None if against is None else _plain(against[:, i]),
            "control_name": name,
        }
        for i, step in enumerate(tokens)
    ]


def _ranks(lens: VocabularyLens, held: Capture, wanted: torch.Tensor) -> np.ndarray:
    """The best rank of each of `wanted` [n] among the positions of every block, [layers, K, n]."""
    found = []
    for layer in lens.layers:
        logits = lens.logits(_states(held, layer), layer, "logit")
        at = wanted.to(logits.device)
        own = logits[:, at]
        above = torch.stack([(logits > column[:, None]).sum(1) for column in own.T], 1)
        equal = torch.stack([(logits == column[:, None]).sum(1) for column in own.T], 1)
        rank = (above + (equal + 1) / 2).cpu().numpy()
        found.append(rank.reshape(held.K, held.M + 1, -1).min(1))
    return np.stack(found)


def _pieces(rim: RiM, value: str) -> str:
    """What to add where a value is more than one token: only its first one is looked for."""
    ids = rim.encode_text(value)
    return f" (its first piece, {token_text(rim, ids[0])})" if len(ids) > 1 else ""


def _plain(ranks: np.ndarray) -> list[int | float]:
    return [int(rank) if rank == int(rank) else float(rank) for rank in ranks]
