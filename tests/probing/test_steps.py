"""Nearest explicit step: a planted code is found in its cell alone, noise stays at chance, controls fail."""

import json
from collections import Counter

import numpy as np
import pytest
from planted import PlantedStudy, observed

from rim_probe.errors import RiMError
from rim_probe.glassbox import glassbox, parts
from rim_probe.probing import step_search
from rim_probe.probing.bank import Reading, read_steps
from rim_probe.probing.section import Section
from rim_probe.probing.step_maps import CANONICAL, Bank, LinearMap, Regression
from rim_probe.probing.step_space import (
    DISTRACTORS,
    Candidates,
    Place,
    covering,
    places_of,
    ranks_of,
    read_places,
    share_within,
    unit,
)
from rim_probe.probing.steps import StepDecoder
from rim_probe.problems import Problem

SIZES = {"fit": 200, "choose": 40, "report": 60}
K, M, WIDTH, LAYER, BLOCK = 2, 1, 20, 1, 2
STEP = 2  # what the block holds
CONTROLS = {"shuffled pairing", "last question token", "mean slot", "another question's memory"}


def code(step: str, directions: np.ndarray) -> np.ndarray:
    """A step as a linear code: one direction for each of its four parts."""
    left, sign, right, result = parts(step)
    return directions[left] + directions[10 + "+-".index(sign)] + directions[12 + right] + directions[22 + result]


class Planted(PlantedStudy):
    """A planted study whose steps are read by the glass box; every other problem is answered right."""

    def right(self, split):
        return (np.arange(len(self.splits[split])) % 2 == 0)[:, None].repeat(self.K, axis=1)


def planted_study(planted: bool = True, seed: int = 0) -> Planted:
    """Noise everywhere; where `planted`, slot 1 of block 2 at layer 1 also holds step 2."""
    box, rng = glassbox(), np.random.default_rng(seed)
    directions = rng.normal(size=(32, WIDTH))
    splits = {split: box.problems(4, count, split) for split, count in SIZES.items()}
    states = {}
    for split, problems in splits.items():
        held = rng.normal(size=(len(problems), 2, K, M + 1, WIDTH)) * 0.2
        if planted:
            held[:, LAYER, BLOCK - 1, 0] += [code(problem.steps[STEP - 1], directions) for problem in problems]
        states["memory", split] = held
    return Planted({"memory": box.rim}, splits, states, seed)


@pytest.fixture(autouse=True, scope="module")
def small_search():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_search, "MOST_READING_LAYERS", 1)
        patch.setattr(step_search, "CONTEXTS", 2)
        patch.setattr(step_search, "FIT_DISTRACTORS", 6)
        yield


@pytest.fixture(scope="module")
def study():
    return planted_study()


@pytest.fixture(scope="module")
def decoder(study):
    return StepDecoder.fit(study)


@pytest.fixture(scope="module")
def section(study, decoder):
    return decoder.score(study)


@pytest.fixture(scope="module")
def noise():
    study = planted_study(planted=False)
    return StepDecoder.fit(study).score(study)


def rows(section, table=0):
    return {row[0]: row[1:] for row in section.tables[table].rows}


def test_a_planted_step_is_found_in_its_cell_and_every_control_fails(section, decoder):
    by_step = rows(section, 1)
    cell, n, top1, bank = by_step["step 2: memory, best cell"]
    assert cell.startswith(f"layer {LAYER}, block {BLOCK}") and n == SIZES["report"]
    assert top1.low > 0.85 and bank.low > 0.85
    for control in CONTROLS:
        assert by_step[f"step 2: control: {control}"][2].high < 0.3
    assert decoder.claims[STEP] == [BLOCK]


def test_to_know_a_part_of_a_step_is_not_to_know_the_step(section):
    """The left number of step 2 is the result of step 1, which says only that."""
    by_step = rows(section, 1)
    assert by_step["step 1: memory, best cell"][2].high < 0.5 < by_step["step 2: memory, best cell"][2].low


