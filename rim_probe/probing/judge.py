"""A linear judge: the chance that a readout is right, read from the states of the memory that stands before it.

Method:
1. A view says which states the judge of readout k sees: those of block k on the penultimate layer (`end`, `slots` or
   `both`; the probe of arXiv:2605.30343), those of all blocks on layers 1..L (`memory`), or, as a control, those of
   the last question token (`question` on the penultimate layer, `question everywhere` on those of `memory`). The wide
   views, `memory` and `question everywhere`, see at most `WIDE_LAYERS` layers, evenly spread: all of a shallow model.
2. States are standardised; in the wide views each cell (layer, block) is reduced to its leading principal components.
   Optionally the readout's own log odds and the share of readouts that agree with it stand beside them.
3. Logistic regression, one per readout, fitted on one split. The strength of its penalty is chosen on another: the
   highest AUROC, mean over the readouts.
4. All of it is affine and kept as one vector per readout (`linear`). On the split that chose, one slope and one offset
   for all readouts make its log odds calibrated (Platt 1999).

Knows states and outcomes. Knows nothing of models, problems or reports.
"""

import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import expit

from rim_probe.decoding import Answer
from rim_probe.errors import RiMError
from rim_probe.probing.capture import Capture, CaptureSet
from rim_probe.probing.compact import is_large, packed, rounded, unpacked
from rim_probe.probing.hooks import spread_layers
from rim_probe.probing.linear import Inputs, LinearMap
from rim_probe.probing.selective import agreement, auroc

OWN_VIEWS = ("end", "slots", "both")
WIDE_VIEWS = ("memory", "question everywhere")
PENALTIES = (0.001, 0.01, 0.1, 1.0)  # C of scikit-learn: the smaller, the stronger
WIDE_LAYERS = 6  # most layers that a wide view sees, spread evenly over 1..L
COMPONENTS = 32  # principal components kept of a cell in wide views
READOUTS = ("none", "own", "all")
_CERTAIN = 1e-6


@dataclass(frozen=True)
class Cell:
    """One part of a view: a layer, and a block's position (see `Capture.cell`) or, for block 0, the last question
    token."""

    layer: int
    block: int
    position: str = ""

    def read(self, capture: Capture | CaptureSet) -> np.ndarray:
        """Its states, float32 [n, F]."""
        if self.block == 0:
            return capture.question_cell(self.layer)
        if self.position == "both":
            slots, end = (capture.cell(self.layer, self.block, name) for name in ("slots", "end"))
            return np.concatenate([slots, end], axis=1)
        return capture.cell(self.layer, self.block, self.position)


def cells(view: str, layers: Sequence[int], num_blocks: int) -> list[list[Cell]]:
    """What the judge of each readout sees, [K][cells]; `layers` are all residual layers 0..L."""
    penultimate, blocks = layers[max(len(layers) - 2, 0)], range(1, num_blocks + 1)
    if view in OWN_VIEWS:
        return [[Cell(penultimate, block, view)] for block in blocks]
    wide = wide_layers(layers)
    shared = {
        "memory": [Cell(layer, block, "both") for layer in wide for block in blocks],
        "question": [Cell(penultimate, 0)],
        "question everywhere": [Cell(layer, 0) for layer in wide],
    }[view]
    return [shared] * num_blocks


def wide_layers(layers: Sequence[int]) -> list[int]:
    """What the wide views see of the residual layers 0..L."""
    return spread_layers(layers[1:], WIDE_LAYERS)


def readout_features(answers: Sequence[Answer], readouts: str, num_blocks: int) -> np.ndarray:
    """What the readouts say about themselves, [n, K, 0, 1 or 2]: own log odds, share of readouts that agree."""
    odds = log_odds(own_probability(answers, num_blocks))
    columns = {"none": [], "own": [odds], "all": [odds]}[readouts]
    if readouts == "all":
        # Times 4: about as wide a spread as the log odds have, so that the penalty weighs on both alike.
        columns.append(4 * agreement([[readout.value for readout in given.readouts] for given in answers]))
    return np.stack(columns, axis=2) if columns else np.zeros((*odds.shape, 0))


