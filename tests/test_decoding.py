"""The greedy loop against the model asked directly: same ids, same texts, no forbidden token, no superfluous work."""

import threading
import time

import pytest
import torch

from rim_probe import greedy
from rim_probe.decoding import PLACES, answer, answer_batch, answer_placed, stream
from rim_probe.errors import RiMError

QUESTION = "Anna has 3 apples and buys 14 more. How many apples has she?"
QUESTIONS = [QUESTION, "How many?", "Anna buys 3 apples. How many more has she than 14?", "3 + 14 + 1 + 4 and 7?"]
METHODS = ("memory", "cot", "direct")


def change_logits(rim, change):
    """Lets `change(logits)` alter in place what the output layer says; returns the handle of the hook."""

    def hook(module, inputs, logits):
        change(logits)

    return rim.model.get_output_embeddings().register_forward_hook(hook)


def fond_of_stopping(rim, amount=5.0):
    """Raises EOS until readouts end after different, mostly small numbers of tokens."""

    def change(logits):
        logits[..., rim.eos_id] += amount

    change_logits(rim, change)
    return rim


def scripted(rim, text):
    """Makes the model say `text` and stop, whatever it is asked; returns the ids it will say."""
    ids = rim.encode_text(text) + [rim.eos_id]
    passes = iter(range(len(ids)))

    def change(logits):
        logits[..., ids[next(passes)]] = 1e6

    change_logits(rim, change)
    return ids


def count_passes(rim):
    """A list that grows by one with every pass of the model; holds the number of tokens fed."""
    fed = []
    rim.model.register_forward_pre_hook(
        lambda module, args, kwargs: fed.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    return fed


@torch.no_grad()
def reference(rim, prompt, max_new_tokens):
    """Greedy decoding as a definition: the whole plain causal text again for every token. Ids and their probability."""
    ids, probability = list(prompt), 1.0
    for _ in range(max_new_tokens):
        logits = rim.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        logits[rim.banned_ids] = float("-inf")
        ids.append(int(logits.argmax()))
        probability *= float(logits.softmax(-1)[ids[-1]])
        if ids[-1] == rim.eos_id:
            break
    return tuple(ids[len(prompt) :]), probability


def test_all_readouts_equal_single_decodes(every_rim):
    rim = fond_of_stopping(every_rim)
    together = answer(rim, QUESTION, "memory", max_new_tokens=12).readouts
    assert [readout.block for readout in together] == [1, 2, 3, 4]
    for readout in together:
        prompt = rim.prompt_ids(QUESTION, "memory", readout.block)
        ids, probability = reference(rim, prompt, 12)
        assert readout.token_ids == ids
        assert readout.probability == pytest.approx(probability, rel=1e-4)
        alone = answer(rim, QUESTION, "memory", num_blocks=readout.block, readouts="final", max_new_tokens=12)
        assert alone.readouts[0].token_ids == readout.token_ids
        assert (alone.text, alone.value) == (readout.text, readout.value)
        assert alone.readouts[0].probability == pytest.approx(probability, rel=1e-4)
    assert len({len(readout.token_ids) for readout in together}) > 1, "readouts that end apart are the hard case"
    assert len({readout.token_ids for readout in together}) > 1


@pytest.mark.parametrize("method", METHODS)
def test_equals_generate(every_rim, method):
    rim = every_rim
    prompt = rim.prompt_ids(QUESTION, method)
    generated = rim.model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        max_new_tokens=24,
        suppress_tokens=rim.banned_ids,
        eos_token_id=rim.eos_id,
        pad_token_id=rim.tokenizer.pad_token_id,
    )
    ours = answer(rim, QUESTION, method, max_new_tokens=24)
    assert ours.token_ids == tuple(generated[0, len(prompt) :].tolist())
    assert ours.prompt_tokens == len(prompt)


@pytest.mark.parametrize("method", METHODS)
def test_batch_equals_one_by_one(every_rim, method):
    rim = fond_of_stopping(every_rim)
    batch = answer_batch(rim, QUESTIONS, method, max_new_tokens=10)
    assert len({result.prompt_tokens for result in batch}) > 1, "padding is the hard case"
    for question, together in zip(QUESTIONS, batch, strict=True):
        alone = answer(rim, question, method, max_new_tokens=10)
        names = ("question", "text", "value", "token_ids", "forward_passes", "generated_tokens", "prompt_tokens")
        for name in (*names, "truncated", "cancelled"):
            assert getattr(together, name) == getattr(alone, name), name
        assert together.ttft_seconds is None and together.total_seconds is None
        assert [r.token_ids for r in together.readouts] == [r.token_ids for r in alone.readouts]
        for ours, theirs in zip(together.readouts, alone.readouts, strict=True):
            assert (ours.block, ours.text, ours.value) == (theirs.block, theirs.text, theirs.value)
            assert ours.probability == pytest.approx(theirs.probability, rel=1e-4)


