"""The report: numbers as text, figures as plotly's JSON, the page as one file, and that file in a real browser."""

import base64
import csv
import gzip
import io
import json
import re
import shutil
import sys

import numpy as np
import pytest

from rim_probe.errors import RiMError
from rim_probe.probing.captions import describe, figure_rows, how_to_read
from rim_probe.probing.figures import dark_colours, figure_json, legend
from rim_probe.probing.page import _packed_plotly, make_page, write_page
from rim_probe.probing.section import Estimate, Figure, Section, Table, Target
from rim_probe.probing.text import (
    format_cell,
    format_estimate,
    format_number,
    format_section,
    format_target_value,
    format_verdict,
    parse_goal,
    says_percent,
)

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
HOSTILE = "</script><script>document.title = 'taken'</script>"

HEATMAP = Figure(
    "heatmap",
    "Layer by block",
    "block",
    "layer",
    {
        "x": ["a", "a", "<b>"],  # a question says a word twice, and memory tokens look like markup
        "y": ["0", "1"],
        "z": [[0.1, None, 0.3], [0.25, 0.9, float("nan")]],
        "hover": None,
        "z_title": "right, %",
        "low": 0,
        "high": 1,
        "diverging": False,
    },
    "Mean over heads.",
)
LINES = Figure(
    "lines",
    "By block",
    "block",
    "accuracy",
    {
        "series": [
            {
                "name": "memory",
                "x": [1, 2, 3, 4, 5],
                "y": [0.1, 0.2, 0.3, 0.4, 0.5],
                "low": [0.0, 0.1, None, 0.3, 0.4],
                "high": [0.2, 0.3, None, 0.5, 0.6],
                "control": False,
            },
            {"name": "shuffled", "x": [1, 2], "y": [0.1, 0.1], "low": None, "high": None, "control": True},
        ]
    },
)
SCATTER = Figure(
    "scatter", "Heads", "share", "effect", {"groups": [{"name": "g", "x": [0.0], "y": [1.0], "text": None}]}
)
BARS = Figure(
    "bars",
    "Against controls",
    "",
    "top-1, %",
    {
        "bars": [
            {"name": "memory", "value": 0.8, "low": 0.7, "high": 0.9, "control": False},
            {"name": "shuffled", "value": 0.05, "low": None, "high": None, "control": True},
        ]
    },
)
FIGURES = [HEATMAP, LINES, SCATTER, BARS]


def section(name: str = "steps", **changes) -> Section:
    content = {
        "title": "Nearest step",
        "question": "Which step is it?",
        "summary": f"80 % right. {HOSTILE}",
        "n": {"fit": 6000, "report": 1500},
        "settings": {"layer": np.int64(5), "map": {"kind": "ridge"}},
        "tables": [
            Table(
                "Scores",
                ["method", "top-1, % (95 % interval)", "AUROC (95 % interval)", "n"],
                [["memory", Estimate(0.834, 0.8, 0.86, 1500), 0.91234, 1500], ["<m>|", None, float("nan"), 3]],
                "Chosen on “choose”.",
            )
        ],
        "figures": FIGURES,
        "targets": [Target("top-1", ">= 90 %", Estimate(0.834, 0.8, 0.86, 1500), False)],
    }
    return Section(name, **{**content, **changes})


PROVENANCE = {
    "checkpoint": "checkpoints/rim-tiny",
    "fingerprint": "f00d",
    "command": "python -m rim_probe probe",
    "seed": 0,
    "data": {"fit": {"file": "fit.txt", "sha256": "ab", "problems": 6000}},
    "machine": {"cpu": "one", "versions": {"torch": "2"}},
}


@pytest.fixture(scope="module")
def page() -> str:
    pytest.importorskip("plotly")
    return make_page([section(), section("other", figures=[], targets=[], tables=[], settings={})], PROVENANCE)


# ------------------------------------------------------------------------------------------------------ numbers as text


def test_percent_is_what_a_title_says_and_no_level_of_confidence():
    assert says_percent("top-1, %") and says_percent("% right (95 % interval)")
    assert not says_percent("AUROC (95 % interval)") and not says_percent("")


def test_numbers_have_three_digits_and_no_value_is_no_zero():
    assert [format_number(value) for value in (0.91234, 12.345, 1234.5, 0.0, 0.9996, 0.01234)] == [
        "0.912",
        "12.3",
        "1,234",
        "0",
        "1.00",
        "0.0123",
    ]
    assert format_number(0.8344, percent=True) == "83.4" and format_number(1e-7) == "1.0e-07"
    assert [format_number(value) for value in (None, float("nan"))] == ["–", "–"]
    assert format_cell(1500, percent=True) == "1,500" and format_cell("a") == "a"
    assert format_number(-0.0001, percent=True) == "0.0"


