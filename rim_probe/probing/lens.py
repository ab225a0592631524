"""Vocabulary lens: which words the model's own head reads in a memory state, at every layer.

Method:
1. Logit lens (nostalgebraist 2020): residual states of any layer go through the final norm and the head, as if the
   model ended there.
2. Tuned lens (Belrose et al. 2023, arXiv:2303.08112, section 3): before that each layer l < L has its own affine
   translator `h + A h + b`, begun at the identity (A = 0, b = 0) and fitted by Adam to the least
   `KL(p_L || p_lens)`, p_L being the model's own distribution at the SAME position. Fitted on the slots and block ends
   of split "fit"; when to stop is chosen on "choose". Layer L needs none: there both lenses are the model. Translators
   too large to ship are replaced by ones of low rank (`lens_store`).
3. Faithfulness, on "report": KL by layer for both lenses, beside a lens that knows only the cell (the mean of p_L over
   the questions of "fit" at that block and position) and nothing of the question.
4. Content, on "report": rank and probability of the result of step t, by its first token as the tokenizer writes it, at
   every layer, block and position. The cell of the table is the one on "choose" whose mean reciprocal rank most
   exceeds that of another problem's result.
   Controls in the same cell: another problem's result, the step's own operand (are these just the question's numbers?),
   the base model's memory tokens, and the last question token.
   A result that equals the answer is left out unless it is that of the last step: every readout is trained to say the
   answer, so finding it says nothing of the step.

Knows states, heads and translators. Knows nothing of attention, interventions or how a table is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rim_probe.errors import RiMError
from rim_probe.model import RiM
from rim_probe.probing import lens_store
from rim_probe.probing.compact import is_large
from rim_probe.probing.hooks import causal_lm, unembed
from rim_probe.probing.lens_reading import CHUNK_STATES, LENSES, kl_divergence, places, read_all
from rim_probe.probing.lens_report import report
from rim_probe.probing.section import Section

if TYPE_CHECKING:
    from rim_probe.probing.study import Study

FIT_ROWS = 24_000  # states per layer; 200 per parameter row of a model as wide as 120, and 300 MB at width 3,072
CHOOSE_ROWS = 4_800
FIT_STEPS = 600
BATCH_ROWS = 256
LEARNING_RATE = 3e-3  # with 600 steps of 256 states the least KL on “choose” among four settings tried on rim-tiny
CHECK_EVERY = 50


class VocabularyLens:
    """Logit and tuned lens of one memory model.

    Attributes:
        rim: the model whose head reads.
        layers: 0..L; the last one has no translator.
        weights [L, d, d], biases [L, d]: the translators, float32 on the model's device; a row of states h becomes
            `h + h @ weights[l] + biases[l]`.
        factors [L, 2, r, d]: of translators of low rank (`lens_store`); None where they are whole.
        history: how the fit went: mean KL on "choose" by layer where it stopped, and after how many steps; of
            translators of low rank what they cost.
    """

    def __init__(
        self,
        rim: RiM,
        layers: Sequence[int],
        weights: torch.Tensor,
        biases: torch.Tensor,
        history: dict,
        factors: np.ndarray | None = None,
    ):
        self.rim, self.layers, self.history, self.factors = rim, tuple(layers), history, factors
        self.weights, self.biases = weights.to(rim.device), biases.to(rim.device)

    # ------------------------------------------------------------------------------------------------------------ fit

    @classmethod
    def fit(cls, study: Study, *, steps: int = FIT_STEPS, rows: int = FIT_ROWS) -> VocabularyLens:
        """Fits one translator per layer on the memory states of split "fit".

        Args:
            steps: of Adam, `BATCH_ROWS` states each; the best of every `CHECK_EVERY` on "choose" is kept.
            rows: states drawn per layer, equally from every block and position.
        """
        rim = study.models["memory"]
        samples = {}
        for split, most in (("fit", rows), ("choose", CHOOSE_ROWS)):
            samples[split] = _Sample(study.capture("memory", split), most, study.rng(f"lens {split}"))
        final = study.layers[-1]
        targets = {split: torch.from_numpy(sample.states(final)) for split, sample in samples.items()}
        order, width = study.rng("lens batches"), targets["fit"].shape[1]
        large = is_large([np.broadcast_to(np.float32(0), (len(study.layers) - 1, width, width))])
        found, pairs, low = [], [], []
        for layer in study.progress(study.layers[:-1], "tuned lens"):
            inputs = {split: torch.from_numpy(sample.states(layer)) for split, sample in samples.items()}
            found.append(_translator(rim, inputs, targets, steps, order))
            if large:
                pairs.append(lens_store.factors(found[-1][0].cpu().numpy(), inputs["fit"].numpy()))
                low.append([_low_rank_kl(rim, inputs, targets, pairs[-1], r, found[-1][1]) for r in lens_store.RANKS])
        weights, biases, kl, stopped = zip(*found, strict=True)
        history = {
            "choose_kl": list(kl),
            "steps": list(stopped),
            "fit_rows": len(targets["fit"]),
            "rate": LEARNING_RATE,
        }
        if not large:
            return cls(rim, study.layers, torch.stack(weights), torch.stack(biases), history)
        tried = dict(zip(lens_store.RANKS, np.mean(low, axis=0).tolist(), strict=True))
        rank = lens_store.choose_rank(float(np.mean(kl)), tried)
        history["low rank"] = {
            "rank": rank,
            "mean KL on choose, whole translators": float(np.mean(kl)),
            "mean KL on choose by rank": {str(r): value for r, value in tried.items()},
        }
        factors = lens_store.restored(lens_store.stored(np.stack(pairs)[:, :, :rank]))  # as they come back
        return cls(rim, study.layers, _whole(factors), torch.stack(biases), history, factors)

    # ----------------------------------------------------------------------------------------------------------- read

    @torch.no_grad()
    def logits(self, states: torch.Tensor | np.ndarray, layer: int, lens: str = "tuned") -> torch.Tensor:
        """float32 logits [..., V] of states [..., d] of one layer; `lens` is `logit` or `tuned`."""
        if lens not in LENSES:
            raise RiMError(f"There is no lens {lens!r}; choose one of {', '.join(LENSES)}.")
        states = torch.as_tensor(states).to(self.rim.device).float()
        if lens == "tuned" and layer != self.layers[-1]:
            index = self.layers.index(layer)
            states = states + states @ self.weights[index] + self.biases[index]
        return unembed(self.rim, states)

    # ---------------------------------------------------------------------------------------------------------- score

    def score(self, study: Study) -> Section:
        """Faithfulness of both lenses and what they read of the gold results; see the head of this module."""
        reading = {split: read_all(self, study, split) for split in ("choose", "report")}
        others = {}
        if "base" in study.models:
            plain = VocabularyLens(study.models["base"], self.layers, self.weights * 0, self.biases * 0, {})
            others["base"] = read_all(plain, study, "report", role="base", lenses=("logit",))
        return report(self, study, reading["choose"], reading["report"], others)

    # ------------------------------------------------------------------------------------------------------ artifacts

    def tensors(self) -> dict[str, np.ndarray]:
        weights = {"weights": self.weights.cpu().numpy()} if self.factors is None else lens_store.stored(self.factors)
        return weights | {"biases": self.biases.cpu().numpy()}

    def settings(self) -> dict[str, Any]:
        return {"layers": list(self.layers), "history": self.history}

    @classmethod
    def restore(cls, tensors: dict[str, np.ndarray], settings: dict[str, Any], rim: RiM) -> VocabularyLens:
        """The lens that `tensors` and `settings` came from, for the model it was fitted on."""
        factors, biases = lens_store.restored(tensors), torch.as_tensor(tensors["biases"])
        weights = torch.as_tensor(tensors["weights"]) if factors is None else _whole(factors)
        width, layers = causal_lm(rim).config.hidden_size, settings["layers"]
        if weights.shape != (len(layers) - 1, width, width) or biases.shape != (len(layers) - 1, width):
            raise RiMError(
                f"The tuned lens has translators of shape {tuple(weights.shape)}, which do not fit {rim.name}; "
                "fit it again for this checkpoint."
            )
        return cls(rim, layers, weights, biases, settings["history"], factors)


# ------------------------------------------------------------------------------------------------------------- the fit


class _Sample:
    """The same `most` states (at the most) of every layer: equally many questions from every block and position."""

    def __init__(self, held, most: int, rng: np.random.Generator):
        self._held = held
        everywhere = list(places(held))
        count = min(held.num_questions, max(1, most // len(everywhere)))
        self._chosen = [(place, rng.choice(held.num_questions, count, replace=False)) for place in everywhere]

    def states(self, layer: int) -> np.ndarray:
        """float32 [rows, d]"""
        return np.concatenate([self._held.cell(layer, *place)[rows] for place, rows in self._chosen])


def _translator(rim: RiM, inputs: dict, targets: dict, steps: int, order: np.random.Generator) -> tuple:
    """One layer's (weight [d, d], bias [d], mean KL on "choose", steps until then); see the head of this module."""
    width = inputs["fit"].shape[1]
    weight = torch.zeros(width, width, device=rim.device, requires_grad=True)
    bias = torch.zeros(width, device=rim.device, requires_grad=True)
    optimizer = torch.optim.Adam([weight, bias], lr=LEARNING_RATE)
    best = None
    for step in range(steps + 1):
        if step % CHECK_EVERY == 0 or step == steps:
            reached = _choose_kl(rim, inputs, targets, weight, bias)
            if best is None or reached < best[2]:
                best = (weight.detach().clone(), bias.detach().clone(), reached, step)
        if step < steps:
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - step / steps)
            rows = torch.from_numpy(order.integers(0, len(inputs["fit"]), BATCH_ROWS))
            # The model's own weights ask for gradients, too; only the translator gets any.
            lost = _divergence(rim, inputs["fit"][rows], targets["fit"][rows], weight, bias).mean()
            weight.grad, bias.grad = torch.autograd.grad(lost, (weight, bias))
            optimizer.step()
    return best


