"""The real page in a real browser: run, stream, stop, bad input, narrow and dark screens, two tabs, a closed tab.

Needs Debian's Chromium (`apt-get install chromium`); Playwright drives it and downloads nothing. The server runs in
this process, so a test can slow decoding down (`pace`) to see what happens in the middle of a run.
"""

import json
import shutil
import threading
import time
from pathlib import Path

import gradio as gr
import pytest
from playwright.sync_api import expect

from app import record
from app.demo import build_demo
from app.models import ModelShelf
from app.serving import serve
from browser.pages import DONE, NEEDS_CHROMIUM, PATIENCE, ask, scrolls_sideways
from rim_probe import outcomes
from rim_probe.errors import CheckpointError
from rim_probe.gallery import load_examples

pytestmark = NEEDS_CHROMIUM


@pytest.fixture(scope="module")
def folder(small_checkpoint, tmp_path_factory) -> Path:
    """Checkpoints `small`, `unfetched` (the same), `torn` (half its weights); a recording and outcomes of `small`."""
    folder = tmp_path_factory.mktemp("served")
    shutil.copytree(small_checkpoint, folder / "small")
    shutil.copytree(small_checkpoint, folder / "unfetched")
    shutil.copytree(small_checkpoint, folder / "torn")
    weights = folder / "torn" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    record.record(str(small_checkpoint), "cpu", folder / "recorded")
    shutil.copytree(small_checkpoint, folder / "small" / "direct")
    counts = dict.fromkeys(outcomes.OUTCOMES.values(), 5)
    kept = {name: load_examples(small_checkpoint)[2:4] for name in outcomes.OFFERED}
    made = {"checkpoint": "small", "data": "some.txt", "command": "…", "date": "2026-11-22"}
    outcomes.Outcomes(**made, counts=counts, examples=kept).save(folder / "recorded" / "small-outcomes.json")
    return folder


@pytest.fixture(scope="module")
def examples(folder) -> list[dict]:
    return json.loads((folder / "small" / "examples.json").read_text())


@pytest.fixture(scope="module")
def address(folder):
    demo: gr.Blocks = build_demo(ModelShelf(folder), folder / "recorded")
    yield serve(demo, "127.0.0.1")
    demo.close()


@pytest.fixture
def pace(monkeypatch):
    """`pace.seconds` are added to every event of chain of thought; `pace.events` counts them."""
    from rim_probe import decoding

    class Pace:
        seconds, events = 0.0, 0

    real, pace = decoding.stream, Pace()

    def stream(rim, question, method, **options):
        for event in real(rim, question, method, **options):
            if method == "cot":
                time.sleep(pace.seconds)
                pace.events += 1
            yield event

    monkeypatch.setattr(decoding, "stream", stream)
    return pace


def saved_run(page) -> dict:
    with page.expect_download() as download:
        page.locator("[data-save]").click()
    return json.loads(Path(download.value.path()).read_text())


def test_opening_shows_a_recorded_race_before_any_model(open_page):
    page = open_page(ready=False)
    expect(page.locator("h1")).to_have_text("RiM Probe")
    expect(page.locator(".badge")).to_have_text("Recorded")
    expect(page.locator(".costs")).to_contain_text("CPU")
    expect(page.locator(".verdict")).to_contain_text("Chain of thought:")
    assert page.get_by_label("A word problem").input_value() == page.locator(".asked q").text_content()
    page.get_by_role("button", name="1 step", exact=True).click()
    expect(page.get_by_role("button", name="1 step", exact=True)).to_have_attribute("aria-pressed", "true")
    assert page.get_by_label("A word problem").input_value() == page.locator(".asked q").text_content()


def test_run_shows_both_answers_and_offers_them_as_json(open_page, examples):
    page = open_page()
    ask(page, examples[0]["question"], examples[0]["answer"])
    page.wait_for_selector(DONE)
    assert page.locator(".asked q").text_content() == examples[0]["question"]
    assert page.locator(".cell").count() == 8 and page.locator(".cell.pending").count() == 0
    assert page.locator(".result .mark").count() == 2
    expect(page.locator(".verdict")).to_contain_text("Memory: 1 read")
    run = saved_run(page)
    assert run["question"] == examples[0]["question"] and run["memory"]["answer"]["readouts"]
    assert page.locator(".track.cot .token").count() == run["cot"]["answer"]["generated_tokens"]