def test_noise_scores_at_chance(noise):
    own, bank = rows(noise)["memory, best cell"][0], rows(noise)["memory, best cell"][3]
    distinct = noise.settings["bank"]
    assert own.low <= noise.data["chance"]
    assert bank.low <= 1 / distinct <= bank.high
    assert not any(target.met for target in noise.targets)
    assert "missed" in noise.summary


def test_the_report_names_every_choice_and_survives_json(section):
    assert {name.removeprefix("control: ") for name in rows(section) if name.startswith("control")} == CONTROLS
    assert section.settings["cells of the memory (layers x blocks x positions)"] == 2 * K * 2
    assert section.n["report"] == SIZES["report"]
    assert "best control" in section.data and section.data["best control"] in CONTROLS
    apart = rows(section, 2)
    right, wrong = apart["answered right: memory, best cell"], apart["answered wrong: memory, best cell"]
    assert right[0] + wrong[0] == SIZES["report"]
    assert Section.from_dict(json.loads(json.dumps(section.to_dict()))).to_dict() == section.to_dict()


def test_the_best_control_is_the_highest_one(section):
    own = {name: row[0].value for name, row in rows(section).items() if name.startswith("control")}
    assert own[f"control: {section.data['best control']}"] == max(own.values())
    memory = rows(section)["memory, best cell"][0].value
    assert section.targets[1].value.value == pytest.approx(memory - max(own.values()))


def test_one_question_without_gold_steps_has_decodes_and_no_scores(study, decoder):
    seen = observed(study.capture("memory", "report"))
    told = decoder.explain(seen)
    json.dumps(told)
    assert [block["block"] for block in told["blocks"]] == list(range(1, K + 1))
    for block in told["blocks"]:
        cosines = [one["cosine"] for one in block["nearest"]]
        assert len(cosines) == 3 and cosines == sorted(cosines, reverse=True)
        assert block["match"] is None and all(one["gold"] is None for one in block["nearest"])


def test_one_question_with_gold_steps_says_which_is_met(study, decoder):
    steps = study.problems("report")[0].steps
    block = decoder.explain(observed(study.capture("memory", "report")), steps)["blocks"][BLOCK - 1]
    assert block["step"] == STEP
    assert block["nearest"][0]["step"] == steps[STEP - 1]
    assert block["match"] is True and block["nearest"][0]["gold"] == STEP
    assert {one["step"] for one in block["others"]} == {1, 3}


def test_a_restored_decoder_decodes_and_claims_the_same(study, decoder):
    restored = StepDecoder.restore(decoder.tensors(), json.loads(json.dumps(decoder.settings())))
    seen = observed(study.capture("memory", "report"))
    assert restored.explain(seen) == decoder.explain(seen)
    assert restored.claims == decoder.claims


def test_a_decode_tells_how_many_problems_it_can_be_right_for(study, decoder):
    """The bank holds the steps of "fit" alone; a decoder saved before this was measured says nothing of it."""
    own = {step for problem in study.problems("fit") for step in problem.steps}
    asked = [problem.steps[STEP - 1] for problem in study.problems("choose")]
    seen = observed(study.capture("memory", "report"))
    told = decoder.explain(seen)["blocks"][BLOCK - 1]
    assert told["coverage"] == pytest.approx(np.mean([step in own for step in asked]))
    settings = decoder.settings()
    for one in settings["maps"]:
        del one["coverage"]
    assert "coverage" not in StepDecoder.restore(decoder.tensors(), settings).explain(seen)["blocks"][0]


def test_the_report_tells_what_the_stored_form_costs(study, monkeypatch):
    monkeypatch.setattr("rim_probe.probing.compact.PLAIN_BYTES", 1024)
    monkeypatch.setattr("rim_probe.probing.step_store.MOST_STEPS", STEP)
    monkeypatch.setattr("rim_probe.probing.step_store.MOST_TEXTS", 60)
    decoder = StepDecoder.fit(study)
    assert set(decoder.claims) == set(range(1, STEP + 1)), "what is not stored is not claimed"
    found = decoder.score(study)
    whole, stored = rows(found, 3).values()
    assert stored[0].n == whole[0].n and stored[0].value < whole[0].value - 0.05
    assert "what is stored is right" in found.summary
    restored = StepDecoder.restore(decoder.tensors(), decoder.settings())
    assert len(restored.bank.texts) == 60 and restored.coverage[BLOCK, STEP] < decoder.coverage[BLOCK, STEP]


