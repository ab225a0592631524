"""Will it be right: a planted direction is found, noise is not, and every measure agrees with a slow count by hand."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from judged import BLOCKS, JudgedStudy
from planted import observed

from rim_probe.errors import RiMError
from rim_probe.probing import correctness, correctness_report, selective
from rim_probe.probing.correctness import (
    MEMORY,
    MEMORY_OWN,
    MEMORY_READOUTS,
    PROBE,
    PROBE_OWN,
    CorrectnessProbe,
    sample,
)
from rim_probe.probing.judge import cells, fit_judge, own_probability
from rim_probe.probing.section import Section
from rim_probe.probing.text import format_section

# ------------------------------------------------------------------------------------------------------------ measures


def test_auroc_counts_pairs_and_is_not_made_up_for_one_class():
    scores = np.array([0.1, 0.2])
    assert np.isnan(selective.auroc(scores, np.array([True, True])))
    assert selective.auroc(np.array([0.1, 0.4, 0.4, 0.9]), np.array([False, True, False, True])) == 0.875


def test_calibration_error_by_hand():
    # Bin 0.6-0.7: confidence 0.65, accuracy 0.5, two of three answers; bin 0.9-1: confidence 1, accuracy 1.
    error = selective.calibration_error(np.array([0.65, 0.65, 1.0]), np.array([True, False, True]))
    assert error == pytest.approx(2 / 3 * 0.15)


def test_risk_and_coverage_by_hand():
    scores, right = np.array([0.9, 0.8, 0.3, 0.1]), np.array([True, True, False, True])
    coverage, accuracy = selective.risk_coverage(scores, right, points=4)
    assert coverage == [0.25, 0.5, 0.75, 1.0]
    assert accuracy == pytest.approx([1.0, 1.0, 2 / 3, 0.75])
    assert selective.risk_area(scores, right) == pytest.approx((0 + 0 + 1 / 3 + 1 / 4) / 4)


def test_a_score_without_information_keeps_the_overall_risk():
    right = np.array([True, False, True, True])
    assert selective.risk_area(np.zeros(4, dtype=int), right) == 0.25


def test_majority_prefers_the_latest_of_equals_and_ignores_silence():
    votes = [["1", "2", "1"], ["1", "2", None], [None, None, None], ["1", None, None]]
    assert selective.majority(votes).tolist() == [2, 1, 2, 0]
    assert selective.agreement(votes)[0].tolist() == pytest.approx([2 / 3, 1 / 3, 2 / 3])
    assert selective.agreement(votes)[2].tolist() == [0, 0, 0]


# -------------------------------------------------------------------------------------------------------------- judges


def test_the_paper_probe_looks_at_its_own_block_on_the_penultimate_layer():
    views = cells("slots", (0, 1, 2, 3), 2)
    assert [(cell.layer, cell.block, cell.position) for view in views for cell in view] == [
        (2, 1, "slots"),
        (2, 2, "slots"),
    ]


def test_planted_correctness_is_found_and_noise_is_not():
    planted, noise = JudgedStudy(strength=3.0), JudgedStudy(strength=0.0)
    for study, found in ((planted, True), (noise, False)):
        judge = fit_judge(sample(study, "fit"), sample(study, "choose"), study.layers, "end")
        report = sample(study, "report")
        estimate = selective.auroc_estimate(judge.logits(report.capture, report.answers), report.right)
        assert estimate.low > 0.95 if found else estimate.low < 0.5 < estimate.high


def test_the_probe_of_one_block_does_not_see_another_layer_but_the_whole_memory_does():
    study = JudgedStudy(strength=3.0, layer=2)
    fit, choose, report = (sample(study, split) for split in ("fit", "choose", "report"))
    scores = {
        view: fit_judge(fit, choose, study.layers, view).logits(report.capture, report.answers)
        for view in ("both", "memory")
    }
    # An interval of a single fit misses chance one time in twenty; this one may not come near the planted signal.
    assert selective.auroc_estimate(scores["both"], report.right).high < 0.6
    assert selective.auroc_estimate(scores["memory"], report.right).low > 0.9


def test_a_judge_folds_standardisation_into_its_weights():
    """Moving and stretching all states alike must not change what a judge says."""
    study, moved = JudgedStudy(), JudgedStudy()
    for key, held in moved._captures.items():
        moved._captures[key] = replace(held, slots=held.slots * 5 + 3, ends=held.ends * 5 + 3)
    for view in ("both", "memory"):
        logits = [
            fit_judge(sample(one, "fit"), sample(one, "choose"), one.layers, view).logits(
                one.capture("memory", "report"), one.answers("memory", "report")
            )
            for one in (study, moved)
        ]
        np.testing.assert_allclose(*logits, rtol=1e-2, atol=1e-2)


def test_a_dimension_that_never_changes_does_no_harm():
    study = JudgedStudy()
    for held in study._captures.values():
        held.ends[..., 3] = 7.0
    judge = fit_judge(sample(study, "fit"), sample(study, "choose"), study.layers, "end")
    assert np.isfinite(judge.weight).all() and not judge.weight[:, 3].any()


def test_readouts_that_were_not_asked_for_are_judged_nan_and_the_final_one_as_ever():
    study = JudgedStudy()
    judge = fit_judge(sample(study, "fit"), sample(study, "choose"), study.layers, "end", "own")
    held, answers = study.capture("memory", "report"), study.answers("memory", "report")
    final = [replace(given, readouts=given.readouts[-1:]) for given in answers]
    everything, last = judge.logits(held, answers), judge.logits(held, final)
    assert np.isnan(own_probability(final, BLOCKS)[:, :-1]).all() and np.isnan(last[:, :-1]).all()
    np.testing.assert_array_equal(everything[:, -1], last[:, -1])


def test_chances_are_calibrated_on_the_choosing_split():
    study = JudgedStudy(strength=1.5)
    probe = CorrectnessProbe.fit(study)
    chances = probe.chances(study.capture("memory", "report"), study.answers("memory", "report"))
    assert selective.calibration_error(chances, study.right("report")) < 0.06


# --------------------------------------------------------------------------------------------------------------- probe


def with_new_chains(study, count=150):
    """The study with steps that no other split has in the last problems of its report."""
    problems = study.splits["report"]
    new = [replace(problem, steps=("<<9-8=1>>", *problem.steps)) for problem in problems[-count:]]
    study.splits["report"] = problems[:-count] + new
    return study


@pytest.fixture(scope="module")
def study():
    return with_new_chains(JudgedStudy())


@pytest.fixture(scope="module")
def probe(study):
    return CorrectnessProbe.fit(study)


@pytest.fixture(scope="module")
def section(study, probe):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selective, "DRAWS", 60)
        patch.setattr(correctness_report, "SHUFFLES", 4)
        return probe.score(study)


def rows(section, title):
    table = next(table for table in section.tables if table.title.startswith(title))
    return {row[0]: dict(zip(table.header[1:], row[1:], strict=True)) for row in table.rows}


def test_the_report_beats_its_controls_where_something_is_planted(section):
    found = rows(section, "Telling right")
    column = "AUROC, final readout"
    assert set(found) >= {PROBE, PROBE_OWN, MEMORY, MEMORY_OWN, MEMORY_READOUTS}
    assert found[PROBE][column].low > 0.9
    assert found["own probability (baseline)"][column].high < 0.65
    controls = {name: row for name, row in found.items() if name.startswith("control")}
    assert len(controls) == 7 and all(row[column].value < 0.65 for row in controls.values())
    assert found["control: block means"][column].value == 0.5
    assert all(target.met for target in section.targets)


def test_the_report_chooses_among_blocks_and_names_its_baselines(section, study):
    found = rows(section, "Choosing among")
    right = study.right("report")
    assert found["final block (baseline)"]["right"].value == right[:, -1].mean()
    assert found["ceiling: some block is right"]["right"].value == right.any(axis=1).mean()
    judge = next(row for name, row in found.items() if name.startswith("highest score of the judge"))
    assert judge["right where some block is right"].value > 0.95


def test_the_report_says_on_what_it_was_fitted_and_survives_json(section):
    assert section.n == {"fit": 300, "choose": 150, "report": 250, "report, new chains": 150}
    assert Section.from_dict(json.loads(json.dumps(section.to_dict()))).to_dict() == section.to_dict()
    assert "used" in next(iter(rows(section, "Fitted on which")))
    kinds = [figure.kind for figure in section.figures]
    assert kinds == ["lines", "lines"]


def test_held_out_splits_are_preferred_where_a_study_has_them(study):
    held = JudgedStudy(seed=3)
    for name in ("fit", "choose"):
        held.splits[f"{name}-heldout"] = held.splits[name]
        held._right[f"{name}-heldout"] = held._right[name]
        held._answers["memory", f"{name}-heldout"] = held._answers["memory", name]
        held._captures["memory", f"{name}-heldout"] = held._captures["memory", name]
    assert CorrectnessProbe.fit(held).splits == ("fit-heldout", "choose-heldout")
    assert CorrectnessProbe.fit(held, "fit", "choose").splits == ("fit", "choose")


def test_whether_it_knows_more_is_decided_on_new_chains_alone(section):
    assert "on the 150 problems whose steps neither the fit nor the choice held" in section.summary
    assert "the judge knows more than that" in section.summary
    assert [target.what.endswith("new chains") for target in section.targets] == [False, False, False, True, True]
    assert all(target.value.n == 150 for target in section.targets[3:])
    assert not any("pooled" in target.what for target in section.targets)
    found = rows(section, "Is it memorised?")
    judge = section.settings["judge"]
    assert found[judge]["new chains (n = 150)"] == section.targets[3].value
    assert found[judge]["judge minus it, new"] is None


def test_a_judge_that_only_recalls_is_found_out(study, probe, monkeypatch):
    """On new chains what stands before the memory tells as much as the memory: the lead elsewhere does not count."""
    monkeypatch.setattr(selective, "DRAWS", 60)
    report = correctness_report.Report(probe, study)
    best, new = report.logits[probe.chosen], report.new
    report.controls["words of the question"] = np.where(new[:, None], best, 0)
    found = report._new_chains()
    assert found.hardest == "words of the question" and found.lead.low == found.lead.high == 0
    assert "there it knows no more than the words of the question, as far as 150 problems" in report._verdict(found)
    report.new = np.zeros_like(new)
    assert report._new_chains() is None and "cannot be told" in report._verdict(None)


def test_noise_is_reported_as_noise(monkeypatch):
    monkeypatch.setattr(selective, "DRAWS", 60)
    monkeypatch.setattr(correctness_report, "SHUFFLES", 4)
    study = JudgedStudy(strength=0.0, seed=1)
    section = CorrectnessProbe.fit(study).score(study)
    estimate = rows(section, "Telling right")[PROBE]["AUROC, final readout"]
    assert estimate.low < 0.5 < estimate.high
    assert not any(target.met for target in section.targets if target.goal == ">= 0.90")
    # Every chain of this report occurs in the fit.
    assert section.n["report, new chains"] == 0 and "cannot be told" in section.summary
    assert "the goal of 0.90 is missed by 0." in section.summary


@pytest.mark.parametrize(("outcome", "word"), [(True, "right"), (False, "wrong")])
def test_final_readouts_that_all_end_alike_leave_nothing_to_tell_apart(study, probe, monkeypatch, outcome, word):
    monkeypatch.setattr(selective, "DRAWS", 60)
    alike = with_new_chains(JudgedStudy())
    alike._right["report"] = alike.right("report").copy()
    alike._right["report"][:, -1] = outcome
    section = probe.score(alike)
    assert section.summary.startswith(f"Every one of the 250 report problems was answered {word}, so there is nothing")
    assert section.targets == [] and section.figures == []  # neither met nor missed
    pages = format_section(section)
    assert "nan" not in pages and "NOT MET" not in pages
    table = rows(section, "Telling right")
    assert all(row["AUROC, final readout"] is None for row in table.values())
    assert table[PROBE]["AUROC, all pooled"].value > 0.6  # of the other readouts there is something to tell
    assert Section.from_dict(json.loads(json.dumps(section.to_dict()))).to_dict() == section.to_dict()


def test_the_same_seed_gives_the_same_probe(study, probe):
    again = CorrectnessProbe.fit(JudgedStudy())
    for name, tensor in probe.tensors().items():
        np.testing.assert_array_equal(tensor, again.tensors()[name])


def test_a_restored_probe_says_the_same_of_a_question(study, probe):
    observation = observed(study.capture("memory", "report"), answer=study.answers("memory", "report")[0])
    told = probe.explain(observation)
    assert [block["block"] for block in told["blocks"]] == [1, 2, 3] and told["chosen_block"] in (1, 2, 3)
    restored = CorrectnessProbe.restore(probe.tensors(), json.loads(json.dumps(probe.settings())))
    assert restored.explain(observation) == told and json.dumps(told)


def test_damaged_parts_and_other_layouts_are_refused_in_a_sentence(study, probe):
    tensors, settings = probe.tensors(), probe.settings()
    with pytest.raises(RiMError, match="fit it anew"):
        CorrectnessProbe.restore({name: t for name, t in tensors.items() if name != "0.bias"}, settings)
    with pytest.raises(RiMError, match="fit it anew"):
        CorrectnessProbe.restore(tensors, settings | {"chosen": "another"})
    held = study.capture("memory", "report")
    fewer = replace(held, slots=held.slots[:, :, :2], ends=held.ends[:, :, :2])
    with pytest.raises(RiMError, match="3 memory blocks, not 2"):
        probe.chances(fewer, study.answers("memory", "report"))


def test_outcomes_that_are_all_alike_are_refused():
    study = JudgedStudy()
    study._right["fit"] = np.ones_like(study._right["fit"])
    with pytest.raises(RiMError, match="same outcome"):
        CorrectnessProbe.fit(study)


def test_a_study_without_the_splits_is_refused():
    with pytest.raises(RiMError, match="splits"):
        correctness.CorrectnessProbe.fit(SimpleNamespace(splits={"report": []}))
