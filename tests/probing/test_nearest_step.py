"""Nearest explicit step: a planted code is found in its cell alone, noise is not, controls have equal means."""

import json

import numpy as np
import pytest
from planted import PlantedStudy, observed, planted_capture

from rim_probe.errors import RiMError
from rim_probe.glassbox import glassbox, parts
from rim_probe.probing.linear import Inputs
from rim_probe.probing.nearest_step import search as fitting
from rim_probe.probing.nearest_step.fit import StepDecoder
from rim_probe.probing.nearest_step.formula import (
    Place,
    StepMap,
    read_places,
    read_steps,
    step_space,
)
from rim_probe.probing.nearest_step.results import BANK, BEFORE, NEW, TOP1
from rim_probe.probing.results import Report
from rim_probe.problems import Problem

SIZES = {"fit": 250, "choose": 40, "report": 60}
K, M, WIDTH, LAYER, BLOCK = 3, 2, 136, 1, 2
STEP = 2  # what the block holds
EQUAL = {"best 2 of the last 4 question tokens", "2 lone end tokens at a block's place"}
FEWER = {"last question token", "last 2 question tokens"}
OTHERS = {"shuffled pairing", "another question's memory", "guessing"}


def code(step: str, directions: np.ndarray) -> np.ndarray:
    """A step as a linear code: one direction for each of its four parts."""
    left, sign, right, result = parts(step)
    return directions[left] + directions[10 + "+-".index(sign)] + directions[12 + right] + directions[22 + result]


class Study(PlantedStudy):
    """A planted study of the glass box, with a folder for the states of its controls."""

    def __init__(self, folder, planted: bool = True, seed: int = 0):
        box, rng = glassbox(), np.random.default_rng(seed)
        directions, splits, states = rng.normal(size=(32, WIDTH)), {}, {}
        for split, count in SIZES.items():
            splits[split] = box.problems(4, count, split)
            held = rng.normal(size=(count, 2, K, M + 1, WIDTH)) * 0.2
            if planted:
                held[:, LAYER, BLOCK - 1, 0] += [code(problem.steps[STEP - 1], directions) for problem in splits[split]]
            states["memory", split] = held
        super().__init__({"memory": box.rim}, splits, states, seed)
        self.folder = folder


@pytest.fixture(autouse=True, scope="module")
def small_search():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "CONTEXTS", 2)
        patch.setattr(fitting, "FIT_DISTRACTORS", 6)
        yield


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return Study(tmp_path_factory.mktemp("planted"))


@pytest.fixture(scope="module")
def decoder(study):
    return StepDecoder.fit(study)


@pytest.fixture(scope="module")
def report(study, decoder):
    return decoder.score(study)


def top1(report, group="all", step=None, metric=TOP1):
    """What was read from -> its result."""
    place = {} if step is None else {"step": step}
    return {r.of: r.estimate for r in report.results if (r.metric, r.group, dict(r.place)) == (metric, group, place)}


def test_a_planted_step_is_found_in_its_cell_and_every_control_fails(report, decoder):
    found = top1(report, step=STEP)
    assert found["memory"].low > 0.75 and found["memory"].n == SIZES["report"]
    assert top1(report, step=STEP, metric=BANK)["memory"].low > 0.75
    for control in EQUAL | FEWER | OTHERS:
        assert found[control].high < 0.3
    assert decoder.claims[STEP] == [BLOCK]
    searched = {tuple(r.place.values()): r.estimate.value for r in report.results if len(r.place) == 3}
    assert max(searched, key=searched.get) == (STEP, LAYER, BLOCK)


def test_noise_scores_at_chance_and_is_told_as_no_more_than_the_controls(tmp_path):
    study = Study(tmp_path, planted=False)
    report = StepDecoder.fit(study).score(study)
    found = top1(report)
    assert found["memory"].low <= found["guessing"].value + 0.03
    assert not any(result.goal.met(result.estimate) for result in report.results if result.goal)
    assert "more than" not in report.verdict.replace("no more and no less than", "")


def test_the_memory_and_its_controls_have_as_many_cells_and_features(report):
    read = report.settings["read from: cells, features, and the cell chosen on choose for each step"]
    means = {name: tuple(told[:2]) for name, told in read.items()}
    assert set(means) == {"memory"} | EQUAL | FEWER and set(top1(report)) == set(means) | OTHERS
    assert all(means[name] == means["memory"] for name in EQUAL)
    assert all(means[name] < means["memory"] for name in FEWER)


def test_a_memory_that_holds_what_a_control_holds_is_scored_as_that_control(tmp_path):
    """The same states through the same function: no lead, and the verdict says so."""
    twin = Study(tmp_path)
    question = next(source for source in fitting.control_sources(twin) if source.name in EQUAL)
    for split in SIZES:
        slots = [
            [question.read(split, layer, k).reshape(-1, M, WIDTH) for k in range(1, K + 1)] for layer in twin.layers
        ]
        held = np.array(slots).transpose(2, 0, 1, 3, 4)
        twin._captures["memory", split] = planted_capture(np.concatenate([held, held[:, :, :, :1]], axis=3))
    report = StepDecoder.fit(twin).score(twin)
    lead = top1(report, metric=f"{TOP1}: memory less control")[question.name]
    assert lead.value == lead.low == lead.high == 0
    assert f"no more and no less than {question.name}" in report.verdict


