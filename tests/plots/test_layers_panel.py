"""The layers panel: cells, rings, control and ranks are the probe's; texts are escaped; nonsense views are fine."""

import json
import re
from html import unescape

import pytest

from rim_probe.pictures import draw, view_of


def cell(*entries):
    return [{"text": text, "score": score} for text, score in entries]


def reading():
    lens = {
        "name": "logit lens",
        "what": "What it would say.",
        "score_name": "probability",
        "layers": [0, 1, 2],
        "positions": [{"block": block, "position": place} for block in (1, 2) for place in (1, "end")],
        "cells": [[cell(("<<", 0.4), ("7", 0.1)) for _ in range(4)] for _ in range(3)],
        "control": "an untrained model",
        "control_cells": [[cell(("2", 0.3), ("7", 0.2)) for _ in range(4)] for _ in range(3)],
        "minus": [[cell(("9", 0.25), ("<<", -0.1)) for _ in range(4)] for _ in range(3)],
    }
    lens["cells"][1][2] = cell(("7", 0.9), ("5", 0.05))
    lens["control_cells"][0][0] = cell(("12", 0.5))
    step = {
        "name": "nearest step",
        "what": "The nearest step.",
        "score_name": "cosine",
        "layers": [1, 2],
        "positions": [{"block": block, "position": "slots", "step": block, "fitted_layer": 2} for block in (1, 2)],
        "cells": [[cell(("<<3+4=7>>", 0.81)), cell(("<<7+5=12>>", -0.2))] for _ in range(2)],
        "control": None,
        "control_cells": None,
        "minus": None,
    }
    rank = {
        "value": "7",
        "step": 1,
        "what": "result of gold step 1",
        "layers": [0, 1, 2],
        "best": [40, 3.5, 1],
        "by_block": [[40, 9, 2], [50, 3.5, 1]],
        "control": [45, 20, 8],
        "control_name": "an untrained model",
    }
    return {
        "question": "?",
        "num_layers": 2,
        "steps": ["<<3+4=7>>", "<<7+5=12>>"],
        "chain": None,
        "probes": {"depth": {"modes": [lens, step], "ranks": [rank, {**rank, "value": "12", "step": 2}]}},
    }


def buttons(picture):
    """(view cell, text, whether ringed, tabindex) of all cells in the order of the page."""
    found = re.findall(
        r"<button (class=g )?data-cell=\S+ data-view='([^']*)' .*?tabindex=(\S+?)[ >][^<]*?>?([^<>]*)<", picture.body
    )
    return [(json.loads(unescape(view))["cell"], unescape(text), bool(ring), tab) for ring, view, tab, text in found]


def acts(picture):
    return [json.loads(unescape(one)) for one in re.findall(r'data-do="([^"]*)"', picture.body)]


def test_the_grid_has_the_best_reading_in_every_cell_with_the_answer_s_side_on_top():
    found = buttons(draw(reading(), "layers", cell="1.2.1"))
    assert [place for place, *_ in found][:5] == ["2.1.1", "2.1.end", "2.2.1", "2.2.end", "1.1.1"]
    assert {text for _, text, *_ in found} == {"<<", "7"}
    assert [place for place, _, ringed, _ in found if ringed] == ["1.2.1"]
    assert [place for place, *_, tab in found if tab == "0"] == ["1.2.1"]


def test_arrow_keys_find_every_neighbour():
    places = re.findall(r"data-cell=(\d+),(\d+)", draw(reading(), "layers").body.split("</table>")[0])
    assert [(int(row), int(column)) for row, column in places] == [(r, c) for r in range(3) for c in range(4)]


def test_rings_are_counted_beside_the_control_s():
    body = draw(reading(), "layers").body
    assert "<b>1</b> of 12 cells, <b>1</b> in the control" in body
    assert "of the right solution" in body


def test_a_tie_is_no_finding():
    data = reading()
    data["probes"]["depth"]["modes"][0]["cells"][1][2] = cell(("7", 0.25), ("5", 0.25))
    body = draw(data, "layers", cell="1.2.1").body
    assert "<b>0</b> of 12 cells" in body
    assert body.count("block 2, slot 1 · nothing stands out") == 1
    assert "the result of step 1" not in body[body.index("<section") : body.index("The control reads")]


def test_without_known_steps_rings_are_the_chain_of_thought_s_and_say_so():
    data = reading()
    data["steps"], data["chain"] = [], {"steps": ["<<3+4=7>>"], "text": "", "value": "7"}
    body = draw(data, "layers").body
    assert "that the chain of thought wrote" in body
    data["chain"] = None
    assert "layers-ring" not in draw(data, "layers").body


def test_the_chosen_cell_is_shown_in_full_beside_its_control():
    body = draw(reading(), "layers", cell="1.2.1").body
    detail = body[body.index("<section") : body.index("</section>")]
    assert "Layer 1, block 2, slot 1" in detail
    read, control = detail.split("The control reads")
    assert re.findall(r"<b>([^<]*)</b>", read) == ["90 %", "5 %"]
    assert re.findall(r"<b>([^<]*)</b>", control) == ["30 %", "20 %"]
    assert "the result of step 1" in read