def test_the_same_seed_gives_the_same_report(study, decoder, section):
    again = StepDecoder.restore(decoder.tensors(), decoder.settings())
    assert again.score(study).to_dict() == section.to_dict()


def test_a_bank_of_the_users_own(study):
    own = ["<<1+1=2>>", "<<9-9=0>>", "<<2+2=5>>"]  # the last two occur in no problem
    decoder = StepDecoder.fit(study, bank=own)
    assert decoder.bank.texts == tuple(own)
    told = decoder.explain(observed(study.capture("memory", "report")))
    assert {one["step"] for one in told["blocks"][0]["nearest"]} == set(own)


def test_problems_without_steps_are_left_out_and_too_few_are_refused(study):
    bare = [Problem(problem.question, (), problem.answer) for problem in study.problems("fit")]
    captures = {key: study.capture(*key) for key in (("memory", split) for split in SIZES)}
    other = Planted.__new__(Planted)
    other.__dict__.update(study.__dict__)
    other.splits, other._captures = {**study.splits, "fit": bare}, captures
    with pytest.raises(RiMError, match="at least 30 problems with steps"):
        StepDecoder.fit(other)


def test_problems_of_the_reports_kind_are_fitted_on_too():
    study = planted_study()
    for part, source in (("fit-heldout", "fit"), ("choose-heldout", "choose")):
        study.splits[part] = study.splits[source]
        study._captures["memory", part] = study._captures["memory", source]
    assert len(step_search.problems_of(study, "fit")) == 2 * SIZES["fit"]
    assert step_search.splits_of(study, "choose") == ("choose-heldout",)
    found = StepDecoder.fit(study).score(study)
    assert rows(found)["memory, best cell, fitted on “fit” alone"][0].value > 0.2
    assert found.n["fit"] == 2 * SIZES["fit"]


# ------------------------------------------------------------------------------------------------- the bank


def test_alternatives_are_read_as_if_alone(every_rim):
    first = Reading("Anna has 3?", ("<<3+14=17>>", "<<17-2=15>>"), (("<<3+4=7>>", "<<1+2=33>>"), ("<<17-3=15>>",)))
    both = read_steps(every_rim, [first, Reading("Hi 3", ("<<1+1=2>>",))], [0, 2])
    for t, step in enumerate(first.steps):
        for place, text in enumerate((step, *first.alternatives[t])):
            alone = read_steps(every_rim, [Reading(first.question, (*first.steps[:t], text))], [0, 2])[0][t][0]
            np.testing.assert_allclose(both[0][t][place], alone, atol=2e-5)


def test_many_alternatives_go_into_more_rows(rim, monkeypatch):
    reading = Reading("Anna has 3?", ("<<3+14=17>>",), (tuple(f"<<3+{n}=17>>" for n in range(1, 9)),))
    whole = read_steps(rim, [reading], [1])
    monkeypatch.setattr("rim_probe.probing.bank.ROW_TOKENS", 1)
    np.testing.assert_allclose(read_steps(rim, [reading], [1])[0][0], whole[0][0], atol=2e-5)


def test_a_question_longer_than_the_context_is_refused(make_rim):
    with pytest.raises(RiMError, match="reads at most 32"):
        read_steps(make_rim(context=32), [Reading("Anna has 3?", ("<<3+14=17>>",) * 4)], [1])


# ------------------------------------------------------------------------------------------------- the space and maps


def test_a_reading_is_relative_to_what_every_place_reads():
    box, references = glassbox(), ("<<1+1=2>>", "<<9-2=7>>")
    problems = box.problems(4, 2, "report")
    places = [Place(i, 1, (problem.steps[0], "<<3+3=6>>"), ("<<4+4=8>>",)) for i, problem in enumerate(problems)]
    read = read_places(box.rim, problems, places, references, [1])
    for place, held in zip(places, read, strict=True):
        problem = problems[place.problem]
        texts = (*place.candidates[1:], *place.guests, *references)
        (states,) = read_steps(box.rim, [Reading(problem.question, problem.steps[:1], (texts,))], [1])[0]
        np.testing.assert_allclose(held, states[:3] - states[3:].mean(0), atol=1e-5)


