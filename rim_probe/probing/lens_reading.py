"""What logit and tuned lens read in every cell, and how the gold results rank there.

Knows lenses, cells and gold results. Knows nothing of how a lens is fitted or reported.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rim_probe.equations import number_value, read_equation
from rim_probe.model import RiM

if TYPE_CHECKING:
    from rim_probe.probing.lens import VocabularyLens
    from rim_probe.probing.study import Study
    from rim_probe.problems import Problem

LENSES = ("logit", "tuned")
TARGETS = ("gold", "shuffled", "operand")
CHUNK_STATES = 1_024  # rows of logits held at once
MOST_QUESTIONS = 1_500  # of "report"; of "choose" and "fit" half as many
FEWEST_PROBLEMS = 30  # a step with fewer problems is not scored


@dataclass(frozen=True)
class Item:
    """A result to look for: that of step `step` (0-based, -1 is the last) of the problems it is scored on."""

    label: str
    step: int


@dataclass(frozen=True)
class Reading:
    """What the lenses read on n problems; P = M + 1 positions of a block, the last of them its end.

    Attributes:
        kl [lenses, layers, K, P, n]: to the model's own distribution at that position, in nats.
        cell_kl [K, P, n]: of the mean distribution of the cell.
        rank, probability [lenses, layers, K, P, items, targets, n]: of the first token of each of `TARGETS`; NaN where
            a problem is not scored.
        question_rank [lenses, layers, items, n]: of the gold result at the last question token.
    """

    kl: np.ndarray
    cell_kl: np.ndarray
    rank: np.ndarray
    probability: np.ndarray
    question_rank: np.ndarray


def read_all(lens: VocabularyLens, study: Study, split: str, role: str = "memory", lenses=LENSES) -> Reading:
    most = MOST_QUESTIONS if split == "report" else MOST_QUESTIONS // 2
    problems = study.problems(split)[:most]
    held, n, layers, final = study.capture(role, split), len(problems), study.layers, study.layers[-1]
    tokens = target_tokens(lens.rim, problems, items(study), study.rng(f"lens shuffled {split}"))
    everywhere = list(places(held))
    P = study.M + 1
    shape = (len(lenses), len(layers), study.K, P)
    kl, cell_kl = np.empty((*shape, n), np.float32), np.empty((study.K, P, n), np.float32)
    rank = np.empty((*shape, *tokens.shape[1:], n), np.float32)
    probability = np.empty_like(rank)
    question_rank = np.empty((*shape[:2], tokens.shape[1], n), np.float32)
    for index, (block, position) in enumerate(study.progress(everywhere, f"lens {role}-{split}")):
        cell = (block - 1, index % P)
        wanted = _log_probabilities(lens, held.cell(final, block, position)[:n], final)
        seen = study.capture(role, "fit").cell(final, block, position)[: MOST_QUESTIONS // 2]
        mean = _log_probabilities(lens, seen, final).logsumexp(0) - np.log(len(seen))
        cell_kl[cell] = kl_divergence(wanted, mean).cpu().numpy()
        for place, layer in enumerate(layers):
            states = held.cell(layer, block, position)[:n]
            for which, name in enumerate(lenses):
                given = _log_probabilities(lens, states, layer, name)
                kl[(which, place, *cell)] = kl_divergence(wanted, given).cpu().numpy()
                ranks, probabilities = _ranks(given, tokens)
                rank[(which, place, *cell)], probability[(which, place, *cell)] = ranks, probabilities
    for place, layer in enumerate(layers):
        states = held.question_cell(layer)[:n]
        for which, name in enumerate(lenses):
            question_rank[which, place] = _ranks(_log_probabilities(lens, states, layer, name), tokens[:, :, :1])[0][
                :, 0
            ]
    return Reading(kl, cell_kl, rank, probability, question_rank)


def _log_probabilities(lens: VocabularyLens, states: np.ndarray, layer: int, name: str = "logit") -> torch.Tensor:
    """float32 [n, V] of states [n, d]."""
    parts = torch.from_numpy(np.ascontiguousarray(states)).split(CHUNK_STATES)
    return torch.cat([lens.logits(part, layer, name).log_softmax(-1) for part in parts])


def _ranks(log_probabilities: torch.Tensor, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rank (1 is the most probable; ties share their mean) and probability of tokens [n, items, targets], each
    [items, targets, n]; NaN for the token -1."""
    wanted = torch.from_numpy(tokens).to(log_probabilities.device).flatten(1)
    missing = (wanted < 0).cpu().numpy()
    own = log_probabilities.gather(1, wanted.clamp(min=0))
    above = torch.stack([(log_probabilities > column[:, None]).sum(1) for column in own.T], dim=1)
    equal = torch.stack([(log_probabilities == column[:, None]).sum(1) for column in own.T], dim=1)
    rank = np.where(missing, np.nan, (above + (equal + 1) / 2).cpu().numpy())
    probability = np.where(missing, np.nan, own.exp().cpu().numpy())
    shape = (*tokens.shape[1:], len(tokens))
    return rank.T.reshape(shape), probability.T.reshape(shape)


