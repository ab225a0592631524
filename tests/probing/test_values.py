"""Value probes: a planted linear code is found in its cell alone, noise stays at chance, memorising is told apart."""

import json
from fractions import Fraction

import numpy as np
import pytest
from planted import PlantedStudy, chains, observed, result_of

from rim_probe.errors import RiMError
from rim_probe.probing.quantities import MOST_DIGITS, PARTS, part_of, targets_of
from rim_probe.probing.values import ValueProbes
from rim_probe.problems import Problem

SIZES = {"fit": 500, "choose": 150, "report": 250}
K, M, WIDTH, LAYER, BLOCK = 2, 1, 16, 1, 2


def planted_study(wide: int = WIDTH, code: bool = True, seed: int = 0) -> PlantedStudy:
    """Noise everywhere; where `code`, slot 1 of block 2 at layer 1 also holds the result of step 1 as a direction."""
    rng = np.random.default_rng(seed)
    directions = rng.normal(size=(10, wide)) * 3
    splits = {split: chains(count, 10 + i) for i, (split, count) in enumerate(SIZES.items())}
    states = {}
    for split, problems in splits.items():
        held = rng.normal(size=(len(problems), 2, K, M + 1, wide))
        if code:
            held[:, LAYER, BLOCK - 1, 0] += directions[[result_of(problem.steps[0]) for problem in problems]]
        states["memory", split] = held
    return PlantedStudy({"memory": None}, splits, states)


@pytest.fixture(scope="module")
def study():
    return planted_study()


@pytest.fixture(scope="module")
def probes(study):
    return ValueProbes.fit(study)


@pytest.fixture(scope="module")
def report(study, probes):
    return probes.score(study)


def at_best(report, quantity="result", step=1) -> dict[str, object]:
    """What stands for a quantity of a step: estimates by what they are of."""
    return {
        result.of: result.estimate
        for result in report.results
        if result.metric == f"accuracy, {quantity}" and result.place["step"] == step
    }


def selectivities(report) -> dict:
    found = [result for result in report.results if result.metric.startswith("selectivity")]
    return {(result.of, result.place["step"]): result.estimate for result in found}


def test_a_planted_code_is_found_in_its_cell_and_beats_every_control(report):
    assert report.settings["cell, best on choose"]["result of step 1"] == f"layer {LAYER}, block {BLOCK} slots"
    memory, *controls = at_best(report).values()
    assert memory.low > 0.9 and len(controls) == 3
    assert all(control.high < memory.low for control in controls)
    assert selectivities(report)["result", 1].low > 0.3
    assert "result of step 1" in report.verdict.partition("above every control: ")[2]


def test_noise_reads_at_chance_and_its_interval_covers_it():
    report = ValueProbes.fit(noise := planted_study(code=False, seed=5)).score(noise)
    frame = report.frame()
    frame = frame[frame["at step"].notna()]
    accuracy = frame[frame.metric.str.startswith("accuracy")].pivot(
        index=["metric", "at step"], columns="of", values="value"
    )
    assert (accuracy["memory"] < accuracy["majority class"] + 0.12).all()
    assert np.mean([one.low <= 0 <= one.high for one in selectivities(report).values()]) >= 0.7


def test_the_control_task_is_a_random_function_of_the_step_with_the_classes_of_the_quantity(study):
    splits = {split: study.problems(split) for split in SIZES}
    target, again = (next(t for t in targets_of(splits, 2) if t.name == "operator of step 1") for _ in range(2))
    functions = [{} for _ in target.control["fit"]]
    for split, problems in splits.items():
        np.testing.assert_array_equal(target.control[split], again.control[split])
        for seen, labels in zip(functions, target.control[split], strict=True):
            for problem, label in zip(problems, labels, strict=True):
                assert seen.setdefault(problem.steps[0], label) == label
    assert all(set(seen.values()) == {0, 1} for seen in functions)
    assert functions[0] != functions[1]
    for labels in target.control["fit"]:
        assert abs(labels.mean() - target.labels["fit"].mean()) < 0.03


