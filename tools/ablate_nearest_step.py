"""What each part of the nearest step adds, on split "choose" alone: the table of docs/nearest-step.md.

python -m tools.ablate_nearest_step checkpoints/rim-tiny FIT CHOOSE FIT_HELDOUT CHOOSE_HELDOUT     (problem files)
"""

import sys
from dataclasses import replace

import numpy as np
from sklearn.linear_model import Ridge

from rim_probe.probing.linear import Inputs
from rim_probe.probing.nearest_step import search as fitting
from rim_probe.probing.nearest_step.formula import StepMap, StepSpace, read_steps, step_space
from rim_probe.probing.study import HELD_OUT, SPLITS, Study, load_models
from rim_probe.problems import read_problems

checkpoint, *files = sys.argv[1:]
splits = {name: read_problems(file).problems for name, file in zip((*SPLITS[:2], *HELD_OUT), files, strict=True)}
models = {"memory": load_models(checkpoint)["memory"]}
study = Study(models, splits | {"report": splits["choose"][:1]}, folder="runs/ablate-nearest-step")  # unused
source, layers = fitting.memory_source(study), study.layers[::-2][::-1]


def plain(rim, problems, places, references, layer) -> list[np.ndarray]:
    """In the place of `read_places`: the states as they are."""
    asked = [(problems[p.problem].question, problems[p.problem].steps[: p.step - 1], p.texts) for p in places]
    return [held[:, 0] for held in read_steps(rim, asked, [layer])]


def unwhitened(places, read) -> StepSpace:
    """In the place of `step_space`: centred alone."""
    back = np.linalg.inv((space := step_space(places, read)).whitening)
    vectors = {text: vector @ back for text, vector in space.vectors.items()}
    return replace(space, whitening=np.eye(len(back), dtype=np.float32), vectors=vectors)


def _ridge(inputs: Inputs, task: fitting.Task, strength: float = 1e-3) -> StepMap:
    mapped = inputs.fit(Ridge(alpha=strength * len(task.rows)), task.targets, task.rows)
    return StepMap(mapped, np.eye(task.targets.shape[1], dtype=np.float32))


def searched(retrievals) -> dict[str, np.ndarray]:
    """Retrieval -> top-1 on "choose" [layers, blocks, steps, (candidates, bank)]."""
    fit = fitting.read_fit(study)
    found = {name: np.zeros((len(layers), study.K, len(fit.tasks), 2)) for name in retrievals}
    for i, k in study.progress(list(np.ndindex(len(layers), study.K)), "cells"):
        inputs, states = Inputs([source.read("fit", layers[i], k + 1)]), source.read("choose", layers[i], k + 1)
        for t, task in enumerate(fit.tasks):
            asked = task.asked["choose"]
            for name, (fitted, recall) in retrievals.items():
                mapped, own = fitted(inputs, task), states[asked.rows]
                said = mapped.recalled(own, fit.bank.vectors) if recall else mapped.to_directions(own)
                ranks = asked.ranks(said), fit.bank.ranks(mapped, own, asked.texts)
                found[name][i, k, t] = [(rank[rank >= 0] <= 0).mean() for rank in ranks]
    counts[:] = [len(task.asked["choose"].rows) for task in fit.tasks]
    return found


def _told(name: str, top1: np.ndarray) -> None:
    best = [own[own[:, 0].argmax()] for own in (top1[..., t, :].reshape(-1, 2) for t in range(len(counts)))]
    print(f"| {name} | " + " | ".join(f"{100 * value:.1f}" for value in np.average(best, 0, counts)) + " |", flush=True)


counts: list[int] = []
print("| on “choose” | own + 20 distractors: top-1, % | bank: top-1, % |\n|---|---:|---:|")
whole = (lambda inputs, task: StepMap.fit(inputs, task.rows, task.targets), True)
parts = {
    "the formula": whole,
    "no D: cos(y, v)": (_ridge, True),
    "no D, ridge 0.1": (lambda *at: _ridge(*at, 0.1), True),
}
found = searched(parts | {"no D, no recall: cos(y, candidate)": (_ridge, False)})
found["no search over layers: the last one"] = found["the formula"][-1:]
found["no search over blocks: the last one"] = found["the formula"][:, -1:]
for name, top1 in found.items():
    _told(name, top1)
changes = {"no whitening": ("step_space", unwhitened), "no references": ("read_places", plain)}
depths = {f"steps read at {depth:g} of the depth": ("READING_DEPTH", depth) for depth in (0.5, 1.0)}
for name, (what, value) in (changes | depths).items():
    kept = getattr(fitting, what)
    setattr(fitting, what, value)
    _told(name, searched({name: whole})[name])
    setattr(fitting, what, kept)