def test_places_hold_the_step_the_own_steps_and_twenty_others():
    problem = Problem("q", ("<<12+30=42>>", "<<42*2=84>>", "no equation"), "84")
    rng = np.random.default_rng(0)
    others = [f"<<{n}+1={n + 1}>>" for n in range(40)]
    for place in places_of([problem], [0], others, rng):
        assert place.candidates[0] == problem.steps[place.step - 1]
        assert set(problem.steps) < set(place.candidates)
        assert len(set(place.candidates)) == len(place.candidates) == 3 + DISTRACTORS


def test_covering_problems_hold_every_step_as_often_as_wanted():
    problems = [Problem(str(n), (f"<<{n % 7}+1={n % 7 + 1}>>",), "") for n in range(70)]
    problems.append(Problem("once", ("<<1+1=2>>", "<<5+5=10>>"), ""))
    chosen = Counter(step for i in covering(problems, 2, np.random.default_rng(0)) for step in problems[i].steps)
    assert chosen.pop("<<5+5=10>>") == 1
    assert len(chosen) == 7 and set(chosen.values()) <= {2, 3}


def test_a_prediction_that_says_nothing_ranks_at_chance():
    rng = np.random.default_rng(0)
    asked = Candidates(np.arange(3), rng.normal(size=(3, 5, 4)).astype(np.float32), np.array([5, 5, 3]), ["a"] * 3)
    np.testing.assert_allclose(asked.ranks(np.zeros((3, 4))), [2, 2, 1])
    assert share_within(asked.ranks(asked.vectors[:, 0]), 1) == 1


def test_ranks_count_ties_half():
    np.testing.assert_allclose(ranks_of(np.array([[1.0, 1.0, 2.0, 0.0]]), np.array([1.0])), [1.5])
    assert share_within(np.array([0.5, np.nan]), 1) == 0


def test_ridge_is_that_of_scikit_learn():
    from sklearn.linear_model import Ridge

    rng = np.random.default_rng(0)
    states, targets = rng.normal(size=(50, 6)) * [1, 2, 3, 4, 5, 6] + 7, rng.normal(size=(50, 3))
    regression = Regression(states, seed=0)
    mapped = regression.solve(np.arange(50), targets).ridge_map(0.1)
    model = Ridge(alpha=0.1 * 50).fit((states - states.mean(0)) / states.std(0), targets)
    np.testing.assert_allclose(
        mapped.predict(states), model.predict((states - states.mean(0)) / states.std(0)), atol=1e-4
    )


def test_what_is_recalled_lies_between_the_steps_of_the_bank():
    rng = np.random.default_rng(0)
    bank = Bank(("a", "b", "c"), np.eye(3, dtype=np.float32))
    same = LinearMap(np.eye(3), np.zeros(3), np.eye(3), np.zeros(3))
    states = np.array([[2.0, 0.5, 0.1]]) + 0.01 * rng.normal(size=(1, 3))
    np.testing.assert_allclose(bank.recalled(same, states, 1000.0), [[1, 0, 0]], atol=1e-6)
    np.testing.assert_allclose(bank.recalled(same, states, 0.0), [[1 / 3, 1 / 3, 1 / 3]], atol=1e-6)
    assert np.isnan(bank.ranks(same, states, ["unknown"])).all()
    assert bank.ranks(same, states, ["b"]) == [1]


def test_canonical_directions_find_what_ridge_drowns():
    """One weak shared direction among loud ones that have nothing to do with each other."""
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(2000, 1))
    states = np.hstack([shared, rng.normal(size=(2000, 5))])
    targets = np.hstack([0.05 * shared, rng.normal(size=(2000, 5))])
    solution = Regression(states, seed=0).solve(np.arange(2000), targets)
    mapped = solution.canonical_map(1e-3)
    assert mapped.weights.shape[1] == min(CANONICAL, 6)
    first = unit(mapped.weights[:, 0])
    assert abs(first[0]) > 0.95
