"""How numbers, targets and sections of a report are written."""

import numpy as np
import pytest

from rim_probe.numbers import format_interval, format_number, percent, says_percent, signed
from rim_probe.probing.section import Estimate, Section, Table, Target
from rim_probe.probing.text import format_cell, format_section, format_target_value, format_verdict, parse_goal


def test_percent_is_what_a_title_says_and_no_level_of_confidence():
    assert says_percent("top-1, %") and says_percent("% right (95 % interval)")
    assert not says_percent("AUROC (95 % interval)") and not says_percent("")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.91234, "0.912"), (12.345, "12.3"), (1234.5, "1,234"), (0.0, "0"), (0.9996, "1.00"), (0.01234, "0.0123")]
    + [(1e-7, "1.0e-07"), (None, "–"), (float("nan"), "–"), (np.float32(0.5), "0.500"), (-3.0, "-3.00")],
)
def test_numbers_have_three_digits_and_no_value_is_no_zero(value, text):
    assert format_number(value) == text


def test_shares_are_written_in_percent_and_counts_are_not():
    assert format_number(0.8344, True) == "83.4" and format_number(-0.0001, True) == "0.0"
    assert format_cell(1500, percent=True) == "1,500" and format_cell("a") == "a"
    assert [percent(share) for share in (0, 0.004, 0.5, 0.996, 1)] == ["0 %", "<1 %", "50 %", ">99 %", "100 %"]
    assert [signed(x) for x in (0.001, -0.004, 0.02, -12.34)] == ["0", "0", "+0.02", "−12.3"]


def test_an_estimate_has_the_same_decimals_throughout():
    assert format_interval(1.05, 0.98, 1.12) == "1.05 (0.98 to 1.12)"
    assert format_cell(Estimate(0.8344, 0.8, 0.86, 9), percent=True) == "83.4 (80.0 to 86.0)"
    assert format_cell(Estimate(None, None, None, 0)) == "–"


@pytest.mark.parametrize(
    ("goal", "value", "verdict"),
    [
        (">= 90 %", Estimate(0.834, 0.8, 0.86, 9), "NOT MET by 6.6 points"),
        ("<= 10 %", 0.125, "NOT MET by 2.5 points"),
        (">= 0.90", 0.86, "NOT MET by 0.0400"),
        (">= -0.01", -0.05, "NOT MET by 0.0400"),
        ("> 0", Estimate(0.02, -0.01, 0.05, 9), "NOT MET: its interval reaches over the goal"),
        ("better than chance", 0.1, "NOT MET"),
        (">= 90 %", float("nan"), "NOT MET"),
    ],
)
def test_a_missed_target_says_by_how_much(goal, value, verdict):
    assert format_verdict(Target("what", goal, value, False)) == verdict
    assert format_verdict(Target("what", goal, value, True)) == "met"


def test_a_target_is_shown_in_the_unit_of_its_goal():
    points = Target("w", ">= 30 points", Estimate(0.25, 0.2, 0.3, 9), False)
    assert format_target_value(points) == "25.0 points (20.0 to 30.0)"
    assert format_target_value(Target("w", ">= 0.9", 0.91, True)) == "0.910"
    assert parse_goal(">= 90 % of CoT") == (">=", 0.9, "%") and parse_goal("high") is None


def test_a_section_as_markdown_holds_what_the_page_holds():
    estimate = Estimate(0.834, 0.8, 0.86, 1500)
    rows = [["memory", estimate, 0.91234], ["<m>|", None, float("nan")]]
    table = Table("Scores", ["method", "top-1, % (95 % interval)", "AUROC"], rows, "Chosen on “choose”.")
    target = Target("top-1", ">= 90 %", estimate, False)
    section = Section("steps", "Title", "Which?", "Half.", {"fit": 6000}, tables=[table], targets=[target])
    text = format_section(section)
    for part in ("### Title", "Which?", "NOT MET by 6.6 points", "Chosen on “choose”.", "fit 6,000", "0.912"):
        assert part in text
    assert "83.4 (80.0 to 86.0)" in text
    assert r"`<m>\|`" in text, "a token is neither swallowed as a tag nor a column's end"
