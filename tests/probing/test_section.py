"""What probes report: sections survive JSON, and their intervals hold what they promise."""

import json

import numpy as np
import pytest

from rim_probe.probing.section import Estimate, Figure, Section, Table, Target, bootstrap, proportion_estimate

SECTION = Section(
    name="steps",
    title="Nearest explicit step",
    question="Which step is a block nearest to?",
    summary="Block 1 holds step 2.",
    n={"fit": 6000, "report": 1500},
    settings={"layer": 3, "cells": [1, 2], "chosen on": "choose"},
    tables=[
        Table("Scores", ["", "top-1", "n"], [["probe", Estimate(0.9, 0.88, 0.92, 1500), 1500], ["none", None, "-"]])
    ],
    figures=[
        Figure("heatmap", "Alignment", "step", "block", {"x": ["1"], "y": ["1"], "z": [[0.5]], "hover": None}, "n")
    ],
    targets=[Target("top-1", ">= 90 %", Estimate(0.9, 0.88, 0.92, 1500), True), Target("gap", ">= 0.3", 0.4, True)],
    data={"matrix": [[0.1, 0.9]]},
)


def test_a_section_survives_json():
    assert Section.from_dict(SECTION.to_dict()) == SECTION
    assert Section.from_dict(json.loads(json.dumps(SECTION.to_dict(), allow_nan=False))) == SECTION


def test_numbers_of_numpy_and_missing_ones_become_json():
    section = Section(
        "name",
        "title",
        "question",
        "summary",
        {"report": np.int64(3)},
        {"layer": np.int32(4), 5: (1, 2)},
        [Table("t", ["a"], [[float("nan"), Estimate(np.float32(0.5), 0.0, float("nan"), 3)]])],
        data={"array": np.array([[1.5, np.nan]]), "infinite": float("inf"), "flag": np.bool_(True)},
    )
    data = json.loads(json.dumps(section.to_dict(), allow_nan=False))
    assert data["n"] == {"report": 3} and data["settings"] == {"layer": 4, "5": [1, 2]}
    assert data["data"] == {"array": [[1.5, None]], "infinite": None, "flag": True}
    nothing, estimate = Section.from_dict(data).tables[0].rows[0]
    assert nothing is None
    # An estimate holds numbers, also where one of them is missing.
    assert (estimate.value, estimate.low, estimate.n) == (0.5, 0.0, 3) and np.isnan(estimate.high)


def test_proportions_have_the_wilson_interval():
    estimate = proportion_estimate([True] * 8 + [False] * 2)
    assert (estimate.value, estimate.n) == (0.8, 10)
    assert (estimate.low, estimate.high) == pytest.approx((0.4902, 0.9433), abs=1e-4)  # Wilson 1927, z = 1.96
    assert proportion_estimate(np.array([1, 0]) > 0).value == 0.5
    none = proportion_estimate([])
    assert np.isnan(none.value) and (none.low, none.high, none.n) == (0, 1, 0)


def test_bootstrap_is_the_same_for_a_seed_and_draws_problems_not_values():
    values = np.random.default_rng(0).normal(size=(50, 4))
    one = bootstrap(values, seed=1, draws=200)
    assert one == bootstrap(values, seed=1, draws=200) != bootstrap(values, seed=2, draws=200)
    assert one.value == values.mean() and one.n == 50 and one.low < one.value < one.high
    # Ten equal copies of a problem's value tell no more than one: the interval does not shrink.
    copies, single = (bootstrap(array, seed=1, draws=200) for array in (np.repeat(values[:, :1], 10, 1), values[:, 0]))
    assert (copies.low, copies.high) == pytest.approx((single.low, single.high))


def test_bootstrap_intervals_cover():
    """Of 120 intervals of the mean of 40 numbers, about 95 % hold the true mean (the percentile one a little fewer)."""
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(120):
        estimate = bootstrap(rng.exponential(size=40), seed=trial, draws=200)
        covered += estimate.low <= 1 <= estimate.high
    assert 0.88 <= covered / 120 <= 0.98


def test_bootstrap_of_arrays_drawn_together():
    x = np.random.default_rng(0).normal(size=200)
    estimate = bootstrap((x, 2 * x), lambda a, b: np.corrcoef(a, b)[0, 1], draws=100)
    assert (estimate.low, estimate.value, estimate.high) == pytest.approx((1, 1, 1))


def test_draws_without_a_value_are_left_out():
    """One right answer in twenty: a third of the draws hold none, and have no share of anything among the right."""
    right = np.arange(20) == 0

    def share(confident, right):
        return confident[right].mean() if right.any() else np.nan

    estimate = bootstrap((np.arange(20) < 5, right), share, draws=200)
    assert (estimate.value, estimate.low, estimate.high, estimate.n) == (1, 1, 1, 20)
    never = bootstrap(np.ones(5), lambda values: np.nan, draws=20)
    assert np.isnan([never.value, never.low, never.high]).all() and never.n == 5
    assert np.isnan(bootstrap(np.ones(0)).value) and bootstrap(np.ones(0)).n == 0