def test_picking_an_example_runs_it_and_an_edit_forgets_its_answer(open_page, examples):
    page = open_page()
    page.locator("#examples button").first.click()
    page.wait_for_selector(DONE)
    assert page.locator(".asked q").text_content() == examples[0]["question"]
    page.get_by_role("button", name="Settings").click()
    gold = page.get_by_label("Correct answer")
    assert gold.input_value() == examples[0]["answer"]
    page.get_by_label("A word problem").press("End")
    page.get_by_label("A word problem").type(" 3")
    expect(gold).to_have_value("")


def test_the_direct_answer_is_a_third_lane(open_page):
    page = open_page()
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("A third lane").check()
    page.get_by_role("button", name="Run", exact=True).click()
    page.wait_for_selector(DONE)
    assert page.locator(".track").count() == 3 and page.locator(".costs .scroll tbody tr").count() == 3
    expect(page.locator(".verdict")).to_contain_text("Direct answer:")
    page.wait_for_function("!document.querySelector('.replaying')", timeout=PATIENCE)  # the one that began by itself
    page.locator(".replay").click()
    page.wait_for_selector(".replaying .track.direct .later", state="attached")
    page.wait_for_function("!document.querySelector('.track.direct .later')", timeout=PATIENCE)
    for width in (380, 1280, 1920):
        page.set_viewport_size({"width": width, "height": 900})
        assert not scrolls_sideways(page)


def test_blocks_slider_and_control_enter(open_page, examples):
    page = open_page()
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("number input for Memory blocks K").fill("3")
    page.get_by_label("number input for Memory blocks K").press("Control+Enter")
    page.wait_for_selector(DONE)
    assert page.locator(".cell").count() == 3


def test_tokens_stream_and_stop_stops(open_page, examples, pace):
    page = open_page()
    pace.seconds = 0.4
    ask(page, examples[0]["question"])
    page.wait_for_selector(".stage.running .lane.memory .big:not(.pending)")
    written = page.locator(".written")
    page.wait_for_function("document.querySelectorAll('.written span[data-t]').length > 1")
    first = written.text_content()
    page.wait_for_function(
        "before => document.querySelector('.written').textContent.length > before", arg=len(first) + 3
    )
    assert page.locator(".stage.running .track.cot .token").count() > 1
    page.get_by_role("button", name="Stop", exact=True).click()
    page.wait_for_selector(".stage.stopped")
    expect(page.locator(".badge")).to_have_text("Stopped")
    assert len(page.locator(".written").text_content()) >= len(first), "what was written stays"
    expect(page.locator("#stop")).to_be_hidden()
    time.sleep(1)  # the event under way when Stop was clicked still ends
    events = pace.events
    time.sleep(1)
    assert pace.events == events
    pace.seconds = 0
    page.get_by_role("button", name="Run", exact=True).click()
    page.wait_for_selector(DONE)


def test_a_hidden_tab_sees_a_race_to_its_end(open_page, examples):
    """A browser that hides a tab draws no frames in it; the events that follow one another must not wait for one."""
    page = open_page()
    page.evaluate(
        """() => {
            Object.defineProperty(document, "hidden", { get: () => true });
            Object.defineProperty(document, "visibilityState", { get: () => "hidden" });
            document.dispatchEvent(new Event("visibilitychange"));
            window.requestAnimationFrame = () => 0;
        }"""
    )
    ask(page, examples[0]["question"])
    page.wait_for_selector(DONE)
    expect(page.get_by_role("button", name="Run", exact=True)).to_be_enabled()


BAD_INPUT = [
    ("", "is empty"),
    ("z" * 20_000, "never seen"),
    ("3 🍎 + 4 🍎 = ?", "🍎"),
    ("   ", "is empty"),
    ("كم عدد التفاح؟", "التفاح"),
    ("Tom has 3\u0007 apples.", "U+0007"),
    ("3 + 4 " * 70, "tokens"),
    ("3 + 4 " * 3334, "characters"),
    ("<img src=x onerror=alert(1)>", "“<”"),
    ("<b><m></b> {{value}} ${1+1}", "“{”"),
]