def test_buttons_ask_for_an_operation_on_this_block_at_this_layer():
    wanted = {"act": "operate_cell", "block": "2", "layer": "1"}
    assert acts(draw(reading(), "layers", cell="1.2.end")) == [
        {**wanted, "action": action} for action in ("blank", "noise", "swap")
    ]


def test_the_last_layer_offers_no_operation_because_it_would_change_nothing():
    picture = draw(reading(), "layers", cell="2.2.end")
    assert acts(picture) == []
    assert "Nothing later reads" in picture.body


def test_minus_control_shows_differences_or_says_why_not():
    picture = draw(reading(), "layers", minus="on", cell="1.1.1")
    assert {text for _, text, *_ in buttons(picture)} == {"9"}
    assert "+0.25" in picture.body and "−0.10" in picture.body
    assert picture.notes == []
    assert picture.table.header[4] == "probability minus control"
    other = draw(reading(), "layers", mode="nearest step", minus="on")
    assert "Minus control is not shown" in other.notes[0]
    assert "0.81" in other.body


def test_another_mode_shows_its_nearest_cell_and_keeps_the_chosen_one():
    picture = draw(reading(), "layers", mode="nearest step", cell="0.2.end")
    assert picture.view["cell"] == "0.2.end"
    assert "Layer 1, block 2, slots" in picture.body
    assert "fitted at layer 2" in picture.body
    assert [text for _, text, *_ in buttons(picture)][:2] == ["3+4=7", "7+5=12"]


def test_ranks_are_drawn_beside_their_control():
    picture = draw(reading(), "layers", value="1", cell="1.2.1")
    for text in (
        "Rank of 7 over depth",
        "layer 1: best of all blocks has rank 3.5",
        "layer 1: the control has rank 20",
    ):
        assert text in picture.body
    assert "control: an untrained model" in picture.body
    assert "Rank of 12 over depth" in draw(reading(), "layers", value="2").body
    data = reading()
    data["probes"]["depth"]["ranks"][0].update(control=None, control_name="none: there is no base model")
    assert "Control: none: there is no base model." in draw(data, "layers").body
    data["probes"]["depth"]["ranks"] = []
    assert "no value to follow" in draw(data, "layers").notes[0]


def test_nonsense_views_become_the_usual_one():
    usual = {"mode": "logit lens", "minus": "off", "cell": "1.2.1", "value": "1"}
    assert view_of(reading(), "layers") == usual
    nonsense = {"mode": "<b>", "minus": "maybe", "cell": "9.9.9", "value": "'"}
    assert view_of(reading(), "layers", nonsense) == usual
    assert draw(reading(), "layers", **nonsense).view == usual


def test_texts_are_escaped_in_every_attribute():
    evil = "'\"><script>alert(1)</script>"
    data = reading()
    mode = data["probes"]["depth"]["modes"][0]
    mode.update(name=evil, what=evil, control=evil)
    mode["cells"][1][2] = mode["control_cells"][1][2] = cell((evil, 0.9))
    mode["positions"][2]["position"] = evil
    data["probes"]["depth"]["ranks"][0].update(value=evil, what=evil, control_name=evil)
    html = draw(data, "layers", cell=f"1.2.{evil}").html()
    assert "<script" not in html and "'\"" not in html and "&lt;script&gt;" in html
    assert 'data-view=\'{"cell":"1.2.&#x27;\\' in html


def test_the_table_has_every_cell_and_every_rank():
    rows = draw(reading(), "layers").table.rows
    assert [2, 1, 1, "<<", 0.4, "2", 0.3] in rows
    assert [1, "best of all", "rank of 7 (step 1)", "7", 3.5, "7", 20] in rows
    assert len(rows) == 12 + 6


@pytest.mark.parametrize(
    ("probes", "why"), [({}, "not read"), ({"depth": {"modes": [], "ranks": []}}, "no memory blocks")]
)
def test_a_reading_without_depth_says_so(probes, why):
    assert why in draw({"question": "?", "probes": probes}, "layers", cell="1.1.1").lead


def test_a_deep_model_s_grid_stays_light():
    data = reading()
    mode = data["probes"]["depth"]["modes"][0]
    mode["layers"] = list(range(31))
    mode["positions"] = [{"block": block, "position": place} for block in range(1, 9) for place in (1, 2, "end")]
    mode["cells"] = [[cell(*[("token", 0.5 - 0.1 * place) for place in range(5)])] * 24] * 31
    mode["control_cells"] = mode["minus"] = mode["cells"]
    grid = draw(data, "layers").body.split("</table>")[0]
    assert grid.count("<button") == 31 * 24
    assert len(grid.encode()) < 150_000
