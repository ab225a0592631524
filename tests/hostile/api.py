"""The page's endpoints over HTTP, with arguments of every kind: an answer, or an error of one sentence."""

import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import httpx
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from app import serving
from app.api import ENDPOINTS
from app.demo import build_demo
from app.models import ModelShelf
from rim_probe.options import silence_transformers

from . import Complaints, Count
from .checkpoints import QUESTION, make

SECONDS = 120  # for an answer, on a busy machine
SOUND = {"question": QUESTION, "num_blocks": 2, "actions": {"1": "blank"}}
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([-1, 0, 1, 2, 16, 17, 10**30, 1e308, 0.5]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=50),
    st.sampled_from([QUESTION, "small", "../../etc/passwd", "7", "<b_m>", "x" * 30_000, "\x00", "blank"]),
    st.dictionaries(
        st.sampled_from(["1", "2", "99", "x", ""]), st.sampled_from(["blank", "swap", "noise", "?", ""]) | st.integers()
    ),
    st.recursive(st.lists(st.integers(), max_size=3), lambda inner: st.lists(inner, max_size=3), max_leaves=8),
)


def call(url: str, name: str, data: list[Any]) -> tuple[str, str]:
    """What an endpoint does with arguments: (what became of it, what it says)."""
    asked = httpx.post(f"{url}/gradio_api/call/{name}", json={"data": data}, timeout=SECONDS)
    if asked.status_code in (413, 422):
        return "refused as a body", ""
    if asked.status_code != 200:
        return f"status {asked.status_code}", asked.text
    given = httpx.get(f"{url}/gradio_api/call/{name}/{asked.json()['event_id']}", timeout=SECONDS)
    event, said = "", ""
    for line in given.text.splitlines():
        event = line[7:] if line.startswith("event: ") else event
        said = line[6:] if line.startswith("data: ") else said
    return {"complete": "answered", "error": "refused"}.get(event, event or "nothing"), said


def attempt(count: int, number: int) -> Count:
    """Calls the endpoints `count` times, by turns, with one or more odd arguments each."""
    found, log = Count(), Complaints(logging.ERROR)
    silence_transformers()
    logging.getLogger().addHandler(log)
    with tempfile.TemporaryDirectory() as work:
        shelf = ModelShelf(make(Path(work) / "small").parent)
        demo = build_demo(shelf)
        documented = demo.get_api_info()["named_endpoints"]
        url = serving.serve(demo, "127.0.0.1").rstrip("/")
        shelf.load("small", readable=True)

        @seed(number)
        @settings(
            max_examples=count,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(st.sampled_from(ENDPOINTS), st.data())
        def try_one(name: str, drawn) -> None:
            if found.tried >= count:
                return
            data = []
            for one in documented[f"/{name}"]["parameters"]:
                sound = SOUND.get(one["parameter_name"], one.get("parameter_default"))
                data.append(drawn.draw(ODD) if drawn.draw(st.integers(0, 5)) == 0 else sound)
            data = data[: drawn.draw(st.sampled_from([None] * 20 + [0]))]
            told_before = len(log.told)
            became, said = call(url, name, data)
            wrong = became not in ("answered", "refused", "refused as a body") or "Traceback" in said or work in said
            wrong = wrong or (became == "refused" and (said in ("", "null") or "\\n" in said))
            unexpected = log.told[told_before:]
            if wrong or unexpected:
                found.note(became, f"{name}({json.dumps(data)[:200]}): {said[:200]} {unexpected}")
            else:
                found.note(became)

        try:
            try_one()
        finally:
            demo.close()
            logging.getLogger().removeHandler(log)
    return found