def test_work_done_for_memory(rim):
    """All readouts cost one prefix pass and one pass per token of the longest, over one unduplicated cache."""
    fed = count_passes(fond_of_stopping(rim))
    result = answer(rim, QUESTION, "memory", max_new_tokens=12)
    lengths = [len(readout.token_ids) for readout in result.readouts]
    assert result.forward_passes == len(fed) == max(lengths)
    # The t-th pass feeds the readouts that are longer than t tokens; the last token of none is ever fed.
    assert fed == [result.prompt_tokens] + [sum(length > t for length in lengths) for t in range(1, max(lengths))]
    config = rim.model.config
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * 8 * 4  # keys and values, 8 wide, float32
    assert result.kv_cache_bytes == per_token * sum(fed)
    assert result.generated_tokens == len(result.token_ids) == lengths[-1]


@pytest.mark.parametrize("method", ("cot", "direct"))
def test_work_done_for_text(rim, method):
    fed = count_passes(rim)
    result = answer(rim, QUESTION, method, max_new_tokens=7)
    assert fed == [result.prompt_tokens] + [1] * 6
    assert (result.forward_passes, result.generated_tokens, result.truncated) == (7, 7, True)
    assert result.readouts == ()


@pytest.mark.parametrize("method", METHODS)
def test_banned_ids_are_never_generated(rim, make_rim, method):
    def love_banned(logits):
        logits[..., rim.banned_ids] += 1e4

    change_logits(rim, love_banned)
    result = answer(rim, QUESTION, method, max_new_tokens=8)
    generated = set(result.token_ids).union(*(readout.token_ids for readout in result.readouts))
    assert set(rim.memory_ids) <= set(rim.banned_ids)
    assert not generated & set(rim.banned_ids)
    assert result.token_ids == answer(make_rim(), QUESTION, method, max_new_tokens=8).token_ids
    assert all(0 <= readout.probability <= 1 for readout in result.readouts)


@pytest.mark.parametrize("method", METHODS)
def test_events(rim, method):
    rim = fond_of_stopping(rim, 3.0)
    events = list(stream(rim, QUESTION, method, max_new_tokens=12))
    kinds = [event.kind for event in events]
    assert kinds[:2] == ["prefill", "token"] and kinds[-1] == "done"
    assert kinds.count("prefill") == kinds.count("done") == 1
    assert all(event.method == method for event in events)
    seconds = [event.seconds for event in events]
    assert seconds == sorted(seconds) and seconds[0] > 0
    result = events[-1].answer
    tokens = [event for event in events if event.kind == "token"]
    assert tuple(event.token_id for event in tokens) == result.token_ids
    assert "".join(event.text for event in tokens) == result.text == rim.decode(result.token_ids)
    assert result.total_seconds == seconds[-1]
    readouts = [event for event in events if event.kind == "readout"]
    assert sorted((event.readout for event in readouts), key=lambda readout: readout.block) == list(result.readouts)
    assert [event.block for event in readouts] == [event.readout.block for event in readouts]
    assert {event.block for event in tokens} == ({4} if method == "memory" else {None})
    if method == "memory":
        assert len(readouts) == 4
        assert result.ttft_seconds == tokens[0].seconds
        assert result.text == result.readouts[-1].text


@pytest.mark.parametrize("spoken", ("<<3+4=7>> <<7*2=14>> #### 14", "#### 14", "<<3+4=7>>####\n 14"))
def test_ttft_of_chain_of_thought_is_the_first_token_of_the_answer(rim, spoken):
    ids = scripted(rim, spoken)
    events = list(stream(rim, QUESTION, "cot"))
    result = events[-1].answer
    assert (result.text, result.value, result.token_ids, result.truncated) == (spoken, "14", tuple(ids), False)
    first = next(
        event
        for place, event in enumerate(events)
        if "".join(e.text for e in events[: place + 1]).partition("####")[2].strip()
    )
    assert first.text.strip() in ("1", "14")
    assert result.ttft_seconds == first.seconds


