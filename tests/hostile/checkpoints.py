"""Checkpoints with one file damaged: refused in one sentence, or loaded with equal logits and equal answers."""

import json
import logging
import random
import shutil
import tempfile
import traceback
from pathlib import Path

import torch

from rim_probe.datasets.arithmetic import World, generate, vocabulary
from rim_probe.errors import RiMError
from rim_probe.gallery import load_examples
from rim_probe.memory import MemoryLayout
from rim_probe.model import RiM, load_methods
from rim_probe.options import silence_transformers
from rim_probe.trained_on import TrainedOn
from rim_probe.training.scratch import small_llama, word_tokenizer

from . import Complaints, Count
from .runs import changed, forms

QUESTION = "Ann has 3 apples. Ann buys 4 more apples. How many apples does Ann have now?"


def make(folder: Path) -> Path:
    """A small checkpoint with everything that one can have."""
    for place, seed in ((folder, 0), (folder / "cot", 1)):
        tokenizer = word_tokenizer(vocabulary())
        base = small_llama(tokenizer, layers=1, width=16, heads=2, inner=32, context=128, seed=seed)
        rim = RiM.attach(base, tokenizer, MemoryLayout(num_blocks=2))
        rim.trained_on = TrainedOn.of(list(generate(World(), "train", 50)), closed=True)
        rim.save_pretrained(place)
    example = {"question": QUESTION, "steps": ["<<3+4=7>>"], "answer": "7"}
    (folder / "examples.json").write_text(json.dumps([example]), encoding="utf-8")
    return folder


def damage(folder: Path, chance: random.Random) -> str:
    """Changes one file of a checkpoint; what was done."""
    file = chance.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    name, content = str(file.relative_to(folder)), file.read_bytes()
    if chance.random() < 0.1:
        file.unlink()
        return f"{name} removed"
    if file.suffix == ".json" and chance.random() < 0.6:
        data = json.loads(content)
        data, what = changed(data, forms(data), chance)
        file.write_text(json.dumps(data), encoding="utf-8")
        return f"{name}: {what}"
    header = 8 + int.from_bytes(content[:8], "little") if file.suffix == ".safetensors" else len(content)
    at = chance.randrange(header)  # the numbers themselves have no checksum: other ones are another model
    what = chance.choice(("cut", "garbled", "grown"))
    rest = b"" if what == "cut" else content[at + 8 :]
    file.write_bytes(
        content + b"{}" if what == "grown" else content[:at] + (chance.randbytes(8) if rest else b"") + rest
    )
    return f"{name} {what} at {at}"


def said(folder: Path) -> dict[str, torch.Tensor]:
    """The logits of each method's model for its prompt."""
    load_examples(folder)
    with torch.no_grad():
        return {
            method: rim.model(torch.tensor([rim.prompt_ids(QUESTION, method)])).logits
            for method, rim in load_methods(folder, "cpu").items()
        }


def attempt(count: int, seed: int) -> Count:
    """Damages a checkpoint `count` times."""
    chance, found = random.Random(seed), Count()
    silence_transformers()
    logging.getLogger("rim_probe").addHandler(log := Complaints(logging.WARNING))
    with tempfile.TemporaryDirectory() as work:
        whole, copy = make(Path(work) / "whole"), Path(work) / "copy"
        expected = said(whole)
        for _ in range(count):
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(whole, copy)
            what = damage(copy, chance)
            log.told.clear()
            try:
                logits = said(copy)
                equal = all(torch.equal(logits[method], value) for method, value in expected.items())
                if equal or log.told:
                    found.note("loaded equal" if equal else "loaded as another model, with a warning")
                else:
                    found.note("loaded as another model", what)
            except RiMError as error:
                found.note("refused", f"{what}: {error}" if "\n" in str(error) else None)
            except Exception:
                found.note("traceback", f"{what}: {traceback.format_exc()[-500:]}")
    return found
