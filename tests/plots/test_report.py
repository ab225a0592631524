"""The report page: every kind of figure, the page as one file, and that file in a real browser."""

import re
import shutil

import numpy as np
import pytest

from rim_probe.plots.colours import dark_colours
from rim_probe.plots.report import draw_page, figures, looks, make_page
from rim_probe.probing.artifacts import save_report
from rim_probe.probing.results import Cloud, Estimate, Goal, Report, Result

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
HOSTILE = "</script><script>document.title = 'taken'</script>"


def result(of: str, value: float, role: str = "score", metric: str = "right", n: int = 9, **place) -> Result:
    return Result(metric, of, Estimate(value, value - 0.1, value + 0.1, n), role, place=place)


NAN = float("nan")
CELLS = [(0, "a", 0.1), (0, "<b>", 0.3), (1, "a", 0.25), (1, "b", 0.9), (1, "<b>", NAN)]
REPORT = Report(
    "steps",
    [
        Result("top-1", "memory", Estimate(0.834, 0.8, 0.86, 1500), goal=Goal(">=", 0.9)),
        result("shuffled", 0.05, "control", "top-1"),
        *(result("memory", value, layer=layer, block=block) for layer, block, value in CELLS),
        *(result("memory", k / 10, metric="says it", block=k) for k in range(1, 6)),
        *(result("random", 0.1, "control", "says it", block=k) for k in range(1, 3)),
    ],
    {"fit": 6000, "report": 1500},
    {"layer": np.int64(5), "map": {"kind": "ridge"}},
    verdict=f"80 % right. {HOSTILE}",
    clouds={"Heads": Cloud("share", "effect", {"g": ([0.0], [1.0])})},
)
BARS, HEATMAP, LINES, SCATTER = ([*figures(REPORT)][i] for i in range(4))
REPORTS = [REPORT, Report("geometry", [], {})]
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
    return make_page(REPORTS, PROVENANCE)


@pytest.mark.parametrize("drawn", [BARS, HEATMAP, LINES, SCATTER], ids=["bars", "heat map", "lines", "scatter"])
def test_every_colour_of_every_kind_has_a_dark_counterpart(drawn):
    used = set(re.findall(r'"(#\w{6}|rgba\([^"]*\))"', drawn[1].to_json()))
    assert used - {"rgba(0,0,0,0)"} <= set(dark_colours())


def test_a_heat_map_keeps_markup_and_gaps():
    cells, crosses = HEATMAP[1].data
    assert list(HEATMAP[1].layout.xaxis.ticktext) == ["a", "&lt;b&gt;", "b"]
    assert [list(row) for row in cells.z] == [[0.1, 0.3, None], [0.25, None, 0.9]]
    assert list(zip(crosses.x, crosses.y, strict=True)) == [(2, 0), (1, 1)]
    assert "90.0 %" in cells.hovertext[1][2] and "&lt;b&gt;" in cells.hovertext[0][1]


def test_a_scale_with_values_below_zero_has_zero_in_its_middle():
    report = Report("steps", [result("x", value, layer=1, block=i) for i, value in enumerate((-0.1, 0.4, 0.0))], {})
    trace = next(figures(report))[1].data[0]
    assert (trace.zmin, trace.zmax) == (-0.4, 0.4)


def test_a_control_is_dashed_and_hollow():
    memory, control = (trace for trace in LINES[1].data if trace.mode == "lines+markers")
    assert memory.line.dash == "solid" != control.line.dash
    symbols = {symbol for trace in BARS[1].data for symbol in trace.marker.symbol}
    assert symbols == {"circle", "circle-open"}


def test_many_series_are_told_apart():
    found = looks([i > 7 for i in range(12)])
    assert len({(look["tone"], look["dash"], look["symbol"]) for look in found}) == 12


def test_tables_hold_every_number_of_a_figure():
    assert HEATMAP[2].rows[3] == ["memory", "1", "b", "90.0 (80.0 to 100.0)", "9"]
    assert LINES[2].rows[0] == ["1", "10.0 (0.0 to 20.0)", "10.0 (0.0 to 20.0)"]


def test_the_page_says_everything_and_text_of_data_stays_text(page):
    assert page.count('class="chart-slot"') == 4
    for part in ("NOT MET by 6.6", "fit 6,000", "f00d", "python -m rim_probe probe", "83.4 %", "(80.0 to 86.0)"):
        assert part in page, part
    assert HOSTILE not in page and "&lt;/script&gt;" in page and "default-src" in page


def test_a_stored_report_gives_the_same_page(page, tmp_path):
    save_report(tmp_path, REPORTS, PROVENANCE)
    assert draw_page(tmp_path).read_text(encoding="utf-8") == page


def test_a_probe_may_have_a_command_of_its_own():
    page = make_page([REPORT], {**PROVENANCE, "probes": {"steps": {"command": "python own"}}})
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
        for place in range(4):
            tab.locator(".chart-slot").nth(place).scroll_into_view_if_needed()
            tab.locator(".chart-slot").nth(place).locator(".main-svg").first.wait_for()
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing scrolls the page sideways"
        assert tab.locator(".chart-slot").nth(1).locator(".xtick").all_text_contents() == ["a", "<b>", "b"]
        tick = tab.locator(".chart-slot").nth(2).locator(".xtick text").first
        assert tick.evaluate("node => getComputedStyle(node).fill") == "rgb(179, 175, 168)", "figures follow the theme"
        assert tab.title() == "RiM probe report: rim-tiny"
        for button, ending in (("[data-tool=csv]", "csv"), ("[data-title*=SVG]", "svg"), ("[data-title*=PNG]", "png")):
            with tab.expect_download() as download:
                tab.locator(button).first.click()
            assert download.value.suggested_filename == f"rim-probe-steps-figure-1.{ending}"
            assert download.value.path().stat().st_size > 50
        browser.close()
    assert complaints == []