@pytest.mark.parametrize("method, spoken", (("cot", "<<3+4=7>> ####"), ("cot", "14"), ("direct", ""), ("memory", "")))
def test_no_answer_has_no_ttft(rim, method, spoken):
    scripted(rim, spoken)
    result = answer(rim, QUESTION, method)
    assert (result.text, result.ttft_seconds) == (spoken, None)


@pytest.mark.parametrize("method", METHODS)
def test_characters_spread_over_tokens_stream_whole(rim, method):
    spoken = "é漢🙂 שלום 14"
    ids = scripted(rim, spoken)
    assert len(ids) > len(spoken), "the tokenizer must split characters for this test to mean anything"
    events = list(stream(rim, QUESTION, method))
    assert "".join(event.text for event in events) == events[-1].answer.text == spoken
    assert not any("\ufffd" in event.text for event in events)


def test_half_a_character_at_the_end(rim):
    """Bytes that never become a character are shown once nothing can complete them, and not before."""
    spoken = "14 🙂"
    scripted(rim, spoken)
    half = len(rim.encode_text(spoken)) - 1
    events = list(stream(rim, QUESTION, "cot", max_new_tokens=half))
    assert events[-1].answer.truncated
    assert "".join(event.text for event in events) == events[-1].answer.text == "14 \ufffd"
    assert [event.text for event in events if event.kind == "token"][-1] == "\ufffd"


@pytest.mark.parametrize("method", METHODS)
def test_cancel_stops_within_one_token(rim, method):
    fed, cancel, tokens = count_passes(rim), threading.Event(), 0
    for event in stream(rim, QUESTION, method, cancel=cancel):
        tokens += event.kind == "token"
        if tokens == 3:
            cancel.set()
    assert event.kind == "done"
    result = event.answer
    assert result.cancelled and not result.truncated
    assert len(fed) == result.forward_passes == len(result.token_ids) == tokens == 3
    assert result.text == rim.decode(result.token_ids).rstrip("\ufffd")


def test_cancel_keeps_the_readouts_that_ended(rim):
    fond_of_stopping(rim)
    lengths = [len(readout.token_ids) for readout in answer(rim, QUESTION, "memory", max_new_tokens=12).readouts]
    assert min(lengths) < max(lengths)
    cancel = threading.Event()
    for event in stream(rim, QUESTION, "memory", max_new_tokens=12, cancel=cancel):
        if event.kind == "readout":
            cancel.set()
    ended = [block for block, length in enumerate(lengths, start=1) if length == min(lengths)]
    assert [readout.block for readout in event.answer.readouts] == ended


def test_closing_stops(rim):
    fed = count_passes(rim)
    events = stream(rim, QUESTION, "cot")
    for _ in range(4):
        next(events)
    events.close()
    assert len(fed) == 3  # prefill and its token come with the first pass
    assert list(events) == []


def test_the_clock_stands_still_while_the_consumer_works(rim):
    start, pauses = time.perf_counter(), 0
    for event in stream(rim, QUESTION, "cot", max_new_tokens=5):
        time.sleep(0.01)
        pauses += event.kind != "done"
    assert time.perf_counter() - start - event.answer.total_seconds >= 0.01 * pauses


