"""The check at the door: each kind of fault is a tiny model that commits it, and must be refused or switched off."""

import json
import logging
import shutil

import pytest
import torch
from conftest import ALL_FAMILIES, tiny_base, tiny_rim, tiny_tokenizer
from transformers import AutoModelForCausalLM

from rim_probe import door
from rim_probe.cli import main
from rim_probe.decoding import answer, answer_batch
from rim_probe.errors import CheckpointError, LayoutError, RiMError
from rim_probe.memory import LAYOUT_FILE, MemoryLayout, detect
from rim_probe.model import RiM, export, load_base, load_methods
from rim_probe.packing import cot_row, pad_rows, row_mask
from rim_probe.probing.capture import capture
from rim_probe.probing.hooks import tells_attention, unembed
from rim_probe.probing.patching import Patcher
from rim_probe.probing.verdict import verdict
from rim_probe.problems import Problem
from tools.architectures import build

QUESTION = "Anna has 3 apples and buys 14 more. How many?"


def made(kind, **config):
    """A tiny random model of a family, with memory tokens."""
    model, tokenizer = build(kind, **config)
    return RiM.attach(model, tokenizer, MemoryLayout(num_blocks=3), name=kind)


# -------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_promised_families_pass_with_every_feature(family):
    rim = tiny_rim(family)
    assert verdict(rim).ok and not rim.verdict.off


@pytest.mark.parametrize("kind", ["lfm2", "jamba", "qwen3_next", "bamba"])
def test_layers_that_ignore_a_mask_are_refused_by_kind(kind):
    with pytest.raises(CheckpointError, match=r"tokens that are masked move the logits.*kinds (conv|linear_attention)"):
        made(kind)


def test_local_attention_by_index_is_refused():
    with pytest.raises(CheckpointError, match="local attention counts the tokens of a row"):
        made("gpt_neo")


def test_chunks_and_windows_bound_the_context():
    assert made("llama4_text").max_length == 64


class _Faulty:
    """Ways of a model to go wrong in its forward pass."""

    @staticmethod
    def drops_masks(real, attention_mask=None, **given):
        return real(**given)

    @staticmethod
    def drops_positions(real, position_ids=None, **given):
        return real(**given)

    @staticmethod
    def sees_the_mean(real, input_ids, **given):  # as a recurrence or a linear attention does
        out = real(input_ids=input_ids, **given)
        out.logits = out.logits + 0.01 * input_ids.float().mean(1, keepdim=True)[..., None]
        return out

    @staticmethod
    def forgets_its_cache(real, past_key_values=None, **given):
        mask = given.pop("attention_mask", None)
        if past_key_values is not None and mask is not None:
            mask = mask[..., -mask.shape[-2] :]
        return real(attention_mask=mask, **given)

    @staticmethod
    def says_nan(real, **given):
        out = real(**given)
        out.logits = out.logits * torch.nan
        return out

    @staticmethod
    def breaks(real, **given):
        raise RuntimeError("first line\nsecond line")


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("drops_masks", "does not follow the positions or masks"),
        ("drops_positions", "does not follow the positions or masks"),
        ("sees_the_mean", "tokens that are masked move the logits"),
        ("forgets_its_cache", "decoded with a cache"),
        ("says_nan", "not finite"),
        ("breaks", r"a pass over them fails \(first line\)"),
    ],
)
def test_a_model_that_computes_otherwise_is_refused_in_one_sentence(fault, told, monkeypatch):
    tokenizer = tiny_tokenizer()
    base = tiny_base(vocab_size=len(tokenizer))
    real = base.forward

    def forward(position_ids=None, **given):
        return getattr(_Faulty, fault)(real, position_ids=position_ids, **given)

    monkeypatch.setattr(base, "forward", forward)
    with pytest.raises(CheckpointError, match=told) as caught:
        RiM.attach(base, tokenizer, name="faulty").examine(anew=True)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("faulty: LlamaForCausalLM")


