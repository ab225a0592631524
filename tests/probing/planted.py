"""A study whose captures are made by hand: what is planted there is known, and no model has to be run for it."""

import zlib
from types import SimpleNamespace

import numpy as np
import torch

from rim_probe.probing.capture import Capture
from rim_probe.problems import Problem


def chains(count: int, seed: int, steps: int = 2) -> list[Problem]:
    """Problems of `steps` additions and subtractions with results from 1 to 9, each question its own."""
    rng, found = np.random.default_rng(seed), []
    while len(found) < count:
        value, told = int(rng.integers(1, 10)), []
        for _ in range(steps):
            other, sign = int(rng.integers(1, 9)), "+-"[rng.integers(2)]
            result = value + other if sign == "+" else value - other
            told.append(f"<<{value}{sign}{other}={result}>>")
            value = result
        if all(0 < int(step[6:-2]) < 10 for step in told):
            found.append(Problem(f"question {seed} {len(found)}", tuple(told), str(value)))
    return found


def result_of(step: str) -> int:
    return int(step[6:-2])


class PlantedStudy:
    """The parts of a `Study` that decoders read: `captures[role, split]` are given.

    Args:
        states: (role, split) -> float array [n, layers, K, M + 1, d], the last position of a block is its end.
    """

    def __init__(self, models, splits, states, seed=0):
        self.models, self.splits, self.seed = models, splits, seed
        self._captures = {key: planted_capture(values) for key, values in states.items()}
        held = next(iter(self._captures.values()))
        self.K, self.M, self.layers = held.K, held.M, held.layers

    def problems(self, split):
        return self.splits[split]

    def capture(self, role, split):
        return self._captures[role, split]

    def rng(self, name):
        return np.random.default_rng([self.seed, zlib.crc32(name.encode())])

    def progress(self, items, label):
        return items


def planted_capture(states: np.ndarray) -> Capture:
    """[n, layers, K, M + 1, d] as a capture; the question tokens hold nothing."""
    tensor = torch.from_numpy(np.asarray(states, dtype=np.float32))
    nothing = torch.zeros(tensor.shape[0], tensor.shape[1], tensor.shape[-1])
    return Capture(
        layers=tuple(range(tensor.shape[1])),
        slots=tensor[:, :, :, :-1],
        ends=tensor[:, :, :, -1],
        question=nothing,
        to_question=None,
        to_memory=None,
        question_ids=[[0]] * len(tensor),
    )


def observed(capture: Capture, question: str = "question", answer=None) -> SimpleNamespace:
    """An observation of the first question of a capture."""
    one = planted_capture(torch.cat([capture.slots, capture.ends.unsqueeze(3)], 3)[:1].numpy())
    return SimpleNamespace(question=question, tokens=["question"], capture=one, answer=answer)
