"""The surgery panel: its view, what it shows of stored results, and the sentences it tells."""

import json
import math
import re
from html import unescape

import pytest

from rim_probe.pictures import draw, view_of
from rim_probe.pictures.surgery import parse, sentence, write
from rim_probe.pictures.surgery_map import signed
from rim_probe.pictures.surgery_try import marked
from rim_probe.pictures.surgery_words import counterfactual_sentence, named, operation


def readouts(values, chance=0.9):
    return [{"block": k, "text": v, "value": v, "probability": chance} for k, v in enumerate(values, 1)]


def told(values, chance=0.9, right=True):
    return {
        "text": values[-1],
        "value": values[-1],
        "probability": chance,
        "right": right,
        "readouts": readouts(values, chance),
    }


@pytest.fixture
def reading():
    steps = ["<<5-1=4>>", "<<4-1=3>>", "<<3-1=2>>"]
    before = told(["4", "3", "2"])
    return {
        "question": "what is 5 - 1 - 1 - 1 ?",
        "num_blocks": 3,
        "num_layers": 2,
        "slots": 2,
        "gold": "2",
        "steps": steps,
        "readouts": before["readouts"],
        "answer": {key: before[key] for key in ("text", "value", "probability", "right")},
        "probes": {
            "importance": {
                "answer": "2",
                "log_probability": math.log(0.9),
                "layers": [0, 1],
                "blocks": [1, 2, 3],
                "change": [[0.0, -2.5, 0.04], [0.0, -0.2, 0.0]],
                "says": [[True, False, True], [True, True, True]],
            },
            "steps": {
                "blocks": [
                    {"block": 1, "step": 1, "accuracy": 0.9, "nearest": [{"step": steps[0], "cosine": 1, "gold": 1}]},
                    {"block": 2, "step": 2, "accuracy": 0.9, "nearest": [{"step": steps[2], "cosine": 1, "gold": 3}]},
                ]
            },
        },
        "complaints": [],
    }


@pytest.fixture
def surgery(reading):
    return {
        "question": reading["question"],
        "num_blocks": 3,
        "actions": {"2": "blank"},
        "layers": [1, 2],
        "partner": None,
        "unrelated": "what is 9 - 9 ?",
        "before": told(["4", "3", "2"]),
        "after": told(["4", "7", "6"], 0.6, False),
        "answer_changed": True,
        "changed_blocks": [2, 3],
        "answer_log_probability": {"before": math.log(0.9), "after": math.log(0.25)},
        "gold_probability": {"before": 0.9, "after": 0.25},
        "control": {
            "what": "block 2 taken from an unrelated question instead",
            "value": "2",
            "answer_changed": False,
            "answer_log_probability": math.log(0.8),
        },
    }


@pytest.fixture
def counterfactual(surgery):
    return {
        "problem": {"question": "what is 5 - 1 - 1 - 1 ?", "steps": [], "answer": "2"},
        "partner": {"question": "what is 7 - 1 - 1 - 1 ?", "steps": [], "answer": "4"},
        "change": "5 → 7 in step 1",
        "blocks": [1],
        "claimed": "<<5-1=4>>",
        "brought": "<<7-1=6>>",
        "expected": "4",
        "own": "2",
        "said": "4",
        "outcome": "expected",
        "came": True,
        "surgery": surgery,
        "control": {"what": "block 3 taken from the partner instead", "said": "2", "outcome": "own"},
    }


def acts(html):
    return [json.loads(unescape(found)) for found in re.findall(r'data-do="([^"]*)"', html)]


@pytest.mark.parametrize("ops", ["4b", "2b2n", "2x", "0b", "b", "2k", "02b", "2b ", "<b>"])
def test_nonsense_operations_become_none(reading, ops):
    assert view_of(reading, "surgery", {"ops": ops, "layers": "5-1"}) == {"ops": "", "layers": "1-2", "partner": ""}
    assert "Nothing is changed yet" in draw(reading, "surgery", ops=ops, layers="a").html()


def test_operations_are_written_as_they_are_read():
    assert parse("5s2b16n", 16) == {2: "b", 5: "s", 16: "n"}
    assert write(parse("5s2b16n", 16)) == "2b5s16n"
    assert write({2: "", 3: "b"}) == "3b"
    assert parse("", 0) == {} and parse("1b", 0) is None


