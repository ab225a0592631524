"""One pass per question and what is kept of it, in memory and on disk: against the plain model, row by row."""

import json
import threading

import numpy as np
import pytest
import torch
from conftest import ALL_FAMILIES, add_lora, tiny_rim

from rim_probe.decoding import answer
from rim_probe.errors import LayoutError, QuestionError, RiMError
from rim_probe.memory import MemoryLayout
from rim_probe.model import RiM
from rim_probe.probing import capture as capture_module
from rim_probe.probing.capture import CaptureSet, capture, capture_to
from rim_probe.probing.hooks import unembed

QUESTIONS = ["Anna has 3 apples and buys 14 more. How many?", "3 and 14 more?", "How many apples has she? 1 2 3", "7?"]
K, M = 4, 2
EMPTY = "The question is empty"


def alone(rim, question, method="memory"):
    """Residual states after each layer but the last [layers, T, d], and attentions [A, H, T, T], by transformers."""
    ids = torch.tensor([rim.prompt_ids(question, method)])
    with torch.no_grad():
        out = rim.model(input_ids=ids, output_hidden_states=True, output_attentions=True, use_cache=False)
    return torch.stack(out.hidden_states)[:-1, 0], torch.stack(out.attentions)[:, 0], out.logits[0]


def assert_equals_eager(rim, eager, questions):
    """What `rim` captured in one padded batch is what `eager` computes of each question alone."""
    held, layout = capture(rim, questions), rim.layout
    assert held.layers == (0, 1, 2) and (held.num_questions, held.K, held.M) == (len(questions), K, M)
    for i, question in enumerate(questions):
        ids = rim.encode_question(question)
        states, attention, logits = alone(eager, question)
        slots, ends = layout.slot_positions(len(ids)), layout.end_positions(len(ids))
        torch.testing.assert_close(held.slots[i, :2], states[:, torch.tensor(slots)])
        torch.testing.assert_close(held.ends[i, :2], states[:, ends])
        torch.testing.assert_close(held.question[i, :2], states[:, len(ids) - 1])
        # The last layer is held before the norm, which the unembedding applies.
        torch.testing.assert_close(unembed(rim, held.ends[i, 2]), logits[ends], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(unembed(rim, held.slots[i, 2]), logits[torch.tensor(slots)], atol=1e-4, rtol=1e-4)
        queries = [place for block, end in zip(slots, ends, strict=True) for place in (*block, end)]
        torch.testing.assert_close(held.to_question[i, ..., : len(ids)], attention[:, :, queries, : len(ids)])
        torch.testing.assert_close(held.to_memory[i], attention[:, :, queries, len(ids) :])
        assert not held.to_question[i, ..., len(ids) :].any()
        assert held.question_ids[i] == ids
    sums = held.to_question.sum(-1) + held.to_memory.sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums))


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_a_padded_batch_equals_each_question_alone_in_the_eager_model(family):
    assert_equals_eager(tiny_rim(family), tiny_rim(family, "eager"), QUESTIONS)


def test_an_adapter_is_captured_with_its_adapter():
    rims = [add_lora(tiny_rim("llama", attention), lora_dropout=0.5) for attention in ("sdpa", "eager")]
    assert rims[0].model.training  # as PEFT hands it over: dropout must not get into a capture
    rims[1].model.eval()
    bare = capture(tiny_rim("llama"), QUESTIONS[:2])
    assert_equals_eager(*rims, QUESTIONS[:2])
    assert not torch.allclose(capture(rims[0], QUESTIONS[:2]).slots, bare.slots)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_bfloat16(family):
    rim = tiny_rim(family)
    expected = capture(rim, QUESTIONS)
    rim.model.to(torch.bfloat16)
    held = capture(rim, QUESTIONS)
    assert held.slots.dtype == held.to_memory.dtype == torch.bfloat16
    assert held.cell(2, 1, "slots").dtype == np.float32
    sums = held.to_question.float().sum(-1) + held.to_memory.float().sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums), atol=0.02, rtol=0)
    torch.testing.assert_close(held.slots[:, 0].float(), expected.slots[:, 0], atol=0.02, rtol=0.01)


