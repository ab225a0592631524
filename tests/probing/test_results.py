"""What probes report: results survive JSON, their intervals hold what they promise, one renderer tells them all."""

import json

import numpy as np
import pytest

from rim_probe.probing.results import (
    Cloud,
    Estimate,
    Goal,
    Report,
    Result,
    bootstrap,
    headline,
    views,
)
from rim_probe.probing.tables import format_headline, view_table

SCORE = Estimate(0.834, 0.8, 0.86, 1500)
NAN = float("nan")
REPORT = Report(
    "steps",
    [
        Result("top-1", "memory", SCORE, goal=Goal(">=", 0.9)),
        Result("top-1", "memory", Estimate(0.7, 0.6, 0.8, 500), group="2 steps"),
        Result("top-1", "last question token", Estimate(0.4, 0.35, 0.45, 1500), "control"),
        Result("top-1", "<m>|", Estimate(NAN, NAN, NAN, 0), "control"),
        Result("entropy, nats", "memory", Estimate(0.5, 0.4, 0.6, 9), share=False, place={"block": 1}),
        Result("entropy, nats", "memory", Estimate(0.25, 0.2, 0.3, 9), share=False, place={"block": 2}),
        *(
            Result("says it", "slots", SCORE, place={"step": step, "layer": layer, "block": 1})
            for step in (1, 2)
            for layer in (3, "all")
        ),
    ],
    {"fit": 6000, "report": 1500},
    {"layer": np.int64(3), "chosen on": "choose"},
    verdict="It holds.",
    clouds={"Heads": Cloud("share", "effect", {"g": ([0.0], [1.0])})},
)


def test_a_report_survives_json():
    data = json.loads(json.dumps(REPORT.to_dict(), allow_nan=False))
    again = Report.from_dict(data)
    assert again.to_dict() == REPORT.to_dict() and again.results[0] == REPORT.results[0]
    assert np.isnan(again.results[3].estimate.value) and again.results[-1].place == {
        "step": 2,
        "layer": "all",
        "block": 1,
    }


def test_the_headline_stands_beside_the_strongest_control_of_the_same_problems():
    score, control = headline(REPORT)
    assert (score.of, control.of) == ("memory", "last question token")
    told = format_headline(REPORT)
    assert "83.4 % (80.0 to 86.0)" in told and "40.0 %" in told and "lies above" in told and told.endswith("It holds.")
    assert headline(Report("x", [], {})) is None


def test_views_put_together_what_one_picture_shows():
    shapes = [(view.metric, view.place, dict(view.at), len(view.results)) for view in views(REPORT)]
    assert shapes[:2] == [("top-1", (), {}, 4), ("entropy, nats", ("block",), {}, 2)]
    assert shapes[2:] == [("says it", ("layer", "block"), {"step": step}, 2) for step in (1, 2)]


def test_tables_hold_every_number():
    top, entropy, cells = (view_table(view) for view in views(REPORT)[:3])
    assert top[1][0] == ["memory", "83.4 (80.0 to 86.0), n = 1,500", "70.0 (60.0 to 80.0)"]
    assert top[1][1][0] == "control: last question token"
    assert entropy == (["block", "memory"], [["1", "0.500 (0.400 to 0.600)"], ["2", "0.250 (0.200 to 0.300)"]])
    assert cells[1][1] == ["slots", "all", "1", "83.4 (80.0 to 86.0)", "1,500"]


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