def test_every_block_has_a_switch_of_four(reading):
    sent = [act for act in acts(draw(reading, "surgery", ops="2b").html()) if act["act"] == "set"]
    assert {(act["block"], act["letter"]) for act in sent} == {(k, letter) for k in "123" for letter in ("", *"bns")}
    assert len(sent) == 3 * 4


def test_blocks_stay_between_0_and_16(reading):
    html = draw(reading, "surgery").html()
    assert {act["k"] for act in acts(html) if act["act"] == "blocks"} == {"2", "4"}
    full = {**reading, "num_blocks": 16, "readouts": readouts(["2"] * 16)}
    assert html.count("disabled") == 1  # reset
    assert draw(full, "surgery").html().count("disabled") == 2
    none = {**reading, "num_blocks": 0, "readouts": [{**readouts(["2"])[0], "block": 0}]}
    assert "nothing to operate on" in draw(none, "surgery", ops="1b").html()


def test_layer_lists_offer_only_ranges_that_exist(reading):
    html = draw(reading, "surgery", layers="1-1").html()
    first, last = re.findall(r'<select data-view-key="layers".*?</select>', html)
    assert re.findall(r'value="([^"]*)"', first) == ["0-1", "1-1", "2-2"]
    assert re.findall(r'value="([^"]*)"', last) == ["0-0", "1-1", "1-2"]


def test_a_result_is_shown_with_its_control(reading, surgery):
    html = draw({**reading, "surgery": surgery}, "surgery", ops="2b").html()
    assert "Probability of 2, the answer before: 25" in html and "Probability of 2: 80" in html
    assert html.count('aria-label="changed">≠') == 2
    assert "2 of 3 readouts say something else" in html


@pytest.mark.parametrize(
    "change, view",
    [
        ({"question": "another"}, {"ops": "2b"}),
        ({"num_blocks": 2}, {"ops": "2b"}),
        ({}, {"ops": "2n"}),
        ({}, {"ops": "2b", "layers": "1-1"}),
        ({"actions": {"2": "swap"}, "partner": "one"}, {"ops": "2s", "partner": "another"}),
    ],
)
def test_a_foreign_result_is_not_shown(reading, surgery, change, view):
    html = draw({**reading, "surgery": {**surgery, **change}}, "surgery", **view).html()
    assert "not here yet" in html and "Probability of 2" not in html and "changed</span>" not in html


def test_a_swap_asks_for_its_question(reading, surgery):
    assert "Type a second question" in draw(reading, "surgery", ops="2s").html()
    swapped = {**surgery, "actions": {"2": "swap"}, "partner": "what is 1 ?"}
    picture = draw({**reading, "surgery": swapped}, "surgery", ops="2s")  # the stored one fills the field
    assert picture.view["partner"] == "what is 1 ?" and "not here yet" not in picture.html()


def test_visitors_and_models_cannot_write_html(reading, surgery, counterfactual):
    evil = "<script>alert(1)</script>"
    surgery |= {"question": evil, "partner": evil, "actions": {"2": "swap"}, "unrelated": None}
    surgery["after"] = told(["4", evil, evil])
    surgery["control"] |= {"what": evil, "value": evil}
    counterfactual |= {"problem": {"question": evil}, "said": evil, "claimed": f"<<{evil}>>", "change": evil}
    reading |= {"question": evil, "steps": [evil] * 3, "surgery": surgery, "counterfactual": counterfactual}
    reading["probes"]["importance"]["answer"] = evil
    html = draw(reading, "surgery", ops="2s", partner=evil).html()
    assert "<script" not in html and "&lt;script" in html


def test_the_map_tells_signs_and_flips(reading):
    html = draw(reading, "surgery").html()
    assert "changes the answer in 1 of 6 cells" in html
    assert "block 2 at layer 0, 2 goes from 90\u00a0% to 7\u00a0% (−2.50 nats)" in html
    assert html.count('surgery-cell less flips"') == 1 and '−2.50<b aria-hidden="true">≠</b>' in html
    assert {"act": "operate_cell", "block": "2", "layer": "0", "action": "blank"} in acts(html)
    assert [signed(x) for x in (0.001, -0.004, 0.02, -12.34)] == ["0", "0", "+0.02", "−12.3"]


