"""Vocabulary lens: which words the model's own head reads in a memory state, at every layer.

Method:
1. Logit lens (nostalgebraist 2020): residual states of any layer go through the final norm and the head, as if the
   model ended there.
2. Tuned lens (Belrose et al. 2023, arXiv:2303.08112, section 3): before that each layer l < L has its own affine
   translator `h + A h + b`, begun at the identity (A = 0, b = 0) and fitted by Adam to the least
   `KL(p_L || p_lens)`, p_L being the model's own distribution at the SAME position. Fitted on the slots and block ends
   of split "fit"; when to stop is chosen on "choose". Layer L needs none: there both lenses are the model.
3. Translators too large to ship (`compact`) become `A V V'`, V [d, `RANK`] being the leading right singular vectors of
   `X A` over the states X that A was fitted on: of all matrices of that rank the one that moves these states most
   nearly as A does. The factors `A V` and `V'` are rounded to 8 bits; what that costs in KL on "choose" is reported.
4. Faithfulness, on "report": KL by layer for both lenses, beside a lens that knows only the position (the mean of p_L
   over the questions of "fit" there) and nothing of the question.
5. Content, on "report": rank and probability of the result of step t, by its first token as the tokenizer writes it, at
   every layer and memory position. It is reported at the cell that on "choose" has the greatest lead of the result over
   another problem's, in mean reciprocal rank.
   Controls at the same layer: another problem's result, the step's own operand (are these just the question's
   numbers?), the base model's untrained memory (by its logit lens), and the last question token.
   A result that equals the answer is left out unless it is that of the last step: every readout is trained to say the
   answer, so finding it says nothing of the step.

Knows states, heads and translators. Knows nothing of attention and interventions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rim_probe.equations import read_equation
from rim_probe.errors import RiMError
from rim_probe.model import RiM
from rim_probe.probing.compact import is_large, packed, rounded, unpacked
from rim_probe.probing.hooks import causal_lm, num_layers, spread_layers, unembed
from rim_probe.probing.quantities import asked_step
from rim_probe.probing.results import Report, Result, is_clear, mean_estimate, proportion_estimate

if TYPE_CHECKING:
    from rim_probe.probing.study import Study
    from rim_probe.problems import Problem

LENSES = ("logit", "tuned")
FIT_ROWS = 24_000  # states per layer; 200 per parameter row of a model as wide as 120, and 300 MB at width 3,072
CHOOSE_ROWS = 4_800
FIT_STEPS = 600
BATCH_ROWS = 256
LEARNING_RATE = 3e-3  # with 600 steps of 256 states the least KL on “choose” among four settings tried on rim-tiny
CHECK_EVERY = 50
RANK = 24  # in 8 bits 0.8 MB for the 30 layers of SmolLM2-135M

TARGETS = ("gold", "shuffled", "operand")
CHUNK_STATES = 1_024  # rows of logits held at once
MOST_QUESTIONS = 1_500  # of "report"; of "choose" and "fit" half as many
FEWEST_PROBLEMS = 30  # a step with fewer problems is not scored


class VocabularyLens:
    """Logit and tuned lens of one memory model.

    Attributes:
        rim: the model whose head reads.
        layers: 0..L; the last one has no translator.
        weights [L, d, d], biases [L, d]: the translators, float32 on the model's device; a row of states h becomes
            `h + h @ weights[l] + biases[l]`.
        factors [L, 2, r, d]: of translators of low rank; None where they are whole.
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

    @classmethod
    def plain(cls, rim: RiM) -> VocabularyLens:
        """A lens without translators: its logit lens is all that may be asked of it."""
        return cls(rim, range(num_layers(rim) + 1), torch.empty(0), torch.empty(0), {})

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

    @classmethod
    def fit(cls, study: Study, *, steps: int = FIT_STEPS, rows: int = FIT_ROWS) -> VocabularyLens:
        """Fits one translator per layer on the memory states of split "fit".

        Args:
            steps: of Adam, `BATCH_ROWS` states each; the best of every `CHECK_EVERY` on "choose" is kept.
            rows: states drawn per layer, equally from every block and position.
        """
        rim, final = study.models["memory"], study.layers[-1]
        samples = {split: _sample(study, split, most) for split, most in (("fit", rows), ("choose", CHOOSE_ROWS))}
        targets = {split: sample(final) for split, sample in samples.items()}
        order, width = study.rng("lens batches"), targets["fit"].shape[1]
        large = is_large([np.broadcast_to(np.float32(0), (len(study.layers) - 1, width, width))])
        found, factors, cost = [], [], []
        for layer in study.progress(study.layers[:-1], "tuned lens"):
            inputs = {split: sample(layer) for split, sample in samples.items()}
            found.append(_translator(rim, inputs, targets, steps, order))
            if large:
                weight, bias = found[-1][:2]
                factors.append(low_rank(weight.cpu().numpy(), inputs["fit"].numpy()))
                kept = _whole(factors[-1:])[0].to(rim.device)
                cost.append(_mean_kl(rim, inputs["choose"], targets["choose"], kept, bias))
        weights, biases, kl, stopped = (list(of) for of in zip(*found, strict=True))
        history = {"choose_kl": kl, "steps": stopped, "fit_rows": len(targets["fit"]), "rate": LEARNING_RATE}
        if not large:
            return cls(rim, study.layers, torch.stack(weights), torch.stack(biases), history)
        history |= {"rank": RANK, "choose_kl of that rank": cost}
        kept = _unpack_factors(pack_factors(np.stack(factors)))  # as they come back from disk
        return cls(rim, study.layers, _whole(kept), torch.stack(biases), history, kept)

    def score(self, study: Study) -> Report:
        """Faithfulness of both lenses and what they read of the gold results."""
        chosen_on, found = (read_all(self, study, split) for split in ("choose", "report"))
        base = None
        if "base" in study.models:
            plain = VocabularyLens.plain(study.models["base"])
            base = read_all(plain, study, "report", role="base", lenses=LENSES[:1])
        results, cells, verdict = _results(study, chosen_on, found, base)
        equations = [read_equation(step) for problem in study.problems("report") for step in problem.steps]
        lengths = [len(self.rim.encode_text(equation.result.text)) for equation in equations if equation is not None]
        return Report(
            "lens",
            results,
            {"fit": study.capture("memory", "fit").num_questions}
            | {split: read.kl.shape[-1] for split, read in (("choose", chosen_on), ("report", found))},
            {
                "cells searched": len(study.layers) * study.K * (study.M + 1),
                "cell, best on choose": cells,
                "tokens in the vocabulary": causal_lm(self.rim).get_output_embeddings().weight.shape[0],
                "share of results that are one token": sum(n == 1 for n in lengths) / max(len(lengths), 1),
                "tuned lens": self.history,
            },
            verdict,
        )

    def tensors(self) -> dict[str, np.ndarray]:
        weights = {"weights": self.weights.cpu().numpy()} if self.factors is None else pack_factors(self.factors)
        return weights | {"biases": self.biases.cpu().numpy()}

    def settings(self) -> dict[str, Any]:
        return {"layers": list(self.layers), "history": self.history}

    @classmethod
    def restore(cls, tensors: dict[str, np.ndarray], settings: dict[str, Any], rim: RiM) -> VocabularyLens:
        """The lens that `tensors` and `settings` came from, for the model it was fitted on."""
        factors, biases = _unpack_factors(tensors), torch.as_tensor(tensors["biases"])
        weights = torch.as_tensor(tensors["weights"]) if factors is None else _whole(factors)
        width, layers = causal_lm(rim).config.hidden_size, settings["layers"]
        if weights.shape != (len(layers) - 1, width, width) or biases.shape != (len(layers) - 1, width):
            raise RiMError(
                f"The tuned lens has translators of shape {tuple(weights.shape)}, which do not fit {rim.name}; "
                "fit it again for this checkpoint."
            )
        return cls(rim, layers, weights, biases, settings["history"], factors)


