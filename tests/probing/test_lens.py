"""The vocabulary lens: a planted code is read, noise is not, and both lenses are the model at its last layer."""

import json

import numpy as np
import pytest
import torch
from planted import PlantedStudy, chains

from rim_probe.errors import RiMError
from rim_probe.probing.lens import TARGETS, VocabularyLens, first_token, read_all, target_tokens
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


@pytest.fixture(scope="module")
def report(planted, lens):
    return lens.score(planted)


def test_the_tuned_lens_undoes_a_rotation_and_reads_noise_no_better_than_a_blind_lens(report):
    frame = report.frame()
    kl = frame[frame.metric.str.startswith("KL")].pivot(index="at layer", columns="of", values="value")
    (blind,) = kl.columns.difference(["logit lens", "tuned lens"])
    assert kl["tuned lens"][1] < 0.25 * kl["logit lens"][1] and kl["tuned lens"][1] < 0.4 * kl[blind][1]
    assert kl["tuned lens"][0] > 0.95 * kl[blind][0]


def test_results_are_ranked_where_the_lens_finds_them(planted, lens):
    """Rank 1 is the token that the lens would say; a result is NaN where a problem is not scored."""
    found, problems = read_all(lens, planted, "report"), planted.problems("report")
    top = lens.logits(planted.capture("memory", "report").cell(1, 2, "end"), 1).argmax(-1).tolist()
    gold = [first_token(lens.rim, problem.answer) for problem in problems]
    last = found.rank[1, 1, 3, -1, TARGETS.index("gold")]  # tuned lens, layer 1, last place of two blocks, last step
    assert ((last == 1) == (np.array(top) == gold)).all()
    first = found.rank[1, 1, 3, 0, TARGETS.index("gold")]
    assert np.isnan(first).tolist() == [p.steps[0][6:-2] == p.answer for p in problems]


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


def test_every_result_stands_beside_its_controls(report):
    assert report.n["report"] == SIZES["report"] and report.verdict
    frame = report.frame()
    at_cell = frame[(frame.metric == "mean reciprocal rank, tuned lens") & (frame["at step"] == 1)]
    assert at_cell.role.tolist() == ["score", "control", "control", "control"]
    assert set(report.settings["cell, best on choose"]["tuned lens"]) == {"result of step 1", "result of the last step"}
    everywhere = frame[frame.metric == "mean reciprocal rank"]
    assert len(everywhere) == 2 * 2 * LAYERS * K * (M + 1)


def test_values_that_say_nothing_of_the_step_are_left_out(rim):
    problems = [
        Problem("a", ("<<3+4=7>>", "<<7-2=5>>"), "5"),
        Problem("b", ("<<2+3=5>>", "<<5*1=5>>"), "5"),  # the result of step 1 is the answer
        Problem("c", ("<<1+1=2>>",), "2"),  # no step after the first
        Problem("d", (), "2"),
        Problem("e", ("<<6+2=8>>", "<<8+1=9>>"), "9"),
    ]
    tokens = target_tokens(rim, problems, [1, None], np.random.default_rng(0))
    gold = tokens[:, :, TARGETS.index("gold")]
    assert gold[:, 0].tolist() == [first_token(rim, "7"), -1, -1, -1, first_token(rim, "8")]
    assert gold[:, 1].tolist() == [first_token(rim, value) for value in "552"] + [-1, first_token(rim, "9")]
    # Another problem's result, and an operand that is neither the result nor the answer.
    assert tokens[0, 0, 1] == first_token(rim, "8")
    assert tokens[0, 0, 2] == first_token(rim, "3")