def test_only_matching_claims_can_be_tried(reading):
    tries = [act for act in acts(draw(reading, "surgery").html()) if act["act"] == "try_counterfactual"]
    assert tries == [{"act": "try_counterfactual", "block": "1"}]
    assert "choose one of the examples" in draw({**reading, "steps": []}, "surgery").html()


def test_missing_probes_are_sentences(reading):
    picture = draw({**reading, "probes": {}}, "surgery", ops="1b")
    assert picture.notes and "no claim to test" in picture.html()


def test_the_table_holds_what_is_drawn(reading, surgery, counterfactual):
    full = {**reading, "surgery": surgery, "counterfactual": counterfactual}
    rows = [tuple(row) for row in draw(full, "surgery", ops="2b").table.rows]
    assert ("readout after", 2, None, "7", 0.6) in rows
    assert ("removal, change of log probability", 2, 0, "another answer", -2.5) in rows
    assert ("counterfactual: expected", None, None, "4", None) in rows


# ---------------------------------------------------------------------------------------------------------- sentences


def test_names_and_operations():
    assert [named(b) for b in ([2], ["3", "2"], range(1, 9), [1, 3, 5])] == [
        "block 2",
        "blocks 2 and 3",
        "blocks 1 to 8",
        "blocks 1, 3 and 5",
    ]
    assert operation({2: "blank", 5: "swap"}) == "blanking block 2 and taking block 5 from the second question"


def test_a_changed_answer_in_words(surgery):
    assert sentence(surgery) == (
        "Blanking block 2 (at layers 1 to 2) changes the answer from 2 (90 %) to 6 (60 %); the probability of 2 "
        "becomes 25 %. The control, block 2 taken from an unrelated question, leaves the answer as it is: it was "
        "the damage, not the missing content, that moved the answer."
    )


def test_an_unchanged_answer_in_words(surgery):
    surgery |= {"after": told(["4", "3", "2"], 0.88), "answer_changed": False, "changed_blocks": [], "control": None}
    assert sentence(surgery) == (
        "Blanking block 2 (at layers 1 to 2) changes nothing that is said: the answer stays 2 (90 % → 88 %). There is "
        "no control for this operation."
    )
    assert "but the readout of block 2 now says something else" in sentence({**surgery, "changed_blocks": [2]})
    assert sentence({**surgery, "actions": {}}) == "No block is touched: the answer is 2 (90 %)."


def test_what_a_damaged_model_says_is_cut(surgery):
    surgery["after"] = told(["4", "3", "3" * 400])
    surgery["control"]["value"] = "9" * 400
    assert len(sentence({**surgery, "control": surgery["control"] | {"answer_changed": True}})) < 400
    assert "no answer" in sentence({**surgery, "after": told(["4", "3", " "])})


@pytest.mark.parametrize(
    "change, verdict",
    [
        ({}, "It came: in this trial the answer follows what is decoded here."),
        ({"control": {"what": "x", "said": "4", "outcome": "expected"}}, "this pair proves nothing"),
        ({"control": None}, "there was no control"),
        ({"came": False, "outcome": "own", "said": "2"}, "The answer did not move: nothing here shows"),
        ({"came": False, "outcome": "partner", "said": "9"}, "copied rather than computed"),
        ({"came": False, "outcome": "other", "said": None}, "moved, but not as the decode predicts"),
    ],
)
def test_the_verdict_on_a_counterfactual(reading, counterfactual, change, verdict):
    result = counterfactual | change
    assert verdict in counterfactual_sentence(result)
    html = draw({**reading, "counterfactual": result}, "surgery").html()
    assert verdict in html
    assert ("surgery-result good" in html) == (not change)  # green only with a control that stayed


def test_a_counterfactual_of_another_question_is_not_shown(reading, counterfactual):
    counterfactual["surgery"] = {**counterfactual["surgery"], "question": "another"}
    assert "surgery-result" not in draw({**reading, "counterfactual": counterfactual}, "surgery").html()


def test_the_changed_number_is_marked():
    assert marked("Ben has 3 toys & <b> .", "Ben has 5 toys & <b> .") == (
        "Ben has <mark>3</mark> toys &amp; &lt;b&gt; ."
    )
