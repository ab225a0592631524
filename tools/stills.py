"""`python -m tools.stills`: the pictures of README, taken from the real page.

Method: starts `app.py` in a process of its own, opens its page in Chromium and does there what a visitor would do:
types a question, runs it, plays the race again, opens panels, tests a claim. Three runs warm the server up; those
after them are shown, whatever their times are.

- `docs/race.gif`, twenty seconds. While the race is replayed the page's clock is stepped by the length of a frame, so
  the replay runs exactly as fast as on the page; by how much it is slowed down is read from the page and stands below
  it. The dark line at the foot is added; everything above it is the page.
- `docs/blocks.png`, `docs/layers.png`, `docs/surgery.png`: figures, cut out of the page.

Knows the page by its labels, roles and classes. Measures nothing, which is why it is not among the benchmarks.
"""

from __future__ import annotations

import argparse
import io
import math
import re
import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

from benchmarks.visitor import ROOT, server

TRAINED, KNOWN = "rim-tiny", "glass-box"
DOCS = ROOT / "docs"
PATIENCE = 60_000  # ms
WARM_UPS = 3
FRAME = 100  # ms of the film; a GIF counts in hundredths of a second
FILM = (880, 760)  # CSS pixels, the line at the foot included
FOOT = 46
PAPER = "#faf9f6"
WINDOW = (1700, 1000)  # CSS pixels, for the stills
STILL_WIDTH = 1280  # pixels
FEW_BLOCKS = 4  # the blocks of the still: eight are a tall picture
MARGIN = 26  # CSS pixels around a still
EXACT = 32  # most frequent colours that stay exactly what they are
MOST = {".gif": 3_000_000, ".png": 250_000}  # bytes

CAPTION = """text => {
  let line = document.querySelector("#film-caption");
  if (!line) {
    line = document.body.appendChild(document.createElement("div"));
    line.id = "film-caption";
    line.style.cssText = "position:fixed;inset:auto 0 0 0;height:FOOTpx;z-index:9999;display:flex;align-items:center;"
      + "justify-content:center;background:#1c1917;color:#faf9f6;font:500 17px ui-sans-serif,system-ui,sans-serif";
  }
  line.textContent = text;
}""".replace("FOOT", str(FOOT))
# Ends the picture with the last of these elements that is whole: no text is cut in two by the foot.
CURTAIN = """(parts) => {
  const foot = innerHeight - FOOT;
  const ends = parts.map((e) => e.getBoundingClientRect().bottom).filter((end) => end <= foot);
  const curtain = document.body.appendChild(document.createElement("div"));
  curtain.className = "film-curtain";
  curtain.style.cssText = `position:fixed;inset:${Math.max(...ends) + 1}px 0 0 0;z-index:9998;background:PAPER`;
}""".replace("FOOT", str(FOOT)).replace("PAPER", PAPER)


# ------------------------------------------------------------------------------------------------------------ the page


@contextmanager
def opened(browser: Browser, url: str, width: int, height: int, scale: float = 1, **query: str | int) -> Iterator[Page]:
    """The page as a visitor who has seen the tour finds it, with the model ready.

    Args:
        scale: pixels per CSS pixel.
        query: the address's query, as the page's own links have it.
    """
    context = browser.new_context(
        viewport={"width": width, "height": height},
        device_scale_factor=scale,
        color_scheme="light",
        reduced_motion="reduce",
    )
    context.add_init_script("localStorage.setItem('rim-probe-tour', '1')")
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    page.goto(f"{url}/?{urlencode(query)}")
    page.wait_for_selector(".model-state.ready")
    page.wait_for_timeout(800)  # what the page still does by itself
    # No blinking cursor, no scroll bar, and the link to Gradio's documentation is not what is shown.
    page.add_style_tag(content="* { caret-color: transparent !important } ::-webkit-scrollbar { display: none }")
    try:
        yield page
    finally:
        context.close()


