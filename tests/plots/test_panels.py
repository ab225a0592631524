"""The panels show a reading's numbers beside their controls; texts of visitors and models are inert."""

import json
import re
from html import unescape

import pytest
from readings import EVIL, acts, cell, counterfactual, everywhere, reading, surgery, words

from rim_probe.errors import RiMError
from rim_probe.plots import PANELS, draw, view_of
from rim_probe.plots.attention import running_text, strongest_heads
from rim_probe.plots.trajectory import paths, shared_movement


def shown(panel, data=None, **view):
    return draw(data or reading(), panel, **view).html()


# ---------------------------------------------------------------------------------------------------------- all panels


@pytest.mark.parametrize("panel", PANELS)
def test_a_panel_is_drawn_alike_each_time_and_saved_whole(panel, tmp_path):
    assert shown(panel) == shown(panel)
    draw(reading(), panel).save(tmp_path / "panel.html")
    saved = (tmp_path / "panel.html").read_text()
    assert shown(panel) in saved and not re.search(r"<(script|link|img)[^>]* (src|href)=", saved)
    assert ("plotly.js v" in saved) == bool(draw(reading(), panel).figures), "plotly comes along where there is a chart"


@pytest.mark.parametrize("panel", PANELS)
def test_texts_write_no_html_and_no_markup_of_plotly(panel):
    data = everywhere(reading(), EVIL) | {"surgery": surgery(), "counterfactual": everywhere(counterfactual(), EVIL)}
    data["steps"] = data["chain"]["steps"] = [EVIL, "<<7-2=5>>"]
    html = shown(panel, data) + draw(data, panel, **{"partner": EVIL} if panel == "surgery" else {}).html(EVIL)
    assert "<script" not in html and "alert(1)" in html
    for figure in draw(data, panel).figures.values():
        assert "<script" not in json.dumps(figure.to_dict(), default=str)


@pytest.mark.parametrize("panel", PANELS)
def test_nonsense_views_become_the_usual_one(panel):
    usual = view_of(reading(), panel)
    for value in ("<b>", "-1", "99", "9.9.9", "²"):
        nonsense = {name: value for name in usual if name != "partner"}
        assert view_of(reading(), panel, nonsense) == usual == draw(reading(), panel, **nonsense).view


@pytest.mark.parametrize("panel", PANELS)
@pytest.mark.parametrize("lacking", [(), ("steps",), ("words", "correctness", "values"), "all"])
def test_what_is_missing_is_said(panel, lacking):
    data = reading()
    for probe in list(data["probes"]) if lacking == "all" else lacking:
        del data["probes"][probe]
    data["complaints"] = ["No <probes> here."]
    html = shown(panel, data)
    if lacking == "all":
        assert re.search("missing|not recorded|not read|not measured|not compared", html)
    assert "<probes>" not in html


@pytest.mark.parametrize("panel", PANELS)
def test_without_memory_there_is_nothing_to_look_into(panel):
    none = reading() | {"num_blocks": 0, "readouts": []}
    assert re.search("without memory blocks|nothing to operate on", shown(panel, none))


def test_a_panel_is_one_of_those_there_are_and_drawn_from_a_reading():
    with pytest.raises(RiMError, match="blocks"):
        draw(reading(), "nonsense")
    with pytest.raises(RiMError, match="not a reading"):
        draw({}, "blocks")


# -------------------------------------------------------------------------------------------------------------- blocks


def test_blocks_stand_beside_their_steps_with_the_accuracy_of_the_decode():
    told = words(shown("blocks"))
    for text in ("✓ step 1 of the solution", "≈ step 1, though read for step 2", "○ no step of the solution"):
        assert text in told
    assert "right for 72 % of known problems" in told and "51 to 72 % of the time" in told
    assert "matches blocks 1, 2" in told and "matches no block" in told


def test_only_the_last_block_can_be_wrong():
    data = reading()
    data["readouts"][2] |= {"value": "6", "right": False}
    told = words(shown("blocks", data))
    assert "7 30 % sure on the way: step 1" in told and "5 64 % sure ✓ right" in told and "✗ wrong" in told
    assert "✗ wrong" not in words(shown("blocks"))