def test_streams_of_two_threads_do_not_disturb_each_other(rim):
    alone = [answer(rim, question, "memory", max_new_tokens=10) for question in QUESTIONS]
    together = [None] * len(QUESTIONS)

    def ask(place):
        together[place] = answer(rim, QUESTIONS[place], "memory", max_new_tokens=10)

    threads = [threading.Thread(target=ask, args=(place,)) for place in range(len(QUESTIONS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for mixed, single in zip(together, alone, strict=True):
        assert [readout.token_ids for readout in mixed.readouts] == [readout.token_ids for readout in single.readouts]
        # Not bit for bit: how torch splits a sum among its threads depends on what else runs.
        probabilities = [readout.probability for readout in single.readouts]
        assert [readout.probability for readout in mixed.readouts] == pytest.approx(probabilities, rel=1e-3)


def test_blocks_removed(rim):
    result = answer(rim, QUESTION, "memory", num_blocks=0, max_new_tokens=6)
    (readout,) = result.readouts
    assert readout.block == 0
    assert result.token_ids == reference(rim, rim.encode_question(QUESTION), 6)[0]
    assert result.token_ids == answer(rim, QUESTION, "cot", max_new_tokens=6).token_ids
    assert answer_batch(rim, [QUESTION], "memory", num_blocks=0, max_new_tokens=6)[0].readouts[0].block == 0


@pytest.mark.parametrize(
    "method, options",
    (
        ("memory", {"num_blocks": -1}),
        ("memory", {"num_blocks": 65}),
        ("memory", {"num_blocks": 1.5}),
        ("memory", {"num_blocks": True}),
        ("memory", {"readouts": "some"}),
        ("memory", {"max_new_tokens": 0}),
        ("cot", {"max_new_tokens": 2.5}),
        ("guess", {}),
    ),
)
def test_impossible_options_are_refused_in_a_sentence(rim, method, options):
    with pytest.raises(RiMError) as caught:
        answer(rim, QUESTION, method, **options)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


@pytest.mark.parametrize("method", METHODS)
def test_the_context_bounds_the_answer(make_rim, family, method):
    """GPT-2 has no embedding beyond its context, so one position too many would fail."""
    rim = make_rim(family, context=64)
    question = "apples " * 13
    short = answer(rim, question, method)
    assert short.truncated
    assert short.prompt_tokens + short.generated_tokens == 64
    if method == "memory":
        assert [len(readout.token_ids) for readout in short.readouts] == [
            64 - short.prompt_tokens + 4 * tail for tail in (3, 2, 1, 0)
        ]
    batch = answer_batch(rim, [question, "How many?"], method)
    assert batch[0].token_ids == short.token_ids
    assert batch[1].prompt_tokens + batch[1].generated_tokens == 64


def test_a_model_that_cannot_choose_positions(rim, monkeypatch):
    expected = answer(rim, QUESTION, "memory", max_new_tokens=5)
    monkeypatch.setattr(greedy, "keeps_logits", lambda model: False)
    assert answer(rim, QUESTION, "memory", max_new_tokens=5).readouts == expected.readouts


def test_dropout_is_off(make_rim):
    rim = make_rim("gpt2")
    expected = answer(rim, QUESTION, "cot", max_new_tokens=8)
    rim.model.train()
    assert answer(rim, QUESTION, "cot", max_new_tokens=8).token_ids == expected.token_ids


def test_attention_that_ignores_masks_is_refused(rim, monkeypatch):
    """Flash attention drops a 4-D mask, and readouts would see each other without a word."""
    monkeypatch.setattr(rim.model.config, "_attn_implementation_internal", "flash_attention_2")
    with pytest.raises(RiMError, match="sdpa"):
        answer(rim, QUESTION, "memory")


def test_a_sliding_window_is_the_context(rim):
    """Masks of readouts do not slide, so beyond the window the model would see more than it was trained to see."""
    rim.model.config.sliding_window = 64
    assert rim.max_length == 64
    result = answer(rim, "apples " * 13, "memory")
    assert result.prompt_tokens + result.generated_tokens == 64


@torch.no_grad()
@pytest.mark.parametrize("place", PLACES)
def test_controls_of_place_stand_where_they_say(rim, place):
    """Each equals a plain pass with these ids at these positions, greedily continued; questions of unlike length."""
    block, length = rim.encoder.block_ids, rim.layout.block_length
    ids, places = {
        "lone end": (block[-1:], [2 * length - 1]),
        "one block": (block, range(length, 2 * length)),
        "one position": (block * 2, [*range(length)] * 2),
    }[place]
    for question, given in zip(QUESTIONS, answer_placed(rim, QUESTIONS, place, 2, max_new_tokens=3), strict=True):
        asked = rim.encode_question(question)
        tokens, positions = [*asked, *ids], [*range(len(asked)), *(len(asked) + at for at in places)]
        for _ in given.token_ids:
            logits = rim.model(torch.tensor([tokens]), position_ids=torch.tensor([positions])).logits[0, -1]
            logits[rim.banned_ids] = -torch.inf
            tokens, positions = [*tokens, int(logits.argmax())], [*positions, positions[-1] + 1]
        assert tuple(tokens[len(asked) + len(ids) :]) == given.token_ids


def test_a_control_of_place_needs_a_block(rim):
    with pytest.raises(RiMError, match="at least one block"):
        answer_placed(rim, QUESTIONS, "lone end", 0)
