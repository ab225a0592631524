"""Will it be right: a planted direction is found, noise is not, and every measure agrees with a slow count by hand."""

import json
from dataclasses import replace

import numpy as np
import pytest
from judged import BLOCKS, JudgedStudy
from planted import observed

from rim_probe.errors import RiMError
from rim_probe.probing import correctness, selective
from rim_probe.probing.correctness import AGREEMENT, AUROC, LEAD, MEMORY, OWN, PROBE, WORDS, CorrectnessProbe, sample
from rim_probe.probing.judge import fit_judge
from rim_probe.probing.results import Report, bootstrap, headline
from rim_probe.probing.tables import format_report


@pytest.fixture(autouse=True, scope="module")
def few_draws():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"DRAWS": 40, "SHUFFLES": 2, "SIZES": (64,)}.items():
            patch.setattr(correctness, name, value)
        yield


# ------------------------------------------------------------------------------------------------------------ measures


def test_measures_by_hand():
    assert selective.auroc(np.array([0.1, 0.4, 0.4, 0.9]), np.array([False, True, False, True])) == 0.875
    assert np.isnan(selective.auroc(np.array([0.1, 0.2]), np.array([True, True])))
    # Bin 0.6-0.7: confidence 0.65, accuracy 0.5, two of three answers; bin 0.9-1: confidence 1, accuracy 1.
    error = selective.calibration_error(np.array([0.65, 0.65, 1.0]), np.array([True, False, True]))
    assert error == pytest.approx(2 / 3 * 0.15)
    scores, right = np.array([0.9, 0.8, 0.3, 0.1]), np.array([True, True, False, True])
    assert selective.risk_area(scores, right) == pytest.approx((0 + 0 + 1 / 3 + 1 / 4) / 4)
    assert selective.risk_area(np.zeros(4, dtype=int), right) == 0.25  # without information


def test_majority_prefers_the_latest_of_equals_and_ignores_silence():
    votes = [["1", "2", "1"], ["1", "2", None], [None, None, None], ["1", None, None]]
    assert selective.majority(votes).tolist() == [2, 1, 2, 0]
    assert selective.agreement(votes)[0].tolist() == pytest.approx([2 / 3, 1 / 3, 2 / 3])
    assert selective.agreement(votes)[2].tolist() == [0, 0, 0]


# -------------------------------------------------------------------------------------------------------------- judges


def judged(study: JudgedStudy, view: str, readouts: str = "none") -> tuple[np.ndarray, np.ndarray]:
    """Log odds on the report split of a judge of that view, and what is right."""
    judge = fit_judge(sample(study, "fit"), sample(study, "choose"), study.layers, view, readouts)
    report = sample(study, "report")
    return judge.logits(report.capture, report.answers), report.right


def auroc_of(study: JudgedStudy, view: str):
    return bootstrap(judged(study, view), selective.auroc, draws=60)


@pytest.mark.parametrize("view", ["end", "slots", "both", "memory"])
def test_planted_correctness_is_found_and_noise_is_not(view):
    assert auroc_of(JudgedStudy(strength=3.0), view).low > 0.9
    # An interval of a single fit misses chance one time in twenty; this one may not come near the planted signal.
    assert auroc_of(JudgedStudy(strength=0.0), view).high < 0.6


@pytest.mark.parametrize("view", ["both", "memory"])
def test_moving_and_stretching_all_states_alike_changes_nothing_that_a_judge_says(view):
    study, moved = JudgedStudy(), JudgedStudy()
    for key, held in moved._captures.items():
        moved._captures[key] = replace(held, slots=held.slots * 5 + 3, ends=held.ends * 5 + 3)
    np.testing.assert_allclose(judged(study, view)[0], judged(moved, view)[0], rtol=1e-2, atol=1e-2)


# --------------------------------------------------------------------------------------------------------------- probe


def with_new_chains(study: JudgedStudy, count: int = 150) -> JudgedStudy:
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
def report(study, probe):
    return probe.score(study)


def values(report: Report, metric: str, group: str = "all"):
    frame = report.frame()
    return frame[(frame.metric == metric) & (frame.group == group)].set_index("of")


