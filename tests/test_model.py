"""Attaching, saving, loading and refusing checkpoints; text to ids and back, with users who type control tokens."""

import json
import shutil
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import huggingface_hub
import pytest
import torch
from conftest import ALL_FAMILIES, tiny_base, tiny_rim, tiny_tokenizer
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import BloomConfig, BloomForCausalLM, PreTrainedTokenizerFast

from rim_probe.encoding import MAX_QUESTION_CHARACTERS
from rim_probe.errors import CheckpointError, LayoutError, QuestionError, RiMError, UnknownWordsError
from rim_probe.memory import LAYOUT_FILE, MemoryLayout
from rim_probe.model import METHODS, RiM, load_base, load_methods
from rim_probe.training.scratch import word_tokenizer

QUESTION = "Anna has 3 apples and buys 14 more. How many?"
WORDS = sorted(
    {*"anna has apples and buys more how many b m eos pad unk".split(), *"0123456789.?+=<>/|_", "<<", ">>", "####"}
)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No test may ask a server; a host name that is looked up is a bug."""

    def refuse(*args, **kwargs):
        raise AssertionError("a test asked for a host on the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A saved tiny Llama. Tests that damage it use `damaged`."""
    return tiny_rim().save_pretrained(tmp_path_factory.mktemp("good") / "rim")


@pytest.fixture
def damaged(checkpoint, tmp_path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "damaged"))


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def logits(rim, text=QUESTION, method="memory"):
    ids = torch.tensor([rim.prompt_ids(text, method)])
    with torch.no_grad():
        return rim.model(input_ids=ids).logits


def one_sentence(caught) -> str:
    text = str(caught.value)
    assert text and "\n" not in text and text.endswith((".", "?")) and "Traceback" not in text
    return text


# -------------------------------------------------------------------------------------------------------- attaching


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_attach_adds_three_rows_and_touches_nothing_else(family):
    base = tiny_base(family)
    before = state(base)
    rim = RiM.attach(base, tiny_tokenizer(), MemoryLayout())
    after = state(base)
    assert rim.memory_ids == (300, 301, 302)
    assert before.keys() == after.keys()
    grown = [name for name in before if before[name].shape != after[name].shape]
    assert sorted(tuple(after[name].shape) for name in grown) == [(303, 32)] * 2  # input and output embeddings
    for name, tensor in before.items():
        assert torch.equal(after[name][: len(tensor)], tensor), name
    for name in grown:
        new = after[name][300:]
        assert new.isfinite().all() and new.std(0).min() > 0
        assert (new - before[name].mean(0)).abs().max() < before[name].std(0).max()  # near the mean of the others
    assert logits(rim).isfinite().all()


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_attaching_the_same_base_twice_gives_equal_rows(family):
    first = tiny_rim(family)
    torch.manual_seed(999)  # whatever has been drawn before
    again = tiny_rim(family)
    # A tokenizer that knows the tokens already, with a base that has no rows for them.
    reused = RiM.attach(tiny_base(family), first.tokenizer, first.layout)
    for other in (again, reused):
        assert all(map(torch.equal, state(first.model).values(), state(other.model).values()))


def test_attach_uses_the_spare_rows_of_a_padded_vocabulary():
    """Qwen and GPT-NeoX have more rows than tokens; none is added, and those that stay spare are never generated."""
    base = tiny_base("qwen3", vocab_size=320)
    before = state(base)
    rim = RiM.attach(base, tiny_tokenizer())
    assert rim.memory_ids == (300, 301, 302)
    for name, tensor in state(base).items():
        assert tensor.shape == before[name].shape
        changed = (tensor != before[name]).reshape(len(tensor), -1).any(-1).nonzero().flatten().tolist()
        assert changed == ([300, 301, 302] if len(tensor) == 320 else [])
    assert set(range(300, 320)) <= set(rim.banned_ids)


