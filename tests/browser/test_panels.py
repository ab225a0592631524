"""The panels in a real browser, over the shipped checkpoints: a whole story, every panel, keyboard, links and files.

rim-tiny is trained, in glass-box block k holds step k by construction: what is predicted there must come.
"""

import csv
import io
import json
import re
from pathlib import Path
from urllib.parse import urlencode

import pytest
from axe_playwright_python.base import AXE_FILE_PATH
from PIL import Image
from playwright.sync_api import expect

from app import recorded
from app.demo import build_demo
from app.models import CHECKPOINTS, ModelShelf
from app.serving import serve
from app.view import PANELS
from browser.pages import DONE, NEEDS_CHROMIUM, ask, scrolls_sideways
from rim_probe.gallery import load_examples
from rim_probe.probing.matches import spelled
from rim_probe.probing.reading import Reading

pytestmark = NEEDS_CHROMIUM
LOOKING = [panel for panel in PANELS if panel not in ("race", "evidence")]
SCRIPT = "<img src=x onerror=alert(1)><script>alert(2)</script>\"'><svg onload=alert(3)>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Both shipped checkpoints, and `torn`: rim-tiny with half of its weights file, and recorded as rim-tiny is."""
    folder = tmp_path_factory.mktemp("shipped")
    for name in ("rim-tiny", "glass-box"):
        (folder / name).symlink_to(CHECKPOINTS / name)
    (folder / "torn").mkdir()
    for path in (CHECKPOINTS / "rim-tiny").iterdir():
        if path.name != "model.safetensors" and not path.name.endswith(".run"):
            (folder / "torn" / path.name).symlink_to(path)
    weights = (CHECKPOINTS / "rim-tiny" / "model.safetensors").read_bytes()
    (folder / "torn" / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    (folder / "recorded").mkdir()
    for name in ("rim-tiny", "torn"):
        runs = recorded.load("rim-tiny")
        for entry in runs:
            entry.run.checkpoint = name
        recorded.save(name, runs, "", folder / "recorded")
    return folder


@pytest.fixture(scope="module")
def address(folder):
    shelf = ModelShelf(folder)
    demo = build_demo(shelf, folder / "recorded")
    yield serve(demo, "127.0.0.1")
    demo.close()


def link(model: str, panel: str = "blocks", **more: str) -> str:
    """The address of a checkpoint's deepest example."""
    deepest = max(load_examples(CHECKPOINTS / model), key=lambda problem: len(problem.steps))
    query = {"model": model, "q": deepest.question, "gold": deepest.answer, "panel": panel}
    return "?" + urlencode(query | {f"v.{name}": value for name, value in more.items()})


def show(page, panel: str) -> None:
    page.locator(f"#tab-{panel}").click()
    drawn(page, panel)


def drawn(page, panel: str) -> None:
    """Waits until the panel is there, whole."""
    page.wait_for_selector(f"#panel:not(.busy) [data-open={panel}]", state="attached")
    if panel != "race":
        page.wait_for_selector("#panel .pic, #panel .notice")


def press(page, control, panel: str) -> None:
    """Presses what the server answers with a panel drawn anew."""
    before = page.locator("#panel [data-drawn]").get_attribute("data-drawn")
    control.click()
    redrawn(page, before)
    drawn(page, panel)


def redrawn(page, before: str) -> None:
    page.wait_for_function(
        "before => document.querySelector('#panel [data-drawn]').dataset.drawn !== before", arg=before
    )
    page.wait_for_selector("#panel:not(.busy)", state="attached")


def body(page) -> str:
    """What the open panel shows, pointed at nothing; the line above it holds times, which no two runs share."""
    return page.locator("#panel .pic").evaluate("""pic => {
        const copy = pic.cloneNode(true);
        copy.querySelectorAll(".lit").forEach(mark => mark.classList.remove("lit"));
        copy.querySelectorAll("[class='']").forEach(mark => mark.removeAttribute("class"));
        copy.querySelector(".pic-tip").textContent = "";
        for (const slot of copy.querySelectorAll(".chart-slot")) slot.replaceWith(slot.dataset.figure);
        return copy.outerHTML;
    }""")


def focused(page) -> str:
    return page.evaluate(
        "(document.activeElement.getAttribute('aria-label') || document.activeElement.textContent).trim()"
    )


def saved(page, selector: str, folder: Path) -> Path:
    with page.expect_download() as download:
        page.locator(selector).click()
    path = folder / download.value.suggested_filename
    download.value.save_as(path)
    return path


def load(page, path: Path) -> None:
    with page.expect_file_chooser() as chooser:
        page.locator("#load-run").click()
    chooser.value.set_files(path)


def test_the_whole_story(open_page, tmp_path):
    """Ask, race, read the blocks, blank one, see the answer change, take it home, come back by link and by file."""
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    page.get_by_label("Model").click()
    page.get_by_role("option", name="glass-box").click()
    page.get_by_role("button", name="Settings").click()
    expect(page.locator("#blocks input[type=range]")).to_have_value("3")  # the model's own K has come
    expect(page.locator(".model-state.ready")).to_be_visible()
    problem = load_examples(CHECKPOINTS / "glass-box")[0]
    ask(page, problem.question, problem.answer)
    page.wait_for_selector(DONE)
    show(page, "blocks")
    page.wait_for_selector("#panel .pic")
    for number, step in enumerate(problem.steps, start=1):
        card = page.locator(f"#panel [data-link~='block-{number}']").first
        expect(card).to_contain_text(spelled(step))
    press(page, page.locator("#panel [data-do*='operate_here'][data-do*='\"2\"']").first, "surgery")
    expect(page.locator("#tab-surgery")).to_have_attribute("aria-selected", "true")
    expect(page.locator(".surgery-block.operated")).to_have_count(1)
    expect(page.locator(".surgery-card.changed")).to_contain_text("changed")
    shown = body(page)

    table = list(csv.reader(io.StringIO(saved(page, "#panel [data-tool=csv]", tmp_path).read_text())))
    assert table[0][:2] == ["what", "block"] and len(table) == page.locator("#panel .pic-table tr").count()
    picture = Image.open(saved(page, "#panel [data-tool=png]", tmp_path)).convert("L")
    box = page.locator("#panel .pic").bounding_box()
    assert "<text" in saved(page, "#panel [data-tool=svg]", tmp_path).read_text()
    assert picture.width > box["width"] and picture.getextrema()[1] - picture.getextrema()[0] > 150, "it is not blank"
    page.locator("#panel [data-tool=python]").click()
    expect(page.locator("#panel [data-tool=python]")).to_have_text("Copied")
    assert "glass-box" in page.evaluate("navigator.clipboard.readText()")
    file = saved(page, "[data-save]", tmp_path)
    assert saved(page, "[data-save]", tmp_path) == file, "it can be saved twice"
    assert Reading.load(file).to_dict()["question"] == problem.question

    again = open_page(query=page.url.partition("/?")[2].join(["?", ""]))
    again.wait_for_selector("#history li")
    drawn(again, "surgery")
    assert body(again) == shown, "the link brings the same picture back in a fresh profile"
    other = open_page()
    load(other, file)
    other.wait_for_selector("#history li")
    drawn(other, "surgery")
    assert body(other) == shown, "and so does the file"
    expect(other.locator(".stage .badge")).to_have_text("From a file")


def test_every_panel_answers_to_hand_and_keyboard(open_page):
    page = open_page(query=link("rim-tiny"))
    page.wait_for_selector("#history li")

    # Tabs: arrows, ends, digits.
    page.locator("#tab-blocks").focus()
    for key, panel in (("ArrowRight", "attention"), ("ArrowLeft", "blocks"), ("End", "evidence"), ("Home", "race")):
        page.keyboard.press(key)
        expect(page.locator(f"#tab-{panel}")).to_be_focused()
        drawn(page, panel)
    for number, panel in enumerate(PANELS, start=1):
        page.keyboard.press(str(number))
        expect(page.locator(f"#tab-{panel}")).to_have_attribute("aria-selected", "true")
        drawn(page, panel)
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Correct answer").press("3")
    expect(page.locator("#tab-evidence")).to_have_attribute("aria-selected", "true")  # digits that are typed are typed

    show(page, "attention")
    press(page, page.get_by_role("group", name="Layer", exact=True).get_by_role("button", name="2"), "attention")
    assert focused(page) == "2", "the focus stays on the button that was used"
    press(page, page.get_by_role("button", name="max over heads"), "attention")
    assert "v.layer=2" in page.url and "v.head=max" in page.url
    block = page.locator(".attention-block").nth(3)
    block.hover()
    expect(page.locator("#panel .pic-tip")).to_contain_text("Block 3:")

    show(page, "layers")
    page.set_viewport_size({"width": 700, "height": 900})
    cell = page.locator("[data-cell][aria-current]")
    cell.focus()
    assert page.locator(".layers-scroll").evaluate("box => box.scrollLeft") > 0
    for key in ("ArrowUp", "ArrowLeft", "ArrowDown", "ArrowDown"):
        page.keyboard.press(key)
    chosen = page.evaluate("document.activeElement.dataset.view")
    scrolled = page.locator(".layers-scroll").evaluate("box => box.scrollLeft")
    before = page.locator("#panel [data-drawn]").get_attribute("data-drawn")
    page.keyboard.press("Enter")
    redrawn(page, before)
    expect(cell).to_be_focused()
    assert cell.get_attribute("data-view") == chosen and json.loads(chosen)["cell"].startswith("4.")
    assert page.locator(".layers-scroll").evaluate("box => box.scrollLeft") == scrolled
    page.set_viewport_size({"width": 1280, "height": 900})
    press(page, page.get_by_role("button", name="nearest step"), "layers")
    press(page, page.get_by_role("button", name="Blank it"), "surgery")  # there and then
    expect(page.locator(".surgery-block.operated")).to_have_count(1)
    assert page.locator("#tabs").bounding_box()["y"] >= 0, "the panel that opened is in view"
    assert page.evaluate("document.activeElement !== document.body")

    press(page, page.get_by_role("button", name="noise block 5", exact=True), "surgery")
    assert focused(page) == "noise block 5"
    expect(page.locator(".surgery-block.operated")).to_have_count(2)
    press(page, page.get_by_role("button", name="Reset"), "surgery")
    expect(page.locator(".surgery-block.operated")).to_have_count(0)
    for name, blocks in (("One block fewer", 7), ("One block more", 8), ("One block more", 9)):
        press(page, page.get_by_role("button", name=name), "surgery")
        expect(page.locator(".surgery-block")).to_have_count(blocks)
        assert focused(page) == name
    expect(page.locator("#panel .notice")).to_contain_text("With K = 9 the answer is")

    show(page, "trajectory")
    press(page, page.get_by_role("button", name="2 and 3"), "trajectory")
    assert focused(page) == "2 and 3"
    press(page, page.get_by_role("button", name="layers", exact=True), "trajectory")
    show(page, "evidence")
    expect(page.locator("#panel")).to_contain_text("RiM is right in")
    page.locator("#panel summary").first.click()

    # History: the runs of this session, one laid beside the other.
    show(page, "blocks")
    expect(page.locator("#history li")).to_have_count(4)
    press(page, page.locator("#history").get_by_role("button", name="Compare").last, "blocks")
    expect(page.locator(".compared .pic")).to_have_count(2)
    assert focused(page) == "Stop comparing"
    expect(page.locator(".compared [data-do]:not(:disabled)")).not_to_have_count(0)
    expect(page.locator(".compared").last.locator("[data-do]:not(:disabled)")).to_have_count(0)
    press(page, page.get_by_role("button", name="Stop comparing"), "blocks")
    press(page, page.locator("#history .shown").last, "blocks")
    expect(page.locator("#history .shown").last).to_have_attribute("aria-pressed", "true")
    expect(page.locator(".stage")).to_have_attribute("aria-label", re.compile("RiM"))


def test_plotly_comes_with_the_first_chart_and_draws_saves_and_follows_the_theme(open_page, tmp_path):
    page = open_page(query=link("rim-tiny", "blocks"), dark=True)
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.wait_for_selector("#history li")
    drawn(page, "blocks")
    assert page.evaluate("window.Plotly === undefined"), "a panel without a chart does not load it"
    show(page, "trajectory")
    page.wait_for_selector("#panel .chart-slot .main-svg")
    assert sum(url.endswith("/plotly.js") for url in asked) == 1
    tick = page.locator("#panel .xtick text").first
    assert tick.evaluate("node => getComputedStyle(node).fill") == "rgb(179, 175, 168)"
    for ending in ("svg", "png"):
        file = saved(page, f"#panel [data-title='Download as {ending.upper()}']", tmp_path)
        assert file.name == f"rim-probe-trajectory.{ending}" and file.stat().st_size > 5_000
    assert "Path of the question" in (tmp_path / "rim-probe-trajectory.svg").read_text()
    for panel, charts in (("layers", 1), ("attention", 1), ("evidence", 4)):
        show(page, panel)
        assert page.locator("#panel .chart-slot:visible").count() == charts
        page.locator("#panel .chart-slot").first.scroll_into_view_if_needed()
        page.wait_for_selector("#panel .chart-slot .main-svg")
    page.locator("#panel .evidence-probe").first.click()
    page.wait_for_selector(".evidence-inside .chart-slot .main-svg")
    assert sum(url.endswith("/plotly.js") for url in asked) == 1


def test_full_screen_outlives_a_choice(open_page):
    page = open_page(query=link("rim-tiny", "trajectory"))
    page.wait_for_selector("#history li")
    drawn(page, "trajectory")
    page.locator("#panel [data-tool=full]").click()
    page.wait_for_function("document.fullscreenElement !== null")
    press(page, page.get_by_role("button", name="1 and 3"), "trajectory")
    assert page.evaluate("document.fullscreenElement !== null")
    page.locator("#panel [data-tool=full]").click()
    page.wait_for_function("document.fullscreenElement === null")


def test_the_tour_runs_an_experiment_that_comes_out_as_predicted(open_page):
    page = open_page(width=380)
    card = page.locator("#tour")
    expect(card).to_be_hidden()
    page.get_by_role("button", name="One-minute tour").click()
    for number, panel in enumerate(("race", "blocks", "surgery", "surgery", "surgery"), start=1):
        if number > 1:
            card.locator(".go").click()
        expect(card).to_contain_text(f"{number} of 5")
        page.wait_for_selector("#tour .go:not([disabled])")
        expect(page.locator(f"#tab-{panel}")).to_have_attribute("aria-selected", "true")
        page.wait_for_selector(".ringed")
        assert page.locator(".ringed").count() == 1 and not scrolls_sideways(page)
        page.wait_for_function(
            """() => {
            const [card, ringed] = [".tour", ".ringed"].map((one) =>
                document.querySelector(one).getBoundingClientRect());
            return card.top >= 0 && ringed.top >= card.bottom - 1 && ringed.top < innerHeight;
            }"""
        )  # the card stays in sight, and what it speaks of stands below it
        if number == 3:
            predicted = card.locator("b").last.text_content()
        if number == 4:
            expect(card).to_contain_text(f"predicted {predicted}, and it says {predicted}.")
            expect(page.locator(".surgery-fact.came dd")).to_contain_text(predicted)
            expect(page.locator(".surgery-card.changed .surgery-big")).to_contain_text(predicted)
            assert page.locator(".surgery-result").count() == 1
    assert page.locator(".surgery-result").count() == 2
    expect(card).to_contain_text("rim-tiny-paper is the same model")
    card.get_by_role("button", name="Finish").click()
    expect(card).to_be_hidden()


def test_a_claim_about_the_glass_box_is_tested_by_hand(open_page):
    query = {"model": "glass-box", "q": "what is 6 - 1 - 2 + 4 ?", "gold": "7", "panel": "surgery"}
    page = open_page(query="?" + urlencode(query))
    page.wait_for_selector("#history li")
    drawn(page, "surgery")
    claims = page.locator("#panel [data-do*='try_counterfactual']")
    for number in range(claims.count()):  # the experiment, then every decode that is stored
        press(page, claims.nth(number), "surgery")
        expect(page.locator(".surgery-fact.came")).to_contain_text("as predicted")


def test_script_in_links_texts_and_files_is_inert(open_page, tmp_path):
    page = open_page(
        query=link("rim-tiny", "surgery", ops=SCRIPT, layers=SCRIPT, partner=SCRIPT)
        + "&"
        + urlencode({"gold": SCRIPT, "v.cell": SCRIPT, f"v.{SCRIPT}": SCRIPT, "steps": SCRIPT, "c.q": SCRIPT}),
    )
    alerts = []
    page.on("dialog", lambda dialog: (alerts.append(dialog.message), dialog.dismiss()))

    def unharmed():
        assert not alerts and page.locator("img[src=x], svg[onload], main script").count() == 0

    page.wait_for_selector("#history li, .notice")
    unharmed()
    query = {"model": SCRIPT, "q": SCRIPT, "recorded": SCRIPT, "k": SCRIPT, "panel": "layers", "v.mode": SCRIPT}
    page = open_page(query="?" + urlencode(query))
    page.on("dialog", lambda dialog: (alerts.append(dialog.message), dialog.dismiss()))
    expect(page.locator("#notice")).to_contain_text("<img src=x")
    ask(page, SCRIPT, SCRIPT)
    expect(page.locator("#notice .notice")).to_have_count(1)
    expect(page.locator("#notice .notice")).to_contain_text("“<”")
    unharmed()

    # A file whose every text is a script, as far as a run may hold texts.
    run = recorded.load("rim-tiny")[0].run.to_dict()
    swapped = json.loads(json.dumps(run).replace(json.dumps(run["question"]), json.dumps(SCRIPT)))
    swapped |= {
        "checkpoint": SCRIPT[:30],
        "machine": SCRIPT,
        "gold": SCRIPT,
        "view": {"panel": "surgery", "partner": SCRIPT},
    }
    told = swapped["reading"]
    told["tokens"] = told["probes"]["attention"]["tokens"] = [SCRIPT] * len(told["tokens"])
    told["complaints"] = [SCRIPT]
    for entry in [*told["readouts"], told["answer"]]:
        entry["text"] = entry["value"] = SCRIPT
    for mode in told["probes"].get("depth", {}).get("modes", []):
        for row in mode["cells"]:
            for cell in row:
                for entry in cell:
                    entry["text"] = SCRIPT
    file = tmp_path / "run.json"
    file.write_text(json.dumps(swapped))
    load(page, file)
    expect(page.locator("#history li")).to_have_count(1)
    expect(page.locator(".stage .asked q")).to_have_text(SCRIPT)
    for panel in LOOKING:
        show(page, panel)
        expect(page.locator("#panel")).to_contain_text("onerror=alert(1)")
        unharmed()
    for damaged in ("{", "[]", json.dumps({"format": SCRIPT}), json.dumps(swapped | {"reading": {"format": SCRIPT}})):
        file.write_text(damaged)
        load(page, file)
        expect(page.locator("#notice .notice")).to_be_visible()
        unharmed()


def test_torn_weights_leave_the_rest_of_the_page(open_page):
    page = open_page(ready=False)
    page.get_by_label("Model").click()
    page.get_by_role("option", name="torn", exact=True).click()
    expect(page.locator(".model-state.failed")).to_contain_text("cannot be loaded")
    expect(page.locator(".stage .badge").first).to_have_text("Recorded")
    for panel in (*LOOKING, "evidence"):
        show(page, panel)
        expect(page.locator("#panel .pic")).to_be_visible()
    show(page, "surgery")
    press(page, page.get_by_role("button", name="blank block 2", exact=True), "surgery")
    expect(page.locator("#panel .notice")).to_be_visible()
    assert "Traceback" not in page.locator("#panel").text_content()


@pytest.mark.parametrize("dark", [False, True])
def test_every_panel_is_accessible_and_fits(open_page, dark):
    page = open_page(dark=dark, query=link("rim-tiny", "surgery", ops="2b3n"), reduced_motion="reduce")
    page.wait_for_selector("#history li")
    page.add_script_tag(content=Path(AXE_FILE_PATH).read_text())
    for panel in PANELS:
        show(page, panel)
        page.evaluate("document.querySelectorAll('.pic-body details').forEach(one => (one.open = true))")
        # What is around the panels is looked at once; the dark page differs in nothing but its colours.
        where = "document" if panel == "race" else "'#stage-column'"
        rules = "runOnly: ['color-contrast']," if dark else ""
        found = page.evaluate(f"axe.run({where}, {{ {rules} resultTypes: ['violations'] }})")["violations"]
        serious = [
            (one["id"], node["target"], node["failureSummary"])
            for one in found
            if one["impact"] in ("serious", "critical")
            for node in one["nodes"]
        ]
        assert serious == [], panel
        assert page.evaluate("document.getAnimations().length") == 0
        for width in () if dark else (380, 1920, 1280):
            page.set_viewport_size({"width": width, "height": 900})
            assert not scrolls_sideways(page), (panel, width)


def test_a_tapped_tab_brings_its_panel_into_view_on_a_telephone(open_page):
    page = open_page(width=380, ready=False)
    for panel in ("blocks", "evidence", "race"):
        show(page, panel)
        page.wait_for_function("document.querySelector('#tabs').getBoundingClientRect().top < innerHeight / 2")
        page.evaluate("scrollTo(0, 0)")
