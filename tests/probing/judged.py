"""Studies by hand in which it is known what tells right readouts from wrong ones."""

from types import SimpleNamespace

import numpy as np
from planted import PlantedStudy

from rim_probe.decoding import Answer, Readout
from rim_probe.problems import Problem

BLOCKS, SLOTS, LAYERS, DIMS = 3, 2, 3, 6
SPLITS = {"fit": 300, "choose": 150, "report": 250}


def answered(problem: Problem, right: np.ndarray, probability: np.ndarray, method: str = "memory") -> Answer:
    """A memory answer whose readouts are right or say "0"; without readouts for other methods."""
    values = [problem.answer if hit else "0" for hit in right]
    readouts = tuple(
        Readout(block, value, value, (1, 0), float(chance))
        for block, (value, chance) in enumerate(zip(values, probability, strict=True), start=1)
    )
    passes = 2 if method == "memory" else 4 * max(1, len(problem.steps))
    return Answer(
        method,
        problem.question,
        values[-1],
        values[-1],
        (1, 0),
        None,
        None,
        passes,
        2,
        10,
        0,
        readouts if method == "memory" else (),
    )


class JudgedStudy(PlantedStudy):
    """A planted study with outcomes.

    Args:
        strength: how far a right readout moves the states of its block along one direction; 0 plants nothing.
        layer: at which residual layer; the penultimate one is LAYERS - 2.
    """

    def __init__(self, strength: float = 3.0, layer: int = LAYERS - 2, seed: int = 0, base: bool = True, cot=None):
        rng = np.random.default_rng(seed)
        problems, states, self._right, self._answers = {}, {}, {}, {}
        for split, count in SPLITS.items():
            problems[split] = [
                Problem(f"{split} {i} has {i % 7} pens", (f"<<{i % 9}+1={i % 9 + 1}>>",) * (1 + i % 3), str(1 + i % 9))
                for i in range(count)
            ]
            right = rng.random((count, BLOCKS)) < 0.7
            held = rng.normal(size=(count, LAYERS, BLOCKS, SLOTS + 1, DIMS))
            held[:, layer, :, :, 0] += strength * right[:, :, None]
            states["memory", split] = held
            if base:
                states["base", split] = rng.normal(size=held.shape)
            chance = rng.uniform(0.3, 1, size=right.shape)
            self._right[split] = right
            self._answers["memory", split] = [
                answered(*parts) for parts in zip(problems[split], right, chance, strict=True)
            ]
            spoken = rng.random(count) < 0.8
            self._answers["cot", split] = [
                answered(problem, [hit], [1.0], "cot") for problem, hit in zip(problems[split], spoken, strict=True)
            ]
        models = {"memory": SimpleNamespace()} | ({"base": SimpleNamespace()} if base else {})
        super().__init__(models, problems, states, seed)

    def answers(self, method, split):
        return self._answers[method, split]

    def right(self, split):
        return self._right[split]