def test_other_layouts_and_counts_of_blocks(make_rim):
    base = make_rim()
    rim = RiM(base.model, base.tokenizer, MemoryLayout(num_blocks=2, slots_per_block=3))
    held = capture(rim, QUESTIONS[:2], num_blocks=5)
    assert held.slots.shape == (2, 3, 5, 3, 32)
    width = len(held.question_ids[0])
    assert held.to_question.shape == (2, 2, 4, 20, width) and held.to_memory.shape == (2, 2, 4, 20, 25)
    # What stands behind a block does not act on it.
    torch.testing.assert_close(held.slots[:, :, :2], capture(rim, QUESTIONS[:2]).slots)


@pytest.mark.parametrize("method", ["cot", "direct"])
def test_methods_without_memory_hold_the_question_alone(rim, method):
    held = capture(rim, QUESTIONS, method=method)
    assert held.K == 0 and held.to_question is None and held.to_memory is None
    for i, question in enumerate(QUESTIONS):
        last = len(rim.encode_question(question)) - 1
        states = alone(tiny_rim(attention="eager"), question, method)[0]
        torch.testing.assert_close(held.question[i, :2], states[:, last])
    with pytest.raises(RiMError, match="There is no position"):
        held.cell(1, 1, "end")


def test_chosen_layers_by_number_or_transformerlens_name(rim):
    every, some = capture(rim, QUESTIONS), capture(rim, QUESTIONS, ["blocks.1.hook_resid_post", 0], attention=False)
    assert some.layers == (0, 2) and some.to_question is None
    torch.testing.assert_close(some.slots, every.slots[:, [0, 2]], atol=1e-4, rtol=1e-4)
    assert np.array_equal(every.cell(2, 1, 1), every.cell("blocks.1.hook_resid_post", 1, 1))
    with pytest.raises(RiMError, match="Layer 1 was not captured; layers are 0, 2."):
        some.cell(1, 1, 1)
    with pytest.raises(RiMError, match="Layer 'blocks.0.hook_resid_post' was not captured"):
        some.cell("blocks.0.hook_resid_post", 1, 1)


@pytest.mark.parametrize("block, position", [(0, 1), (5, 1), (1, 0), (1, 3), (1, "slot")])
def test_a_cell_that_is_not_there(rim, block, position):
    with pytest.raises(RiMError, match="There is no position .* blocks are 1 to 4, positions 1 to 2, 'slots' or 'end'"):
        capture(rim, QUESTIONS[:1]).cell(0, block, position)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_questions_are_answered_as_ever_while_others_are_captured(attention):
    rim = tiny_rim(attention=attention, context=64)
    expected, captured = answer(rim, QUESTIONS[1], "memory").readouts, capture(rim, QUESTIONS)
    over, found = threading.Event(), []

    def capture_on():
        while not over.is_set():
            found.append(capture(rim, QUESTIONS))

    thread = threading.Thread(target=capture_on)
    thread.start()
    try:
        given = [answer(rim, QUESTIONS[1], "memory").readouts for _ in range(3)]
    finally:
        over.set()
        thread.join()
    assert all(readouts == expected for readouts in given)
    for held in found:
        assert torch.equal(held.slots, captured.slots) and torch.equal(held.to_memory, captured.to_memory)
    assert found


@pytest.mark.parametrize(
    "questions, options, error, message",
    [
        ([], {}, RiMError, "There is no question to capture"),
        (["7?", " "], {}, QuestionError, EMPTY),
        (["7?", None], {}, QuestionError, "The question must be text, not NoneType"),
        (["7 " * 600], {}, QuestionError, "shorten the question"),
        (["7?"], {"num_blocks": 65}, LayoutError, "number of memory blocks"),
        (["7?"], {"method": "magic"}, RiMError, "Unknown method 'magic'"),
        (["7?"], {"layers": [3]}, RiMError, "There is no layer 3"),
    ],
)
def test_what_cannot_be_asked_is_one_sentence(rim, tmp_path, questions, options, error, message):
    for ask in (capture, lambda *args, **options: capture_to(tmp_path, *args, progress=False, **options)):
        with pytest.raises(error, match=message):
            ask(rim, questions, **options)


def test_attention_of_another_back_end_is_refused(rim):
    rim.model.config._attn_implementation = "flex_attention"
    with pytest.raises(RiMError, match="need the attention back end sdpa or eager, not 'flex_attention'"):
        capture(rim, QUESTIONS)