def _divergence(rim: RiM, states: torch.Tensor, finals: torch.Tensor, weight, bias) -> torch.Tensor:
    """KL of the model's own distribution to that of a translator, [n]; states and final states [n, d]."""
    states = states.to(rim.device)
    with torch.no_grad():
        wanted = unembed(rim, finals).log_softmax(-1)
    return kl_divergence(wanted, unembed(rim, states + states @ weight + bias).log_softmax(-1))


@torch.no_grad()
def _choose_kl(rim: RiM, inputs: dict, targets: dict, weight: torch.Tensor, bias: torch.Tensor) -> float:
    """The mean KL of a translator on "choose"."""
    parts = zip(inputs["choose"].split(CHUNK_STATES), targets["choose"].split(CHUNK_STATES), strict=True)
    return torch.cat([_divergence(rim, *part, weight, bias) for part in parts]).mean().item()


def _low_rank_kl(rim: RiM, inputs: dict, targets: dict, pair: np.ndarray, rank: int, bias: torch.Tensor) -> float:
    """The mean KL on "choose" of a translator made of factors [2, r, d] at a rank."""
    weight = torch.from_numpy(lens_store.of_rank(pair, rank)).to(rim.device)
    return _choose_kl(rim, inputs, targets, weight, bias)


def _whole(factors: np.ndarray) -> torch.Tensor:
    """Translators [L, d, d] of factors [L, 2, r, d]."""
    return torch.from_numpy(np.stack([lens_store.of_rank(pair, pair.shape[1]) for pair in factors]))
