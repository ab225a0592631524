"""The memory layout: positions against a plain count, and refusals that name what is wrong."""

import pytest
from conftest import tiny_base, tiny_rim, tiny_tokenizer

from rim_probe.errors import CheckpointError, LayoutError
from rim_probe.memory import LAYOUT_FILE, MAX_BLOCKS, MAX_SLOTS, MemoryLayout
from rim_probe.model import RiM


@pytest.mark.parametrize("blocks", [0, 1, 8])
@pytest.mark.parametrize("slots", [1, 2, 5])
@pytest.mark.parametrize("question_length", [0, 7])
def test_positions_are_where_the_tokens_stand(blocks, slots, question_length):
    layout = MemoryLayout(num_blocks=blocks, slots_per_block=slots)
    row = ["x"] * question_length + (["<b>"] + ["<m>"] * slots + ["</b>"]) * blocks
    slot_positions = layout.slot_positions(question_length)
    assert [place for block in slot_positions for place in block] == [i for i, t in enumerate(row) if t == "<m>"]
    assert [len(block) for block in slot_positions] == [slots] * blocks
    assert layout.end_positions(question_length) == [i for i, t in enumerate(row) if t == "</b>"]
    assert layout.block_length == slots + 2


IMPOSSIBLE = [
    ("num_blocks", -1),
    ("num_blocks", MAX_BLOCKS + 1),
    ("num_blocks", True),
    ("slots_per_block", 0),
    ("slots_per_block", MAX_SLOTS + 1),
    ("begin", ""),
    ("slot", "<m >"),
]


@pytest.mark.parametrize(("name", "value"), IMPOSSIBLE)
def test_an_impossible_value_is_refused_by_name(name, value):
    with pytest.raises(LayoutError, match=name):
        MemoryLayout(**{name: value})
    with pytest.raises(LayoutError, match=name):
        MemoryLayout.from_dict({name: value})


def test_equal_tokens_are_refused():
    with pytest.raises(LayoutError, match="three different tokens"):
        MemoryLayout(begin="<m>")


@pytest.mark.parametrize("blocks", [-1, MAX_BLOCKS + 1, 2.5, "3", True])
def test_a_number_of_blocks_out_of_range_is_refused(blocks):
    with pytest.raises(LayoutError, match=f"from 0 to {MAX_BLOCKS}"):
        MemoryLayout().slot_positions(5, blocks)
    with pytest.raises(LayoutError, match=f"from 0 to {MAX_BLOCKS}"):
        MemoryLayout().text(blocks)


def test_save_and_load(tmp_path):
    layout = MemoryLayout(num_blocks=5, slots_per_block=3, slot="<µ>")
    path = layout.save(tmp_path)
    assert path == tmp_path / LAYOUT_FILE
    assert MemoryLayout.load(tmp_path) == MemoryLayout.load(path) == MemoryLayout.load(str(tmp_path)) == layout
    assert MemoryLayout.from_dict(layout.to_dict()) == layout


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(LayoutError, match=f"{LAYOUT_FILE} is missing"):
        MemoryLayout.load(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"num_blocks": ', "cannot be read as JSON"),
        (b"\xff\xfe\x00", "cannot be read as JSON"),
        (b"[1, 2]", "expected a JSON object.*list"),
        (b'{"num_blocks": 8.5}', "num_blocks.*8.5"),
        (b'{"slot": {"a": 1}}', "slot must be a token name"),
        (b'{"blocks": 8, "Slot": 1}', "unknown key 'Slot', 'blocks'; known keys are begin"),
    ],
)
def test_a_damaged_file_gives_one_sentence_with_its_path(tmp_path, content, message):
    (tmp_path / LAYOUT_FILE).write_bytes(content)
    with pytest.raises(LayoutError, match=message) as caught:
        MemoryLayout.load(tmp_path)
    assert str(tmp_path / LAYOUT_FILE) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_layout_that_does_not_match_the_tokenizer_names_the_tokens():
    with pytest.raises(LayoutError, match="does not know the memory tokens <b>, <m>, </b>"):
        MemoryLayout().token_ids(tiny_tokenizer())
    rim = tiny_rim()
    with pytest.raises(LayoutError, match="does not know the memory tokens <slot> of this layout"):
        RiM(rim.model, rim.tokenizer, MemoryLayout(slot="<slot>"))


def test_memory_tokens_beyond_the_embedding_rows_are_refused():
    rim = tiny_rim()
    with pytest.raises(CheckpointError, match="only 300 embedding rows"):
        RiM(tiny_base(), rim.tokenizer, rim.layout)
