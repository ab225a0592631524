"""The attention panel: its figures are the probe's, texts are escaped, nonsense views and missing parts are fine."""

import copy
import json
import re
from html import unescape

import pytest

from rim_probe.pictures import draw, view_of
from rim_probe.pictures.attention import _running_text, strongest_heads

MEAN = [[[0.1, 0.5, 0.0], [0.2, 0.0, 0.1]], [[0.0, 0.1, 0.0], [0.0, 0.3, 0.0]]]  # [layers 2][blocks 2][words 3]
HEADS = [  # [layers][heads 2][blocks][words]
    [[[0.2, 0.6, 0.0], [0.4, 0.0, 0.2]], [[0.0, 0.4, 0.0], [0.0, 0.0, 0.0]]],
    [[[0.0, 0.2, 0.0], [0.0, 0.6, 0.0]], [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]],
]


def reading():
    return {
        "question": "Ann <b>has</b> 3?",
        "probes": {
            "attention": {
                "tokens": ["ann", "3", "?"],
                "numbers": [False, True, False],
                "layers": 2,
                "heads": 2,
                "aggregation": "mean over the 2 slots of a block",
                "slots_to_tokens": {"mean over heads": MEAN, "max over heads": _max(), "per head": HEADS},
                "answer_to_blocks": [[[0.1, 0.0], [0.2, 0.7]], [[0.0, 0.0], [0.4, 0.2]]],
                "answer_to_tokens": [[[0.9, 0.0, 0.0], [0.0, 0.1, 0.0]], [[0.0, 1.0, 0.0], [0.4, 0.0, 0.0]]],
            }
        },
    }


def _max():
    return [[[max(a, b) for a, b in zip(*rows, strict=True)] for rows in zip(*layer, strict=True)] for layer in HEADS]


def shades(picture):
    return json.loads(unescape(re.search(r'data-shades="([^"]*)"', picture.body)[1]))


def test_words_are_shaded_by_the_selection_that_is_named():
    picture = draw(reading(), "attention", layer="1", head="mean")
    assert shades(picture)["1"] == [0.2, 1, 0]
    assert shades(picture)["all"] == pytest.approx([0.6, 1, 0.2], abs=0.01)
    assert "layer 1, mean over heads; the most, 25 %, goes to “3”" in picture.body
    assert "mean over the 2 slots of a block" in picture.body
    assert shades(draw(reading(), "attention", layer="1", head="2"))["1"] == [0, 1, 0]
    assert shades(draw(reading(), "attention", layer="1", head="max"))["2"] == [1, 0, 0.5]


def test_a_first_word_that_takes_most_does_not_hide_the_others():
    sunk = copy.deepcopy(reading())
    sunk["probes"]["attention"]["slots_to_tokens"]["mean over heads"][0] = [[0.6, 0.2, 0.1], [0.8, 0.0, 0.1]]
    picture = draw(sunk, "attention", layer="1", head="mean")
    assert shades(picture)["1"] == [1, 1, 0.5] and shades(picture)["2"] == [1, 0, 1]
    assert "70 %, goes to “Ann”, the first word" in picture.body and "of the others 10 % goes to “3”" in picture.body
    assert "to 20 % and more" in picture.body


def test_the_chosen_block_shades_the_words_at_rest():
    picture = draw(reading(), "attention", layer="1", block="2")
    assert 'data-rest="2"' in picture.body
    assert re.findall(r'class="word"[^>]*--w:([\d.]+)', picture.body) == ["1", "0", "0.5"]


def test_the_answer_s_bars_are_the_head_s_or_pooled():
    def shown(**view):
        return re.findall(r"<small>\d</small><b>([^<]*)</b>", draw(reading(), "attention", **view).body)

    assert shown(layer="1", head="2") == ["20 %", "70 %"]
    assert shown(layer="1", head="mean") == ["15 %", "35 %"]
    assert shown(layer="1", head="max") == ["20 %", "70 %"]