def items(study: Study) -> list[Item]:
    """Step t of problems that go on after it, for every t with enough problems, and the last step of all."""
    lengths = [len(problem.steps) for problem in study.problems("report")]
    middle = []
    while sum(length > len(middle) + 1 for length in lengths) >= FEWEST_PROBLEMS and len(middle) + 1 < study.K:
        middle.append(Item(f"result of step {len(middle) + 1}", len(middle)))
    return [*middle, Item("result of the last step", -1)]


def target_tokens(
    rim: RiM, problems: Sequence[Problem], wanted: Sequence[Item], rng: np.random.Generator
) -> np.ndarray:
    """First tokens of the gold result, of another problem's and of one of the step's operands, [n, items, TARGETS].

    -1 where a problem is not scored: it has no such step, or the value equals its answer (last step excepted).
    """
    tokens = np.full((len(problems), len(wanted), len(TARGETS)), -1, dtype=np.int64)
    for column, item in enumerate(wanted):
        found = {}
        for row, problem in enumerate(problems):
            if len(problem.steps) > max(item.step + 1, 0):
                equation = read_equation(problem.steps[item.step])
                if equation is not None and (item.step < 0 or equation.result.value != number_value(problem.answer)):
                    found[row] = equation
        rows = list(found)
        donors = [rows[i] for i in rng.permutation(len(rows))]
        for place, (row, equation) in enumerate(found.items()):
            answer = None if item.step < 0 else problems[row].answer
            result, operands = equation.result.text, [operand.text for operand in equation.operands]
            turned = (donors[(place + shift) % len(rows)] for shift in range(len(rows)))
            others = (found[donor].result.text for donor in turned if donor != row)
            values = (
                result,
                next((value for value in others if value != answer), None),
                next((value for value in operands if value not in (answer, result)), None),
            )
            tokens[row, column] = [-1 if value is None else first_token(rim, value) for value in values]
    return tokens


def first_token(rim: RiM, value: str) -> int:
    """The first token of a value, as the tokenizer writes it where a readout states it."""
    return rim.encode_text(value)[0]


_SIGNS = str.maketrans({" ": "␣", "\n": "↵", "\t": "⇥"})


def token_text(rim: RiM, token: int) -> str:
    """A token as a person reads it: white space by its signs, what has no text by its name in the vocabulary."""
    text = rim.tokenizer.decode([token])
    return text.strip() or text.translate(_SIGNS) or str(rim.tokenizer.convert_ids_to_tokens(token))


def places(held) -> Iterator[tuple[int, Any]]:
    """(block, position) of every memory state, in the order of the text."""
    for block in range(1, held.K + 1):
        yield from ((block, position) for position in (*range(1, held.M + 1), "end"))


def kl_divergence(wanted: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    """KL(wanted || given) in nats of log probabilities [..., V] -> [...]."""
    return (wanted.exp() * (wanted - given)).sum(-1)
