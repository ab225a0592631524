"""The report page: every kind of figure, the page as one file, and that file in a real browser."""

import re
import shutil

import numpy as np
import pytest

from rim_probe.plots.colours import dark_colours
from rim_probe.plots.report import draw_page, figure_table, looks, make_page, section_figure
from rim_probe.probing.artifacts import save_report
from rim_probe.probing.section import Estimate, Figure, Section, Table, Target

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
PROVENANCE = {
    "checkpoint": "checkpoints/rim-tiny",
    "fingerprint": "f00d",
    "command": "python -m rim_probe probe",
    "seed": 0,
    "data": {"fit": {"file": "fit.txt", "sha256": "ab", "problems": 6000}},
    "machine": {"cpu": "one", "versions": {"torch": "2"}},
}


def section(name: str = "steps", **changes) -> Section:
    score = Estimate(0.834, 0.8, 0.86, 1500)
    rows = [["memory", score, 0.91234, 1500], ["<m>|", None, float("nan"), 3]]
    content = {
        "title": "Nearest step",
        "question": "Which step is it?",
        "summary": f"80 % right. {HOSTILE}",
        "n": {"fit": 6000, "report": 1500},
        "settings": {"layer": np.int64(5), "map": {"kind": "ridge"}},
        "tables": [Table("Scores", ["method", "top-1, % (95 % interval)", "AUROC", "n"], rows, "Chosen on “choose”.")],
        "figures": FIGURES,
        "targets": [Target("top-1", ">= 90 %", score, False)],
    }
    return Section(name, **{**content, **changes})


SECTIONS = [section(), section("other", figures=[], targets=[], tables=[], settings={})]


@pytest.fixture(scope="module")
def page() -> str:
    return make_page(SECTIONS, PROVENANCE)


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.kind)
def test_every_colour_of_every_kind_has_a_dark_counterpart(figure):
    used = set(re.findall(r'"(#\w{6}|rgba\([^"]*\))"', section_figure(figure).to_json()))
    assert used - {"rgba(0,0,0,0)"} <= set(dark_colours())


def test_a_heat_map_keeps_repeated_labels_markup_and_gaps():
    figure = section_figure(HEATMAP)
    cells, crosses = figure.data
    assert list(figure.layout.xaxis.ticktext) == ["a", "a", "&lt;b&gt;"]
    assert [list(row) for row in cells.z] == [[0.1, None, 0.3], [0.25, 0.9, None]]
    assert list(zip(crosses.x, crosses.y, strict=True)) == [(1, 0), (2, 1)]
    assert "90.0 %" in cells.hovertext[1][1] and "&lt;b&gt;" in cells.hovertext[0][2]


def test_a_diverging_scale_has_zero_in_its_middle():
    data = {**HEATMAP.data, "low": None, "high": None, "diverging": True, "z": [[-0.1, 0.4, 0.0]], "y": ["0"]}
    trace = section_figure(Figure("heatmap", "t", "x", "y", data)).data[0]
    assert (trace.zmin, trace.zmax) == (-0.4, 0.4)


def test_a_band_leaves_out_points_without_an_interval_and_a_control_is_dashed():
    band, memory, control = section_figure(LINES).data
    assert list(band.x) == [1, 2, 4, 5, 5, 4, 2, 1] and list(band.y)[:4] == [0.0, 0.1, 0.3, 0.4]
    assert memory.line.dash == "solid" != control.line.dash
    assert band.legendgroup == memory.legendgroup != control.legendgroup


def test_many_series_are_told_apart():
    found = looks([{"control": i > 7} for i in range(12)])
    assert len({(look["tone"], look["dash"], look["symbol"]) for look in found}) == 12


def test_tables_hold_every_number_of_a_figure_as_its_title_says():
    assert ["1", "a", "90.0"] in figure_table(HEATMAP).rows and len(figure_table(HEATMAP).rows) == 6
    assert figure_table(LINES).rows[2] == ["memory", "3", "0.300", "–", "–"]
    assert figure_table(SCATTER).rows == [["g", "0", "1.00", "–"]]
    assert figure_table(BARS).rows[0] == ["memory", "80.0", "70.0", "90.0"]


def test_the_page_says_everything_and_text_of_data_stays_text(page):
    assert page.count('class="chart-slot"') == len(FIGURES)
    for part in (
        "NOT MET by 6.6",
        "fit 6,000",
        "f00d",
        "python -m rim_probe probe",
        "Mean over",
        "83.4 (80.0 to 86.0)",
    ):
        assert part in page, part
    assert (
        HOSTILE not in page and "&lt;/script&gt;" in page and "default-src &#39;none&#39;"
    ) or "default-src 'none'" in page


def test_a_stored_report_gives_the_same_page(page, tmp_path):
    save_report(tmp_path, SECTIONS, PROVENANCE)
    assert draw_page(tmp_path).read_text(encoding="utf-8") == page


def test_a_probe_may_have_a_command_of_its_own():
    page = make_page([section()], {**PROVENANCE, "probes": {"steps": {"command": "python own"}}})
    assert page.count("python own") == 1 and page.count("python -m rim_probe probe") == 1


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here; `apt-get install chromium` runs this test")
def test_a_dark_phone_shows_every_figure_and_asks_nothing_of_the_network(page, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api")
    (tmp_path / "report.html").write_text(page, encoding="utf-8")
    complaints = []
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        tab = browser.new_context(viewport={"width": 380, "height": 800}, color_scheme="dark").new_page()
        tab.set_default_timeout(60_000)
        tab.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on("request", lambda request: complaints.append(request.url) if "http" in request.url else None)
        tab.goto((tmp_path / "report.html").as_uri())
        for place in range(len(FIGURES)):
            tab.locator(".chart-slot").nth(place).scroll_into_view_if_needed()
            tab.locator(".chart-slot").nth(place).locator(".main-svg").first.wait_for()
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing scrolls the page sideways"
        assert tab.locator(".chart-slot").nth(0).locator(".xtick").all_text_contents() == ["a", "a", "<b>"]
        tick = tab.locator(".chart-slot").nth(1).locator(".xtick text").first
        assert tick.evaluate("node => getComputedStyle(node).fill") == "rgb(179, 175, 168)", "figures follow the theme"
        assert tab.title() == "RiM probe report: rim-tiny"
        for button, ending in (("[data-tool=csv]", "csv"), ("[data-title*=SVG]", "svg"), ("[data-title*=PNG]", "png")):
            with tab.expect_download() as download:
                tab.locator(button).first.click()
            assert download.value.suggested_filename == f"rim-probe-steps-figure-1.{ending}"
            assert download.value.path().stat().st_size > 50
        browser.close()
    assert complaints == []