def test_attach_refuses_memory_tokens_that_are_ordinary_words():
    """A question could hold them, and the rows of the base would be trained."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["</b>"])
    with pytest.raises(LayoutError, match="holds </b> as ordinary text"):
        RiM.attach(tiny_base(), tokenizer)
    with pytest.raises(LayoutError, match="holds 7 as ordinary text"):
        RiM.attach(tiny_base(), tiny_tokenizer(), MemoryLayout(slot="7"))


def test_a_tokenizer_without_eos_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(CheckpointError, match="no end-of-sequence token") as caught:
        RiM.attach(tiny_base(), tokenizer)
    one_sentence(caught)


# ------------------------------------------------------------------------------------------------- saving and loading


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_full_weights_round_trip(family, tmp_path):
    rim = tiny_rim(family, num_blocks=3, bos=family == "llama")
    folder = rim.save_pretrained(tmp_path / "deep" / "rim")
    names = {path.name for path in folder.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", LAYOUT_FILE} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl"))]
    loaded = RiM.from_pretrained(folder, device="cpu")
    assert type(loaded.model) is type(rim.model) and not loaded.model.training
    assert loaded.name == str(folder) and loaded.layout == rim.layout
    for what in ("memory_ids", "banned_ids", "eos_id", "max_length", "dtype", "device"):
        assert getattr(loaded, what) == getattr(rim, what), what
    for method in METHODS:
        assert loaded.prompt_ids(QUESTION, method) == rim.prompt_ids(QUESTION, method)
        assert torch.equal(logits(loaded, method=method), logits(rim, method=method))


def test_a_saved_checkpoint_is_plain_transformers(checkpoint):
    """The block text appended to a question is all that another program needs."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rim = tiny_rim()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenizer(QUESTION + "\n" + MemoryLayout.load(checkpoint).text(4), return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(checkpoint)(ids).logits, logits(rim))


