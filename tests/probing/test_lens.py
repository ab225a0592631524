"""The vocabulary lens: a planted code is read, noise is not, and both lenses are the model at its last layer."""

import copy
import json

import numpy as np
import pytest
import torch
from planted import PlantedStudy, chains

from rim_probe.errors import RiMError
from rim_probe.probing.hooks import unembed
from rim_probe.probing.lens import VocabularyLens
from rim_probe.probing.lens_reading import TARGETS, Item, first_token, read_all, target_tokens
from rim_probe.probing.section import Section
from rim_probe.problems import Problem

SIZES = {"fit": 800, "choose": 60, "report": 60}
LAYERS, K, M, WIDTH = 3, 2, 1, 32


@pytest.fixture(scope="module")
def planted():
    """Layer 2 is random, layer 1 the same turned around (so that a linear map undoes it), layer 0 unrelated noise."""
    from conftest import tiny_rim

    rng = np.random.default_rng(0)
    turned, _ = np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))
    splits = {split: chains(count, seed) for seed, (split, count) in enumerate(SIZES.items())}
    states = {}
    for split, count in SIZES.items():
        last = rng.normal(size=(count, K, M + 1, WIDTH)) * 3
        states["memory", split] = np.stack([rng.normal(size=last.shape) * 3, last @ turned, last], axis=1)
    return PlantedStudy({"memory": tiny_rim(num_blocks=K)}, splits, states)


@pytest.fixture(scope="module")
def lens(planted):
    return VocabularyLens.fit(planted, steps=300)


def test_the_tuned_lens_undoes_a_rotation_that_the_logit_lens_cannot_read(planted, lens):
    found = read_all(lens, planted, "report")
    logit, tuned = found.kl[:, 1].mean((1, 2, 3))
    assert tuned < 0.25 * logit
    assert tuned < 0.4 * found.cell_kl.mean()


def test_noise_is_read_no_better_than_by_a_lens_that_is_blind_to_the_question(planted, lens):
    found = read_all(lens, planted, "report")
    assert found.kl[1, 0].mean() > 0.95 * found.cell_kl.mean()


def test_both_lenses_are_the_model_at_its_last_layer(planted, lens):
    states = planted.capture("memory", "report").cell(2, 1, "end")
    for name in ("logit", "tuned"):
        torch.testing.assert_close(lens.logits(states, 2, name), unembed(lens.rim, torch.from_numpy(states)))


def test_the_fit_is_the_same_for_a_seed_and_never_worse_than_the_logit_lens_on_choose(planted, lens):
    first, again = (VocabularyLens.fit(planted, steps=20, rows=500) for _ in range(2))
    assert first.weights.any() and torch.equal(again.weights, first.weights)
    untouched = VocabularyLens.fit(planted, steps=0)
    assert not untouched.weights.any()
    assert all(a <= b for a, b in zip(lens.history["choose_kl"], untouched.history["choose_kl"], strict=True))


def test_restored_it_reads_the_same_and_another_width_is_refused(planted, lens):
    settings = json.loads(json.dumps(lens.settings()))
    again = VocabularyLens.restore(lens.tensors(), settings, lens.rim)
    states = planted.capture("memory", "report").cell(1, 2, 1)
    torch.testing.assert_close(again.logits(states, 1), lens.logits(states, 1))
    with pytest.raises(RiMError, match="no lens"):
        lens.logits(states, 1, "other")
    narrow = {name: values[..., :5] for name, values in lens.tensors().items()}
    with pytest.raises(RiMError, match="fit it again"):
        VocabularyLens.restore(narrow, settings, lens.rim)


def test_the_report_is_plain_data_with_controls(planted, lens):
    section = lens.score(planted)
    assert Section.from_dict(json.loads(json.dumps(section.to_dict()))).name == "lens"
    assert sum(title.startswith("control") for title in section.tables[0].header) == 4
    assert section.n["report"] == SIZES["report"]


@pytest.mark.filterwarnings("error")
def test_problems_without_steps_have_no_gold_result_to_look_for(planted, lens):
    splits = {s: [Problem(p.question, (), p.answer) for p in given] for s, given in planted.splits.items()}
    bare = copy.copy(planted)
    bare.splits = splits
    section = lens.score(bare)
    assert "not defined" in section.summary and "nan" not in json.dumps(section.to_dict()).lower()
    assert all(row[1] == "not defined" for row in section.tables[0].rows)
    assert [figure.kind for figure in section.figures] == ["lines"]


def test_values_that_say_nothing_of_the_step_are_left_out(rim):
    problems = [
        Problem("a", ("<<3+4=7>>", "<<7-2=5>>"), "5"),
        Problem("b", ("<<2+3=5>>", "<<5*1=5>>"), "5"),  # the result of step 1 is the answer
        Problem("c", ("<<1+1=2>>",), "2"),  # no step after the first
        Problem("d", (), "2"),
        Problem("e", ("<<6+2=8>>", "<<8+1=9>>"), "9"),
    ]
    tokens = target_tokens(rim, problems, [Item("step 1", 0), Item("last", -1)], np.random.default_rng(0))
    gold = tokens[:, :, TARGETS.index("gold")]
    assert gold[:, 0].tolist() == [first_token(rim, "7"), -1, -1, -1, first_token(rim, "8")]
    assert gold[:, 1].tolist() == [first_token(rim, value) for value in "552"] + [-1, first_token(rim, "9")]
    # Another problem's result, and an operand that is neither the result nor the answer.
    assert tokens[0, 0, 1] == first_token(rim, "8")
    assert tokens[0, 0, 2] == first_token(rim, "3")
