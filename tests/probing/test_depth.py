"""Depth on the glass box, whose layers are known, and on small random models, whose numbers can be computed twice."""

import numpy as np
import pytest
import torch
from conftest import tiny_rim

from rim_probe.glassbox.box import END_LAYER, HELD_LAYER, LAYERS, glassbox
from rim_probe.memory import MemoryLayout
from rim_probe.probing import depth
from rim_probe.probing.depth import token_text
from rim_probe.probing.lens import VocabularyLens, places
from rim_probe.probing.linear import LinearMap
from rim_probe.probing.nearest_step.fit import BlockMap, StepDecoder
from rim_probe.probing.nearest_step.formula import Bank, StepMap
from rim_probe.probing.study import observe
from rim_probe.probing.words import carried_answers

QUESTION = "Anna has 3 apples and buys 14 more."


@pytest.fixture(scope="module")
def models():
    """A memory model, and as its base the same architecture with other weights."""
    return {"memory": tiny_rim(num_blocks=2), "base": tiny_rim(num_blocks=2, seed=1)}


@pytest.fixture(scope="module")
def seen(models):
    return observe(models["memory"], QUESTION)


@pytest.fixture(scope="module")
def control(models, seen):
    return depth.Control.of(models, seen)


@pytest.fixture(scope="module")
def lens(models):
    """With translators that change much."""
    generator = torch.Generator().manual_seed(0)
    weights, biases = torch.randn(2, 32, 32, generator=generator), torch.randn(2, 32, generator=generator)
    return VocabularyLens(models["memory"], (0, 1, 2), weights * 0.2, biases, {})


# ---------------------------------------------------------------------------------------------------- logit, tuned lens


@pytest.mark.parametrize(("name", "place"), [("logit", 0), ("tuned", 1)])
def test_a_cell_names_the_most_probable_tokens_beside_those_of_the_control(models, lens, seen, control, name, place):
    mode = depth.lens_modes(lens, seen, control, tuned=True)[place]
    assert mode["name"] == f"{name} lens" and mode["layers"] == [0, 1, 2] and "untrained" in mode["control"]
    assert [(at["block"], at["position"]) for at in mode["positions"]] == list(places(seen.capture))
    other = VocabularyLens(models["base"], lens.layers, lens.weights, lens.biases, {})
    for layer in (0, 1, 2):
        own, untrained = (
            a.logits(held.cell(layer, 2, "end"), layer, name).softmax(-1)[0]
            for a, held in ((lens, seen.capture), (other, control.capture))
        )
        wanted = {"cells": own, "control_cells": untrained, "minus": own - untrained}
        for key, scores in wanted.items():
            cell, best = mode[key][layer][-1], scores.topk(5)
            assert [entry["score"] for entry in cell] == pytest.approx(best.values.tolist(), abs=1e-4)
            assert [entry["text"] for entry in cell] == [token_text(lens.rim, id) for id in best.indices.tolist()]


def test_a_base_that_cannot_be_compared_is_no_control(models, seen):
    fewer = tiny_rim(num_blocks=2, seed=1)
    fewer.layout = MemoryLayout(num_blocks=2, slots_per_block=1)
    shallow = tiny_rim(num_blocks=2)
    shallow.model.config.num_hidden_layers = 1
    shallow.model.model.layers = shallow.model.model.layers[:1]
    short, other = tiny_rim(num_blocks=2, context=20), tiny_rim(num_blocks=2, bos=True)
    for base in (fewer, shallow, short, other):
        found = depth.Control.of(models | {"base": base}, seen)
        assert found.rim is found.capture is None and found.missing.endswith(".")


# -------------------------------------------------------------------------------------------------------- nearest step


def decoder(block: int = 2, width: int = 64) -> StepDecoder:
    """Reads the slots of one block at layer 1 through an orthogonal map, for a bank of three steps."""
    rng = np.random.default_rng(0)
    weights = np.linalg.qr(rng.normal(size=(width, width)))[0].astype(np.float32)
    bank = Bank(("<<1+1=2>>", "<<2+2=4>>", "<<3+3=6>>"), rng.normal(size=(3, width)).astype(np.float32))
    mapped = StepMap(LinearMap(weights, np.zeros(width, np.float32)), np.eye(width, dtype=np.float32))
    return StepDecoder(bank, {(block, 1): BlockMap(1, mapped, 0.5, 0.5, 1.0)}, {}, 1)