def test_results_that_are_the_answer_count_for_the_last_step_alone(study):
    problems = [*study.problems("fit"), Problem("q", ("<<2+3=5>>", "<<9-4=5>>"), "5"), Problem("r", (), "5")]
    splits = {"fit": problems, "choose": problems, "report": problems}
    found = {target.name: target for target in targets_of(splits, 2)}
    assert found["result of step 1"].labels["fit"][-2] == -1
    assert found["result of the last step"].labels["fit"][-2] >= 0
    assert found["operator of step 1"].labels["fit"][-2] >= 0
    assert all(target.labels["fit"][-1] == -1 for target in found.values())
    assert "result of step 2" not in found  # always the answer here


def told(probes, study, block=BLOCK) -> dict:
    """What is said of the result of step 1 of the first problem that is reported on."""
    (found,) = [
        value
        for value in probes.explain(observed(study.capture("memory", "report")))["blocks"][block - 1]["values"]
        if (value["step"], value["quantity"]) == (1, "result")
    ]
    return found


def test_explain_reads_what_is_planted_also_after_a_round_trip(study, probes):
    again = ValueProbes.restore(probes.tensors(), json.loads(json.dumps(probes.settings())))
    value = told(again, study)
    assert value == json.loads(json.dumps(value)) == told(probes, study)
    assert value["value"] == str(result_of(study.problems("report")[0].steps[0]))
    assert value["confidence"] > 0.6 and value["accuracy"] > 0.9 and told(again, study, 1)["accuracy"] < 0.4


def test_what_is_said_of_a_value_is_no_surer_than_the_classes_cover(study, monkeypatch):
    """A probe that never met a value reads another one in its place: it may not say "surely"."""
    monkeypatch.setattr("rim_probe.probing.quantities.FEWEST_SEEN", 50)  # rare results are no classes
    probes = ValueProbes.fit(study)
    (read,) = [read for read in probes.reads if (read["step"], read["quantity"]) == (1, "result")]
    asked = [p for p in study.problems("choose") if len(p.steps) > 1 and str(result_of(p.steps[0])) != p.answer]
    known = np.mean([str(result_of(problem.steps[0])) in read["classes"] for problem in asked])
    assert read["covered"] == pytest.approx(known) and 0.2 < known < 0.9
    assert told(probes, study)["confidence"] <= known and told(probes, study)["accuracy"] <= known


def test_states_wider_than_the_bound_are_read_through_their_principal_components(monkeypatch):
    monkeypatch.setattr("rim_probe.probing.values.MOST_FEATURES", 24)
    value = told(ValueProbes.fit(study := planted_study(wide=40)), study)
    assert value["accuracy"] > 0.9 and value["value"] == str(result_of(study.problems("report")[0].steps[0]))


def test_problems_without_steps_are_refused_in_a_sentence(study):
    bare = {split: [Problem(p.question, (), p.answer) for p in study.problems(split)] for split in SIZES}
    states = {("memory", split): np.zeros((SIZES[split], 2, K, M + 1, WIDTH)) for split in SIZES}
    with pytest.raises(RiMError, match="give more problems with steps"):
        ValueProbes.fit(PlantedStudy({"memory": None}, bare, states))


@pytest.mark.parametrize(
    "number, digit, magnitude",
    [
        ("0", "0", "0"),
        ("-999", "9", "100 to 999"),
        ("1000", "1", "1,000 to 9,999"),
        ("2/3", "6", "below 1"),
        ("7e400", "7", f"{10 ** (MOST_DIGITS + 1):,} or more"),
        ("3e-400", "3", "below 1"),
    ],
)
def test_parts_of_a_number_however_large(number, digit, magnitude):
    assert [part_of(Fraction(number), part) for part in PARTS] == [digit, magnitude]
