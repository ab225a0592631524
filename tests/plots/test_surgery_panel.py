"""The surgery panel: its view, what it shows of stored results, and the sentences it tells."""

import re

import pytest
from readings import acts, counterfactual, reading, readouts, surgery, told, words

from rim_probe.plots import draw, view_of
from rim_probe.plots.surgery import marked, parse, write
from rim_probe.plots.surgery_words import counterfactual_verdict, named, operation, sentence


def shown(data=None, **view):
    return draw(data or reading(), "surgery", **view).html()


@pytest.mark.parametrize("ops", ["4b", "2b2n", "2x", "0b", "b", "2k", "02b", "2b ", "<b>"])
def test_nonsense_operations_become_none(ops):
    assert view_of(reading(), "surgery", {"ops": ops, "layers": "5-1"}) == {"ops": "", "layers": "1-2", "partner": ""}
    assert "Nothing is changed yet" in shown(ops=ops, layers="a")


def test_operations_are_written_as_they_are_read():
    assert parse("5s2b16n", 16) == {2: "b", 5: "s", 16: "n"}
    assert write(parse("5s2b16n", 16)) == "2b5s16n" and write({2: "", 3: "b"}) == "3b"
    assert parse("", 0) == {} and parse("1b", 0) is None


def test_every_block_has_a_switch_of_four_and_k_stays_between_0_and_16():
    sent = [(act["block"], act["letter"]) for act in acts(shown(ops="2b")) if act["act"] == "set"]
    assert sorted(sent) == sorted((k, letter) for k in "123" for letter in ("", *"bns"))
    assert {act["k"] for act in acts(shown()) if act["act"] == "blocks"} == {"2", "4"}
    full = reading() | {"num_blocks": 16, "readouts": readouts(["2"] * 16)}
    assert shown().count("disabled") == 1 and shown(full).count("disabled") == 2  # reset; and one block more


def test_layer_lists_offer_only_ranges_that_exist():
    first, last = re.findall(r'<select data-view-key="layers".*?</select>', shown(layers="1-1"))
    assert re.findall(r'value="([^"]*)"', first) == ["0-1", "1-1", "2-2"]
    assert re.findall(r'value="([^"]*)"', last) == ["0-0", "1-1", "1-2"]


def test_a_result_is_shown_with_its_control():
    html = shown(reading() | {"surgery": surgery()}, ops="2b")
    assert "Probability of 5, the answer before: 25 %" in words(html) and "Probability of 5: 80 %" in words(html)
    assert html.count('aria-label="changed"') == 2 and "2 of 3 readouts say something else" in words(html)


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
def test_a_foreign_result_is_not_shown(change, view):
    html = shown(reading() | {"surgery": surgery() | change}, **view)
    assert "not here yet" in html and "Probability of 5" not in html


def test_a_swap_asks_for_its_question_or_has_the_stored_one():
    assert "Type a second question" in shown(ops="2s")
    stored = surgery() | {"actions": {"2": "swap"}, "partner": "what is 1 ?"}
    panel = draw(reading() | {"surgery": stored}, "surgery", ops="2s")
    assert panel.view["partner"] == "what is 1 ?" and "not here yet" not in panel.html()


def test_the_map_tells_signs_and_flips():
    html = shown()
    assert "changes the answer in 1 of 6 cells" in words(html)
    assert "block 2 at layer 0, 5 goes from 90 % to 7 % (−2.50 nats)" in words(html)
    assert html.count("surgery-cell less flips") == 1
    assert {"act": "operate_cell", "block": "2", "layer": "0", "action": "blank"} in acts(html)


def test_only_matching_claims_can_be_tried():
    tries = [act for act in acts(shown()) if act["act"] == "try_counterfactual"]
    assert [act["block"] for act in tries] == ["", "1"], "the experiment, then each decode"
    assert "choose one of the examples" in shown(reading() | {"steps": [], "chain": None})