def run(page: Page, question: str) -> None:
    """Presses Run and waits for both answers and the reading of the memory."""
    page.locator("#run").click()
    expect(page.locator("#stage .stage.done .asked q")).to_have_text(question)
    expect(page.locator("#stage .stage.done .badge")).to_have_text("Live")
    page.mouse.move(0, 0)
    page.wait_for_timeout(1500)


def open_panel(page: Page, name: str) -> Locator:
    """The picture of a panel."""
    page.get_by_role("tab", name=name).click()
    page.mouse.move(0, 0)
    return drawn(page, name)


def drawn(page: Page, name: str) -> Locator:
    picture = page.locator(f"#panel [data-open={name.lower()}] .pic").first
    picture.wait_for()
    page.locator("#panel:not(.busy)").wait_for()
    page.evaluate("document.activeElement.blur()")
    page.wait_for_timeout(400)
    return picture


def scroll(page: Page, target: Locator, above: int = 12) -> None:
    """Puts the top of an element just below the top of the window."""
    target.evaluate("(e, above) => window.scrollTo(0, e.getBoundingClientRect().top + scrollY - above)", above)
    page.wait_for_timeout(100)


def pick_known(page: Page) -> None:
    """Chooses the glass box and runs its first example by pressing it, so that its steps are known, too."""
    page.get_by_label("Model", exact=True).click()
    page.get_by_role("option", name=KNOWN).click()
    expect(page.get_by_label("number input for Memory blocks K")).to_have_value("3")
    page.wait_for_selector(".model-state.ready")
    question = page.get_by_role("region", name="Examples").locator("button:visible").first
    text = question.inner_text().strip()
    question.click()
    expect(page.locator("#stage .stage.done .asked q")).to_have_text(text)
    page.wait_for_timeout(1500)


def test_claim(page: Page, block: int) -> Locator:
    """Tests on the panel Blocks what it claims of a block; the picture of Surgery.

    Raises:
        AssertionError: the predicted answer did not come.
    """
    open_panel(page, "Blocks").get_by_role("button", name="Test this claim").nth(block - 1).click()
    picture = drawn(page, "Surgery")
    expect(picture.locator(".surgery-result")).to_contain_text("as predicted")
    return picture


# ------------------------------------------------------------------------------------------------------------ the film


class Film:
    """Frames of the window, each shown for some milliseconds; equal ones become a single longer one."""

    def __init__(self, page: Page):
        self.page = page
        self.images: list[Image.Image] = []
        self.times: list[int] = []

    def caption(self, text: str) -> None:
        self.page.evaluate(CAPTION, text)

    def end_with(self, parts: str) -> None:
        """Draws a curtain below the last of these elements (a CSS selector) that is not cut off; "" draws it back."""
        self.page.evaluate("document.querySelector('.film-curtain')?.remove()")
        if parts:
            self.page.locator(parts).locator("visible=true").evaluate_all(CURTAIN)

    def shoot(self, time: int = FRAME) -> None:
        image = screenshot(self.page)
        if self.images and image.tobytes() == self.images[-1].tobytes():
            self.times[-1] += time
        else:
            self.images.append(image)
            self.times.append(time)

    def save(self, path: Path) -> None:
        # A GIF shows in every README; in WebP without loss the same frames took half as much again.
        images = few_colours(self.images)
        images[0].save(path, save_all=True, append_images=images[1:], duration=self.times, loop=0)


