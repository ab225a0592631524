"""Geometry: measures on shapes that are known, and a basis that survives being stored."""

import json

import numpy as np
import pytest
from judged import BLOCKS, JudgedStudy
from planted import observed

from rim_probe.errors import RiMError
from rim_probe.probing import geometry
from rim_probe.probing.geometry import (
    ACROSS,
    DIMENSIONS,
    DISPLACEMENT,
    STRAIGHTNESS,
    TOGETHER,
    Basis,
    Geometry,
    differences,
    measure,
    pairwise_cosines,
)
from rim_probe.probing.results import Report


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    monkeypatch.setattr(geometry, "DRAWS", 40)


@pytest.fixture(scope="module")
def study():
    return JudgedStudy()


@pytest.fixture(scope="module")
def found(study):
    return Geometry.fit(study)


def test_a_straight_path_is_straight_and_as_long_as_it_is():
    # Three blocks at 1, 2, 3 times one vector: moved by 2, mean norm 2.
    states = np.ones((20, 1, 4)) * np.array([1.0, 2.0, 3.0])[:, None]
    held = measure(states)
    assert held[DISPLACEMENT].value == pytest.approx(1.0) and held[STRAIGHTNESS].value == pytest.approx(1.0)
    assert held["share of variance between blocks"].value == pytest.approx(1.0)
    there_and_back = measure(states[:, [0, 2, 0]])
    assert there_and_back[DISPLACEMENT].value == 0 and there_and_back[STRAIGHTNESS].value == 0


def test_variance_is_shared_out_between_blocks_questions_and_both():
    rng = np.random.default_rng(0)
    question, block, both = rng.normal(size=(200, 1, 5)), rng.normal(size=(1, 4, 5)), rng.normal(size=(200, 4, 5))
    for states, name in (
        (question + 0 * both, "share of variance between questions"),
        (block + 0 * both, "share of variance between blocks"),
        (both, TOGETHER),
    ):
        held = measure(states)
        shares = [held[key].value for key in held if key.startswith("share of variance")]
        assert sum(shares) == pytest.approx(1) and held[name].value == max(shares) > 0.7


def test_differences_are_paired_and_vanish_between_equals():
    rng = np.random.default_rng(6)
    states = rng.normal(size=(80, 3, 6)) * rng.uniform(0.1, 5, size=(80, 1, 1))
    assert all(e.value == e.low == e.high == 0 for e in differences(states, states).values())
    slightly = differences(states * np.array([1, 1, 1.02])[:, None], states)[DISPLACEMENT]
    apart = measure(states)[DISPLACEMENT]
    assert slightly.high - slightly.low < (apart.high - apart.low) / 3


def test_collapse_is_confirmed_only_where_all_measures_agree():
    rng = np.random.default_rng(7)
    collapsed = np.ones(6) + 0.01 * rng.normal(size=(80, 1, 1)) + 1e-4 * rng.normal(size=(80, 3, 6))
    free = rng.normal(size=(80, 3, 6))
    assert "collapsed is confirmed" in geometry._verdict(differences(free, collapsed))
    against = geometry._verdict(differences(collapsed, free))
    assert "not confirmed" in against and "against it: movement" in against and "for it" not in against


def test_participation_ratio_equals_the_eigenvalues():
    states = np.random.default_rng(2).normal(size=(50, 3, 6)) * np.arange(1, 7)
    centred = (states - states.mean(axis=0)).reshape(-1, 6)
    eigenvalues = np.linalg.eigvalsh(centred.T @ centred)
    assert measure(states)[DIMENSIONS].value == pytest.approx(eigenvalues.sum() ** 2 / (eigenvalues**2).sum())


def test_blocks_that_share_the_question_are_alike_and_other_questions_are_not():
    rng = np.random.default_rng(3)
    states = rng.normal(size=(300, 1, 16)) + 0.1 * rng.normal(size=(300, 4, 16)) + 5 * rng.normal(size=(1, 4, 16))
    held = measure(states)
    assert held["cosine between blocks, same question"].low > 0.9
    control = held[ACROSS]
    assert abs(control.value) < 0.05
    cosines = pairwise_cosines(states)
    assert cosines[0, 0].value == pytest.approx(1) and 0.9 < cosines[0, 2].value == pytest.approx(cosines[2, 0].value)


def test_a_basis_finds_the_directions_of_most_variance_with_a_fixed_sign():
    rng = np.random.default_rng(4)
    states = rng.normal(size=(100, 5)) * np.array([0.1, 5, 0.1, 2, 0.1])
    basis = Basis.fit(states)
    assert basis.components[0].argmax() == 1 and basis.components[1].argmax() == 3
    assert basis.explained[0] > 0.8 and basis.project(states).shape == (100, 3)
    assert Basis.fit(states[:, :2]).components.shape == (3, 2)  # fewer dimensions than components


def test_the_report_sets_trained_beside_untrained(study, found):
    report = found.score(study)
    frame = report.frame()
    assert report.n["report"] == 250 and "claim" in report.verdict
    assert set(frame[frame.metric == DISPLACEMENT].of) == {"trained", "untrained"}
    cosines = frame[frame.metric == "cosine between blocks"]
    assert len(cosines) == 2 * BLOCKS**2 and set(cosines["at block"]) == set(range(1, BLOCKS + 1))
    assert Report.from_dict(json.loads(json.dumps(report.to_dict()))).to_dict() == report.to_dict()


def test_a_stored_geometry_draws_the_same_path(study, found):
    observation = observed(study.capture("memory", "report"))
    told = found.explain(observation)
    assert np.shape(told["blocks"]) == (BLOCKS, 3) and np.shape(told["depth"]) == (2, BLOCKS, 3)
    restored = Geometry.restore(found.tensors(), json.loads(json.dumps(found.settings())))
    assert restored.explain(observation) == told and json.dumps(told)
    with pytest.raises(RiMError, match="fit it anew"):
        Geometry.restore({}, found.settings())