@pytest.mark.parametrize("group", ["all", "new chains", "known chains"])
def test_the_report_beats_its_controls_where_something_is_planted(report, group):
    found = values(report, AUROC, group)
    controls = found[found.role == "control"].drop(AGREEMENT)  # wrong readouts all say the same here
    assert found.low[PROBE] > 0.9 and len(controls) == 7 and (controls.value < 0.65).all()
    assert found.value["block means"] == 0.5


def test_the_headline_is_the_judge_on_new_chains_beside_its_strongest_control(report):
    score, control = headline(report)
    assert (score.of, score.group, score.estimate.n) == (report.settings["judge"], "new chains", 150)
    leads = [result for result in report.results if result.metric == LEAD and result.goal]
    assert {(lead.of, lead.group) for lead in leads} >= {(OWN, "all"), (OWN, "new chains"), (control.of, "new chains")}
    assert all(lead.goal.met(lead.estimate) for lead in leads) and score.goal.met(score.estimate)
    assert "knows more than" in report.verdict


def test_the_report_chooses_among_blocks(report, study):
    metric, right = "answer of the chosen block right", study.right("report")
    found = values(report, metric)
    assert found.value["final block"] == right[:, -1].mean()
    assert found.value["a right block, where there is one"] == right.any(axis=1).mean()
    assert values(report, metric, "some block is right").value.iloc[0] > 0.95


def test_the_report_says_on_what_it_was_fitted_and_survives_json(report):
    assert report.n == {"fit": 300, "choose": 150, "report": 250, "report, new chains": 150}
    assert Report.from_dict(json.loads(json.dumps(report.to_dict()))).to_dict() == report.to_dict()


def test_held_out_splits_are_preferred_and_the_others_told_beside_them():
    held = JudgedStudy(seed=3)
    for name in ("fit", "choose"):
        held.splits[f"{name}-heldout"] = held.splits[name]
        held._right[f"{name}-heldout"] = held._right[name]
        held._answers["memory", f"{name}-heldout"] = held._answers["memory", name]
        for role in ("memory", "base"):
            held._captures[role, f"{name}-heldout"] = held._captures[role, name]
    probe = CorrectnessProbe.fit(held)
    assert probe.splits == ("fit-heldout", "choose-heldout")
    found = values(probe.score(held), AUROC).value
    assert found[f"{PROBE}, fitted on fit"] == pytest.approx(found[PROBE], abs=0.02)


def test_a_judge_that_only_recalls_is_found_out(study, probe, monkeypatch):
    """On new chains what stands before the memory tells as much as the memory: the lead elsewhere does not count."""
    report = sample(study, "report")
    best = probe.judge.logits(report.capture, report.answers)
    new = np.arange(len(best)) >= len(best) - 150
    monkeypatch.setattr(correctness._Scored, "_words", lambda self: np.where(new[:, None], best, 0))
    scored = probe.score(study)
    lead = values(scored, LEAD, "new chains").loc[WORDS]
    assert lead.value == lead.low == lead.high == 0 and values(scored, LEAD).low[WORDS] > 0
    assert "knows no more" in scored.verdict and WORDS in scored.verdict


def test_noise_is_reported_as_noise():
    study = JudgedStudy(strength=0.0, seed=1)
    report = CorrectnessProbe.fit(study).score(study)
    found = values(report, AUROC)
    assert found.low[PROBE] < 0.5 < found.high[PROBE]
    assert not any(
        result.goal.met(result.estimate) for result in report.results if result.metric == AUROC and result.goal
    )
    # Every chain of this report occurs in the fit.
    assert report.n["report, new chains"] == 0 and "cannot be told" in report.verdict


@pytest.mark.parametrize("outcome", [True, False])
def test_final_readouts_that_all_end_alike_leave_nothing_to_tell_apart(probe, outcome):
    alike = with_new_chains(JudgedStudy())
    alike._right["report"] = alike.right("report").copy()
    alike._right["report"][:, -1] = outcome
    report = probe.score(alike)
    assert "nothing to tell apart" in report.verdict and not any(result.goal for result in report.results)
    assert "nan" not in format_report(report, "title", "question?")
    # Of the other readouts there is something to tell.
    assert values(report, "AUROC, all readouts pooled").value[PROBE] > 0.6


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
    with pytest.raises(RiMError, match=f"{BLOCKS} memory blocks, not 2"):
        probe.judges[MEMORY].logits(fewer, study.answers("memory", "report"))