def film_race(film: Film, question: str, gold: str) -> None:
    """Types the question, runs it, and plays the race again."""
    page = film.page
    field = page.get_by_label("A word problem")
    field.fill("")
    film.caption("One question, two ways to think: in silent memory blocks (RiM), in written steps (CoT)")
    film.end_with(".example")
    film.shoot(500)
    words = re.findall(r"\S+\s*", question)
    for first in range(0, len(words), 3):
        field.press_sequentially("".join(words[first : first + 3]))
        film.shoot()
    film.shoot(500)
    page.get_by_label("Correct answer").fill(gold)
    run(page, question)
    scroll(page, page.locator("#stage .verdict"))
    film.caption("Both have answered")
    film.end_with("#stage .axis, #stage .reason")
    film.shoot(1400)

    button = page.locator(".replay")
    slowed = re.search(r"slowed down .*", button.inner_text())
    film.caption(f"The same race again, {slowed.group() if slowed else 'at its own speed'}")
    page.clock.install()
    page.clock.pause_at(page.evaluate("Date.now()") + 1000)
    button.click()
    page.mouse.move(0, 0)
    while page.locator(".stage.replaying").count():
        page.clock.run_for(FRAME)
        film.shoot()
    film.caption("Every token that is written is one more pass through the model")
    film.shoot(1300)
    film.end_with("")
    page.clock.resume()


def film_blocks(film: Film) -> None:
    """Reads down the blocks of the same run."""
    page = film.page
    picture = open_panel(page, "Blocks")
    scroll(page, picture)
    film.caption("Inside the memory: the step that each block lies nearest to. A claim, not yet a cause")
    film.shoot(1000)
    bottom = picture.locator(".blocks-card").last.evaluate("e => e.getBoundingClientRect().bottom")
    way = max(bottom + MARGIN - (FILM[1] - FOOT), 0)
    start = page.evaluate("scrollY")
    steps = 12
    for step in range(1, steps + 1):
        share = (1 - math.cos(math.pi * step / steps)) / 2
        page.evaluate("y => window.scrollTo(0, y)", start + way * share)
        film.shoot()
    film.end_with(".blocks-card")
    film.shoot(900)


def film_swap(film: Film) -> None:
    """On the glass box, whose weights were written by hand: the claim about block 2 put to the test."""
    page = film.page
    scroll(page, open_panel(page, "Blocks"))
    film.caption("A second model, the glass box: weights written by hand, so the truth is known")
    film.end_with(".blocks-card, .blocks-key")
    film.shoot(1700)
    page.get_by_role("button", name="Test this claim").nth(1).hover()
    film.caption("Is it a cause? Block 2 is swapped for one that holds another step …")
    film.shoot(1200)
    film.end_with("")
    picture = test_claim(page, 2)
    scroll(page, picture.get_by_role("group", name="Claim to test"), 8)
    film.caption("… and the answer becomes exactly the one that was predicted")
    film.end_with(".surgery-result, .surgery-sentence, .surgery-cards, .surgery-part")
    film.shoot(2700)


def make_film(browser: Browser, url: str) -> list[Path]:
    path = DOCS / "race.gif"
    with opened(browser, url, *FILM) as page:
        question = page.get_by_label("A word problem").input_value()
        gold = page.get_by_label("Correct answer").input_value()
        for _ in range(WARM_UPS):
            run(page, question)
        page.evaluate("window.scrollTo(0, 0)")
        film = Film(page)
        film_race(film, question, gold)
        film_blocks(film)
    with opened(browser, url, *FILM) as page:
        pick_known(page)
        film.page = page
        film_swap(film)
    film.save(path)
    print(f"{path.relative_to(ROOT)}: {len(film.images)} frames, {sum(film.times) / 1000:.1f} s")
    return [path]


# ---------------------------------------------------------------------------------------------------------- the stills


def still(page: Page, path: Path, first: Locator, last: Locator) -> Path:
    """Cuts out of the page what lies from the top of one element to the bottom of another; adds a margin of paper."""
    corners = "e => { const r = e.getBoundingClientRect(); return [r.x, r.y + scrollY, r.right, r.bottom + scrollY] }"
    one, two = first.evaluate(corners), last.evaluate(corners)
    left, right = min(one[0], two[0]), max(one[2], two[2])
    clip = {"x": left, "y": one[1], "width": right - left, "height": two[3] - one[1]}
    cut = screenshot(page, clip=clip, full_page=True)
    margin = round(MARGIN * cut.width / (right - left))
    image = Image.new("RGB", (cut.width + 2 * margin, cut.height + 2 * margin), PAPER)
    image.paste(cut, (margin, margin))
    height = round(image.height * STILL_WIDTH / image.width)
    save_png(image.resize((STILL_WIDTH, height), Image.Resampling.LANCZOS), path)
    return path


