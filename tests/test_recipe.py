"""Recipes are read as written, and every mistake in one is a sentence that names the place."""

from pathlib import Path

import pytest
import yaml

import rim_probe.training.recipe as recipe_module
from rim_probe.errors import RecipeError
from rim_probe.training.recipe import load_recipe

SHIPPED = sorted((Path(recipe_module.__file__).parent / "recipes").glob("*.yaml"))
STAGE = {"name": "one", "objective": "cot", "rows": 10, "learning_rate": 1e-3}
RECIPE = {"output": "out", "base": "model", "data": {"files": ["a.txt"]}, "stages": [STAGE]}


def write(folder: Path, **changes) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE | changes), encoding="utf-8")
    return path


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipe_loads(path):
    recipe = load_recipe(path)
    assert recipe.output and recipe.stages


def test_values_arrive_with_defaults_and_overrides(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "output: out\nscratch: {layers: 2}\nlayout: {num_blocks: 3}\ndata: {world: {max_steps: 2}, rows: 5}\n"
        "stages:\n  - {name: one, objective: stage2, rows: 10, learning_rate: 1e-3, warmup: 0}\n"
    )
    recipe = load_recipe(path, output="elsewhere", seed=None)
    assert (recipe.output, recipe.seed, recipe.lora, recipe.base) == ("elsewhere", 0, None, None)
    assert (recipe.scratch.layers, recipe.layout.num_blocks, recipe.layout.slots_per_block) == (2, 3, 2)
    assert (recipe.data.world.max_steps, recipe.data.world.min_steps, recipe.data.rows) == (2, 1, 5)
    (stage,) = recipe.stages
    assert stage.learning_rate == 0.001 and isinstance(stage.learning_rate, float)  # `1e-3` is text to YAML 1.1
    assert stage.warmup == 0.0 and isinstance(stage.warmup, float)


@pytest.mark.parametrize(
    ("changes", "place", "said"),
    [
        ({"outputs": "x"}, "recipe", "outputs"),
        ({"layout": {"blocks": 5}}, "recipe.layout", "blocks"),
        ({"stages": [STAGE, STAGE | {"name": "two", "lr": 1}]}, "recipe.stages[1]", "lr"),
        ({"stages": [{"name": "one"}]}, "recipe.stages[0]", "objective"),
        ({"stages": ["cot"]}, "recipe.stages[0]", "mapping"),
        ({"stages": []}, "recipe.stages", "at least 1"),
        ({"stages": [STAGE, STAGE]}, "recipe", "name"),
        ({"stages": [STAGE | {"rows": "many"}]}, "recipe.stages[0].rows", "'many'"),
        ({"stages": [STAGE | {"rows": 0}]}, "recipe.stages[0].rows", "1"),
        ({"stages": [STAGE | {"learning_rate": 3}]}, "recipe.stages[0].learning_rate", "1"),
        ({"stages": [STAGE | {"learning_rate": float("nan")}]}, "recipe.stages[0].learning_rate", "nan"),
        ({"stages": [STAGE | {"objective": "stage3"}]}, "recipe.stages[0].objective", "'stage1', 'stage2'"),
        ({"stages": [STAGE | {"slot_labels": 6}]}, "recipe.stages[0]", "stage1 and interchange"),
        ({"stages": [STAGE | {"memory": False}]}, "recipe.stages[0]", "memory: false goes with stage1"),
        ({"stages": [STAGE | {"objective": "interchange"}], "layout": {"num_blocks": 0}}, "recipe", "num_blocks"),
        ({"stages": [STAGE | {"name": "a/b"}]}, "recipe.stages[0]", "'a/b'"),
        ({"stages": [STAGE | {"dropout": 0.1}]}, "recipe", "lora"),
        ({"stages": [STAGE | {"objective": "stage2"}], "layout": {"num_blocks": 0}}, "recipe", "num_blocks"),
        ({"scratch": {}}, "recipe", "one of base"),
        ({"base": None, "scratch": {}, "lora": {}}, "recipe", "lora needs a base"),
        ({"base": None, "scratch": {"width": 10, "heads": 4}}, "recipe.scratch", "width"),
        ({"lora": {"r": -1}}, "recipe.lora.r", "0"),
        ({"data": {}}, "recipe.data", "world"),
        ({"data": {"world": {}, "files": ["a.txt"], "rows": 3}}, "recipe.data", "world"),
        ({"data": {"world": {}}}, "recipe.data", "rows"),
        ({"data": {"world": {}, "rows": 3, "validation": "v.txt"}}, "recipe.data", "validation"),
        ({"data": {"files": "a.txt"}}, "recipe.data.files", "list"),
        ({"data": {"files": ["a.txt"], "repeats": [1, 2]}}, "recipe.data", "repeats"),
        ({"data": {"files": ["a.txt"], "repeats": [0]}}, "recipe.data.repeats[0]", "0"),
        ({"data": {"world": {}, "rows": 3, "repeats": [1]}}, "recipe.data", "repeats"),
        ({"data": {"world": {"min_steps": 9}, "rows": 3}}, "recipe.data.world", "min_steps"),
        ({"layout": {"num_blocks": 1000}}, "recipe.layout", "num_blocks"),
        ({"seed": -1}, "recipe.seed", "0"),
        ({"output": ""}, "recipe", "output"),
        ({"compile": "yes"}, "recipe.compile", "'yes'"),
    ],
)
def test_mistakes_are_named(tmp_path, changes, place, said):
    path = write(tmp_path, **changes)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    sentence = str(caught.value)
    assert sentence.startswith(f"{path}: {place}") and said in sentence and "\n" not in sentence


@pytest.mark.parametrize(
    "text",
    ["output: [", "\x00", "- 1\n- 2", "", "[" * 400, "a: 2026-99-99", "a: " + "9" * 5000],
)
def test_what_is_not_a_recipe_is_refused(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=r"not YAML|must be a mapping"):
        load_recipe(path)


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"missing\.yaml cannot be read \(No such file"):
        load_recipe(tmp_path / "missing.yaml")
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path)
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(RecipeError, match="is not YAML"):
        load_recipe(tmp_path / "bytes.yaml")