def test_bad_input_is_answered_with_a_sentence(open_page):
    page = open_page(width=380)
    before = page.locator(".verdict").text_content()
    notice = page.locator(".notice")
    for question, words in BAD_INPUT:
        ask(page, question)
        expect(notice).to_contain_text(words)
        assert "Traceback" not in notice.text_content() and page.locator(".notice img").count() == 0
        assert page.locator(".verdict").text_content() == before, "the race that was there stays"
        expect(page.locator("#stop")).to_be_hidden()
        assert not scrolls_sideways(page)


def test_unknown_words_offer_an_example_and_dim_the_result_before(open_page, examples):
    page = open_page()
    ask(page, examples[2]["question"].replace("How", "How zeppelin"))
    expect(page.locator(".notice")).to_contain_text("“zeppelin”")
    offered = page.locator(".notice .example")
    question = offered.text_content()
    assert question in [example["question"] for example in examples]
    assert page.locator("#stage").evaluate("stage => getComputedStyle(stage).opacity") < "0.5", "the old result is dim"
    offered.click()
    page.wait_for_selector(DONE)
    assert page.locator(".asked q").text_content() == question
    assert page.locator(".notice").count() == 0


def test_torn_weights_are_reported_in_the_page(open_page):
    page = open_page()
    page.get_by_label("Model").click()
    page.get_by_role("option", name="torn").click()
    expect(page.locator(".model-state.failed")).to_contain_text("cannot be loaded")
    ask(page, "3 + 4 = ?")
    expect(page.locator(".notice")).to_contain_text("cannot be loaded")


def test_a_base_is_fetched_before_the_eyes_of_the_visitor(open_page, examples, monkeypatch):
    from app import models

    load, tries, go = models._load_somewhere, [], threading.Event()

    def fetch(path, device, progress):
        tries.append(path)
        progress("Downloading a base", 41_000_000, 93_000_000)
        go.wait(60)
        if len(tries) == 1:
            raise CheckpointError("The base cannot be fetched; go online.")
        progress("Downloading a base", 93_000_000, 93_000_000)
        return load(path, device, progress)

    page = open_page(width=390)
    monkeypatch.setattr(models, "_load_somewhere", fetch)
    page.get_by_label("Model").click()
    page.get_by_role("option", name="unfetched").click()
    bar = page.locator("#model-state").get_by_role("progressbar")
    expect(bar).to_be_visible()
    expect(page.locator("#model-state")).to_contain_text("Downloading a base")
    expect(page.locator("#model-state")).to_contain_text("41/93 MB")
    assert not scrolls_sideways(page)
    another = open_page()  # meanwhile, the other models can be asked
    ask(another, examples[0]["question"])
    another.wait_for_selector(DONE)
    go.set()
    expect(page.locator(".model-state.failed")).to_contain_text("go online")
    go.clear()
    page.get_by_role("button", name="Try again").click()
    expect(bar).to_be_visible()
    ask(page, examples[0]["question"])
    expect(page.locator("#notice").get_by_role("progressbar")).to_be_visible()
    go.set()
    page.wait_for_selector(DONE)
    expect(page.locator(".model-state.ready")).to_be_visible()
    assert page.get_by_role("progressbar").count() == 0 and len(tries) == 2


@pytest.mark.parametrize("dark", [False, True])
def test_every_width_and_both_themes(open_page, dark):
    page = open_page(380, dark)
    assert not scrolls_sideways(page)
    page.get_by_role("button", name="Run", exact=True).click()
    page.wait_for_selector(DONE)
    # The race begins below the fold there, so it is brought into view.
    page.wait_for_function("document.querySelector('.stage').getBoundingClientRect().top < innerHeight / 2")
    ink, paper = page.evaluate(
        "[getComputedStyle(document.querySelector('.verdict')).color, getComputedStyle(document.body).backgroundColor]"
    )
    assert (lightness(ink) > lightness(paper)) == dark and abs(lightness(ink) - lightness(paper)) > 0.7
    for width in (380, 800, 1600):
        page.set_viewport_size({"width": width, "height": 900})
        assert not scrolls_sideways(page)


