"""Probes on models in bfloat16, as a GPU runs them: numpy knows no such numbers, so every probe must turn them over."""

import numpy as np
import pytest
import torch
from conftest import tiny_rim

from rim_probe.datasets.arithmetic import World, generate
from rim_probe.probing import attention, commitment, importance, words
from rim_probe.probing.correctness import CorrectnessProbe
from rim_probe.probing.geometry import Geometry
from rim_probe.probing.lens import VocabularyLens
from rim_probe.probing.nearest_step.fit import StepDecoder
from rim_probe.probing.patching import Patcher
from rim_probe.probing.study import Study, observe

BLOCKS = 2


@pytest.fixture(scope="module")
def study():
    # A short context ends the endless answers of random models early.
    roles = enumerate(("memory", "base", "stage1"))
    models = {role: tiny_rim(num_blocks=BLOCKS, seed=seed, context=200) for seed, role in roles}
    for rim in models.values():
        rim.model.to(torch.bfloat16)
    problems = list(generate(World(min_steps=2, max_steps=2), "train", 56, unique=True))
    splits = {"fit": problems[:32], "choose": problems[32:44], "report": problems[44:]}
    with Study(models, splits, progress=False) as made:
        yield made


def test_states_are_held_as_the_model_has_them_and_read_as_numpy_can(study):
    held = study.capture("memory", "report")
    assert next(iter(held)).slots.dtype == torch.bfloat16
    assert held.cell(1, 1, "slots").dtype == np.float32


@pytest.mark.parametrize(
    "score",
    [
        lambda study: VocabularyLens.fit(study, steps=2, rows=100).score(study),
        lambda study: StepDecoder.fit(study).score(study),
        lambda study: words.score(study),
        lambda study: attention.score(study, problems=4),
        lambda study: importance.score(study, problems=2, pool=4, donors=1),
    ],
    ids=["lens", "steps", "words", "attention", "importance"],
)
def test_a_probe_is_scored(study, score):
    assert score(study).results


def test_answers_of_any_kind_have_a_course(study):
    rim, problems = study.models["memory"], study.problems("report")
    ids = [rim.encoder.answer_ids(problem.answer) for problem in problems]
    course = commitment.memory_course(rim, [problem.question for problem in problems], ids, BLOCKS)
    assert course.probability.dtype == np.float32 and np.isfinite(course.divergence).all()


def test_states_are_swapped_and_judged(study, monkeypatch):
    """A random model is right nowhere: it is taken to be right everywhere, or every other time."""
    right = np.arange(len(study.problems("fit")) * BLOCKS).reshape(-1, BLOCKS) % 3 > 0
    monkeypatch.setattr(study, "right", lambda split: right[: len(study.problems(split))])
    probe = CorrectnessProbe.fit(study)
    seen = observe(study.models["memory"], study.problems("report")[0].question)
    assert len(probe.explain(seen)["blocks"]) == BLOCKS
    assert len(Geometry.fit(study).explain(seen)["blocks"]) == BLOCKS
    clean = Patcher(study.models["memory"], seen.question, [[5, 0]], num_blocks=BLOCKS)
    assert clean.score([clean.edits(clean.memory * 0, [1], [1])]).says.shape == (1, 1)