def test_steps_before_the_last_and_unseen_chains_are_told_apart(report, study):
    problems = study.problems("report")
    known = {problem.steps for split in ("fit", "choose") for problem in study.problems(split)}
    assert top1(report, NEW)["memory"].n == sum(problem.steps not in known for problem in problems)
    # Steps 1 and 2 of 3, of which one is planted.
    assert top1(report, BEFORE)["memory"].value > top1(report)["memory"].value


def test_the_report_survives_json_and_comes_again_from_a_restored_decoder(study, decoder, report):
    assert Report.from_dict(json.loads(json.dumps(report.to_dict()))).to_dict() == report.to_dict()
    assert StepDecoder.restore(decoder.tensors(), decoder.settings()).score(study).to_dict() == report.to_dict()


def test_one_question_with_gold_steps_says_which_is_met(study, decoder):
    steps = study.problems("report")[0].steps
    block = decoder.explain(observed(study.capture("memory", "report")), steps)["blocks"][BLOCK - 1]
    assert block["step"] == STEP
    assert block["nearest"][0]["step"] == steps[STEP - 1]
    assert block["match"] is True and block["nearest"][0]["gold"] == STEP
    assert {one["step"] for one in block["others"]} == {1, 3}


@pytest.mark.parametrize("plain_bytes", [2**21, 1024], ids=["whole", "in 8 bits"])
def test_a_restored_decoder_decodes_and_claims_the_same(study, decoder, monkeypatch, plain_bytes):
    monkeypatch.setattr("rim_probe.probing.compact.PLAIN_BYTES", plain_bytes)
    restored = StepDecoder.restore(decoder.tensors(), json.loads(json.dumps(decoder.settings())))
    assert restored.claims == decoder.claims
    seen = observed(study.capture("memory", "report"))
    own, again = (one.explain(seen)["blocks"][BLOCK - 1]["nearest"][0] for one in (decoder, restored))
    assert own["step"] == again["step"] and own["cosine"] == pytest.approx(again["cosine"], abs=0.02)
    with pytest.raises(RiMError, match="fit it anew"):
        StepDecoder.restore({}, decoder.settings())


def test_problems_without_steps_are_left_out_and_too_few_are_refused(tmp_path):
    study = Study(tmp_path)
    study.splits["fit"] = [Problem(problem.question, (), problem.answer) for problem in study.splits["fit"]]
    with pytest.raises(RiMError, match="at least 30 problems with steps"):
        StepDecoder.fit(study)


def test_problems_of_the_reports_kind_are_fitted_on_too(tmp_path):
    study = Study(tmp_path)
    for part, source in (("fit-heldout", "fit"), ("choose-heldout", "choose")):
        study.splits[part] = study.splits[source]
        study._captures["memory", part] = study._captures["memory", source]
    assert fitting.splits_of(study, "choose") == ("choose-heldout",)
    fit = fitting.read_fit(study)
    assert len(fit.tasks[0].rows) == 2 * SIZES["fit"] == len(fitting.memory_source(study).read("fit", 1, 1))


# ------------------------------------------------------------------------------------------------- what is read


def test_branches_are_read_as_if_alone(every_rim):
    question, before, texts = "Anna has 3?", ("<<3+14=17>>",), ("<<17-2=15>>", "<<1+2=33>>")
    _, both = read_steps(every_rim, [("Hi 3", (), ["<<1+1=2>>"]), (question, before, texts)], [0, 2])
    for text, states in zip(texts, both, strict=True):
        (alone,) = read_steps(every_rim, [(question, before, [text])], [0, 2])
        np.testing.assert_allclose(alone[0], states, atol=2e-5)


def test_a_question_longer_than_the_context_is_refused(make_rim):
    with pytest.raises(RiMError, match="reads at most 32"):
        read_steps(make_rim(context=32), [("Anna has 3?", ("<<3+14=17>>",) * 4, ["<<3+14=17>>"])], [1])


def test_a_reading_is_relative_to_what_every_place_reads():
    box, references = glassbox(), ("<<1+1=2>>", "<<9-2=7>>")
    problems = box.problems(4, 2, "report")
    places = [Place(i, 1, (problem.steps[0], "<<3+3=6>>")) for i, problem in enumerate(problems)]
    for place, held in zip(places, read_places(box.rim, problems, places, references, 1), strict=True):
        (states,) = read_steps(box.rim, [(problems[place.problem].question, (), (*place.texts, *references))], [1])
        np.testing.assert_allclose(held, (states[:2] - states[2:].mean(0))[:, 0], atol=1e-5)


# ------------------------------------------------------------------------------------------------- space and maps


def test_readings_are_white_in_their_space():
    rng = np.random.default_rng(0)
    places = [Place(i, 1, (f"a{i}", f"b{i}")) for i in range(400)]
    read = [rng.normal(size=(2, 3)).astype(np.float32) * [1, 5, 25] for _ in places]
    white = step_space(places, read).whitened(np.concatenate(read))
    np.testing.assert_allclose(np.cov(white.T), np.eye(3), atol=0.1)


def test_the_map_finds_a_weak_direction_that_states_tell_among_loud_ones_that_they_do_not():
    rng = np.random.default_rng(0)
    states = rng.normal(size=(2000, 6)).astype(np.float32)
    targets = np.hstack([0.05 * states[:, :1], rng.normal(size=(2000, 5))])
    mapped = StepMap.fit(Inputs([states]), np.arange(2000), targets)
    assert abs(mapped.keys[0, 0]) > 10 * abs(mapped.keys[1:, 0]).max()
    assert abs(np.corrcoef(mapped.to_directions(states)[:, 0], states[:, 0])[0, 1]) > 0.99