def test_blocks_that_agree_share_a_card_and_keep_their_own_numbers():
    data = reading()
    data["readouts"][2] |= {"value": data["readouts"][1]["value"], "text": data["readouts"][1]["text"]}
    steps = data["probes"]["steps"]["blocks"]
    steps[2] = steps[1] | {"block": 3}
    html = shown("blocks", data)
    assert html.count("<article") == 2 and len(draw(data, "blocks").table.rows) == 3
    assert {"act": "operate_here", "block": "2"} in acts(html) and {"act": "operate_here", "block": "3"} in acts(html)


def test_a_readout_that_states_a_step_shows_its_result():
    data = reading()
    data["readouts"][0] |= {"value": None, "text": "<<3+4=7>>", "right": False}
    assert "7 30 % sure on the way: step 1" in words(shown("blocks", data))


def test_lines_end_at_their_steps_and_loose_ends_stay_loose():
    html = shown("blocks")
    ends = [float(end) for end in re.findall(r' 100 ([\d.]+)"/>', html)]
    assert len(ends) == 2 and all(20 < end < 30 for end in ends)  # the middle of the first of two rows is 25
    assert html.count("H26") == html.count("<circle") == 1


def test_only_what_a_block_is_read_as_can_be_tested():
    """Block 2 was read for step 2 and is read as step 1: a trial of step 2 would test what nobody claims."""
    assert {"act": "operate_here", "block": "2"} in acts(shown("blocks"))
    tried = [act for act in acts(shown("blocks")) if act["act"] == "try_counterfactual"]
    assert tried == [{"act": "try_counterfactual", "block": "1"}]
    assert "try_counterfactual" not in shown("blocks", step="1")


def test_the_table_of_blocks_holds_what_is_shown():
    table = draw(reading(), "blocks").table
    assert all(len(row) == len(table.header) for row in table.rows)
    first = dict(zip(table.header, table.rows[0], strict=True))
    assert (first["nearest step"], first["cosine"], first["right or wrong"]) == ("3+4=7", "0.810", "wrong")
    assert first["own words"] == "7-2=5" and first["result by a linear probe"] == "7"


# ----------------------------------------------------------------------------------------------------------- attention


def shades(**view):
    return json.loads(re.search(r"data-shades='([^']*)'", shown("attention", **view))[1])


def test_words_are_shaded_by_the_selection_that_is_named():
    assert shades(layer="1", head="mean")["1"] == [0.2, 1, 0]
    assert shades(layer="1", head="mean")["all"] == pytest.approx([0.6, 1, 0.2], abs=0.01)
    assert shades(layer="1", head="2")["1"] == [0, 1, 0] and shades(layer="1", head="max")["2"] == [1, 0, 0.5]
    html = shown("attention", layer="1", block="2")
    assert re.findall(r'class="word"[^>]*--w:([\d.]+)', html) == ["1.0", "0.0", "0.5"]


def test_the_map_and_the_table_hold_every_weight():
    panel = draw(reading(), "attention", layer="1")
    (cells,) = panel.figures["map"].data
    assert [list(row) for row in cells.z] == [[0.1, 0.5, 0.0], [0.2, 0.0, 0.1], [0.45, 0.05, 0.0]]
    assert "block 1 on “3”: 50 %" in cells.hovertext[0]
    assert list(panel.table.rows[1]) == ["3", 0.5, 0.0, 0.05] and list(panel.table.rows[-1])[1:] == [0.15, 0.35]


def test_a_first_word_that_takes_most_does_not_hide_the_others():
    data = reading()
    data["probes"]["attention"]["slots_to_tokens"]["mean over heads"][0] = [[0.6, 0.2, 0.1], [0.8, 0.0, 0.1]]
    html = shown("attention", data, layer="1", head="mean")
    assert json.loads(re.search(r"data-shades='([^']*)'", html)[1])["1"] == [1, 1, 0.5]
    assert "70 %, goes to “Ann”, the first word" in words(html)
    assert draw(data, "attention", layer="1", head="mean").figures["map"].data[0].zmax == 0.2


