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
4. The rank of the result of every known step among all tokens of the vocabulary, by the logit lens (1 is the top): at
   the best position of each block, and of all blocks. The best of many positions is good by chance alone, so the
   control is the best of as many.

Knows states, lenses and maps. Knows nothing of how a lens or a map was fitted, of what is right, or of the screen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
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
from rim_probe.probing.lens import LENSES, VocabularyLens, first_token, places, token_ranks

if TYPE_CHECKING:
    from rim_probe.decoding import Answer, Readout
    from rim_probe.probing.nearest_step.fit import StepDecoder
    from rim_probe.probing.study import Observation

TOP = 5
DIGITS = 4
UNTRAINED = "the base model's untrained memory on the same question"
_SIGNS = str.maketrans({" ": "␣", "\n": "↵", "\t": "⇥"})


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

    def shape(rim: RiM) -> tuple:
        head = causal_lm(rim).get_output_embeddings().weight  # [V, d]
        return num_layers(rim), tuple(head.shape), rim.layout.slots_per_block

    return shape(first) == shape(second)


def _mode(
    scores: Iterable[tuple[torch.Tensor, torch.Tensor | None]], text: Callable[[int], str], control: str, **about: Any
) -> dict[str, Any]:
    """What is likeliest in every cell, beside the control and less the control.

    Args:
        scores: of each layer [positions, candidates], and those of the control, if there is one.
        text: of a candidate.
        control: what the control is.
    """
    found: dict[str, list] = {"cells": [], "control_cells": [], "minus": []}
    for own, untrained in scores:
        found["cells"].append(_best(own, text))
        if untrained is not None:
            found["control_cells"].append(_best(untrained, text))
            found["minus"].append(_best(own - untrained, text))
    told = {name: cells or None for name, cells in found.items()}
    return about | told | {"control": control if told["control_cells"] else None}