# -------------------------------------------------------------------------------------------------------------- on disk


@pytest.fixture
def pairs(monkeypatch):
    """Shards of two questions."""
    monkeypatch.setattr(capture_module, "SHARD_QUESTIONS", 2)


def calls_of(monkeypatch):
    """How many questions are captured at a time from here on."""
    sizes, real = [], capture_module.capture

    def counting(rim, questions, *args, **options):
        sizes.append(len(questions))
        return real(rim, questions, *args, **options)

    monkeypatch.setattr(capture_module, "capture", counting)
    return sizes


MORE = [*QUESTIONS, "1 2 3 4 5?"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["memory", "cot"])
def test_streamed_captures_read_like_those_in_memory(rim, tmp_path, pairs, method, dtype):
    rim.model.to(dtype)
    stored = capture_to(tmp_path, rim, MORE, method=method, progress=False)
    held = capture(rim, MORE, method=method, attention=False, batch_size=2)
    assert (stored.layers, stored.K, stored.num_questions) == (held.layers, held.K, 5)
    for layer in held.layers:
        cells = [(block, position) for block in range(1, held.K + 1) for position in (1, 2, "end", "slots")]
        for block, position in cells:
            found, expected = stored.cell(layer, block, position), held.cell(layer, block, position)
            assert found.dtype == np.float32 and found.shape == expected.shape
            np.testing.assert_allclose(found, expected, atol=1e-4 if dtype == torch.float32 else 0.1)
        np.testing.assert_allclose(stored.question_cell(layer), held.question_cell(layer), atol=0.1)
    shards = list(stored)
    assert [shard.num_questions for shard in shards] == [2, 2, 1]
    assert [one for shard in shards for one in shard.question_ids] == held.question_ids
    assert np.array_equal(np.concatenate([s.question_cell(1) for s in shards]), stored.question_cell(1))
    with pytest.raises(RiMError, match="Layer 9 was not captured"):
        stored.question_cell(9)
    with pytest.raises(RiMError, match="There is no position"):
        stored.cell(0, 5, 1)
    assert CaptureSet(tmp_path).num_questions == 5


def test_no_more_than_one_shard_is_ever_held(rim, tmp_path, monkeypatch):
    sizes = calls_of(monkeypatch)
    per_question = 3 * (K * (M + 1) + 1) * 32 * 4  # layers, positions, width, bytes
    monkeypatch.setattr(capture_module, "SHARD_BYTES", 3 * per_question)
    assert capture_to(tmp_path, rim, MORE, progress=False).num_questions == 5
    assert sizes == [3, 2]


def test_an_interrupted_capture_goes_on_where_it_stopped(rim, tmp_path, pairs, monkeypatch):
    expected = capture_to(tmp_path / "whole", rim, MORE, progress=False)
    folder, real = tmp_path / "cut", capture_module.capture

    def interrupt(rim, questions, *args, **options):
        if questions == MORE[2:4]:
            raise KeyboardInterrupt
        return real(rim, questions, *args, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(capture_module, "capture", interrupt)
        capture_to(folder, rim, MORE, progress=False)
    with pytest.raises(RiMError, match="holds no complete capture .*; capture the questions again"):
        CaptureSet(folder)
    (folder / "shard-00001.safetensors.partial").write_bytes(b"cut off while it was written")
    sizes = calls_of(monkeypatch)
    found = capture_to(folder, rim, MORE, progress=False)
    assert sizes == [2, 1]
    for layer in (0, 1, 2):
        assert np.array_equal(found.cell(layer, 2, "slots"), expected.cell(layer, 2, "slots"))
    capture_to(folder, rim, MORE, progress=False)
    assert sizes == [2, 1]  # nothing left to do


DAMAGES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "emptied": lambda path: path.write_bytes(b""),
    "no safetensors": lambda path: path.write_text("hello" * 100),
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"layers": null}', json.dumps({"layers": [0], "num_blocks": 1})])
def test_a_damaged_index_is_one_sentence(tmp_path, text):
    (tmp_path / "capture.json").write_text(text)
    with pytest.raises(RiMError, match="holds no complete capture .*; capture the questions again"):
        CaptureSet(tmp_path)
