"""What a researcher is told about a checkpoint before probing it: the truth, in sentences, whatever the model does."""

import pytest
import torch
from conftest import add_lora, tiny_base, tiny_rim, tiny_tokenizer

from rim_probe.memory import MemoryLayout
from rim_probe.model import RiM
from rim_probe.probing.verdict import verdict


def checks_of(rim):
    return {check.name: check for check in verdict(rim).lines}


def failed(rim):
    return {name for name, check in checks_of(rim).items() if check.ok is False}


def train(rim):
    """Memory rows somewhere else than where they were put."""
    weight = rim.model.get_input_embeddings().weight
    with torch.no_grad():
        weight[list(rim.memory_ids)] = weight[[40, 41, 42]] + 0.1
    return rim


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_adapter_passes_and_is_named(family):
    rim = add_lora(train(tiny_rim(family)))  # in training mode
    rim.model.peft_config["default"].base_model_name_or_path = "some/base"
    found = verdict(rim)
    assert found.ok, str(found)
    assert "A LORA adapter of rank 2 on some/base" in str(found)


def test_facts_are_told_as_they_are():
    found = checks_of(train(tiny_rim("qwen3", num_blocks=5, context=80)))
    assert found["memory tokens"].sentence == "<b>, <m>, </b> are single tokens with the ids 300, 301, 302."
    assert found["memory layout"].sentence == "K = 5 blocks of M = 2 slots: 20 tokens follow a question."
    assert found["architecture"].sentence.startswith("Qwen3ForCausalLM: 2 decoder layers found, residual stream of 32")
    assert "4 attention heads share 2 of keys and values (GQA)" in found["attention heads"].sentence
    assert found["output head"].sentence.startswith("A matrix of its own")
    assert found["context"].sentence == "80 tokens, of which a question may take 58."
    assert found["weights"].sentence.startswith("Full weights, ")


def test_a_closed_vocabulary_is_asked_in_its_own_words(small_checkpoint):
    found = verdict(RiM.from_pretrained(small_checkpoint, "cpu"))
    assert found.ok, str(found)
    assert "Tied to the embeddings" in str(found)


# ----------------------------------------------------------------------------------------------- memory embeddings


def test_rows_that_were_trained_are_told_from_one_that_was_not(rim):
    with torch.no_grad():
        rim.model.get_input_embeddings().weight[list(rim.memory_ids[:2])] += 0.5
    check = checks_of(rim)["memory embeddings"]
    assert check.ok is None and "rows of </b> stand where" in check.sentence


def test_equal_rows_fail(rim):
    with torch.no_grad():
        rim.model.get_input_embeddings().weight[list(rim.memory_ids)] = 1.0
    assert failed(rim) == {"memory embeddings"}


# ------------------------------------------------------------------------------------------------- what goes wrong


def test_memory_tokens_that_are_ordinary_text_fail():
    tokenizer = tiny_tokenizer()
    word = next(token for token in tokenizer.get_vocab() if token.startswith("Ġ") and len(token) > 2)
    rim = RiM(tiny_base(vocab_size=len(tokenizer)), tokenizer, MemoryLayout(begin=word, slot="1", end="2"))
    assert failed(rim) == {"memory tokens"}
    assert "no other program would see the blocks" in checks_of(rim)["memory tokens"].sentence


def test_a_context_without_room_fails(make_rim):
    rim = make_rim(context=17)
    assert "leave no room for a question; choose fewer memory blocks" in checks_of(rim)["context"].sentence
    assert "context" in failed(rim)


def test_a_model_without_decoder_layers_or_with_a_broken_pass_gives_sentences_only(rim, monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(rim.model, "forward", broken)
    assert "a pass over them fails (first line)." in checks_of(rim)["readouts"].sentence
    rim.model.config.num_hidden_layers = 9
    check = checks_of(rim)["architecture"]
    assert check.ok is False and "no list of 9 decoder layers was found" in check.sentence
    assert not verdict(rim).ok and "\n" not in "".join(check.sentence for check in verdict(rim).lines)
