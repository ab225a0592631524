"""The blocks panel: matches agree with the data, marks are more than colour, everything is escaped."""

import re

import pytest
from block_readings import decode, reading

from rim_probe.pictures import blocks, draw, view_of
from rim_probe.pictures.matches import claims, decodes, explicit_steps


def test_each_decode_is_matched_with_its_step_and_marked_by_sign_and_word():
    found = decodes(reading())
    assert {block: (one.row, one.gold, one.exact) for block, one in found.items()} == {
        1: (0, 1, True),
        2: (0, 1, False),
        3: (None, 0, False),
    }
    assert [one.mark[1][0] for one in found.values()] == ["✓", "≈", "✗"]


def test_the_view_reads_all_blocks_for_one_step():
    data = reading()
    assert {block: one.nearest[0][0] for block, one in decodes(data, "1").items()} == {1: "3+4=7", 3: "3+4=7"}
    assert view_of(data, "blocks") == {"step": "own"}
    assert view_of(data, "blocks", {"step": "<script>"}) == {"step": "own"}
    assert 'aria-pressed="true"' in draw(data, "blocks", step="2").controls
    assert draw(data, "blocks", step="2").view == {"step": "2"}


def test_lines_end_at_their_steps_and_loose_ends_stay_loose():
    body = draw(reading(), "blocks").body
    ends = [float(end) for end in re.findall(r'<path class="\w+" [^>]* 100 ([\d.]+)"/>', body)]
    assert len(ends) == 2 and all(20 < end < 30 for end in ends)  # the middle of the first of two rows is 25
    assert body.count("loose") == 1 and body.count("<circle") == 1


def test_hovering_a_step_lights_its_blocks_and_a_block_its_step():
    body = draw(reading(), "blocks").body
    assert 'data-link="step-1 block-1 block-2"' in body and 'data-link="step-2"' in body
    assert "met by blocks 1, 2" in body and "met by no block" in body


def test_the_control_stands_beside_every_decode():
    picture = draw(reading(), "blocks")
    assert [f"on known problems {share} % right" in picture.body for share in (72, 51, 60)] == [True] * 3
    assert "51 to 72 %" in picture.look_for and "Surgery" in picture.look_for


def test_steps_that_a_decode_cannot_name_count_against_it():
    data = reading()
    data["probes"]["steps"]["bank"] = 8000
    data["probes"]["steps"]["blocks"][0]["coverage"] = 0.5
    picture = draw(data, "blocks")
    assert "right for 72 % of known problems whose step is among the 8,000 known steps (36 % of all)" in picture.body
    assert "on known problems 36 % right, 72 % where it knows the step" in picture.body
    assert "36 to 60 %" in picture.look_for


def test_buttons_ask_for_surgery():
    body = draw(reading(), "blocks").body.replace("&quot;", '"')
    assert '{"act": "operate_here", "block": "2"}' in body and '{"act": "try_counterfactual", "block": "1"}' in body


def test_only_what_a_block_is_read_as_can_be_tested():
    """Block 2 was read for step 2 and is read as step 1: a trial of step 2 would test what nobody claims."""
    body = draw(reading(), "blocks").body
    assert claims(reading()) == {1: 1} and body.count("try_counterfactual") == 1
    assert "try_counterfactual" not in draw(reading(), "blocks", step="1").body
    unknown = reading() | {"steps": []}  # then the steps of the chain are the known ones
    for block in unknown["probes"]["steps"]["blocks"]:
        for one in block["nearest"]:
            one["gold"] = None
    assert claims(unknown) == {1: 1}


def test_the_chain_is_judged_as_the_race_judges_it():
    assert "✗ wrong" not in draw(reading() | {"gold": "5.0"}, "blocks").body.partition("blocks-cards")[0]


def test_the_table_holds_what_is_shown():
    table = draw(reading(), "blocks").table
    assert all(len(row) == len(table.header) for row in table.rows)
    first = dict(zip(table.header, table.rows[0], strict=True))
    assert first["nearest step"] == "3+4=7" and first["cosine"] == "0.810" and first["right or wrong"] == "wrong"
    assert first["own words"] == "7-2=5" and first["result by a linear probe"] == "7"


def test_without_gold_steps_blocks_are_matched_with_the_chain():
    data = reading()
    data["steps"], data["gold"] = [], None
    for block in data["probes"]["steps"]["blocks"]:
        for near in block["nearest"]:
            near["gold"] = None
    found = decodes(data)
    assert [one.mark for one in found.values()] == [
        ("hit", "→ step 1 of the chain"),
        ("near", "→ step 1 of the chain"),
        ("none", "○ no step of the chain"),
    ]
    assert "of the solution" not in draw(data, "blocks").body


def test_a_wrong_chain_is_marked_and_the_solution_completes_it():
    data = reading()
    data["chain"] = {"text": "", "steps": ["<<3+4=8>>", "<<7-2=5>>"], "value": "6"}
    rows = explicit_steps(data)
    assert [(row.text, row.written, row.gold) for row in rows] == [
        ("3+4=8", True, 0),
        ("7-2=5", True, 2),
        ("3+4=7", False, 1),
    ]
    body = draw(data, "blocks").body
    assert "✗ not in the solution" in body and "not written by CoT" in body and "✗ wrong" in body


def test_the_same_step_twice_goes_to_the_one_it_was_read_for():
    data = reading()
    data["steps"] = data["chain"]["steps"] = ["<<3+4=7>>", "<<3+4=7>>"]
    data["probes"]["steps"]["blocks"] = [{"block": 1, **decode(2, ("<<3+4=7>>", 0.9, 1)), "others": []}]
    assert decodes(data)[1].row == 1 and decodes(data)[1].exact


@pytest.mark.parametrize("probe", ["steps", "words", "correctness", "values"])
def test_a_missing_probe_leaves_the_rest(probe):
    data = reading()
    del data["probes"][probe]
    data["complaints"] = ["The probes folder is of another model."]
    picture = draw(data, "blocks")
    assert picture.body.count("<article") == 3
    if probe != "values":
        assert picture.notes and picture.notes[-1] == "The probes folder is of another model."


def test_nothing_to_compare_with():
    data = reading()
    data["chain"], data["steps"] = None, []
    picture = draw(data, "blocks")
    assert "blocks-links" not in picture.body and any("no chain of thought" in note for note in picture.notes)
    data["readouts"] = []
    assert "without memory blocks" in draw(data, "blocks").lead


def test_texts_are_escaped():
    bad = '<img src=x onerror="1">'
    data = reading()
    data["chain"] = {"text": bad, "steps": [bad], "value": bad}
    data["readouts"][0] |= {"text": bad, "value": bad}
    data["probes"]["steps"]["blocks"][0]["nearest"][0]["step"] = bad
    data["probes"]["words"]["blocks"][0]["stage1"] = bad
    data["probes"]["values"]["blocks"][0]["values"][0]["value"] = bad
    data["complaints"] = [bad]
    del data["probes"]["correctness"]
    assert "<img" not in draw(data, "blocks").html()


def test_runs_of_blocks_are_drawn_together():
    assert blocks._listed([2, 4, 5, 6, 8, 9]) == "2, 4–6, 8, 9"


def test_without_a_decoder_nothing_is_said_to_be_unmet():
    data = reading()
    del data["probes"]["steps"]
    picture = draw(data, "blocks")
    assert "met by" not in picture.body and "unmet" not in picture.body and "A line" not in picture.lead