def test_weights_that_are_no_numbers_are_refused_when_loaded(tmp_path, rim):
    with torch.no_grad():
        rim.model.model.layers[1].mlp.down_proj.weight.fill_(torch.nan)
    with pytest.raises(CheckpointError, match="not finite"):
        RiM.from_pretrained(rim.save_pretrained(tmp_path), "cpu")


def test_memory_tokens_that_get_the_ids_of_words_are_refused():
    tokenizer = tiny_tokenizer()
    held = json.loads(tokenizer.backend_tokenizer.to_str())
    words = held["model"]["vocab"]
    last = max(words, key=words.get)
    words[last] += 1  # a gap: the first token that is added gets the number of the last word
    tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(held))
    with pytest.raises(LayoutError, match="gaps"):
        RiM.attach(tiny_base(vocab_size=len(tokenizer) + 1), tokenizer)


@pytest.mark.parametrize(
    ("layers", "told"), [(1, "more layers than its config.json tells of"), (10**6, "tells of 1,000,000 layers")]
)
def test_another_number_of_layers_than_the_weights_hold_is_refused(layers, told, tmp_path, rim):
    folder = rim.save_pretrained(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers, "layer_types": None}))
    with pytest.raises(CheckpointError, match=told):
        RiM.from_pretrained(folder, "cpu")


# ------------------------------------------------------------------------------------------- what is switched off


@pytest.mark.parametrize("kind", ["gemma2", "granite", "cohere"])
def test_a_lens_that_is_not_the_model_is_switched_off(kind):
    rim = made(kind)
    with pytest.raises(RiMError, match="the logit lens cannot be used here.*changes its logits afterwards"):
        unembed(rim, torch.zeros(1, 32))
    assert "the logit lens is off" in str(rim.verdict)


@pytest.mark.parametrize("kind", ["falcon", "gpt_oss"])
def test_attention_that_is_not_told_is_none_and_never_memory_without_values(kind):
    rim = made(kind)
    held = capture(rim, "anna has 3 apples")
    assert held.to_question is None and held.to_memory is None and held.slots.isfinite().all()
    assert "attention" in str(rim.verdict) and not tells_attention(rim)


@pytest.mark.parametrize("kind", ["gemma4_text", "gpt_bigcode", "xglm"])
def test_a_model_that_cannot_go_on_from_its_own_states_is_not_intervened_in(kind):
    with pytest.raises(RiMError, match="intervening in it cannot be used here"):
        Patcher(made(kind), "anna has 3 apples")


def test_an_intervention_that_is_not_what_it_writes_is_switched_off(rim, monkeypatch):
    """A layer that adds what nobody else adds: more rows than one are another pass to it."""
    real = rim.model.model.layers[1].forward
    monkeypatch.setattr(
        rim.model.model.layers[1], "forward", lambda x, **given: real(x, **given) + (len(x) > 1) * x[:1]
    )
    rim.verdict.features.clear()
    rim.verdict.file = None  # what is patched here shall not be remembered of others
    with pytest.raises(RiMError, match="intervening in it cannot be used"):
        Patcher(rim, QUESTION)


def test_a_back_end_that_takes_no_mask_switches_memory_off(rim):
    rim.model.config._attn_implementation = "flash_attention_2"
    assert str(rim.examine()).startswith("tiny-llama: asking it through memory blocks is off")
    with pytest.raises(RiMError, match="attention='sdpa'"):
        answer(rim, QUESTION, "memory")


# ------------------------------------------------------------------------------------------------- what is remembered


def test_a_verdict_is_remembered_until_the_weights_change(tmp_path, rim, monkeypatch):
    folder = rim.save_pretrained(tmp_path)
    RiM.from_pretrained(folder, "cpu")

    def tried(*_):
        raise RuntimeError("tried again")

    monkeypatch.setattr(door, "_try", tried)
    assert not RiM.from_pretrained(folder, "cpu").verdict.off
    with torch.no_grad():
        rim.model.model.layers[0].mlp.down_proj.weight += 0.1
    with pytest.raises(CheckpointError, match="tried again"):
        RiM.from_pretrained(rim.save_pretrained(tmp_path), "cpu")