def own_probability(answers: Sequence[Answer], num_blocks: int) -> np.ndarray:
    """The probability each readout gave itself, [n, K]; NaN for readouts that were not asked for."""
    found = np.full((len(answers), num_blocks), np.nan)
    for row, given in zip(found, answers, strict=True):
        for readout in given.readouts:
            row[readout.block - 1] = readout.probability
    return found


def log_odds(probability: np.ndarray) -> np.ndarray:
    """Logit of probabilities, kept finite at 0 and 1."""
    clipped = np.clip(probability, _CERTAIN, 1 - _CERTAIN)
    return np.log(clipped / (1 - clipped))


def probability(logits: np.ndarray) -> np.ndarray:
    """Inverse of `log_odds`."""
    return expit(logits)


@dataclass(frozen=True)
class Judge:
    """A fitted judge of K readouts.

    Attributes:
        view, readouts: what it sees.
        layers: the residual layers 0..L of its model.
        weight [K, F + E]: on raw states, cell after cell, then on `readout_features`; bias [K].
        penalty: the C that was chosen.
    """

    view: str
    readouts: str
    layers: tuple[int, ...]
    weight: np.ndarray
    bias: np.ndarray
    penalty: float

    @property
    def num_blocks(self) -> int:
        return len(self.bias)

    @property
    def seen_layers(self) -> tuple[int, ...]:
        """The residual layers it reads, ascending."""
        view = cells(self.view, self.layers, self.num_blocks)
        return tuple(sorted({cell.layer for part in view for cell in part}))

    def logits(self, capture: Capture | CaptureSet, answers: Sequence[Answer]) -> np.ndarray:
        """Log odds that each readout is right, [n, K]; NaN where the judge reads what was not asked for.

        Raises:
            RiMError: a capture with another number of blocks than the judge was fitted on.
        """
        if self.num_blocks != capture.K:
            raise RiMError(
                f"This judge was fitted on {self.num_blocks} memory blocks, not {capture.K}; "
                "ask with as many, or fit it anew."
            )
        views = cells(self.view, self.layers, self.num_blocks)
        found = np.tile(self.bias, (capture.num_questions, 1))
        if self.readouts != "none":
            extra = readout_features(answers, self.readouts, self.num_blocks)
            found += (extra * self.weight[:, -extra.shape[2] :]).sum(axis=2)
        shared = all(view is views[0] for view in views)
        for rows, view in [(slice(None), views[0])] if shared else [(slice(k, k + 1), v) for k, v in enumerate(views)]:
            start = 0
            for cell in view:
                states = cell.read(capture)
                found[:, rows] += states @ self.weight[rows, start : start + states.shape[1]].T
                start += states.shape[1]
        return found

    def tensors(self) -> dict[str, np.ndarray]:
        weight = {"weight": self.weight.astype(np.float32)}
        return (packed("weight", self.weight) if is_large([self.weight]) else weight) | {
            "bias": self.bias.astype(np.float32)
        }

    def settings(self) -> dict[str, Any]:
        return {
            "view": self.view,
            "readouts": self.readouts,
            "layers": list(self.layers),
            "penalty": self.penalty,
        }

    @classmethod
    def restore(cls, tensors: Mapping[str, np.ndarray], settings: Mapping[str, Any]) -> "Judge":
        """The judge that `tensors` and `settings` came from.

        Raises:
            ValueError, KeyError, TypeError: parts that are missing or do not fit together.
        """
        weight, bias = unpacked(tensors, "weight"), np.asarray(tensors["bias"], dtype=float)
        if weight.ndim != 2 or bias.shape != weight.shape[:1]:
            raise ValueError(f"shapes {weight.shape} and {bias.shape}")
        view, readouts = settings["view"], settings["readouts"]
        if view not in (*OWN_VIEWS, *WIDE_VIEWS) or readouts not in READOUTS:
            raise ValueError(f"view {view!r} with readouts {readouts!r}")
        return cls(view, readouts, tuple(settings["layers"]), weight, bias, float(settings["penalty"]))


@dataclass(frozen=True)
class Sample:
    """One split as a judge is fitted or chosen on it: states, answers and outcomes `right` [n, K]."""

    capture: Capture | CaptureSet
    answers: Sequence[Answer]
    right: np.ndarray