def lightness(colour: str) -> float:
    return sum(float(part) for part in colour.partition("(")[2].rstrip(")").split(",")[:3]) / 765


def test_marks_explain_themselves_by_keyboard_and_pointer(open_page):
    page = open_page()
    tip = page.locator(".tip")
    page.locator(".track.cot").focus()
    page.keyboard.press("ArrowRight")
    expect(tip).to_contain_text("CoT reads the question in one pass")
    page.keyboard.press("ArrowRight")
    expect(tip).to_contain_text("CoT token 1")
    page.locator(".track.memory .prefill").dispatch_event("mouseover")
    expect(tip).to_contain_text("8 memory blocks in one pass")
    page.locator(".cell").nth(2).hover()
    expect(tip).to_contain_text("Block 3 says")
    page.locator("h1").hover()
    expect(tip).not_to_contain_text("Block 3 says")


@pytest.mark.parametrize(("width", "height"), [(1280, 800), (390, 844)])
def test_the_race_is_seen_at_once_in_slow_motion(open_page, width, height):
    page = open_page(width, ready=False)
    page.set_viewport_size({"width": width, "height": height})
    page.wait_for_selector(".replaying .later")
    for part in (".verdict", ".lane.memory", ".lane.cot", ".ticks"):
        box = page.locator(part).bounding_box()
        assert box["y"] >= 0 and box["y"] + box["height"] <= height, f"{part} is above the fold"
    page.wait_for_function("!document.querySelector('.later')")
    page.locator(".replay").click()
    page.wait_for_selector(".replaying .later")
    page.locator(".replay").click()
    page.wait_for_function("!document.querySelector('.later')")
    assert not page.locator(".playhead").is_visible()


def test_nothing_moves_for_those_who_do_not_want_it(open_page):
    page = open_page(ready=False, reduced_motion="reduce")
    time.sleep(1)
    assert page.locator(".replaying, .later").count() == 0


def test_back_and_forward_walk_and_the_link_is_copied(open_page, examples):
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    ask(page, examples[0]["question"])
    page.wait_for_selector("#history li")
    page.locator("#tab-evidence").click()
    expect(page.locator("[data-open]")).to_have_attribute("data-open", "evidence")
    page.go_back()
    expect(page.locator("[data-open]")).to_have_attribute("data-open", "race")
    expect(page.locator(".asked q")).to_have_text(examples[0]["question"])
    page.get_by_role("button", name="Copy link").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == page.url and "q=" in page.url
    page.go_forward()
    expect(page.locator("[data-open]")).to_have_attribute("data-open", "evidence")


def test_two_tabs_do_not_mix(open_page, examples, pace):
    one, two = open_page(), open_page()
    pace.seconds = 0.2
    ask(one, examples[0]["question"])
    one.wait_for_selector(".stage.running")
    ask(two, examples[1]["question"])
    expect(two.locator("#notice")).to_contain_text("queue: 1/1")
    pace.seconds = 0
    for page, example in ((one, examples[0]), (two, examples[1])):
        page.wait_for_selector(DONE)
        assert page.locator(".asked q").text_content() == example["question"]


def test_a_closed_tab_stops_its_work(open_page, examples, pace):
    page = open_page()
    pace.seconds = 0.2
    ask(page, examples[0]["question"])
    page.wait_for_selector(".stage.running .lane.memory .big:not(.pending)")
    page.context.close()
    events = -1
    while events != pace.events:
        events = pace.events
        time.sleep(1)
    assert events < 30, "of about 100"
    pace.seconds = 0
    again = open_page()  # and the next visitor does not wait for it
    ask(again, examples[1]["question"])
    again.wait_for_selector(DONE)


def test_a_pasted_question_forgets_the_answer_of_the_example(open_page, examples):
    page = open_page()
    page.locator("#examples button").first.click()
    page.wait_for_selector(DONE)
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("A word problem").fill(examples[1]["question"])
    page.get_by_role("button", name="Run", exact=True).click()
    expect(page.locator(".asked q")).to_have_text(examples[1]["question"])
    page.wait_for_selector(DONE)
    expect(page.get_by_label("Correct answer")).to_have_value("")
    expect(page.locator(".stage")).not_to_contain_text("wrong")
