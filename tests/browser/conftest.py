"""One browser for all tests of the page, and visitors whose page must not complain.

A module that opens pages says in a fixture `address` where its server is.
"""

import pytest
from playwright.sync_api import sync_playwright

from browser.pages import CHROMIUM, FLAGS, PATIENCE


@pytest.fixture(scope="package")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, address):
    """Opens the page as a visitor of its own; errors in its console and requests to elsewhere fail the test."""
    contexts, complaints = [], []

    def open_page(width: int = 1280, dark: bool = False, ready: bool = True, query: str = "", **options):
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light", **options
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: None if is_ours(request.url, address) else complaints.append(request.url))
        page.goto(address + query)
        page.wait_for_selector(".stage", state="attached")
        if ready:
            page.wait_for_selector(".model-state.ready")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def is_ours(url: str, address: str) -> bool:
    return url.startswith((address, "data:", "blob:"))
