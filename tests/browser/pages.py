"""What the tests of the page share: the browser they need, and what visitors do on every page."""

import shutil

import pytest
from playwright.sync_api import Page, expect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
NEEDS_CHROMIUM = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium here; `apt-get install chromium` runs these tests"
)
PATIENCE = 60_000  # ms; costs nothing where the machine is free, and saves the tests where it is busy
DONE = ".stage.done:not(.recorded)"
expect.set_options(timeout=PATIENCE)


def ask(page: Page, question: str, gold: str = "") -> None:
    page.get_by_label("A word problem").fill(question)
    if gold:
        if not page.get_by_label("Correct answer").is_visible():
            page.get_by_role("button", name="Settings").click()
        page.get_by_label("Correct answer").fill(gold)
    page.get_by_label("A word problem").press("Enter")


def scrolls_sideways(page: Page) -> bool:
    return page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth")