def test_the_answer_s_shares_are_the_head_s_or_pooled():
    def shares(**view):
        return re.findall(r"<small>\d</small><b>([^<]*)</b>", shown("attention", **view).replace("\u00a0", " "))

    assert shares(layer="1", head="2") == shares(layer="1", head="max") == ["20 %", "70 %"]
    assert shares(layer="1", head="mean") == ["15 %", "35 %"]


def test_strongest_heads_are_ranked_by_their_mass_on_memory():
    found = strongest_heads(reading()["probes"]["attention"])
    assert [(layer, head) for layer, head, _ in found] == [(1, 2), (2, 2), (1, 1), (2, 1)]
    assert 'aria-pressed="true" data-view=\'{"head": "2", "layer": "2"}\'' in shown("attention", layer="2", head="2")


def test_without_weights_by_head_the_words_show_the_mean_and_say_so():
    data = reading()
    data["probes"]["attention"]["slots_to_tokens"]["per head"] = None
    data["probes"]["attention"]["answer_to_tokens"] = None
    panel = draw(data, "attention", layer="1", head="2")
    assert len(panel.figures["map"].data[0].z) == 2 and any("mean over heads" in note for note in panel.notes)


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
    pieces = running_text(question, tokens)
    assert len(pieces) == len(tokens)
    assert "".join(f" {word}" if spaced else word for spaced, word in pieces).strip() == text


# -------------------------------------------------------------------------------------------------------------- layers


def grid(data=None, **view):
    """(cell, text, whether ringed, tabindex) of all cells in the order of the page."""
    cells = re.findall(
        r"<button (class=g )?data-cell=\S+ data-view='([^']*)' .*?tabindex=(\S+?)[ >][^<]*?>?([^<>]*)<",
        shown("layers", data, **view),
    )
    return [(json.loads(view)["cell"], unescape(text), bool(ring), tab) for ring, view, tab, text in cells]


def test_the_grid_has_the_best_reading_in_every_cell_with_the_answer_s_side_on_top():
    found = grid(cell="1.2.1")
    assert [place for place, *_ in found][:5] == ["2.1.1", "2.1.end", "2.2.1", "2.2.end", "1.1.1"]
    assert [(place, text) for place, text, ringed, _ in found if ringed] == [("1.2.1", "7")]
    assert [place for place, *_, tab in found if tab == "0"] == ["1.2.1"]
    at = re.findall(r"data-cell=(\d+),(\d+)", shown("layers"))
    assert [(int(r), int(c)) for r, c in at] == [(r, c) for r in range(3) for c in range(4)], "arrow keys find all"


def test_rings_are_counted_beside_the_control_s_and_a_tie_is_no_finding():
    assert "1 of 12 cells, 1 in the control" in words(shown("layers")).replace(" ,", ",")
    data = reading()
    data["probes"]["depth"]["modes"][0]["cells"][1][2] = cell(("7", 0.25), ("5", 0.25))
    assert "0 of 12 cells" in words(shown("layers", data))
    assert shown("layers", data).count("block 2, slot 1 · nothing stands out") == 1


def test_the_chosen_cell_is_shown_in_full_beside_its_control():
    detail = words(shown("layers", cell="1.2.1").partition("<section")[2])
    assert "Layer 1, block 2, slot 1" in detail
    assert re.search("Read here 7 90 % the result of step 1 5 5 % .*The control reads 2 30 % 7 20 %", detail)
    wanted = {"act": "operate_cell", "block": "2", "layer": "1"}
    assert acts(shown("layers", cell="1.2.end")) == [wanted | {"action": name} for name in ("blank", "noise", "swap")]
    assert acts(shown("layers", cell="2.2.end")) == [], "nothing later reads the last layer"


