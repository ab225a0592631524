"""The interchange test on the glass box, where it is known which block holds what."""

import numpy as np
import pytest

from rim_probe.errors import RiMError
from rim_probe.glassbox.box import END_LAYER, HELD_LAYER, LAYERS, glassbox
from rim_probe.probing import interchange
from rim_probe.probing.section import Section
from rim_probe.probing.study import Study

SIZES = {"choose_pairs": 4, "report_pairs": 12, "heatmap_pairs": 12}
FEW = {"choose_pairs": 2, "report_pairs": 4, "heatmap_pairs": 1}


def study_of(box, other=None) -> Study:
    # A study asks for room for the chain behind the blocks; the glass box has none, and nothing here puts it there.
    (other or box).rim.model.config.max_position_embeddings = 64
    splits = {"fit": box.problems(0, 40, "fit"), "choose": box.problems(0, 20, "choose")}
    splits["report"] = box.problems(1, 30, "report")
    return Study({"memory": (other or box).rim}, splits, progress=False)


@pytest.fixture(scope="module")
def study():
    return study_of(glassbox())


@pytest.fixture(scope="module")
def section(study):
    return interchange.score(study, **SIZES)


def row(section, start):
    return next(cells for cells in section.tables[0].rows if cells[0].startswith(start))


def test_every_swap_of_a_block_that_holds_the_step_gives_the_predicted_answer(section):
    for start in ("the partner's, one number", "strict", "best joint swap", "by construction"):
        assert row(section, start)[1].value == 1
    # The end reads its block at layer 7 of 8, so that at a middle layer it holds nothing yet: this control may fail.
    assert row(section, "positive control")[1].value == 0
    assert [estimate.value for _, estimate in section.tables[2].rows] == [1, 1, 1]
    assert "all layers" in section.settings["cell"]  # no single layer serves all three blocks
    assert all(target.met for target in section.targets)


def test_wrong_blocks_and_random_problems_fail(section):
    wrong = row(section, "control, strict")
    assert wrong[1].value == 0 and wrong[3].value > 0.5  # a block of a later step brings the partner's answer
    assert row(section, "control: the same of a random")[1].value <= 0.3


def test_claimed_and_other_blocks_are_compared_on_the_same_pairs(section):
    strict = section.tables[1].rows[1]
    assert [estimate.value for estimate in strict[1:4]] == [1, 0, 1] and strict[4] == strict[1].n


def test_without_a_positive_control_a_failure_is_inconclusive_and_misses_are_told(study):
    found = interchange.score(study, {1: [3], 2: [1], 3: [2]}, choose_pairs=6, report_pairs=12, heatmap_pairs=0)
    assert found.targets[0].what in found.settings["targets missed by"]
    assert "cells: one layer or all layers" in found.settings["tried"] and "is missed by" in found.summary
    assert "the model does not compute it" not in found.summary


def test_heat_maps_find_each_block_at_the_layers_where_it_is_held_and_not_yet_read(section):
    ends = {1: HELD_LAYER[2], 2: HELD_LAYER[3], 3: END_LAYER}
    for step, figure in enumerate((f for f in section.figures if f.kind == "heatmap"), start=1):
        z = np.array(figure.data["z"][: LAYERS - 1])
        for block in (1, 2, 3):
            # With one changed number every block from the changed step on holds something that follows from it.
            held = range(HELD_LAYER[block], ends[block]) if block >= step else ()
            np.testing.assert_array_equal(z[:, block - 1], [float(layer in held) for layer in range(1, LAYERS)])


def test_false_claims_fail(study):
    found = interchange.score(study, {1: [3], 2: [1], 3: [2]}, **(SIZES | {"heatmap_pairs": 0}))
    strict = row(found, "strict")
    assert strict[1].value <= 0.3
    assert not found.targets[0].met


def test_the_report_survives_json_and_is_the_same_again(study, section):
    assert Section.from_dict(section.to_dict()).to_dict() == section.to_dict()
    again = [interchange.score(study, **FEW).to_dict() for _ in range(2)]
    assert again[0] == again[1]
    assert section.settings["cells searched"] == 3 * LAYERS * 2 * 3


def test_claims_must_name_blocks_and_some_pair_must_be_right(study):
    for claims in ({}, {1: []}, {1: [4]}, {1: [0]}):
        with pytest.raises(RiMError):
            interchange.score(study, claims, **FEW)
    with pytest.raises(RiMError, match="answered right"):
        interchange.score(study_of(glassbox(), glassbox(trained=False)), **FEW)