def test_a_damaged_memory_of_a_verdict_is_made_anew(rim):
    rim.verdict.file.write_text('{"the logit lens": 3}')
    assert rim.examine().features == {door.LENS: None}


# ------------------------------------------------------------------------------------------------------- saved, loaded


def test_where_an_answer_ends_is_the_same_everywhere(rim, tmp_path):
    rim.model.config.eos_token_id = 5
    rim.model.generation_config.eos_token_id = [5, 6]
    folder = export(rim.save_pretrained(tmp_path / "rim"), tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert again.config.eos_token_id == again.generation_config.eos_token_id == rim.tokenizer.eos_token_id


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("targets", ["all-linear", ["lm_head", "q_proj"], ["embed_tokens"]])
def test_tied_weights_are_equal_after_merging_saving_and_loading(targets, tmp_path):
    """transformers#45127, peft#2864."""
    from peft import LoraConfig, get_peft_model

    tokenizer = tiny_tokenizer()
    base = tiny_base(vocab_size=len(tokenizer))
    base.config.tie_word_embeddings = True
    base.tie_weights()
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    rim = RiM.attach(*load_base(tmp_path / "base"))
    rows = {"embed_tokens": list(rim.memory_ids)} if targets == "all-linear" else None
    config = LoraConfig(r=2, target_modules=targets, trainable_token_indices=rows, init_lora_weights=False)
    rim.model = get_peft_model(rim.model, config).eval()
    rim.model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    ids = torch.tensor([rim.prompt_ids(QUESTION, "memory")])
    with torch.no_grad():
        for name, parameter in rim.model.named_parameters():
            parameter *= 1 + ("trainable_tokens" in name)
        said = rim.model(input_ids=ids).logits
        merged = RiM.from_pretrained(rim.save_pretrained(tmp_path / "adapter"), "cpu")
        again = RiM.from_pretrained(export(tmp_path / "adapter", tmp_path / "plain"), "cpu")
        for loaded in (merged, again):
            torch.testing.assert_close(loaded.model(input_ids=ids).logits, said, atol=1e-4, rtol=1e-4)


# -------------------------------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize(
    ("edit", "told"), [({"slots_per_block": 1}, "trained with 4 blocks of 2"), ({"num_blocks": 5}, "4 blocks of 2")]
)
def test_an_edited_layout_warns(edit, told, rim, tmp_path, caplog):
    file = rim.save_pretrained(tmp_path) / LAYOUT_FILE
    RiM.from_pretrained(tmp_path, "cpu")
    assert "edited" not in caplog.text
    file.write_text(json.dumps(json.loads(file.read_text()) | edit))
    RiM.from_pretrained(tmp_path, "cpu")
    assert told in caplog.text and caplog.records[0].levelno == logging.WARNING


def test_a_layout_without_a_fingerprint_loads_silently(rim, tmp_path, caplog):
    file = rim.save_pretrained(tmp_path) / LAYOUT_FILE
    file.write_text(json.dumps(rim.layout.to_dict()))
    assert RiM.from_pretrained(tmp_path, "cpu").layout == rim.layout and not caplog.records


@pytest.mark.parametrize(
    ("tokens", "found"),
    [
        ("<rim_b> <rim_m> <rim_eb>", ("<rim_b>", "<rim_m>", "<rim_eb>")),
        ("<pad> <m> <b> </b> <eos>", ("<b>", "<m>", "</b>")),
        ("<|mem_begin|> <|mem_slot|> <|mem_end|>", ("<|mem_begin|>", "<|mem_slot|>", "<|mem_end|>")),
        ("<rim_b> <rim_m>", None),
        ("<rim_b> <rim_m> <rim_eb> <b> <m> </b>", None),
        ("<bos> <eos> <pad> <|im_start|> <|im_end|>", None),
    ],
)
def test_layouts_are_detected_by_the_names_of_tokens(tokens, found):
    layout = detect(tokens.split())
    assert (layout and layout.tokens) == found


