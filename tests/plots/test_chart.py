"""Charts: places agree with the numbers, texts are escaped, nothing scales letters."""

import re

import pytest

from rim_probe.pictures import chart as ch
from rim_probe.pictures.axes import same_units


def test_ticks_are_round_and_inside():
    axis = ch.axis([0.13, 0.87], "share", low=0, high=1)
    assert [value for value, _ in axis.ticks] == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert [text for _, text in ch.axis([-37, 41]).ticks] == ["−40", "−20", "0", "20", "40"]


def test_ranks_have_the_first_on_top_and_equal_ratios_equally_long():
    axis = ch.axis([1, 300], "rank", low=1, log=True, flipped=True)
    assert axis.share(1) == 1 and axis.share(axis.high) == 0
    assert axis.share(1) - axis.share(3) == pytest.approx(axis.share(10) - axis.share(30))


@pytest.mark.parametrize("values", [[], [None, float("nan")], [3, 3, 3], [1e-9, 2e-9], [-5e6, 5e6]])
def test_any_values_make_an_axis(values):
    for log in (False, True):
        axis = ch.axis(values, log=log)
        assert axis.low < axis.high and len(axis.ticks) <= 12


def test_marks_are_where_the_numbers_say():
    x, y = ch.axis([], low=0, high=10), ch.axis([], low=0, high=1)
    drawn = ch.chart(x, y, [ch.Line([0, 5, 10], [0, 0.25, 1], tips=["a", "b", "c"])], "a line")
    assert re.findall(r'<svg x="([\d.]+)%" y="([\d.]+)%"', drawn) == [
        ("0.0", "100.0"),
        ("50.0", "75.0"),
        ("100.0", "0.0"),
    ]
    assert 'd="M0 1000L500 750L1000 0"' in drawn


def test_a_gap_breaks_the_line():
    x, y = ch.axis([], low=0, high=3), ch.axis([], low=0, high=1)
    drawn = ch.chart(x, y, [ch.Line([0, 1, 2, 3], [0, 0, None, 1], tips=list("abcd"))], "gap")
    assert 'data-tip="c"' not in drawn and re.search(r'd="M[^"]*M[^"]*"', drawn)


def test_only_the_first_mark_is_a_tab_stop():
    x, y = ch.axis([], low=0, high=1), ch.axis([], low=0, high=1)
    lines = [ch.Line([0, 1], [0, 1], tips=["p", "q"]), ch.Path([(0, 1), (1, 0)], tips=["r", "s"])]
    drawn = ch.chart(x, y, lines, "two lines")
    assert drawn.count('tabindex="0"') == 1
    assert re.findall(r'data-cell="([\d,]+)"', drawn) == ["1,0", "1,1", "0,0", "0,1"]


def test_texts_are_escaped():
    bad = '<script>"&'
    x, y = ch.named_axis([bad], bad), ch.axis([1], bad)
    drawn = ch.chart(x, y, [ch.Line([0], [1], tips=[bad], label=bad, links=[bad])], bad)
    drawn += ch.chart(x, y, [ch.Path([(0, 1)], [bad], tips=[bad])], bad) + ch.legend([("line", "ink", bad)])
    drawn += ch.whiskers([ch.Whisker(bad, 1, 0, 2, bad, tip=bad)], y, bad)
    assert "<script" not in drawn and bad not in drawn


def test_equal_units_keep_what_was_shown():
    x, y = same_units(ch.axis([], low=0, high=10), ch.axis([], low=0, high=1), 2)
    assert (x.high - x.low) / (y.high - y.low) == pytest.approx(2)
    assert x.low <= 0 and x.high >= 10 and y.low <= 0 and y.high >= 1


def test_a_cloud_outside_the_frame_is_left_out():
    x = y = ch.axis([], low=0, high=1)
    assert ch.chart(x, y, [ch.Cloud([(0.5, 0.5), (3, 0.5)])], "cloud").count("<circle") == 1


def test_whiskers_name_their_values_and_unmeasured_rows_say_so():
    x = ch.axis([], low=0, high=1)
    drawn = ch.whiskers([ch.Whisker("RiM", 0.5, 0.4, 0.7, "50 %", mark=0.1), ch.Whisker("CoT", None)], x, "rows")
    assert "left:40.0%;width:30.00%" in drawn and "left:10.0%" in drawn
    assert "CoT: not measured" in drawn and drawn.count("whisker-dot") == 1


def test_an_unknown_tone_is_an_error():
    with pytest.raises(ValueError, match="tone"):
        ch.legend([("dot", "purple", "text")])