def write_gguf(path, base, tokenizer):
    """A tiny Llama as llama.cpp would store it: its own names, and query and key rows in its own order."""
    gguf = pytest.importorskip("gguf")
    config, heads = base.config, {"q_proj": base.config.num_attention_heads, "k_proj": base.config.num_key_value_heads}
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    parts = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for i in range(config.num_hidden_layers):
        names |= {f"model.layers.{i}.{ours}": f"blk.{i}.{theirs}" for ours, theirs in parts.items()}
    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].get)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in tokenizer.all_special_tokens else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in bpe["merges"]])
    writer.add_bos_token_id(tokenizer.eos_token_id)  # as GPT-2's; never put before a text
    writer.add_add_bos_token(False)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    for name, tensor in base.state_dict().items():
        name = name.removesuffix(".weight")
        if count := heads.get(name.rsplit(".", 1)[-1]):
            tensor = tensor.unflatten(0, (count, 2, -1)).transpose(1, 2).flatten(0, 2)
        writer.add_tensor(f"{names[name]}.weight", tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def save_base(folder, family="llama"):
    tiny_base(family).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def add_adapter(rim, base_path):
    """LoRA and the three memory rows, moved away from where they start by two steps of SGD."""
    from peft import LoraConfig, get_peft_model

    embeddings = next(name for name, module in rim.model.named_modules() if module is rim.model.get_input_embeddings())
    config = LoraConfig(
        r=2,
        target_modules="all-linear",
        trainable_token_indices={embeddings.rsplit(".", 1)[-1]: sorted(rim.memory_ids)},
        task_type="CAUSAL_LM",
    )
    rim.model = get_peft_model(rim.model, config)
    rim.model.peft_config["default"].base_model_name_or_path = str(base_path)
    optimizer = torch.optim.SGD([p for p in rim.model.parameters() if p.requires_grad], lr=0.5)
    ids = torch.tensor([rim.prompt_ids(QUESTION, "memory")])
    for _ in range(2):
        optimizer.zero_grad()
        rim.model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    rim.model.eval()
    return rim


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gguf"])
def test_adapter_round_trip(kind, tmp_path):
    if kind == "gguf":
        base_path = write_gguf(tmp_path / "tiny.gguf", tiny_base(), tiny_tokenizer())
    else:
        base_path = save_base(tmp_path / "base", kind)
    attached = RiM.attach(*load_base(base_path))
    plain, untrained = state(attached.model), logits(attached)
    rim = add_adapter(attached, base_path)
    trained = logits(rim)
    assert (trained - untrained).abs().max() > 1e-3
    folder = rim.save_pretrained(tmp_path / "adapter")
    assert not list(folder.glob("model*")) and not list(folder.glob("*.bin"))
    stored = load_file(folder / "adapter_model.safetensors")
    assert [tuple(tensor.shape) for name, tensor in stored.items() if "lora" not in name] == [(3, 32)]  # memory rows
    loaded = RiM.from_pretrained(folder, device="cpu")
    torch.testing.assert_close(logits(loaded), trained, rtol=1e-4, atol=1e-3)  # merged; the logits reach 30
    assert loaded.adapter.r == 2 and type(loaded.model) is type(attached.model.get_base_model())
    assert loaded.prompt_ids(QUESTION, "memory") == rim.prompt_ids(QUESTION, "memory")
    assert (loaded.memory_ids, loaded.banned_ids, loaded.max_length) == (rim.memory_ids, rim.banned_ids, 512)
    assert not any(p.requires_grad for p in loaded.model.parameters())
    trainable = RiM.from_pretrained(folder, device="cpu", trainable=True)
    assert torch.equal(logits(trainable), trained)
    assert any(p.requires_grad for p in trainable.model.parameters())
    # The base under the adapter is the one that was trained on, to the bit: also the rows it got when it was loaded.
    rows = len(loaded.tokenizer)
    found = [tensor for tensor in state(trainable.model.unload()).values() if len(tensor) == rows]
    expected = [tensor for tensor in plain.values() if len(tensor) == rows]
    assert len(found) == len(expected) == 2 and all(map(torch.equal, found, expected))


def test_methods_have_models_of_their_own_where_there_are_folders(checkpoint, tmp_path):
    one = load_methods(checkpoint, device="cpu")
    assert set(one) == set(METHODS)
    assert one["memory"] is one["cot"] is one["direct"]
    folder = Path(shutil.copytree(checkpoint, tmp_path / "three"))
    tiny_rim(seed=1).save_pretrained(folder / "cot")
    two = load_methods(str(folder), device="cpu")
    assert two["direct"] is two["memory"] is not two["cot"]
    assert (logits(two["cot"]) - logits(two["memory"])).abs().max() > 1e-3
    tiny_rim(seed=2).save_pretrained(folder / "direct")
    three = load_methods(folder, device="cpu")
    assert len({id(rim) for rim in three.values()}) == 3
    assert [three[method].name for method in METHODS] == [str(folder), str(folder / "cot"), str(folder / "direct")]


@pytest.mark.parametrize("method", ["cot", "direct"])
def test_a_damaged_matched_model_is_not_replaced_by_the_memory_model(damaged, method):
    tiny_rim().save_pretrained(damaged / method)
    (damaged / method / LAYOUT_FILE).unlink()
    with pytest.raises(LayoutError, match=f"{method}/{LAYOUT_FILE} is missing"):
        load_methods(damaged)


# ----------------------------------------------------------------------------------------------- damaged checkpoints


def remove(name):
    return lambda folder: (folder / name).unlink()


def overwrite(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def truncate(name, size):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def change_tensors(change):
    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return damage


def set_in_config(**values):
    def damage(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return damage


def only_pickled_weights(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def wider_tokenizer(folder):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["one", "two"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<b>", "<m>", "</b>"]})
    tokenizer.save_pretrained(folder)


DAMAGES = {
    "no weights": (remove("model.safetensors"), "weights in .* cannot be loaded"),
    "only pytorch_model.bin": (only_pickled_weights, "no file named model.safetensors"),
    "a tensor is missing": (
        change_tensors(lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight")),
        "lack 1 tensors .*layers.1.mlp.up_proj",
    ),
    "a tensor of another shape": (
        change_tensors(lambda tensors: tensors.update({"model.norm.weight": torch.ones(5)})),
        "another shape, such as model.norm.weight",
    ),
    "no tokenizer": (remove("tokenizer.json"), "tokenizer in .* cannot be loaded"),
    "tokenizer of another base": (wider_tokenizer, "only 303 embedding rows"),
    "tokenizer without memory tokens": (tiny_tokenizer().save_pretrained, "does not know the memory tokens"),
    "no layout": (remove(LAYOUT_FILE), "is missing, so this is not a RiM checkpoint"),
    "window of a wrong type": (set_in_config(sliding_window="long"), "sliding_window in its config.json .* not 'long'"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_gives_one_sentence(damaged, damage):
    break_it, message = DAMAGES[damage]
    break_it(damaged)
    with pytest.raises(RiMError, match=message) as caught:
        RiM.from_pretrained(damaged)
    assert str(damaged) in one_sentence(caught) or "embedding rows" in message or "memory tokens" in message


def test_pickles_and_foreign_code_are_never_run(tmp_path, damaged):
    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "exploded",)

    torch.save({"x": Bomb()}, damaged / "pytorch_model.bin")
    (damaged / "model.safetensors").unlink()
    (damaged / "bomb.py").write_text(
        f"open({str(tmp_path / 'exploded')!r}, 'w')\nclass Config: pass\nclass Model: pass\n"
    )
    config = json.loads((damaged / "config.json").read_text())
    for kind in (config["model_type"], "bomb"):
        auto = {"AutoConfig": "bomb.Config", "AutoModelForCausalLM": "bomb.Model"}
        (damaged / "config.json").write_text(json.dumps(config | {"model_type": kind, "auto_map": auto}))
        with pytest.raises(CheckpointError):
            RiM.from_pretrained(damaged)
        with pytest.raises(CheckpointError):
            load_base(damaged)
    assert not (tmp_path / "exploded").exists()


def test_an_index_that_names_pickles_is_refused(damaged):
    weights = load_file(damaged / "model.safetensors")
    (damaged / "model.safetensors").unlink()
    torch.save(weights, damaged / "weights.bin")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "weights.bin")}
    (damaged / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="names 'weights.bin'; weights are read from safetensors only"):
        RiM.from_pretrained(damaged)


def test_a_model_without_position_ids_is_refused():
    base = BloomForCausalLM(BloomConfig(vocab_size=300, hidden_size=32, n_layer=1, n_head=2))
    with pytest.raises(CheckpointError, match="BloomForCausalLM takes no position ids"):
        RiM.attach(base, tiny_tokenizer())


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A base folder and the adapter folder on it."""
    folder = tmp_path_factory.mktemp("adapter")
    base_path = save_base(folder / "base")
    add_adapter(RiM.attach(*load_base(base_path)), base_path).save_pretrained(folder / "adapter")
    return folder


ADAPTER_DAMAGES = {
    "no weights": (remove("adapter_model.safetensors"), "adapter_model.safetensors is missing"),
    "garbage": (overwrite("adapter_model.safetensors", b"garbage" * 99), "adapter in .* cannot be loaded"),
    "truncated": (truncate("adapter_model.safetensors", 3000), "adapter in .* cannot be loaded"),
    "no base named": (overwrite("adapter_config.json", b'{"peft_type": "LORA"}'), "no entry 'base_model_name_or_path'"),
    "base null": (
        overwrite("adapter_config.json", b'{"base_model_name_or_path": null}'),
        "base_model_name_or_path is None",
    ),
    "no layout": (remove(LAYOUT_FILE), "is missing, so this is not a RiM checkpoint"),
}


@pytest.mark.parametrize("damage", ADAPTER_DAMAGES)
def test_a_damaged_adapter_gives_one_sentence(adapter, tmp_path, damage):
    folder = Path(shutil.copytree(adapter / "adapter", tmp_path / "damaged"))
    break_it, message = ADAPTER_DAMAGES[damage]
    break_it(folder)
    with pytest.raises(RiMError, match=message) as caught:
        RiM.from_pretrained(folder)
    assert str(folder) in one_sentence(caught)


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
@pytest.mark.parametrize("lost", ["lora_A", "lora_B", "trainable_tokens"])
def test_an_adapter_that_lacks_tensors_is_refused(adapter, tmp_path, lost):
    folder = Path(shutil.copytree(adapter / "adapter", tmp_path / "damaged"))
    tensors = load_file(folder / "adapter_model.safetensors")
    del tensors[next(name for name in tensors if lost in name)]
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=lost) as caught:
        RiM.from_pretrained(folder)
    assert str(folder) in one_sentence(caught)


def test_an_adapter_whose_base_is_gone_names_the_base(adapter, tmp_path):
    folder = Path(shutil.copytree(adapter / "adapter", tmp_path / "moved"))
    config = json.loads((folder / "adapter_config.json").read_text())
    gone = str(tmp_path / "gone")
    for base in (gone, gone + ".gguf"):
        (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
        with pytest.raises(CheckpointError) as caught:
            RiM.from_pretrained(folder)
        assert base in one_sentence(caught)


def test_a_gguf_that_is_missing_or_garbage_is_named(tmp_path):
    path = tmp_path / "base.gguf"
    with pytest.raises(CheckpointError, match="does not exist") as caught:
        load_base(path)
    assert str(path) in one_sentence(caught)
    path.write_bytes(b"GGUF" + b"\x00" * 50)
    with pytest.raises(CheckpointError, match="cannot be loaded") as caught:
        load_base(path)
    assert str(path) in one_sentence(caught)


@pytest.mark.parametrize(
    "path", ["nowhere", "checkpoints/none", "./none", "/none/at/all", "a/b/c", "~/x", "a\0b", "", "x" * 5000]
)
def test_a_mistyped_folder_is_not_asked_for_on_the_hub(path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kwargs: pytest.fail("asked the Hub"))
    with pytest.raises(CheckpointError, match="There is no checkpoint folder") as caught:
        RiM.from_pretrained(path)
    one_sentence(caught)


@pytest.mark.parametrize("load", [RiM.from_pretrained, load_methods])
@pytest.mark.parametrize("name", ["nobody/rim", "some-org/Llama-3.2-1B_rim"])
def test_a_hub_id_that_cannot_be_reached(load, name):
    with pytest.raises(CheckpointError, match=f"^{name} is neither a folder here nor a repository") as caught:
        load(name)
    one_sentence(caught)


def test_a_hub_id_is_downloaded_without_pickles(checkpoint, monkeypatch):
    asked = []

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(checkpoint)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    rim = RiM.from_pretrained("some-org/Llama-3.2-1B_rim", device="cpu")
    assert rim.name == "some-org/Llama-3.2-1B_rim"
    ((name, patterns),) = asked
    assert name == "some-org/Llama-3.2-1B_rim"
    assert not any(pattern.endswith((".bin", ".pt", ".py", "*")) for pattern in patterns)


def test_without_a_gpu_everything_runs_on_the_cpu(checkpoint, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in ("cuda", "cuda:1", torch.device("cuda"), "cpu", None):
        rim = RiM.from_pretrained(checkpoint, device=device)
        assert rim.device == torch.device("cpu") and rim.dtype == torch.float32
    assert RiM.from_pretrained(checkpoint, dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("device", ["gpu", "hpu:0", "cuda:x", "meta", 3.5])
def test_a_device_that_cannot_be_used(checkpoint, device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(CheckpointError, match="device '.*' cannot be used here; use cpu or cuda") as caught:
        RiM.from_pretrained(checkpoint, device=device)
    one_sentence(caught)


# ---------------------------------------------------------------------------------------------- text to ids and back


def gpt2_like():
    """Byte-level BPE whose one special token is EOS, BOS and unknown at once, with chat tokens on top."""
    bare = tiny_tokenizer()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bare.backend_tokenizer, eos_token="<eos>", bos_token="<eos>", unk_token="<eos>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return tokenizer


def llama_like():
    """BPE over characters with bytes to fall back on, a space mark before the text, and BOS before every text."""
    special = ["<unk>", "<s>", "</s>"]
    vocabulary = special + [f"<0x{byte:02X}>" for byte in range(256)] + ["▁"]
    vocabulary += [chr(code) for code in range(33, 127)] + ["an", "▁a", "</", "<|", "|>"]
    merges = [("a", "n"), ("▁", "a"), ("<", "/"), ("<", "|"), ("|", ">")]
    ids = {token: i for i, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


TOKENIZERS = {
    "words": lambda: word_tokenizer(WORDS),
    "byte-level": tiny_tokenizer,
    "byte-level with BOS": lambda: tiny_tokenizer(bos=True),
    "gpt2-like": gpt2_like,
    "llama-like": llama_like,
}
PREFIX = {"byte-level with BOS": ["<bos>"], "llama-like": ["<s>"]}


def rim_with(kind) -> RiM:
    tokenizer = TOKENIZERS[kind]()
    return RiM.attach(tiny_base(vocab_size=len(tokenizer) + 20), tokenizer)


@pytest.fixture(params=TOKENIZERS)
def kind(request):
    return request.param


@pytest.fixture
def any_rim(kind):
    return rim_with(kind)


def test_a_question_is_the_prefix_the_text_and_a_line_end(kind, any_rim):
    bare = any_rim.tokenizer(QUESTION + "\n", add_special_tokens=False)["input_ids"]
    prefix = any_rim.tokenizer.convert_tokens_to_ids(PREFIX.get(kind, []))
    assert any_rim.encode_question(QUESTION) == prefix + bare
    assert any_rim.encode_question(f"  \n{QUESTION}\t ") == prefix + bare
    assert any_rim.encode_text(QUESTION + "\n") == bare


def test_prompts_of_the_methods(any_rim):
    question, block = any_rim.encode_question(QUESTION), any_rim.encoder.block_ids
    assert any_rim.prompt_ids(QUESTION, "memory") == question + block * 8
    assert any_rim.prompt_ids(QUESTION, "memory", 3) == question + block * 3
    assert any_rim.prompt_ids(QUESTION, "memory", 0) == any_rim.prompt_ids(QUESTION, "cot") == question
    assert any_rim.prompt_ids(QUESTION, "direct") == question + any_rim.encode_text("#### ")
    with pytest.raises(LayoutError, match="from 0 to 64"):
        any_rim.prompt_ids(QUESTION, "memory", 65)
    with pytest.raises(RiMError, match="Unknown method 'magic'; choose one of memory, cot, direct"):
        any_rim.prompt_ids(QUESTION, "magic")


def control_ids(rim):
    return {*rim.banned_ids, rim.eos_id}


def test_banned_ids_hold_every_control_token_but_eos(kind, any_rim):
    tokenizer = any_rim.tokenizer
    spare = any_rim.model.get_output_embeddings().weight.shape[0] - len(tokenizer)
    control = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    assert control >= {*tokenizer.all_special_ids, *any_rim.memory_ids}
    assert any_rim.eos_id not in any_rim.banned_ids
    assert control - {any_rim.eos_id} <= set(any_rim.banned_ids)
    assert len(any_rim.banned_ids) == len(control) - 1 + spare and spare > 0
    assert not set(any_rim.banned_ids) & set(any_rim.encode_text("0123456789 <<3+14=17>> #### how many"))


@pytest.mark.parametrize("around", ["{}", "how many {} apples?", "3{}14", "{0}{0} and {0}"])
def test_control_tokens_that_are_typed_become_plain_characters(kind, any_rim, around):
    tokenizer = any_rim.tokenizer
    prefix = tokenizer.convert_tokens_to_ids(PREFIX.get(kind, []))
    typed = [*tokenizer.all_special_tokens, "<b><m></b>", any_rim.layout.text(2)]
    assert {"<b>", "<m>", "</b>", tokenizer.eos_token} <= set(typed)
    for token in typed:
        question = around.format(token)
        ids = any_rim.encode_question(question)
        assert ids[: len(prefix)] == prefix
        assert not set(ids[len(prefix) :]) & control_ids(any_rim), token
        shown = any_rim.decode(ids)
        assert shown.replace(" ", "").strip() == question.replace(" ", "")
        # Outside the question nothing changes.
        assert any_rim.prompt_ids(question, "memory", 2) == ids + any_rim.encoder.block_ids * 2


def test_typed_control_tokens_stay_plain_after_saving_and_loading(kind, any_rim, tmp_path):
    loaded = RiM.from_pretrained(any_rim.save_pretrained(tmp_path), device="cpu")
    for token in any_rim.tokenizer.all_special_tokens:
        assert loaded.encode_question(f"3 {token} 14") == any_rim.encode_question(f"3 {token} 14")
    assert loaded.banned_ids == any_rim.banned_ids


def test_a_tokenizer_whose_words_are_its_control_tokens_refuses_them():
    """Split at white space alone, `<eos>` is a word. The question is refused rather than ended in its middle."""
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1, "3": 2, "####": 3}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")
    rim = RiM.attach(tiny_base(vocab_size=4), fast)
    assert rim.encode_question("3 3") == [2, 2]
    with pytest.raises(QuestionError, match="holds <eos>") as caught:
        rim.encode_question("3 <eos> 3")
    one_sentence(caught)


TEXTS = [
    "plain words, 1,000 and $18.50!",
    "😀 👨‍👩‍👧 🇦🇹 has 3 🍎",
    "שלום, כמה תפוחים? \u202e12\u202c",
    "كم تفاحة؟ ٣",
    "两个苹果 ａｂｃ ½ ﬁ é e\u0301",
    "tabs\tand\nlines\r\nin  between   words",
    "a\x00b\x07c\x1b[31m",
    "<<3+4=7>> || #### <b>",
    "\u200bzero\u200dwidth\ufeff",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", ["byte-level", "byte-level with BOS", "gpt2-like", "llama-like"])
def test_decoding_gives_the_typed_characters_back(kind, text):
    rim = rim_with(kind)
    assert rim.decode(rim.encode_text(text)) == text
    assert rim.decode(rim.encode_question(text)) == text.strip() + "\n"


@pytest.mark.parametrize(
    "text", ["", "   ", "\n\t\r\n", "\x00", "\x07\x1b\x00", "\u200b\u200d", "\u202e", "\ud83d", "\xa0"]
)
def test_a_question_without_a_visible_character_is_empty(any_rim, text):
    with pytest.raises(QuestionError, match="The question is empty") as caught:
        any_rim.encode_question(text)
    one_sentence(caught)


@pytest.mark.parametrize("value", [None, 3, ["a"], b"bytes"])
def test_a_question_that_is_not_text(rim, value):
    with pytest.raises(QuestionError, match=f"must be text, not {type(value).__name__}"):
        rim.encode_question(value)


def test_a_lone_surrogate_is_replaced(rim):
    """Half an emoji, as a browser can send it, is no character; the rest of the question is asked."""
    assert rim.decode(rim.encode_question("3 \ud83d apples")) == "3 ? apples\n"
    assert rim_with("words").encode_question("3 \udc00 apples")


def test_the_longest_question(rim):
    assert len(rim.encode_question("3" * MAX_QUESTION_CHARACTERS)) > 0
    assert rim.encode_question("3" * MAX_QUESTION_CHARACTERS + "   ")  # white space around it does not count
    with pytest.raises(QuestionError, match="20,001 characters; shorten it to at most 20,000") as caught:
        rim.encode_question("3" * (MAX_QUESTION_CHARACTERS + 1))
    one_sentence(caught)


@pytest.mark.parametrize(("method", "extra"), [("memory", 4 * 4), ("cot", 0), ("direct", None)])
def test_a_question_longer_than_the_context(make_rim, method, extra):
    rim = make_rim(context=64)
    extra = len(rim.encode_text("#### ")) if extra is None else extra
    room = 64 - 2 - extra - 1  # an answer token and EOS; prompt; the line end
    fits = "?" * room
    assert len(rim.encode_text(fits)) == room
    assert len(rim.prompt_ids(fits, method)) == 62
    remedy = "shorten the question" + (" or use fewer blocks" if method == "memory" else "")
    with pytest.raises(QuestionError, match=rf"needs 63 tokens .* reads at most 62; {remedy}\.$") as caught:
        rim.prompt_ids(fits + "?", method)
    one_sentence(caught)


def test_unknown_words_are_named_once_in_order():
    rim = rim_with("words")
    with pytest.raises(UnknownWordsError) as caught:
        rim.encode_question("Zebra has 3 apples, Anna has zyx. Zebra buys 😀 and QUUX zyx!")
    assert caught.value.words == ["Zebra", ",", "zyx", "😀", "QUUX", "!"]
    assert one_sentence(caught).startswith("This small model has never seen “Zebra”, “,”, “zyx”, “😀”, “QUUX”, “!”;")
    assert rim.encode_question("ANNA has 3 Apples.") == rim.encode_question("anna has 3 apples.")


def test_two_threads_may_load_at_once(small_checkpoint):
    """As the page does when visitors choose different models; tied weights went missing."""
    with ThreadPoolExecutor(4) as threads:
        for rim in threads.map(RiM.from_pretrained, [small_checkpoint] * 12):
            assert rim.model.lm_head.weight is rim.model.model.embed_tokens.weight