@pytest.fixture
def foreign(tmp_path):
    """A checkpoint of another program: memory tokens of its own and no layout file."""
    tokenizer = tiny_tokenizer()
    layout = MemoryLayout(begin="<rim_b>", slot="<rim_m>", end="<rim_eb>", num_blocks=2)
    RiM.attach(tiny_base(vocab_size=len(tokenizer)), tokenizer, layout).save_pretrained(tmp_path / "foreign")
    shutil.move(tmp_path / "foreign" / LAYOUT_FILE, tmp_path / "own.json")
    return tmp_path / "foreign"


def test_a_checkpoint_of_another_program_is_offered_what_its_tokens_tell(foreign):
    with pytest.raises(LayoutError, match=r"<rim_b>, <rim_m>, <rim_eb> look like memory.*--layout detected"):
        load_methods(foreign, "cpu")


@pytest.mark.parametrize(("layout", "blocks"), [("detected", 8), ("own.json", 2)])
def test_a_checkpoint_of_another_program_is_asked_with_a_layout(layout, blocks, foreign, capsys):
    layout = layout if layout == "detected" else str(foreign.parent / layout)
    asked = ["ask", QUESTION, "--model", str(foreign), "--method", "memory", "--max-new-tokens", "2", "--json"]
    assert main([*asked, "--layout", layout]) == 0
    assert len(json.loads(capsys.readouterr().out)["answers"][0]["readouts"]) == blocks
    if layout != "detected":
        assert main(["probe", str(foreign), "--question", QUESTION, "--layout", layout]) == 0


# ------------------------------------------------------------------------------------------------ known cases of others


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_padding_on_the_left_changes_no_answer(family):
    """transformers#47651 (lengths of 1 modulo 32), nnsight#672 (GPT-2, two pads and more), transformers PR#48161."""
    rim = tiny_rim(family)
    texts = ["3 and 14 more?"]
    length = len(rim.prompt_ids(texts[0], "memory"))
    while len(rim.prompt_ids(texts[-1], "memory")) < 66:
        texts.append(texts[-1] + " 7")
    chosen = [text for text in texts if len(rim.prompt_ids(text, "memory")) % 32 in (0, 1, 2)] + texts[:1]
    assert len(chosen) > 3 and length < 66
    together = answer_batch(rim, chosen, "memory", max_new_tokens=6)
    alone = [answer(rim, text, "memory", max_new_tokens=6) for text in chosen]
    assert [it.token_ids for it in together] == [it.token_ids for it in alone]


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_padding_on_the_right_changes_no_row_without_a_mask(family):
    """transformers PR#48161, PR#46634: positions of padding begin anew, which some libraries take for another text."""
    rim = tiny_rim(family)
    rows = [cot_row(rim.encoder, Problem("3 and 14 more?" + " 7" * n, ("<<3+14=17>>",), "17")) for n in (0, 1, 9)]
    batch = pad_rows(rows, rim.eos_id)
    assert row_mask(batch["readouts"], rim.dtype) is None
    with torch.no_grad():
        together = rim.model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        for row, found in zip(rows, together, strict=True):
            alone = rim.model(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0]
            torch.testing.assert_close(found[: len(row)], alone, atol=1e-4, rtol=1e-4)


def test_a_number_edited_in_a_configuration_is_said(tmp_path, rim, caplog):
    rim.save_pretrained(tmp_path)
    RiM.from_pretrained(tmp_path)
    assert not caplog.messages
    file = tmp_path / "config.json"
    told = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(told | {"rms_norm_eps": 0.5}), encoding="utf-8")
    RiM.from_pretrained(tmp_path)
    assert any("config.json" in message and "changed since" in message for message in caplog.messages)
