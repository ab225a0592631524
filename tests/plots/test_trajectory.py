"""The trajectory panel: paths and clouds agree with the data, the control is drawn, nonsense views become defaults."""

import pytest
from block_readings import reading

from rim_probe.pictures import draw, trajectory, view_of
from rim_probe.pictures.trajectory import shared_movement


def test_path_cloud_and_control_are_drawn():
    picture = draw(reading(), "trajectory")
    assert picture.body.count("data-cell=") == 6  # three blocks, and three of the mean path
    assert "ends right (2)" in picture.body and "ends wrong (1)" in picture.body
    assert "mean path of known problems" in picture.body and "50 % of the variance" in picture.body
    assert "Block 1 at (0.0, 0.0) · answer so far 7 (30 % sure, wrong)" in picture.body


def test_clouds_by_steps_have_a_shape_each():
    body = draw(reading(), "trajectory", cloud="steps").body
    assert "1 step (1)" in body and "2 steps (2)" in body and body.count('<path d="M0-2.4') == 2
    assert "ends right" not in draw(reading(), "trajectory", cloud="none").body


def test_the_cloud_is_only_known_in_its_own_axes():
    assert "ends right" not in draw(reading(), "trajectory", axes="13").body


def test_the_frame_leaves_out_what_is_far():
    assert draw(reading(), "trajectory", frame="path").body != draw(reading(), "trajectory").body


def test_over_depth_each_block_has_its_path():
    picture = draw(reading(), "trajectory", over="depth", block="2")
    assert "Block 2 at layer 1: (1.0, 1.0)" in picture.body and "other blocks" in picture.body
    assert "Mean of the other blocks at layer 2: (5.0, 1.0)" in picture.body
    assert len(picture.table.rows) == 6 and picture.table.header[0] == "layer"


def test_movement_shared_with_the_mean_path():
    own = [[0, 0, 0], [2, 0, 0]]
    assert shared_movement(own, own) == 1
    assert shared_movement(own, [[5, 5, 5], [7, 5, 5]]) == 1  # the place does not count, the movement does
    assert shared_movement(own, [[0, 0, 0], [1, 0, 0]]) == pytest.approx(0.75)
    assert shared_movement(own, [[2, 0, 0], [0, 0, 0]]) == 0
    assert shared_movement([[1, 1, 1]] * 2, own) == 0
    assert "90 % of the movement" in draw(reading(), "trajectory").look_for


def test_nonsense_views_become_defaults():
    view = view_of(reading(), "trajectory", {"over": "x", "axes": "99", "cloud": "<b>", "frame": "", "block": "17"})
    assert view == {"over": "blocks", "axes": "12", "cloud": "right", "frame": "all", "block": "3"}


def test_table_holds_path_and_control():
    table = draw(reading(), "trajectory").table
    assert table.rows[1] == [2, "10.00", "0.00", "2.00", "8.00", "0.00", "1.50"]
    assert len(table.header) == 7


@pytest.mark.parametrize("part", ["cloud", "mean_path", "depth"])
def test_missing_parts_leave_the_path(part):
    data = reading()
    data["probes"]["geometry"].pop(part)
    assert "this question, block 1 to 3" in draw(data, "trajectory").body


def test_fewer_blocks_than_the_mean_path_and_more():
    data = reading()
    data["probes"]["geometry"]["blocks"] = data["probes"]["geometry"]["blocks"][:1]
    assert "this question, block 1" in draw(data, "trajectory").body
    data["probes"]["geometry"]["blocks"] *= 5
    assert trajectory.mean_path(data["probes"]["geometry"]) == []
    assert "mean path" not in draw(data, "trajectory").body


def test_a_missing_probe_gives_a_sentence():
    data = reading()
    data["probes"].pop("geometry")
    data["complaints"] = ["No <geometry> here."]
    picture = draw(data, "trajectory")
    assert "missing" in picture.lead and "&lt;geometry&gt;" in picture.lead