def test_an_estimate_has_the_same_decimals_throughout():
    assert format_estimate(Estimate(1.05, 0.98, 1.12, 9)) == "1.05 (0.98 to 1.12)"
    assert format_estimate(Estimate(0.8344, 0.8, 0.86, 9), percent=True) == "83.4 (80.0 to 86.0)"
    assert format_estimate(Estimate(None, None, None, 0)) == "–"


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
    assert format_target_value(Target("w", ">= 30 points", Estimate(0.25, 0.2, 0.3, 9), False)) == (
        "25.0 points (20.0 to 30.0)"
    )
    assert format_target_value(Target("w", ">= 0.9", 0.91, True)) == "0.910"
    assert parse_goal(">= 90 % of CoT") == (">=", 0.9, "%") and parse_goal("high") is None


def test_a_section_as_markdown_holds_what_the_page_holds():
    text = format_section(section())
    for part in ("### Nearest step", "Which step is it?", "NOT MET by 6.6 points", "Chosen on “choose”.", "fit 6,000"):
        assert part in text
    assert "83.4 (80.0 to 86.0)" in text and "0.912" in text
    assert r"`<m>\|`" in text, "a token is neither swallowed as a tag nor a column's end"


# -------------------------------------------------------------------------------------------------------------- figures


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.kind)
def test_plotly_takes_every_kind(figure):
    graph_objects = pytest.importorskip("plotly.graph_objects")
    drawn = figure_json(figure)
    assert graph_objects.Figure(**drawn).layout.height == drawn["layout"]["height"] > 0
    json.dumps(drawn, allow_nan=False)
    assert how_to_read(figure) and describe(figure)


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.kind)
def test_every_colour_has_a_dark_counterpart(figure):
    used = set(re.findall(r'"(#\w{6}|rgba\([^"]*\))"', json.dumps(figure_json(figure))))
    assert used - {"rgba(0,0,0,0)"} <= set(dark_colours())


def test_a_heat_map_keeps_repeated_labels_markup_and_gaps():
    heatmap, crosses = figure_json(HEATMAP)["data"]
    axis = figure_json(HEATMAP)["layout"]["xaxis"]
    assert heatmap["x"] == [0, 1, 2] and axis["ticktext"] == ["a", "a", "&lt;b&gt;"]
    assert heatmap["z"] == [[0.1, None, 0.3], [0.25, 0.9, None]]
    assert list(zip(crosses["x"], crosses["y"], strict=True)) == [(1, 0), (2, 1)]
    assert "90.0 %" in heatmap["hovertext"][1][1] and "&lt;b&gt;" in heatmap["hovertext"][0][2]
    assert describe(HEATMAP).endswith("Highest 90.0 % at layer 1, block a; lowest 10.0 % at layer 0, block a.")


def test_a_diverging_scale_has_zero_in_its_middle():
    data = {**HEATMAP.data, "low": None, "high": None, "diverging": True, "z": [[-0.1, 0.4, 0.0]], "y": ["0"]}
    trace = figure_json(Figure("heatmap", "t", "x", "y", data))["data"][0]
    assert (trace["zmin"], trace["zmax"]) == (-0.4, 0.4)


def test_a_band_leaves_out_points_without_an_interval_and_a_control_is_dashed_grey():
    band, memory, control = figure_json(LINES)["data"]
    assert band["x"] == [1, 2, 2, 1, None, 4, 5, 5, 4]
    assert band["y"] == [0.0, 0.1, 0.3, 0.2, None, 0.3, 0.4, 0.6, 0.5]
    assert memory["line"]["dash"] == "solid" != control["line"]["dash"]
    assert band["legendgroup"] == memory["legendgroup"] != control["legendgroup"]
    assert [entry["colour"] for entry in legend(LINES)] == [memory["line"]["color"], control["line"]["color"]]


def test_many_series_are_told_apart():
    series = [{"name": str(i), "x": [1], "y": [1.0], "low": None, "high": None, "control": i > 7} for i in range(12)]
    looks = legend(Figure("lines", "t", "x", "y", {"series": series}))
    assert len({(look["colour"], look["dash"], look["symbol"]) for look in looks}) == 12


def test_rows_hold_every_number_of_a_figure():
    assert figure_rows(HEATMAP)[1][4] == ["1", "a", 0.9] and len(figure_rows(HEATMAP)[1]) == 6
    assert figure_rows(LINES)[0] == ["series", "block", "accuracy", "low", "high"]
    assert figure_rows(LINES)[1][2] == ["memory", 3, 0.3, None, None]
    assert figure_rows(BARS)[2] == [False, True, True, True]


# ------------------------------------------------------------------------------------------------------------- the page


def packed(page: str, name: str) -> str:
    found = re.search(f'<script type="text/plain" id="{name}">([^<]*)</script>', page)
    return gzip.decompress(base64.b64decode(found[1])).decode()