def test_the_table_holds_what_is_drawn():
    full = reading() | {"surgery": surgery(), "counterfactual": counterfactual()}
    rows = [tuple(row) for row in draw(full, "surgery", ops="2b").table.rows]
    assert ("readout after", 2, None, "9", 0.6) in rows
    assert ("removal, change of log probability", 2, 0, "another answer", -2.5) in rows
    assert ("counterfactual: predicted", None, None, "7", None) in rows


def test_a_counterfactual_of_another_question_is_not_shown():
    other = counterfactual() | {"surgery": surgery() | {"question": "another"}}
    assert "surgery-result" not in shown(reading() | {"counterfactual": other})


# ---------------------------------------------------------------------------------------------------------- sentences


def test_names_and_operations():
    spans = [named(b) for b in ([2], ["3", "2"], range(1, 9), [1, 3, 5])]
    assert spans == ["block 2", "blocks 2 and 3", "blocks 1 to 8", "blocks 1, 3 and 5"]
    assert operation({2: "blank", 5: "swap"}) == "blanking block 2 and taking block 5 from the second question"


def test_what_became_of_the_answer_and_of_the_control_is_said():
    text = sentence(surgery())
    assert "changes the answer from 5 (90 %) to 6 (60 %)" in text and "the probability of 5 becomes 25 %" in text
    assert "The control, block 2 taken from an unrelated question, leaves the answer as it was" in text
    same = surgery() | {"after": told(["7", "5", "5"], 0.88), "answer_changed": False, "changed_blocks": []}
    assert "the answer stays 5 (90 % → 88 %)" in sentence(same)
    assert "no control" in sentence(same | {"control": None})
    assert "the readout of block 2 now says something else" in sentence(same | {"changed_blocks": [2]})


def test_what_a_damaged_model_says_is_cut():
    said = surgery() | {"after": told(["4", "3", "3" * 400])}
    said["control"] |= {"value": "9" * 400, "answer_changed": True}
    assert len(sentence(said)) < 400
    assert "no answer" in sentence(surgery() | {"after": told(["4", "3", " "])})


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"control": {"what": "x", "said": "7", "outcome": "expected"}},
        {"control": None},
        {"came": False, "outcome": "own", "said": "5"},
        {"came": False, "outcome": "partner", "said": "9"},
        {"came": False, "outcome": "other", "said": None},
    ],
)
def test_a_counterfactual_is_green_only_where_the_prediction_came_and_the_control_stayed(change):
    result = counterfactual() | change
    verdict, why = counterfactual_verdict(result)
    html = shown(reading() | {"counterfactual": result})
    assert verdict in words(html) and why in words(html) and "3 + 4 = 7" in why
    assert ("surgery-result good" in html) == (not change)


def test_a_prediction_stands_before_any_outcome():
    html = shown(reading() | {"predicted": counterfactual()})
    assert "from 5 into <b>7</b>" in html and "surgery-result" not in html and "has not answered yet" in html


def test_two_checkpoints_stand_side_by_side_with_their_rates():
    routes = [{"cut": "question", "outcome": "expected", "clean": "own"}]
    missed = counterfactual() | {"came": False, "outcome": "own", "said": "5"}
    one = {"checkpoint": "one", "rate": "In 98 %.", "routes": routes}
    beside = {"checkpoint": "another", "found": missed, "why": None, "rate": None}
    told = words(shown(reading() | {"counterfactual": counterfactual() | one | {"beside": beside}}))
    assert told.index("one ✓") < told.index("In 98 %.") < told.index("another ✗") < told.index("not measured")
    assert "Question cut from the answer 7 without the swap: 5" in told
    none = beside | {"found": None, "why": "It answers 4 here."}
    assert "No test: It answers 4 here." in shown(reading() | {"counterfactual": counterfactual() | {"beside": none}})


def test_the_changed_number_is_marked():
    expected = "Ben has <mark>3</mark> toys &amp; &lt;b&gt; ."
    assert marked("Ben has 3 toys & <b> .", "Ben has 5 toys & <b> .") == expected