def _best(scores: torch.Tensor, text: Callable[[int], str]) -> list[list[dict[str, Any]]]:
    """The `TOP` candidates of each row of scores, best first."""
    best = scores.topk(min(TOP, scores.shape[1]))
    return [
        [{"text": text(id), "score": round(score, DIGITS)} for id, score in zip(*row, strict=True)]
        for row in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


# --------------------------------------------------------------------------------------------------- logit, tuned lens


def lens_modes(lens: VocabularyLens, observation: Observation, control: Control, tuned: bool) -> list[dict[str, Any]]:
    """What the lenses read in every slot and block end: one mode, or two where the translators are fitted."""
    base = VocabularyLens(control.rim, lens.layers, lens.weights, lens.biases, {}) if control.rim is not None else None
    whats = {
        "logit": "Each state goes through the model's own last step, as if the model ended at that layer; early layers "
        "need not speak this language.",
        "tuned": "The same with a small correction fitted for every layer; the correction alone already favours usual "
        "words, which is why the control goes through it, too.",
    }

    def scores(name: str) -> Iterable[tuple[torch.Tensor, torch.Tensor | None]]:
        for layer in lens.layers:
            own = lens.logits(_states(observation.capture, layer), layer, name).softmax(-1)
            against = base and base.logits(_states(control.capture, layer), layer, name).softmax(-1).to(own.device)
            yield own, against

    return [
        _mode(
            scores(name),
            lambda token: token_text(lens.rim, token),
            f"{UNTRAINED}, through the same lens and its own head",
            name=f"{name} lens",
            what=whats[name],
            score_name="probability",
            layers=list(lens.layers),
            positions=[{"block": block, "position": place} for block, place in places(observation.capture)],
        )
        for name in (LENSES if tuned else LENSES[:1])
    ]


def token_text(rim: RiM, token: int) -> str:
    """A token as a person reads it: white space by its signs, what has no text by its name in the vocabulary."""
    text = rim.tokenizer.decode([token])
    return text.strip() or text.translate(_SIGNS) or str(rim.tokenizer.convert_ids_to_tokens(token))


def _states(held: Capture, layer: int) -> np.ndarray:
    """float32 [K * (M + 1), d], in the order of `places`."""
    return np.concatenate([held.cell(layer, block, position) for block, position in places(held)])


# -------------------------------------------------------------------------------------------------------- nearest step


def step_mode(decoder: StepDecoder, observation: Observation, control: Control) -> dict[str, Any] | None:
    """The nearest explicit steps at every layer, block by block; None where no block asked for has a map."""
    held, bank = observation.capture, decoder.bank
    chosen = {b: decoder.headline(b) for b in sorted({block for block, _ in decoder.maps}) if b <= held.K}
    if not chosen:
        return None
    maps = {block: decoder.maps[block, step] for block, step in chosen.items()}

    def cosines(seen: Capture | None, layer: int) -> torch.Tensor | None:
        """[blocks, bank]"""
        if seen is None:
            return None
        rows = [one.mapped.cosines(seen.cell(layer, block, "slots"), bank.vectors)[0] for block, one in maps.items()]
        return torch.from_numpy(np.stack(rows))

    fitted = sorted({one.layer for one in maps.values()})
    where = ", ".join(f"block {block}: layer {one.layer}" for block, one in maps.items())
    return _mode(
        ((cosines(held, layer), cosines(control.capture, layer)) for layer in held.layers),
        bank.texts.__getitem__,
        f"{UNTRAINED}, through the same maps",
        name="nearest step",
        what="The explicit step that each block lies nearest to, by a map that was fitted for that block at one layer "
        f"({where if len(fitted) > 1 else f'layer {fitted[0]}'}) and is applied to the other layers as it is, where it "
        "may well be at a loss.",
        score_name="cosine",
        layers=list(held.layers),
        positions=[
            {"block": block, "position": "slots", "step": chosen[block], "fitted_layer": one.layer}
            for block, one in maps.items()
        ],
    )


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
    rim, K = lens.rim, observation.capture.K
    found = {step: equation.result.text for step, text in enumerate(steps, 1) if (equation := read_equation(text))}
    tokens = {step: first_token(rim, value) for step, value in found.items()}
    tokens = {step: token for step, token in tokens.items() if token != rim.tokenizer.unk_token_id}
    if not tokens:
        return []
    wanted = list(tokens.values())
    own = _ranks(lens, observation.capture, wanted)  # [layers, K, values]
    best = own.min(1)
    against, name = None, "none: there is no base model, and no other step to compare with"
    if control.capture is not None:
        against = _ranks(VocabularyLens.plain(control.rim), control.capture, wanted).min(1)
        name = UNTRAINED
    elif all(others := [[i for i, other in enumerate(wanted) if other != token] for token in wanted]):
        against = np.stack([np.median(best[:, other], axis=1) for other in others], 1)
        name = "the results of the other steps (median rank)"
    return [
        {
            "value": found[step],
            "step": step,
            "what": f"result of {whose} step {step}{', the last' * (step == len(steps))}{_pieces(rim, found[step])}",
            "layers": list(lens.layers),
            "best": _plain(best[:, i]),
            "by_block": [_plain(own[:, block, i]) for block in range(K)],
            "control": None if against is None else _plain(against[:, i]),
            "control_name": name,
        }
        for i, step in enumerate(tokens)
    ]


def _ranks(lens: VocabularyLens, held: Capture, tokens: Sequence[int]) -> np.ndarray:
    """The best rank of each token among the positions of every block, [layers, K, tokens]."""
    found = []
    for layer in lens.layers:
        logits = lens.logits(_states(held, layer), layer, "logit")
        ranks = token_ranks(logits, torch.tensor([tokens] * len(logits), device=logits.device))
        found.append(ranks.cpu().numpy().reshape(held.K, held.M + 1, -1).min(1))
    return np.stack(found)


def _pieces(rim: RiM, value: str) -> str:
    """What to add where a value is more than one token: only its first one is looked for."""
    ids = rim.encode_text(value)
    return f" (its first piece, {token_text(rim, ids[0])})" if len(ids) > 1 else ""


def _plain(ranks: np.ndarray) -> list[int | float]:
    return [int(rank) if rank == int(rank) else float(rank) for rank in ranks]