def test_the_page_asks_nothing_of_the_network(page):
    shell = re.sub(r'(<script type="text/plain"[^>]*>)[^<]*', r"\1", page)
    assert not re.search(r"\s(src|action)=|\shref=\"(?!#)|https?://|url\(|@import", shell)
    assert "default-src 'none'" in shell
    assert len(page) < 2_500_000


def test_the_page_says_everything_without_its_figures(page):
    assert page.count('class="plot" role="img" aria-label="') == page.count("<figure") == len(FIGURES)
    assert page.count('<details class="numbers">') == len(FIGURES)
    for part in ("0 of 1 targets met", "NOT MET by 6.6", "fit 6,000", "f00d", "python -m rim_probe probe", "Mean over"):
        assert part in page, part


def test_text_of_data_stays_text(page):
    assert HOSTILE not in page and "&lt;/script&gt;" in page


def test_the_downloads_hold_the_data(page):
    payload = json.loads(packed(page, "payload"))
    assert payload["report"]["sections"][0]["settings"]["layer"] == 5
    assert set(payload["figures"]) == {f"steps-figure-{place}" for place in (1, 2, 3, 4)}
    scores = list(csv.reader(io.StringIO(payload["items"]["steps-table-1"]["csv"])))
    assert scores[0][1:5] == [f"top-1, % (95 % interval){part}" for part in ("", ", low", ", high", ", n")]
    assert scores[1] == ["memory", "83.4", "80.0", "86.0", "1500", "0.91234", "1500"], "in percent, as the header says"
    assert packed(page, "plotly").lstrip().startswith("/**\n* plotly.js")


def test_pages_are_equal_for_equal_reports(page, tmp_path):
    again = [section(), section("other", figures=[], targets=[], tables=[], settings={})]
    assert write_page(tmp_path / "report.html", again, PROVENANCE).read_text(encoding="utf-8") == page


def test_a_report_that_was_stored_gives_the_same_page(page):
    stored = json.loads(packed(page, "payload"))["report"]
    assert make_page([Section.from_dict(one) for one in stored["sections"]], stored["provenance"]) == page


def test_a_probe_may_have_a_command_of_its_own():
    pytest.importorskip("plotly")
    page = make_page([section()], {**PROVENANCE, "probes": {"steps": {"command": "python own"}}})
    assert page.count("python own") == 1 and page.count("python -m rim_probe probe") == 1


def test_without_plotly_a_sentence_says_what_to_install(monkeypatch):
    _packed_plotly.cache_clear()
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(RiMError, match=r"^[^.]*; run `pip install plotly`\.$"):
        make_page([section()], PROVENANCE)


# ------------------------------------------------------------------------------------------------------- in the browser


@pytest.fixture(scope="module")
def opened(page, tmp_path_factory):
    """Opens the page from a file; `opened.complaints` collects errors and whatever is asked of elsewhere."""
    if CHROMIUM is None:
        pytest.skip("no Chromium here; `apt-get install chromium` runs these tests")
    playwright = pytest.importorskip("playwright.sync_api")
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(page, encoding="utf-8")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])

        def opened(script: str = "", **screen):
            tab = browser.new_context(**screen).new_page()
            tab.on(
                "console", lambda message: opened.complaints.append(message.text) if message.type == "error" else None
            )
            tab.on("pageerror", lambda error: opened.complaints.append(str(error)))
            tab.on("request", lambda request: opened.complaints.append(request.url))
            if script:
                tab.add_init_script(script)
            tab.goto(file.as_uri())
            opened.complaints.remove(file.as_uri())
            return tab

        opened.complaints = []
        yield opened
        browser.close()


def test_a_dark_telephone_shows_every_figure(opened):
    tab = opened(viewport={"width": 380, "height": 800}, color_scheme="dark")
    tab.wait_for_selector("html[data-ready]", timeout=60_000)
    for place in range(len(FIGURES)):
        tab.locator(".plot").nth(place).scroll_into_view_if_needed()
        tab.locator(".plot").nth(place).locator(".main-svg").first.wait_for(timeout=60_000)
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing makes the page scroll sideways"
    ticks = tab.locator(".plot").nth(0).locator(".xtick").all_text_contents()
    assert ticks == ["a", "a", "<b>"]
    colour = tab.locator(".plot").nth(1).locator(".xtick text").first.evaluate("node => getComputedStyle(node).fill")
    assert colour == "rgb(179, 175, 168)", "text of figures follows the theme"
    assert tab.title() == "RiM probe report: rim-tiny"
    with tab.expect_download() as download:
        tab.locator("button[data-save=csv]").first.click()
    assert download.value.suggested_filename == "steps-figure-1.csv"
    assert opened.complaints == []


def test_a_browser_that_cannot_unpack_shows_the_tables(opened):
    tab = opened("delete window.DecompressionStream")
    tab.wait_for_selector("#trouble:not([hidden])", timeout=60_000)
    assert tab.locator("details.numbers[open]").count() == len(FIGURES)
    assert opened.complaints == []