def test_the_map_of_a_block_reads_every_layer_and_the_control(seen, control):
    held, steps = seen.capture, decoder()
    mode = depth.step_mode(steps, seen, control)
    assert mode["positions"] == [{"block": 2, "position": "slots", "step": 1, "fitted_layer": 1}]
    assert "layer 1" in mode["what"] and mode["score_name"] == "cosine"
    mapped = steps.maps[2, 1].mapped
    for layer in held.layers:
        own = mapped.cosines(held.cell(layer, 2, "slots"), steps.bank.vectors)[0]
        untrained = mapped.cosines(control.capture.cell(layer, 2, "slots"), steps.bank.vectors)[0]
        for key, scores in {"cells": own, "control_cells": untrained, "minus": own - untrained}.items():
            cell = mode[key][layer][0]
            assert [entry["score"] for entry in cell] == pytest.approx(sorted(scores, reverse=True), abs=1e-4)
            assert cell[0]["text"] == steps.bank.texts[int(scores.argmax())]


# ----------------------------------------------------------------------------------------------------------- own words


def test_carried_words_stand_beside_the_words_with_the_models_own_slots(seen):
    stage1, layers = tiny_rim(num_blocks=2, seed=2), range(3)
    plain, *single = carried_answers(stage1, seen, [(), *zip(layers, strict=True)])
    mode = depth.words_mode(stage1, seen, plain, dict(zip(layers, single, strict=True)))
    assert mode["positions"] == [{"block": block, "position": "slots"} for block in (1, 2)]
    changed = 0
    for layer in layers:
        for block in (0, 1):
            ((own,), (without,), (minus,)) = (mode[key][layer][block] for key in ("cells", "control_cells", "minus"))
            readout = single[layer].readouts[block]
            assert own == {"text": readout.text.strip(), "score": pytest.approx(readout.probability, abs=1e-4)}
            assert without["text"] == plain.readouts[block].text.strip() and minus["text"] == own["text"]
            if own["text"] == without["text"]:  # teacher-forced it is what was decoded
                assert minus["score"] == pytest.approx(own["score"] - without["score"], abs=2e-4)
            else:
                changed += 1
                assert minus["score"] >= own["score"] - without["score"] - 2e-4  # not its first choice there
    assert changed


# --------------------------------------------------------------------------------------------------------------- ranks


@pytest.fixture(scope="module")
def boxed():
    models = {"memory": glassbox().rim, "base": glassbox(trained=False).rim}
    problem = next(
        p for p in glassbox().problems(1, 50, "report") if len({step[-3] for step in p.steps} | {p.question[8]}) == 4
    )
    return models, problem, observe(models["memory"], problem.question)


def test_a_result_is_on_top_in_its_own_block_from_the_layer_that_writes_it(boxed):
    models, problem, seen = boxed
    lens = VocabularyLens.plain(models["memory"])
    found = depth.ranks(lens, seen, depth.Control.of(models, seen), problem.steps, "gold")
    assert [(rank["step"], rank["value"]) for rank in found] == [
        (k, step[-3]) for k, step in enumerate(problem.steps, start=1)
    ]
    assert found[-1]["what"] == "result of gold step 3, the last" and "untrained" in found[0]["control_name"]
    for block, rank in enumerate(found, start=1):
        held = HELD_LAYER[block]
        assert rank["by_block"][block - 1][held:] == [1] * (LAYERS + 1 - held)
        # A state that says nothing ties with half of the vocabulary and is no hit.
        assert min(rank["by_block"][block - 1][:held]) > 5 and min(rank["best"][:held]) > 5
        assert rank["best"] == np.min(rank["by_block"], axis=0).tolist()
        assert min(rank["control"]) > 1
    assert found[0]["by_block"][1][END_LAYER] > 1  # block 2 says its own result


def test_without_a_base_the_other_results_are_the_control(boxed):
    models, problem, seen = boxed
    lens, nobody = VocabularyLens.plain(models["memory"]), depth.Control()
    found = depth.ranks(lens, seen, nobody, problem.steps, "gold")
    for rank in found:
        others = [other["best"] for other in found if other is not rank]
        assert rank["control"] == pytest.approx(np.median(others, axis=0).tolist())
    (single,) = depth.ranks(lens, seen, nobody, problem.steps[:1], "gold")
    assert single["control"] is None and "no other step" in single["control_name"]


def test_what_is_no_equation_is_not_looked_for_and_long_numbers_by_their_first_piece(seen, models):
    lens = VocabularyLens.plain(models["memory"])
    (rank,) = depth.ranks(lens, seen, depth.Control(), ["<<so what>>", "<<400+56=456>>", "half"], "gold")
    pieces = lens.rim.encode_text("456")
    assert len(pieces) > 1 and rank["step"] == 2 and f"first piece, {token_text(lens.rim, pieces[0])}" in rank["what"]
    logits = lens.logits(seen.capture.cell(1, 2, "end"), 1, "logit")[0]
    assert rank["by_block"][1][1] <= (logits > logits[pieces[0]]).sum().item() + 1
    assert depth.ranks(lens, seen, depth.Control(), ["half"], "gold") == []
