"""`python -m benchmarks.feel`: the speed that people feel, in a real browser on the real page.

Method: Chromium opens the page of a server started for it, beside it on the same machine. Every time is taken in the
page, from a click until what was clicked for has been painted. The weight is what a first visit transfers, and the page
counts as usable when Run can be clicked. Medians with quartiles; everything takes turns, so that none has the quiet
moments to itself. The limits are those of the project's plan.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from typing import Any

from playwright.sync_api import Browser, Page, sync_playwright

from benchmarks.load import CHECKPOINT
from benchmarks.visitor import examples, quantile, server
from rim_probe.evaluation import cpu_name
from rim_probe.options import open_card
from rim_probe.report import table

PANELS = ("blocks", "attention", "layers", "trajectory", "surgery", "evidence")
LIMITS = {"click to RiM's answer": 300, "click to CoT's first token": 300, "panel switch": 200, "surgery": 500}  # ms
PATIENCE = 60_000  # ms
WARM_UPS = 3  # runs before the first that counts: the browser compiles, too

# Clicks and waits until every condition has held once; gives the milliseconds after which each was painted.
TIMER = """([click, conditions]) => new Promise((resolve) => {
  const done = {}, start = performance.now();
  const look = () => {
    for (const [name, condition] of Object.entries(conditions))
      if (!(name in done) && new Function("return " + condition)()) {
        done[name] = null;
        requestAnimationFrame(() => setTimeout(() => {
          done[name] = performance.now() - start;
          if (Object.keys(conditions).every((each) => done[each])) { watch.disconnect(); resolve(done); }
        }));
      }
  };
  const options = { childList: true, subtree: true, attributes: true, characterData: true };
  const watch = new MutationObserver(look);
  watch.observe(document.body, options);
  document.querySelector(click).click();
})"""


def visit(browser: Browser, url: str) -> tuple[Page, float, float]:
    """A page in a fresh profile, the seconds until it is usable, and the bytes it took."""
    page = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
    weight = [0.0]
    network = page.context.new_cdp_session(page)
    network.send("Network.enable")
    network.on("Network.loadingFinished", lambda event: weight.append(event["encodedDataLength"]))
    start = time.perf_counter()
    page.goto(url, wait_until="commit")
    page.wait_for_selector("#run", state="visible", timeout=PATIENCE)
    page.click("#run", trial=True)
    usable = time.perf_counter() - start
    page.wait_for_timeout(1500)  # what the page still fetches by itself
    return page, usable, sum(weight)


def timed(page: Page, click: str, **conditions: str) -> dict[str, float]:
    """Milliseconds from a click until each condition (JavaScript) holds and is painted."""
    return page.evaluate(TIMER, [click, conditions])


def ask(page: Page, problem: dict[str, Any]) -> dict[str, float]:
    """One run: when RiM's answer and CoT's first token are there."""
    page.fill("#question textarea", problem["question"])
    page.fill("#gold input, #gold textarea", problem["answer"])
    page.wait_for_timeout(400)  # until the page has told the server of the edit
    shown = f"document.querySelector('#stage .asked q')?.textContent === {json.dumps(problem['question'])}"
    times = timed(
        page,
        "#run",
        memory=f"{shown} && document.querySelector('#stage .lane.memory .big:not(.pending)')",
        cot=f"{shown} && document.querySelector('#stage .lane.cot .written [data-t]')",
        done=f"{shown} && document.querySelector('#stage .stage.done')",
    )
    page.wait_for_timeout(200)
    return times


def switch(page: Page, panel: str) -> float:
    there = f"document.querySelector('#panel [data-open={panel}]') && !document.querySelector('#panel .pending-panel')"
    return timed(page, f"[role=tab][data-panel={panel}]", there=there)["there"]


def operate(page: Page) -> float:
    """The first switch of Surgery that is not pressed yet."""
    switch(page, "surgery")
    button = "#panel button[data-do*=operate]:not([aria-pressed=true]):not(:disabled)"
    before = page.inner_html("#panel")
    page.evaluate("html => { window.before = html; }", before)
    changed = "document.querySelector('#panel').innerHTML !== window.before"
    return timed(page, button, there=f"{changed} && !document.querySelector('#panel .busy, #panel.busy')")["there"]


def measure(url: str, tries: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Milliseconds by what was measured, and of every first visit the seconds until usable and the megabytes."""
    problems = examples(CHECKPOINT)
    times: dict[str, list[float]] = {name: [] for name in LIMITS}
    visits: dict[str, list[float]] = {"usable": [], "weight": []}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for _ in range(3):
            page, usable, weight = visit(browser, url)
            visits["usable"].append(usable)
            visits["weight"].append(weight / 1e6)
            if len(visits["usable"]) < 3:
                page.context.close()
        page.wait_for_selector("#model-state .ready", timeout=PATIENCE)
        for number in range(WARM_UPS + tries):
            switch(page, "race") if page.query_selector("[role=tab][data-panel=race]") else None
            answered = ask(page, problems[number % len(problems)])
            page.wait_for_timeout(1500)  # the reading
            row = {"click to RiM's answer": answered["memory"], "click to CoT's first token": answered["cot"]}
            if page.query_selector("[role=tab]"):
                row["panel switch"] = switch(page, PANELS[number % len(PANELS)])
                row["surgery"] = operate(page)
            if number >= WARM_UPS:
                for name, value in row.items():
                    times[name].append(value)
        browser.close()
    return times, visits


def report(times: dict[str, list[float]], visits: dict[str, list[float]]) -> str:
    rows = []
    for name, values in times.items():
        if not values:
            continue
        low, middle, high = (quantile(values, share) for share in (0.25, 0.5, 0.75))
        verdict = "met" if middle <= LIMITS[name] else "NOT MET"
        shown = "switch in Surgery to its result" if name == "surgery" else name
        rows.append([shown, str(len(values)), f"{middle:.0f} ({low:.0f} to {high:.0f})", f"<= {LIMITS[name]}", verdict])
    return (
        f"`{CHECKPOINT}`, server and Chromium on one {cpu_name()}, {time.strftime('%Y-%m-%d')}; "
        "`python -m benchmarks.feel --card README.md`\n\n"
        + table(["ms, median (quartiles)", "n", "measured", "limit", ""], rows)
        + f"\n\nA first visit transfers {quantile(visits['weight'], 0.5):.1f} MB, and Run can be clicked after "
        f"{quantile(visits['usable'], 0.5):.1f} s.\n"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.feel", description=__doc__.split("\n\n")[0])
    parser.add_argument("--tries", type=int, default=20, help="how many of each (default: 20)")
    parser.add_argument("--port", type=int, default=7889, help="port of the server it starts (default: 7889)")
    parser.add_argument("--card", help="put the table between <!-- feel --> and <!-- /feel --> of a Markdown file")
    flags = parser.parse_args(arguments)
    card = open_card(flags.card, "feel") if flags.card else None
    with server(flags.port) as (url, _):
        text = report(*measure(url, flags.tries))
    if card:
        card(text)
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
