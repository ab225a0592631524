"""What a researcher is told about a checkpoint before probing it: the truth, in sentences, whatever the model does."""

import pytest
import torch
from conftest import ALL_FAMILIES, tiny_base, tiny_rim, tiny_tokenizer
from transformers import AutoModelForCausalLM, Gemma2Config, GraniteConfig

from rim_probe.glassbox import glassbox
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_a_sound_model_passes(family, dtype):
    rim = train(tiny_rim(family))
    rim.model.to(dtype)
    found = verdict(rim)
    assert found.ok and all(check.ok for check in found.lines), str(found)
    assert str(dtype).removeprefix("torch.") + " on cpu" in str(found)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_adapter_passes_and_is_named(family):
    from peft import LoraConfig, get_peft_model

    rim = train(tiny_rim(family))
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    rim.model = get_peft_model(rim.model, config)  # in training mode
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


def test_the_glass_box_passes():
    found = verdict(glassbox().rim)
    assert found.ok, str(found)


def test_one_line_for_every_check(rim):
    found = verdict(rim)
    lines = str(found).splitlines()
    assert len(lines) == len(found.lines)
    for line, check in zip(lines, found.lines, strict=True):
        assert check.name in line and line.endswith(check.sentence) and check.sentence.endswith(".")


# ----------------------------------------------------------------------------------------------- memory embeddings


def test_untrained_rows_are_noted_and_do_not_fail(rim):
    check = checks_of(rim)["memory embeddings"]
    assert check.ok is None and "<b>, <m>, </b> stand where RiM.attach puts them: untrained" in check.sentence
    assert verdict(rim).ok


def test_rows_that_were_trained_are_told_from_one_that_was_not(rim):
    with torch.no_grad():
        rim.model.get_input_embeddings().weight[list(rim.memory_ids[:2])] += 0.5
    check = checks_of(rim)["memory embeddings"]
    assert check.ok is None and "rows of </b> stand where" in check.sentence


def test_rows_that_drifted_with_those_of_tokens_never_seen_look_untrained(rim):
    weight = rim.model.get_input_embeddings().weight
    with torch.no_grad():
        drift = torch.ones(32)
        weight[rim.tokenizer.pad_token_id] = drift
        weight[list(rim.memory_ids)] = drift + 0.1 * torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    check = checks_of(rim)["memory embeddings"]
    assert check.ok is None and "lie nearest to <pad>, which never occurs in a text" in check.sentence


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


@pytest.mark.parametrize("family", ["gemma2", "granite"])
def test_a_model_that_changes_its_logits_after_the_head_makes_the_lens_lie(family):
    tokenizer = tiny_tokenizer()
    size = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.3,
        "max_position_embeddings": 128,
        "bos_token_id": None,
    }
    if family == "gemma2":
        config = Gemma2Config(**size, head_dim=8, final_logit_softcapping=3.0, attn_logit_softcapping=None)
        changed = "final_logit_softcapping"
    else:
        config, changed = GraniteConfig(**size, logits_scaling=4.0), "logits_scaling"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()  # all Gemma 2 runs
    rim = RiM.attach(model, tokenizer)
    check = checks_of(rim)["logit lens"]
    assert check.ok is False and f"the model changes its logits afterwards: {changed}" in check.sentence
    assert "logit lens" in failed(rim)


def test_a_model_that_ignores_masks_fails(rim, monkeypatch):
    real = rim.model.forward
    monkeypatch.setattr(
        rim.model, "forward", lambda *args, attention_mask=None, **options: real(*args, **options), raising=True
    )
    assert "does not follow the positions or masks it is given" in checks_of(rim)["readouts"].sentence
    assert failed(rim) == {"readouts"}


def test_weights_that_are_no_numbers_fail(rim):
    with torch.no_grad():
        rim.model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    assert failed(rim) == {"readouts"}
    assert "its logits are not finite" in checks_of(rim)["readouts"].sentence


def test_another_attention_back_end_fails(rim):
    rim.model.config._attn_implementation = "flash_attention_2"
    assert "load the model with attention='sdpa'" in checks_of(rim)["attention back end"].sentence
    assert {"attention back end", "attention weights"} <= failed(rim)


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