def test_strongest_heads_are_ranked_by_their_mass_on_memory_and_set_layer_and_head():
    found = reading()["probes"]["attention"]
    assert [(layer, head) for layer, head, _ in strongest_heads(found)] == [(1, 2), (2, 2), (1, 1), (2, 1)]
    controls = draw(reading(), "attention", layer="2", head="2").controls
    assert json.loads(unescape(re.findall(r'data-view="([^"]*)"[^>]*data-tip', controls)[0])) == {
        "layer": "1",
        "head": "2",
    }
    assert re.search(r'aria-pressed="true"[^>]*data-tip="In layer 2, head 2, 60 %', controls)


def test_without_weights_by_head_the_words_show_the_mean_and_say_so():
    data = reading()
    data["probes"]["attention"]["slots_to_tokens"]["per head"] = None
    data["probes"]["attention"]["answer_to_tokens"] = None
    picture = draw(data, "attention", layer="1", head="2")
    assert shades(picture)["1"] == [0.2, 1, 0]
    assert "answer" not in shades(picture)
    assert any("too large" in note and "mean over heads" in note for note in picture.notes)
    assert re.findall(r"<small>\d</small><b>([^<]*)</b>", picture.body) == ["20 %", "70 %"]


def test_it_opens_where_blocks_look_most_differently_and_takes_no_nonsense():
    usual = {"layer": "1", "head": "mean", "block": "all"}
    assert view_of(reading(), "attention") == usual
    assert view_of(reading(), "attention", {"layer": "99", "head": "<script>", "block": "-1"}) == usual
    assert draw(reading(), "attention", layer="'\"", block="7").view == usual


def test_an_even_look_is_called_even_and_is_not_where_it_opens():
    data = reading()
    found = data["probes"]["attention"]
    found["slots_to_tokens"] = {**found["slots_to_tokens"], "mean over heads": [[[0.3] * 3] * 2, MEAN[1]]}
    assert view_of(data, "attention")["layer"] == "2"
    body = draw(data, "attention", layer="1").body
    assert "every word gets the same, 30 %" in body
    assert "Block 1: 90 % on the question, the rest on memory, on every word the same." in body


def test_texts_are_escaped():
    data = reading()
    data["question"] = "<script>alert(1)</script> 3 ?"
    data["probes"]["attention"]["tokens"] = ["<script>alert(1)</script>", "3", "?"]
    html = draw(data, "attention").html("<script>")
    assert "<script" not in html
    assert "&lt;script&gt;alert(1)" in html


@pytest.mark.parametrize(
    ("question", "tokens", "text"),
    [
        ("Ann has 3.", ["ann", "has", "3", "."], "Ann has 3."),
        ("Ann has 3.", ["An", "n", " has", " ", "3", "."], "Ann has ␣3."),
        ("Ann has\n3.", ["Ann", " has", "\n", "3", ".", "\n"], "Ann has ↵3. ↵"),
        ("Zed's Ann", ["<unk>", "ann"], "<unk> Ann"),
        ("İ has 3", ["i̇", "has", "3"], "i̇ has 3"),
        ("", ["a"], "a"),
    ],
)
def test_tokens_are_found_again_in_the_question(question, tokens, text):
    pieces = _running_text(question, tokens)
    assert len(pieces) == len(tokens)
    assert "".join(f" {word}" if spaced else word for spaced, word in pieces).strip() == text


def test_table_holds_every_weight():
    table = draw(reading(), "attention", layer="1").table
    assert table.header == ["word", "block 1", "block 2", "answer"]
    assert list(table.rows[1]) == ["3", 0.5, 0.0, 0.05]
    assert list(table.rows[-1])[1:] == [0.15, 0.35]


@pytest.mark.parametrize("probes", [{}, {"attention": None}])
def test_a_reading_without_attention_says_so(probes):
    picture = draw({"question": "?", "probes": probes}, "attention", layer="3")
    assert "not recorded" in picture.lead


def test_a_run_without_memory_says_so():
    data = copy.deepcopy(reading())
    found = data["probes"]["attention"]
    found["slots_to_tokens"] = {key: [[], []] for key in found["slots_to_tokens"]}
    found["answer_to_blocks"] = [[[], []], [[], []]]
    assert "no memory blocks" in draw(data, "attention").lead