# ------------------------------------------------------------------------------------------------------------- the fit


def _sample(study: Study, split: str, most: int) -> Callable[[int], torch.Tensor]:
    """From a layer to its states float32 [rows, d] at the same `most` places (at the most): equally many questions from
    every memory position."""
    held, rng = study.capture("memory", split), study.rng(f"lens {split}")
    everywhere = list(places(held))
    count = min(held.num_questions, max(1, most // len(everywhere)))
    chosen = [(place, rng.choice(held.num_questions, count, replace=False)) for place in everywhere]
    return lambda layer: torch.from_numpy(np.concatenate([held.cell(layer, *place)[rows] for place, rows in chosen]))


def _translator(rim: RiM, inputs: dict, targets: dict, steps: int, order: np.random.Generator) -> tuple:
    """One layer's (weight [d, d], bias [d], mean KL on "choose", steps until then); see step 2 of the method."""
    width = inputs["fit"].shape[1]
    weight = torch.zeros(width, width, device=rim.device, requires_grad=True)
    bias = torch.zeros(width, device=rim.device, requires_grad=True)
    optimizer = torch.optim.Adam([weight, bias], lr=LEARNING_RATE)
    best = None
    for step in range(steps + 1):
        if step % CHECK_EVERY == 0 or step == steps:
            reached = _mean_kl(rim, inputs["choose"], targets["choose"], weight, bias)
            if best is None or reached < best[2]:
                best = (weight.detach().clone(), bias.detach().clone(), reached, step)
        if step < steps:
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - step / steps)
            rows = torch.from_numpy(order.integers(0, len(inputs["fit"]), BATCH_ROWS))
            # The model's own weights ask for gradients, too; only the translator gets any.
            lost = _translated_kl(rim, inputs["fit"][rows], targets["fit"][rows], weight, bias).mean()
            weight.grad, bias.grad = torch.autograd.grad(lost, (weight, bias))
            optimizer.step()
    return best


def _translated_kl(rim: RiM, states: torch.Tensor, finals: torch.Tensor, weight, bias) -> torch.Tensor:
    """KL of the model's own distribution to that of a translator, [n]; states and final states [n, d]."""
    states = states.to(rim.device)
    with torch.no_grad():
        wanted = unembed(rim, finals).log_softmax(-1)
    return kl_divergence(wanted, unembed(rim, states + states @ weight + bias).log_softmax(-1))


@torch.no_grad()
def _mean_kl(rim: RiM, states: torch.Tensor, finals: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> float:
    parts = zip(states.split(CHUNK_STATES), finals.split(CHUNK_STATES), strict=True)
    return torch.cat([_translated_kl(rim, *part, weight, bias) for part in parts]).mean().item()


def kl_divergence(wanted: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    """KL(wanted || given) in nats of log probabilities [..., V] -> [...]."""
    return (wanted.exp() * (wanted - given)).sum(-1)


def low_rank(weight: np.ndarray, states: np.ndarray) -> np.ndarray:
    """The rounded factors of a translator [d, d] that states [n, d] were translated by, [2, r, d]: `left.T @ right` is
    the one of rank r; see step 3 of the method."""
    moved = states.astype(np.float64) @ weight
    right = np.linalg.eigh(moved.T @ moved).eigenvectors[:, ::-1][:, :RANK].T.astype(np.float32)
    return np.stack([rounded(right @ weight.T), rounded(right)])


def _whole(factors: np.ndarray) -> torch.Tensor:
    """Translators [L, d, d] of factors [L, 2, r, d]."""
    return torch.from_numpy(np.stack([left.T @ right for left, right in factors]))


def pack_factors(factors: np.ndarray) -> dict[str, np.ndarray]:
    """Factors [L, 2, r, d] as tensors."""
    return packed("left", factors[:, 0]) | packed("right", factors[:, 1])


def _unpack_factors(tensors: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """The factors that were packed; None where the translators were stored whole."""
    return np.stack([unpacked(tensors, name) for name in ("left", "right")], axis=1) if "left" in tensors else None


# --------------------------------------------------------------------------------------------------- what is looked for


def places(held) -> Iterator[tuple[int, Any]]:
    """(block, position) of every memory state, in the order of the text."""
    for block in range(1, held.K + 1):
        yield from ((block, position) for position in (*range(1, held.M + 1), "end"))


def steps_asked(study: Study) -> list[int | None]:
    """Step t of problems that go on after it, for every t with enough problems, and None, the last step of all."""
    lengths, found = [len(problem.steps) for problem in study.problems("report")], []
    while len(found) + 1 < study.K and sum(length > len(found) + 1 for length in lengths) >= FEWEST_PROBLEMS:
        found.append(len(found) + 1)
    return [*found, None]


def target_tokens(
    rim: RiM, problems: Sequence[Problem], steps: Sequence[int | None], rng: np.random.Generator
) -> np.ndarray:
    """First tokens of the gold result, of another problem's and of one of the step's operands, [n, steps, TARGETS].

    -1 where a problem is not scored (see `asked_step`), and for a control that is the answer or, as an operand, the
    result.
    """
    tokens = np.full((len(problems), len(steps), len(TARGETS)), -1, dtype=np.int64)
    for column, step in enumerate(steps):
        asked = {row: asked_step(problem, step) for row, problem in enumerate(problems)}
        found = {row: equation for row, equation in asked.items() if equation is not None}
        rows = rng.permutation(list(found)).tolist()
        for row, donor in zip(rows, rows[1:] + rows[:1], strict=True):
            result, other = found[row].result.text, found[donor].result.text
            never = {None if step is None else problems[row].answer}
            operands = (operand.text for operand in found[row].operands)
            operand = next((value for value in operands if value not in never | {result}), None)
            values = (result, None if donor == row or other in never else other, operand)
            tokens[row, column] = [-1 if value is None else first_token(rim, value) for value in values]
    return tokens


def first_token(rim: RiM, value: str) -> int:
    """The first token of a value, as the tokenizer writes it where a readout states it."""
    return rim.encode_text(value)[0]


def token_ranks(scores: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Ranks of tokens [n, t] among scores [n, V]: 1 is the top, and ties share their mean, so that a state that says
    nothing has the middle rank."""
    columns = scores.gather(1, tokens).T
    above = torch.stack([(scores > own[:, None]).sum(1) for own in columns], 1)
    equal = torch.stack([(scores == own[:, None]).sum(1) for own in columns], 1)
    return above + (equal + 1) / 2


# ---------------------------------------------------------------------------------------------------------- the reading


@dataclass(frozen=True)
class LensReading:
    """What lenses read on n problems at P places: every memory position in the order of the text, and then the last
    question token.

    Attributes:
        kl [lenses, layers, P, n]: to the model's own distribution at that place, in nats.
        blind_kl [P, n]: of the mean distribution of the place.
        rank [lenses, layers, P, steps, targets, n]: of the first token of each of `TARGETS`; NaN where a problem is not
            scored.
        probability [lenses, layers, P, steps, n]: of the gold result.
    """

    kl: np.ndarray
    blind_kl: np.ndarray
    rank: np.ndarray
    probability: np.ndarray


def read_all(
    lens: VocabularyLens, study: Study, split: str, role: str = "memory", lenses: Sequence[str] = LENSES
) -> LensReading:
    half = MOST_QUESTIONS // 2
    problems = study.problems(split)[: MOST_QUESTIONS if split == "report" else half]
    held, fitted, n, final = study.capture(role, split), study.capture(role, "fit"), len(problems), study.layers[-1]
    tokens = target_tokens(lens.rim, problems, steps_asked(study), study.rng(f"lens shuffled {split}"))
    scored = (tokens >= 0).transpose(1, 2, 0)  # [steps, targets, n]
    wanted = torch.from_numpy(tokens.clip(min=0).reshape(n, -1)).to(lens.rim.device)
    everywhere = [*places(held), None]
    shape = (len(lenses), len(study.layers), len(everywhere))
    kl, blind = np.empty((*shape, n), np.float32), np.empty((len(everywhere), n), np.float32)
    rank, probability = (np.empty((*shape, *size), np.float32) for size in (scored.shape, (len(scored), n)))

    def states(of, layer: int, place) -> np.ndarray:
        return of.question_cell(layer) if place is None else of.cell(layer, *place)

    def log_probabilities(rows: np.ndarray, layer: int, name: str = "logit") -> torch.Tensor:
        parts = torch.from_numpy(np.ascontiguousarray(rows)).split(CHUNK_STATES)
        return torch.cat([lens.logits(part, layer, name).log_softmax(-1) for part in parts])

    for p, place in enumerate(study.progress(everywhere, f"lens {role}-{split}")):
        own = log_probabilities(states(held, final, place)[:n], final)
        seen = log_probabilities(states(fitted, final, place)[:half], final)
        blind[p] = kl_divergence(own, seen.logsumexp(0) - np.log(len(seen))).cpu().numpy()
        for i, layer in enumerate(study.layers):
            rows = states(held, layer, place)[:n]
            for which, name in enumerate(lenses):
                given = log_probabilities(rows, layer, name)
                ranks = token_ranks(given, wanted).cpu().numpy().T.reshape(scored.shape)
                chance = given.gather(1, wanted).exp().cpu().numpy().T.reshape(scored.shape)[:, 0]
                kl[which, i, p] = kl_divergence(own, given).cpu().numpy()
                rank[which, i, p] = np.where(scored, ranks, np.nan)
                probability[which, i, p] = np.where(scored[:, 0], chance, np.nan)
    return LensReading(kl, blind, rank, probability)


# ---------------------------------------------------------------------------------------------------------- the results


def _results(
    study: Study, chosen_on: LensReading, found: LensReading, base: LensReading | None
) -> tuple[list[Result], dict[str, dict[str, str]], str]:
    """The results, by lens and step the cell they are reported at, and what follows."""
    layers, held = study.layers, places(study.capture("memory", "report"))
    positions = [f"block {block} {'end' if at == 'end' else f'slot {at}'}" for block, at in held]
    at_cell, shares, by_layer, everywhere = [], [], [], []
    cells: dict[str, dict[str, str]] = {f"{name} lens": {} for name in LENSES}
    sides: dict[str, list[str]] = {"above every control": [], "not clear of the controls": []}
    for i, step in enumerate(steps_asked(study)):
        # Without such a step on either split there is no cell to choose, or nothing to read in it.
        if any(np.isnan(read.rank[0, 0, 0, i, 0]).all() for read in (chosen_on, found)):
            continue
        result, at = f"result of {f'step {step}' if step else 'the last step'}", {"step": step or "last"}
        for name in LENSES[::-1]:
            which, lens, metric = LENSES.index(name), f"{name} lens", f"mean reciprocal rank, {name} lens"
            layer, p = _best_cell(chosen_on.rank[which, :, :-1, i])
            cells[lens][result] = f"layer {layers[layer]}, {positions[p]}"
            gold, shuffled, operand = (found.rank[which, :, p, i, target] for target in range(len(TARGETS)))
            series = {"the step's result": gold, "another problem's result": shuffled, "the step's operand": operand}
            series["the result at the last question token"] = found.rank[which, :, -1, i, 0]
            if base is not None:
                series["the result by the base model's logit lens"] = base.rank[0, :, p, i, 0]
            score, *controls = (_mrr(metric, of, ranks[layer], at, ranks is gold) for of, ranks in series.items())
            at_cell += [score, *controls]
            on_top = proportion_estimate(gold[layer][~np.isnan(gold[layer])] == 1)
            chance = mean_estimate(found.probability[which, layer, p, i])
            shares.append(Result("result on top of the vocabulary", lens, on_top, place=at))
            shares.append(Result("probability of the result", lens, chance, place=at))
            everywhere += [
                _mrr("mean reciprocal rank", f"{result}, {lens}", found.rank[which, y, x, i, 0], place)
                for y in spread_layers(range(len(layers)))
                for x, position in enumerate(positions)
                for place in [{"layer": layers[y], "position": position}]
            ]
            if name == "tuned":
                title = f"{metric}, {result}, {positions[p]}"
                by_layer += [
                    _mrr(title, of, row, {"layer": at}, ranks is gold)
                    for of, ranks in series.items()
                    for at, row in zip(layers, ranks, strict=True)
                ]
                clear = all(is_clear(score.estimate, control.estimate) for control in controls if control.estimate.n)
                sides["above every control" if clear else "not clear of the controls"].append(result)
    told = "; ".join(f"{side}: {', '.join(names)}" for side, names in sides.items() if names)
    verdict = f"By the tuned lens {told}." if told else "No problem states a step whose result could be looked for."
    return at_cell + shares + _faithfulness(layers, found) + by_layer + everywhere, cells, verdict


def _faithfulness(layers: Sequence[int], found: LensReading) -> list[Result]:
    """KL by layer, the mean of all memory positions."""
    blind = found.blind_kl[:-1].mean(0)
    series = [(f"{name} lens", "score", kl[:, :-1].mean(1)) for name, kl in zip(LENSES, found.kl, strict=True)]
    series.append(("knows the position, not the question", "control", [blind] * len(layers)))
    return [
        Result("KL to the model's own words there, nats", of, mean_estimate(row), role, False, place={"layer": layer})
        for of, role, kl in series
        for layer, row in zip(layers, kl, strict=True)
    ]


def _mrr(metric: str, of: str, ranks: np.ndarray, place: Mapping[str, int | str], score: bool = True) -> Result:
    return Result(metric, of, mean_estimate(1 / ranks), "score" if score else "control", share=False, place=place)


def _best_cell(ranks: np.ndarray) -> tuple[int, int]:
    """(layer, position) indices in ranks [layers, P, targets, n] where the gold result leads another problem's by most,
    in mean reciprocal rank."""
    count = (~np.isnan(ranks)).sum(-1)
    mean = np.nan_to_num(1 / ranks).sum(-1) / np.maximum(count, 1)
    lead = mean[..., TARGETS.index("gold")] - mean[..., TARGETS.index("shuffled")]
    return tuple(int(i) for i in np.unravel_index(np.argmax(lead), lead.shape))