def save_png(image: Image.Image, path: Path) -> None:
    few_colours([image])[0].save(path, optimize=True)


def few_colours(images: list[Image.Image]) -> list[Image.Image]:
    """The images in 256 colours that all of them share.

    The most frequent ones (paper, ink, accents) stay exactly what they are; the rest, edges of letters and rare signs
    alike, are divided by median cut, where a colour's weight is the logarithm of its count: otherwise a small green
    sign would turn grey. Pillow's own nearest colour is approximate, so that paper would change its tint.
    """
    packed = [np.asarray(image, np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32) for image in images]
    found, counts = np.unique(np.concatenate([pixels.ravel() for pixels in packed]), return_counts=True)
    colours = np.stack([found >> 16 & 255, found >> 8 & 255, found & 255], 1).astype(np.uint8)
    weighted = np.repeat(colours, 1 + np.log2(counts).astype(int), 0)
    cut = Image.fromarray(weighted[None]).quantize(256 - EXACT, Image.Quantize.MEDIANCUT, kmeans=1)
    shared = np.array(cut.getpalette(), np.uint8).reshape(-1, 3)[: 256 - EXACT]
    shared = np.concatenate([colours[np.argsort(-counts)[:EXACT]], shared])
    nearest = [np.square(shared.astype(int) - colour).sum(1).argmin() for colour in colours.astype(int)]
    index = np.array(nearest, np.uint8)
    drawn = [Image.fromarray(index[np.searchsorted(found, pixels)]) for pixels in packed]
    for image in drawn:
        image.putpalette(shared.tobytes())
    return drawn


def make_stills(browser: Browser, url: str) -> list[Path]:
    paths = []
    with opened(browser, url, *WINDOW, scale=2) as page:
        question = page.get_by_label("A word problem").input_value()
        run(page, question)
        layers = open_panel(page, "Layers")
        paths.append(still(page, DOCS / "layers.png", layers, layers.locator(".layers-detail")))
        gold = page.get_by_label("Correct answer").input_value()
    with opened(browser, url, *WINDOW, scale=2, model=TRAINED, q=question, gold=gold, k=FEW_BLOCKS) as page:
        blocks = open_panel(page, "Blocks")
        paths.append(still(page, DOCS / "blocks.png", blocks, blocks.locator(".blocks-key")))
    with opened(browser, url, *WINDOW, scale=2) as page:
        pick_known(page)
        surgery = test_claim(page, 2)
        part = surgery.locator(".surgery-part", has=page.locator(".surgery-result"))
        paths.append(still(page, DOCS / "surgery.png", part, part))
    return paths


def screenshot(page: Page, **options: Any) -> Image.Image:
    return Image.open(io.BytesIO(page.screenshot(animations="disabled", **options))).convert("RGB")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.stills", description=__doc__.split("\n\n")[0])
    parser.add_argument("--port", type=int, help="port of the server it starts (default: a free one)")
    flags = parser.parse_args(arguments)
    DOCS.mkdir(exist_ok=True)
    with server(flags.port or free_port()) as (url, _), sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        paths = make_film(browser, url) + make_stills(browser, url)
        browser.close()
    heavy = False
    for path in paths:
        size = path.stat().st_size
        heavy |= size > MOST[path.suffix]
        print(f"{path.relative_to(ROOT)}: {size / 1000:.0f} kB" + (" TOO LARGE" if size > MOST[path.suffix] else ""))
    return int(heavy)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main())
