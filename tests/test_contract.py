"""What others build on, as names: commands and options, API endpoints, recipe keys, saved runs, checkpoint files.

Names may be added; one that is missing breaks a script, a link or a file that somebody has kept.
"""

import gzip
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from conftest import add_lora

from rim_probe.cli import main
from rim_probe.model import METHODS, load_methods
from rim_probe.training.recipe import load_recipe

ROOT = Path(__file__).parent.parent
CHECKPOINTS = ROOT / "checkpoints"

OPTIONS = {
    "ask": "QUESTION --model --method --num-blocks --max-new-tokens --device --json",
    "train": "RECIPE --output --resume --max-minutes --trial --profile --batch-size",
    "eval": "CHECKPOINT --data --from --limit --method --num-blocks --max-new-tokens --device --batch-size "
    "--latency-samples --cost-devices --seed --output --figures --card",
    "probe": "CHECKPOINT --data --question --page --steps --fit --choose --fit-heldout --choose-heldout --only --base "
    "--limit --num-blocks --output --seed --device --card",
    "bench": "CHECKPOINT --num-blocks --data --questions --train-batch --train-steps --seed --device --json --card",
    "data arithmetic": "--split --rows --output --seed --min-steps --max-steps --max-value --operations --story "
    "--relation --bare --shuffle --distract --held-out-steps",
    "data everyday": "--split --rows --output --seed --variants",
    "data check": "--against",
    "data gsm8k": "--split --output --from --revision",
    "data gsm8k-aug": "--split --output --from --revision",
    "data gsm-hard": "--split --output --from --revision",
    "base": "NAME --from --source",
    "export": "CHECKPOINT FOLDER --method",
}

ENDPOINTS = "run blocks attention layers trajectory surgery counterfactual evidence".split()

RUN = """format checkpoint question gold steps num_blocks seed machine date matched status memory cot reading surgery
counterfactual""".split()
READING = """format question tokens num_blocks slots num_layers gold steps chain readouts answer provenance complaints
probes""".split()
PROBES = "steps values words correctness attention commitment importance geometry depth".split()

WORLD = {
    "min_steps": 1,
    "max_steps": 3,
    "max_value": 50,
    "operations": "+-",
    "story": 0.5,
    "relation": 0.3,
    "bare": 0.2,
    "shuffle": 0.1,
    "distract": 0.1,
    "held_out_steps": 2,
}
STAGE = {
    "name": "one",
    "objective": "stage2",
    "rows": 64,
    "learning_rate": 1e-4,
    "batch_size": 8,
    "batch_tokens": 512,
    "accumulation": 2,
    "schedule": "cosine",
    "warmup": 0.1,
    "weight_decay": 0.01,
    "lambdas": "absolute",
    "blocks": 3,
    "grounded": 0.5,
    "share": 0.5,
    "one_number_share": 0.2,
    "slot_labels": 0,
    "dropout": 0.1,
    "validate_every": 10,
}
LAYOUT = {"num_blocks": 4, "slots_per_block": 2, "begin": "<m>", "slot": "<s>", "end": "</m>"}
RECIPE = {
    "output": "out",
    "layout": LAYOUT,
    "seed": 1,
    "precision": "float32",
    "attention": "sdpa",
    "compile": False,
    "data": {
        "files": ["a.txt", "b.txt"],
        "repeats": [2.0, 0.25],
        "rows": 100,
        "seed": 2,
        "validation": "v.txt",
        "validation_rows": 10,
    },
    "stages": [STAGE],
}
ORIGINS = {
    "base": {"base": "smollm2-135m", "lora": {"r": 8, "alpha": 16, "dropout": 0.05}},
    "start": {"start": "adapter"},
    "scratch": {
        "scratch": {"layers": 2, "width": 16, "heads": 2, "inner": 32, "context": 128},
        "data": {"world": WORLD, "rows": 100},
        "stages": [{key: value for key, value in STAGE.items() if key != "dropout"}],
    },
}


@pytest.mark.parametrize("command", OPTIONS)
def test_options_of_a_command(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), "--help"])
    assert stop.value.code == 0
    usage, _, _ = capsys.readouterr().out.partition("\n\n")
    assert set(OPTIONS[command].split()) <= set(re.findall(r"--[a-z][a-z-]*|\b[A-Z]+\b", usage))


def test_api_endpoints():
    from app.demo import build_demo
    from app.models import ModelShelf

    assert {f"/{name}" for name in ENDPOINTS} <= set(
        build_demo(ModelShelf(CHECKPOINTS)).get_api_info()["named_endpoints"]
    )


@pytest.mark.parametrize("origin", ORIGINS)
def test_recipe_keys(origin, tmp_path):
    written = RECIPE | ORIGINS[origin]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(written), encoding="utf-8")

    def holds(read, told):
        if isinstance(told, dict):
            return all(holds(getattr(read, key), value) for key, value in told.items())
        if isinstance(told, list):
            return len(read) == len(told) and all(map(holds, read, told))
        return read == told

    assert holds(load_recipe(path), written)


def test_names_in_a_saved_run_and_its_reading():
    for file in (ROOT / "app" / "recorded").glob("*.json.gz"):
        for entry in json.loads(gzip.decompress(file.read_bytes()))["runs"]:
            run = entry["run"]
            assert set(RUN) <= set(run)
            assert set(READING) <= set(run["reading"]) and set(PROBES) <= set(run["reading"]["probes"])


def test_files_of_a_checkpoint_that_load(tmp_path):
    files = "model.safetensors config.json tokenizer.json tokenizer_config.json memory_layout.json".split()
    for place in ("", "cot", "direct"):
        (tmp_path / place).mkdir(exist_ok=True)
        for name in files:
            shutil.copy(CHECKPOINTS / "rim-tiny" / place / name, tmp_path / place)
    methods = load_methods(tmp_path, "cpu")
    assert set(methods) == set(METHODS) and len({id(rim) for rim in methods.values()}) == 3


def test_files_of_an_adapter(make_rim, tmp_path):
    """An adapter folder holds no base; both are plain PEFT and transformers files."""
    from rim_probe.memory import MemoryLayout
    from rim_probe.model import RiM, load_base

    plain = make_rim()
    plain.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "memory_layout.json").unlink()
    rim = RiM.attach(*load_base(tmp_path / "base"), MemoryLayout(num_blocks=2))
    add_lora(rim)
    rim.save_pretrained(tmp_path / "adapter")
    wanted = {"adapter_model.safetensors", "adapter_config.json", "memory_layout.json", "base.json", "tokenizer.json"}
    assert wanted <= {path.name for path in (tmp_path / "adapter").iterdir()}
    assert RiM.from_pretrained(tmp_path / "adapter").layout.num_blocks == 2


def test_a_report_that_was_saved_is_told_again(capsys):
    assert main(["eval", "--from", str(CHECKPOINTS / "rim-tiny" / "metrics.json")]) == 0
    assert "McNemar" in capsys.readouterr().out