def fit_judge(
    fit: Sample,
    choose: Sample,
    layers: Sequence[int],
    view: str,
    readouts: str = "none",
    *,
    penalties: Sequence[float] = PENALTIES,
    rows: np.ndarray | None = None,
    blocks: Sequence[int] | None = None,
    calibrate: bool = True,
    prepared: dict | None = None,
) -> Judge:
    """Fits the judges of all readouts and chooses the penalty (see the head of this module).

    Args:
        rows: indices of the fitting problems to use, all of them by default.
        blocks: readouts to be judged, 1..K, all by default; the others get the weights 0.
        calibrate: step 4.
        prepared: kept by the caller between fits on the same samples and rows, so that cells are read and reduced once.
    """
    from sklearn.linear_model import LogisticRegression

    num_blocks = fit.right.shape[1]
    rows = np.arange(len(fit.right)) if rows is None else rows
    chosen = range(num_blocks) if blocks is None else [block - 1 for block in blocks]
    views = cells(view, layers, num_blocks)
    extras = [readout_features(part.answers, readouts, num_blocks) for part in (fit, choose)]
    prepared = {} if prepared is None else prepared
    found: dict[float, dict[int, LinearMap]] = {penalty: {} for penalty in penalties}
    tested = {penalty: np.zeros(choose.right.shape) for penalty in penalties}
    for k in chosen:
        key, right = tuple(views[k]), fit.right[rows, k]
        if key not in prepared:
            states = [cell.read(fit.capture)[rows] for cell in views[k]]
            tried = np.concatenate([cell.read(choose.capture) for cell in views[k]], axis=1)
            prepared[key] = Inputs(states, COMPONENTS if view in WIDE_VIEWS else sys.maxsize), tried
        inputs, states = prepared[key]
        if readouts != "none":
            inputs = inputs.beside(Inputs([extras[0][rows, k]]))
            states = np.concatenate([states, extras[1][:, k]], axis=1)
        for penalty in penalties:
            if right.all() or not right.any():  # one class only: its log odds, by Laplace's rule
                odds = np.log((right.sum() + 1) / ((~right).sum() + 1))
                own = inputs.folded(np.zeros((inputs.fitted.shape[1], 1)), np.array([odds]))
            else:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # not converged: as good a judge, only less penalised
                    own = inputs.fit(LogisticRegression(C=penalty, max_iter=200), right)
            found[penalty][k], tested[penalty][:, k] = own, own(states)[:, 0]
    penalty = max(penalties, key=lambda c: np.nan_to_num(mean_auroc(tested[c], choose.right, chosen)))
    slope, offset = _platt(tested[penalty][:, chosen], choose.right[:, chosen]) if calibrate else (1.0, 0.0)
    weight = np.zeros((num_blocks, len(found[penalty][chosen[0]].weights)), np.float32)
    bias = np.zeros(num_blocks)
    for k, own in found[penalty].items():
        weight[k], bias[k] = slope * own.weights[:, 0], slope * own.bias[0] + offset
    if is_large([weight]):
        weight = rounded(weight)  # what is reported is what is stored
    return Judge(view, readouts, tuple(layers), weight, bias, penalty)


def mean_auroc(scores: np.ndarray, right: np.ndarray, columns: Sequence[int] | None = None) -> float:
    """AUROC of each readout, mean over the readouts that are right sometimes and wrong sometimes."""
    columns = range(right.shape[1]) if columns is None else columns
    found = [auroc(scores[:, k], right[:, k]) for k in columns]
    return float(np.nanmean(found)) if not np.all(np.isnan(found)) else float("nan")


def _platt(logits: np.ndarray, right: np.ndarray) -> tuple[float, float]:
    """Slope and offset that calibrate log odds; (1, 0) where that would turn the ranking round or cannot be told."""
    from sklearn.linear_model import LogisticRegression

    if right.all() or not right.any() or np.ptp(logits) == 0:
        return 1.0, 0.0
    model = LogisticRegression(C=1e3).fit(logits.reshape(-1, 1), right.ravel())
    slope = float(model.coef_[0, 0])
    return (slope, float(model.intercept_[0])) if slope > 0 else (1.0, 0.0)