def test_minus_control_shows_differences_or_says_why_not():
    assert {text for _, text, *_ in grid(minus="on", cell="1.1.1")} == {"9"}
    assert "+0.25" in shown("layers", minus="on") and "−0.10" in shown("layers", minus="on")
    other = draw(reading(), "layers", mode="nearest step", minus="on", cell="0.2.end")
    assert "has no control" in other.notes[0] and "0.81" in other.html()
    assert other.view["cell"] == "0.2.end" and "Layer 1, block 2, slots" in other.html()


def test_ranks_are_drawn_beside_their_control():
    panel = draw(reading(), "layers", value="1", cell="1.2.1")
    drawn = {trace.name: list(trace.y) for trace in panel.figures["rank"].data}
    assert drawn == {
        "best of all blocks": [40, 3.5, 1],
        "block 2": [50, 3.5, 1],
        "control: an untrained model": [45, 20, 8],
    }
    assert panel.figures["rank"].layout.yaxis.autorange == "reversed"
    assert [1, "best of all", "rank of 7 (step 1)", "7", 3.5, "7", 20] in panel.table.rows
    assert [2, 1, 1, "<<", 0.4, "2", 0.3] in panel.table.rows and len(panel.table.rows) == 12 + 6


def test_a_deep_model_s_grid_stays_light():
    data = reading()
    mode = data["probes"]["depth"]["modes"][0]
    mode["layers"] = list(range(31))
    mode["positions"] = [{"block": block, "position": place} for block in range(1, 9) for place in (1, 2, "end")]
    mode["cells"] = [[cell(*[("token", 0.5 - 0.1 * place) for place in range(5)])] * 24] * 31
    mode["control_cells"] = mode["minus"] = mode["cells"]
    html = shown("layers", data).split("</table>")[0]
    assert html.count("<button") > 31 * 24 and len(html.encode()) < 160_000


# ---------------------------------------------------------------------------------------------------------- trajectory


def traces(**view):
    return {trace.name: trace for trace in draw(reading(), "trajectory", **view).figures["path"].data}


def test_the_path_its_control_and_the_cloud_are_drawn_in_the_axes_chosen():
    drawn = traces()
    own = drawn["this question, block by block"]
    assert list(zip(own.x, own.y, strict=True)) == [(0, 0), (10, 0), (10, 10)]
    assert "answer so far 7 (30 % sure, wrong)" in own.hovertext[0]
    assert list(drawn["mean path of 3 known problems"].x) == [0, 8, 8]
    assert list(drawn["ends right (2)"].x) == [0, 5] and list(drawn["ends wrong (1)"].x) == [20]
    assert {"1 step (1)", "2 steps (2)"} < set(traces(cloud="steps"))
    assert len(traces(cloud="none")) == 2 and len(traces(axes="13")) == 2, "the cloud is known in axes 1 and 2 alone"
    assert list(traces(axes="13")["this question, block by block"].y) == [1, 2, 3]


def test_over_depth_each_block_has_its_path_beside_the_others():
    drawn = traces(over="depth", block="2")
    assert list(drawn["block 2, layer by layer"].x) == [1, 5]
    assert list(drawn["mean path of the question's other blocks"].x) == [1, 5]
    assert len(draw(reading(), "trajectory", over="depth").table.rows) == 6


def test_movement_shared_with_the_mean_path():
    own = [[0, 0, 0], [2, 0, 0]]
    assert shared_movement(own, own) == 1
    assert shared_movement(own, [[5, 5, 5], [7, 5, 5]]) == 1  # the place does not count, the movement does
    assert shared_movement(own, [[0, 0, 0], [1, 0, 0]]) == pytest.approx(0.75)
    assert shared_movement(own, [[2, 0, 0], [0, 0, 0]]) == 0
    assert shared_movement([[1, 1, 1]] * 2, own) == 0
    assert "90 % of the movement" in words(shown("trajectory"))


def test_a_path_longer_than_its_control_is_drawn_without_it():
    geometry = reading()["probes"]["geometry"]
    assert len(paths(geometry | {"blocks": geometry["blocks"][:1]})[1]) == 1
    assert paths(geometry | {"blocks": geometry["blocks"] * 5})[1] == []
