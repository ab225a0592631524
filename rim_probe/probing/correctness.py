"""Will it be right? Whether the states of the memory blocks tell right readouts from wrong ones, before they are read.

Method (arXiv:2605.30343, the probe of the experiments: linear, a block's hidden state, penultimate layer, 256 held-out
problems, "this readout is right"; published AUROC 0.836 to 0.860, on other models):
1. The paper's probe: one logistic regression per block on its own states, penultimate layer; position (end, slots,
   both) and penalty chosen.
2. The same beside the readout's own probability; a judge of the whole memory (all blocks and layers), alone, beside the
   readout's own probability, and beside the agreement of all readouts as well. The one that ranks best on the choosing
   split is "the judge".
3. Reported on other problems: AUROC, AUPRC, calibration error; choosing among the blocks' answers; risk and coverage.
4. Controls: the readout's own probability and the readouts' agreement; block means (no question can be told apart); the
   last question token; the base model's states; the words of the question without any model; shuffled outcomes.
5. Most problems share their chain of steps with one that the judge was fitted on, and may be recalled. Whether the
   judge knows more than its controls is decided on the new chains: those in neither the fitting nor the choosing split.

A model errs otherwise on what it was trained on than on what it was not. Where a study has the splits `fit-heldout` and
`choose-heldout`, they are used, and what `fit` and `choose` would have given is told beside it.

Knows outcomes and judges (`judge`). Knows nothing of how answers come about.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.special import expit

from rim_probe.errors import RiMError
from rim_probe.numbers import format_interval
from rim_probe.probing import selective
from rim_probe.probing.compact import is_large
from rim_probe.probing.hooks import layers_told
from rim_probe.probing.judge import OWN_VIEWS, Judge, Sample, fit_judge, log_odds, mean_auroc, own_probability
from rim_probe.probing.results import Estimate, Goal, Report, Result, bootstrap, mean_estimate, proportion_estimate
from rim_probe.probing.study import Observation, Study

SPLIT_PAIRS = (("fit-heldout", "choose-heldout"), ("fit", "choose"))  # the first pair that a study has is used
WIDE_PENALTIES = (0.0001, 0.001, 0.01)
PROBE, PROBE_OWN = "probe (paper)", "probe + own probability"
MEMORY, MEMORY_OWN = "whole memory", "whole memory + own probability"
MEMORY_READOUTS = "whole memory + readouts"
OWN, AGREEMENT, WORDS = "own probability", "agreement of readouts", "words of the question"

SIZES = (64, 256, 1024)  # problems fitted on; 256 is the paper's
OTHER_PROBLEMS = 2000  # most problems that a fit on another split uses, so that sizes are comparable
SHUFFLES = 20
DRAWS = 500
COVERAGES = range(5, 101, 5)  # percent
AUROC, LEAD = "AUROC, final readout", "AUROC of the judge minus another's, final readout"
AUROC_GOAL, LEAD_GOAL = Goal(">=", 0.90), Goal(">=", 0.0, whole=True)


@dataclass(frozen=True)
class CorrectnessProbe:
    """Fitted judges of K readouts.

    Attributes:
        judges: by name: PROBE, PROBE_OWN, MEMORY, MEMORY_OWN, MEMORY_READOUTS.
        chosen: the name of the one that ranks best on the choosing split, and that `judge` is.
        splits: (fitted on, chosen on).
        chosen_scores: AUROC on the choosing split, mean over the readouts, by everything that was tried there.
    """

    judges: Mapping[str, Judge]
    chosen: str
    splits: tuple[str, str]
    chosen_scores: Mapping[str, float]

    @property
    def judge(self) -> Judge:
        return self.judges[self.chosen]

    @property
    def quick_judge(self) -> Judge:
        """The best on the choosing split of those that need no other readout than the one they judge."""
        names = [name for name, judge in self.judges.items() if judge.readouts != "all"]
        return self.judges[max(names, key=lambda name: np.nan_to_num(self.chosen_scores[name]))]

    @classmethod
    def fit(cls, study: Study) -> "CorrectnessProbe":
        """Fits and chooses on the first of SPLIT_PAIRS that the study has.

        Raises:
            RiMError: all readouts to fit on have one outcome.
        """
        splits = next(pair for pair in SPLIT_PAIRS if set(pair) <= set(study.splits))
        fitting, choosing = (sample(study, split) for split in splits)
        if fitting.right.all() or not fitting.right.any():
            raise RiMError(
                f"Every readout on the split “{splits[0]}” has the same outcome, so right and wrong cannot be told "
                "apart; fit on problems of which the model solves some."
            )
        scores: dict[str, float] = {}

        def fitted(name: str, view: str, readouts: str = "none", **options) -> Judge:
            judge = fit_judge(fitting, choosing, study.layers, view, readouts, **options)
            scores[name] = mean_auroc(judge.logits(choosing.capture, choosing.answers), choosing.right)
            return judge

        own = {view: fitted(f"{PROBE}, {view}", view) for view in study.progress(OWN_VIEWS, "correctness probe")}
        view = max(OWN_VIEWS, key=lambda name: np.nan_to_num(scores[f"{PROBE}, {name}"]))
        scores[PROBE] = scores[f"{PROBE}, {view}"]
        judges = {PROBE: own[view], PROBE_OWN: fitted(PROBE_OWN, view, "own")}
        prepared: dict = {}
        wide = {MEMORY: "none", MEMORY_OWN: "own", MEMORY_READOUTS: "all"}
        for name, readouts in study.progress(wide.items(), "correctness of the whole memory"):
            judges[name] = fitted(name, "memory", readouts, penalties=WIDE_PENALTIES, prepared=prepared)
        chosen = max(judges, key=lambda name: np.nan_to_num(scores[name]))
        return cls(judges, chosen, splits, scores)

    def score(self, study: Study) -> Report:
        """The results on the split `report`; controls are fitted here, on the splits of `fit`."""
        report, paper = _Scored(self, study), self.judges[PROBE]
        results = [*report.ranking(), *report.choosing(), *report.by_block()]
        if not report.alike:
            results += [*report.other_fits(), *report.shuffled(), *report.abstaining()]
        counts = {split: len(study.problems(split)) for split in (*self.splits, "report")}
        settings = {
            "fitted on": self.splits[0],
            "chosen on": self.splits[1],
            "judge": self.chosen,
            "judge's C": self.judge.penalty,
            "judge's layers": layers_told(self.judge.seen_layers, self.judge.layers[1:]),
            "probe": f"layer {paper.layers[-2]}, {paper.view}, C = {paper.penalty}",
            "AUROC on the choosing split, mean over readouts": dict(self.chosen_scores),
            "most problems of another split that a judge is fitted on": OTHER_PROBLEMS,
            "interval of shuffled outcomes": f"the range of 95 % of {SHUFFLES} shuffles",
        }
        counts["report, new chains"] = int(report.new.sum())
        return Report("correctness", results, counts, settings, verdict=report.verdict())

    def explain(self, observation: Observation) -> dict[str, Any]:
        """For every block its readout, its own probability and the judge's; which block the judge would choose.

        Raises:
            RiMError: the question was asked with another number of blocks than the judge was fitted on.
        """
        held, answers = observation.capture, [observation.answer]
        chances, paper = (judge.chances(held, answers)[0] for judge in (self.judge, self.judges[PROBE]))
        return {
            "judge": self.chosen,
            "blocks": [
                {
                    "block": readout.block,
                    "value": readout.value,
                    "own_probability": round(readout.probability, 4),
                    "chance_right": round(float(chance), 4),
                    "chance_right_paper_probe": round(float(by_paper), 4),
                }
                for readout, chance, by_paper in zip(observation.answer.readouts, chances, paper, strict=True)
            ],
            "chosen_block": int(np.argmax(chances)) + 1,
        }

    def tensors(self) -> dict[str, np.ndarray]:
        """Weights [K, F + E] and biases [K] by judge."""
        return {
            f"{place}.{part}": tensor
            for place, judge in enumerate(self._stored().values())
            for part, tensor in judge.tensors().items()
        }

    def _stored(self) -> dict[str, Judge]:
        """The judges that are stored: of large ones those alone that answer for a question."""
        if not is_large(judge.weight for judge in self.judges.values()):
            return dict(self.judges)
        asked = (self.judge, self.quick_judge, self.judges[PROBE])
        return {name: judge for name, judge in self.judges.items() if any(judge is one for one in asked)}

    def settings(self) -> dict[str, Any]:
        return {
            "judges": [{"name": name, **judge.settings()} for name, judge in self._stored().items()],
            "chosen": self.chosen,
            "splits": list(self.splits),
            "chosen_scores": dict(self.chosen_scores),
        }

    @classmethod
    def restore(cls, tensors: Mapping[str, np.ndarray], settings: Mapping[str, Any]) -> "CorrectnessProbe":
        """The probe that `tensors` and `settings` came from.

        Raises:
            RiMError: parts that are missing or do not fit together.
        """
        try:
            judges = {}
            for place, entry in enumerate(settings["judges"]):
                start = f"{place}."
                own = {name.removeprefix(start): array for name, array in tensors.items() if name.startswith(start)}
                judges[entry["name"]] = Judge.restore(own, entry)
            if not {PROBE, settings["chosen"]} <= set(judges):
                raise ValueError(f"no judge {settings['chosen']!r}")
            return cls(judges, settings["chosen"], tuple(settings["splits"]), dict(settings["chosen_scores"]))
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise RiMError(f"The correctness probe cannot be restored ({error}); fit it anew.") from None


def sample(study: Study, split: str, role: str = "memory") -> Sample:
    """States of a role on a split, with the memory model's answers and outcomes."""
    return Sample(study.capture(role, split), study.answers("memory", split), study.right(split))


# -------------------------------------------------------------------------------------------------------------- results


class _Scored:
    """The report split as judges and controls see it.

    Attributes:
        judged, controls: log odds, or another score that rises with the chance of being right, [n, K] by name; `all`.
        right [n, K]; final [n]; new [n]: no split of the probe holds the problem's chain of steps.
        alike: all final readouts have one outcome, so that no AUROC of them exists.
        groups: rows of the problems told apart, as far as both outcomes are among them.
    """

    def __init__(self, probe: CorrectnessProbe, study: Study):
        self.probe, self.study = probe, study
        self.fit, self.choose, self.report = (sample(study, split) for split in (*probe.splits, "report"))
        self.right, self.final = self.report.right, self.report.right[:, -1]
        self.alike = bool(self.final.all() or not self.final.any())
        self.values = [[readout.value for readout in given.readouts] for given in self.report.answers]
        held, answers = self.report.capture, self.report.answers
        self.judged = {name: judge.logits(held, answers) for name, judge in probe.judges.items()}
        self.controls = self._controls()
        self.all = self.judged | self.controls
        seen = {problem.steps for split in probe.splits for problem in study.problems(split)}
        self.new = np.array([problem.steps not in seen for problem in study.problems("report")])
        groups = {"new chains": self.new, "all": np.ones_like(self.new), "known chains": ~self.new}
        self.groups = {name: rows for name, rows in groups.items() if 0 < self.final[rows].sum() < rows.sum()}
        self.auroc = {
            group: {name: self._auroc(scores[rows, -1], self.final[rows]) for name, scores in self.all.items()}
            for group, rows in self.groups.items()
        }

    def _controls(self) -> dict[str, np.ndarray]:
        narrow, wide = self.probe.judges[PROBE], self.probe.judges[MEMORY]
        found = {
            OWN: log_odds(own_probability(self.report.answers, self.study.K)),
            AGREEMENT: selective.agreement(self.values),
            # A block's mean state says which block it is and nothing of the question.
            "block means": np.tile(log_odds(self.fit.right.mean(axis=0)), (len(self.right), 1)),
            WORDS: self._words(),
            "last question token": self._refitted(replace(narrow, view="question")),
            "last question token, all layers seen": self._refitted(replace(wide, view="question everywhere")),
        }
        if "base" in self.study.models:
            base = [sample(self.study, split, "base") for split in (*self.probe.splits, "report")]
            found |= {f"{name}, base model": self._refitted(self.probe.judges[name], *base) for name in (PROBE, MEMORY)}
        return found

    def _refitted(self, like: Judge, *samples: Sample, **options) -> np.ndarray:
        """Log odds on the report split of a judge fitted anew in the manner of another, on (fit, choose, report)."""
        fit, choose, report = (*samples, *(self.fit, self.choose, self.report)[len(samples) :])
        if like.view == "memory":  # takes the penalty over: a search costs as much as all the rest
            options["penalties"] = (like.penalty,)
        judge = fit_judge(fit, choose, self.study.layers, like.view, like.readouts, **options)
        return judge.logits(report.capture, report.answers)

    def _words(self) -> np.ndarray:
        """Scores of a logistic regression on the counts of words and pairs of words of the question, [n, K]."""
        from sklearn.feature_extraction.text import CountVectorizer
        from sklearn.linear_model import LogisticRegression

        splits = (self.probe.splits[0], "report")
        fit, report = ([problem.question for problem in self.study.problems(split)] for split in splits)
        counts = CountVectorizer(ngram_range=(1, 2), token_pattern=r"\S+").fit(fit)
        fit, report = counts.transform(fit), counts.transform(report)
        scores = np.zeros(self.right.shape)
        for k, right in enumerate(self.fit.right.T):
            if right.any() and not right.all():
                scores[:, k] = LogisticRegression(C=0.1, max_iter=200).fit(fit, right).decision_function(report)
        return scores

    def _measure(self, statistic: Callable[..., float], *arrays: np.ndarray) -> Estimate:
        return bootstrap(arrays, statistic, seed=self.study.seed, draws=DRAWS)

    def _auroc(self, scores: np.ndarray, right: np.ndarray) -> Estimate:
        return self._measure(selective.auroc, scores, right)

    def _lead(self, name: str, group: str) -> Estimate:
        """AUROC of the judge minus that of another score, final readout, paired by problem."""
        rows = self.groups[group]
        judge, other = (self.all[one][rows, -1] for one in (self.probe.chosen, name))

        def lead(ours: np.ndarray, theirs: np.ndarray, right: np.ndarray) -> float:
            return selective.auroc(ours, right) - selective.auroc(theirs, right)

        return self._measure(lead, judge, other, self.final[rows])

    def _strongest(self, group: str) -> str:
        return max(self.controls, key=lambda name: self.auroc[group][name].value)

    def _result(self, metric: str, name: str, estimate: Estimate, **more) -> Result:
        role = "control" if name in self.controls else "score"
        return Result(metric, name, estimate, role, share=False, **more)

    def ranking(self) -> Iterator[Result]:
        """AUROC, paired differences to the judge, precision and calibration, score by score."""
        chosen = self.probe.chosen
        for group, found in self.auroc.items():
            for name, estimate in found.items():
                goal = AUROC_GOAL if name == chosen and group != "known chains" else None
                yield self._result(AUROC, name, estimate, group=group, goal=goal)
        for group in (name for name in self.groups if name != "known chains"):
            for name in (name for name in self.all if name != chosen):
                goal = LEAD_GOAL if name in (OWN, self._strongest(group)) else None
                yield Result(LEAD, name, self._lead(name, group), share=False, group=group, goal=goal)
        for name, scores in self.all.items():
            yield self._result("AUROC, all readouts pooled", name, self._auroc(scores, self.right))
            for outcome, right, sign in (("right", self.final, 1), ("wrong", ~self.final, -1)):
                area = self._measure(selective.average_precision, sign * scores[:, -1], right)
                yield self._result(f"AUPRC of {outcome} final readouts", name, area)
            if name not in (AGREEMENT, WORDS):  # which give no probability
                error = self._measure(selective.calibration_error, expit(scores), self.right)
                yield self._result("expected calibration error, all readouts pooled", name, error)

    def by_block(self) -> Iterator[Result]:
        """How many readouts are right, and how well they are told apart, block by block."""
        for k, right in enumerate(self.right.T):
            place = {"block": k + 1}
            yield Result("readout right", "memory", proportion_estimate(right), place=place)
            for name in (*self.judged, OWN):
                yield self._result("AUROC by block", name, self._auroc(self.all[name][:, k], right), place=place)

    def choosing(self) -> Iterator[Result]:
        """How often the answer is right that each way of choosing a block gives, and minus the final block's."""
        chosen, (n, blocks), some = self.probe.chosen, self.right.shape, self.right.any(axis=1)
        for name, role, block in (
            (f"highest score of the judge ({chosen})", "score", self.judged[chosen].argmax(1)),
            (f"highest score of the {PROBE}", "score", self.judged[PROBE].argmax(1)),
            ("final block", "control", np.full(n, blocks - 1)),
            ("majority of the readouts", "control", selective.majority(self.values)),
            ("highest own probability", "control", self.controls[OWN].argmax(1)),
            ("a block at random", "control", self.study.rng("correctness/choosing").integers(0, blocks, n)),
            ("a right block, where there is one", "positive control", self.right.argmax(1)),
        ):
            right, metric = self.right[np.arange(n), block], "answer of the chosen block right"
            yield Result(metric, name, proportion_estimate(right), role)
            yield Result(metric, name, proportion_estimate(right[some]), role, group="some block is right")
            yield Result(f"{metric}, minus the final block's", name, mean_estimate(right * 1.0 - self.final), role)

    def other_fits(self) -> Iterator[Result]:
        """AUROC by how many problems the fit has seen, and fitted on the splits that were not used."""
        split, total = self.probe.splits[0], len(self.fit.right)
        order = self.study.rng("correctness/sizes").permutation(total)
        pairs = [pair for pair in SPLIT_PAIRS if set(pair) <= set(self.study.splits) and pair != self.probe.splits]

        def refitted(name: str, rows: np.ndarray, *samples: Sample) -> Estimate:
            scores = self._refitted(self.probe.judges[name], *samples, rows=np.sort(rows), blocks=[self.study.K])
            return self._auroc(scores[:, -1], self.final)

        for name in self.study.progress((PROBE, MEMORY_READOUTS), "fits of other sizes and splits"):
            by_size = {size: refitted(name, order[:size]) for size in SIZES if size < total}
            for size, estimate in (by_size | {total: self.auroc["all"][name]}).items():
                place = {f"problems of {split} fitted on": size}
                yield Result(f"{AUROC}, by size of the fit", name, estimate, share=False, place=place)
            for other, choose in pairs:
                rng = self.study.rng("correctness/alternative")
                rows = rng.permutation(len(self.study.problems(other)))[:OTHER_PROBLEMS]
                estimate = refitted(name, rows, sample(self.study, other), sample(self.study, choose))
                yield Result(AUROC, f"{name}, fitted on {other}", estimate, share=False)
        for name in (split, *(other for other, _ in pairs)):
            right = proportion_estimate(self.study.right(name)[:, -1])
            yield Result("final readout right where judges are fitted", name, right, split=name)

    def shuffled(self) -> Iterator[Result]:
        """AUROC of the paper's probe fitted on shuffled outcomes: mean over shuffles, range of 95 % of them."""
        like, rng, found = self.probe.judges[PROBE], self.study.rng("correctness/shuffled"), []
        options = {"penalties": (like.penalty,), "blocks": [self.study.K], "prepared": {}}
        for _ in self.study.progress(range(SHUFFLES), "shuffled outcomes"):
            fit = replace(self.fit, right=rng.permutation(self.fit.right))
            found.append(selective.auroc(self._refitted(like, fit, **options)[:, -1], self.final))
        estimate = Estimate(float(np.mean(found)), *map(float, np.quantile(found, [0.025, 0.975])), SHUFFLES)
        yield Result(f"{AUROC}, outcomes shuffled", PROBE, estimate, "control", share=False)

    def abstaining(self) -> Iterator[Result]:
        """Answering less: risk-coverage area, and accuracy of the share of readouts that score highest."""
        n, random = len(self.final), self.study.rng("correctness/random order")
        extra = {
            "random order": ("control", random.random(n)),
            # Right before wrong; equal scores would be taken in together.
            "perfect order": ("positive control", self.final + np.linspace(0, 0.5, n)),
        }
        names = dict.fromkeys((self.probe.chosen, PROBE, OWN))
        told = {name: ("control" if name == OWN else "score", self.all[name][:, -1]) for name in names}
        for name, (role, scores) in (told | extra).items():
            area = self._measure(selective.risk_area, scores, self.final)
            yield Result("area under the risk-coverage curve (less is better)", name, area, role, share=False)
            order = np.argsort(-scores, kind="stable")
            for coverage in COVERAGES:
                right, place = self.final[order[: max(1, -(-n * coverage // 100))]], {"answered, %": coverage}
                accuracy = proportion_estimate(right)
                yield Result("right among the final readouts that score highest", name, accuracy, role, place=place)

    def verdict(self) -> str:
        """Whether the judge knows more than its controls: decided on the new chains, where nothing can be recalled."""
        if self.alike:
            outcome = "right" if self.final[0] else "wrong"
            return f"All {len(self.final)} final readouts are {outcome}, so there is nothing to tell apart."
        if "new chains" not in self.groups:
            return "There are no new chains with both outcomes: what the judge knows cannot be told from recall."
        rival = self._strongest("new chains")
        lead = self._lead(rival, "new chains")
        knows = "more than" if lead.low > 0 else "less than" if lead.high < 0 else "no more, as far as they show, than"
        return (
            f"On the {self.new.sum()} problems whose chain of steps neither the fit nor the choice held, the judge "
            f"knows {knows} the strongest control, {rival} (difference in AUROC "
            f"{format_interval(lead.value, lead.low, lead.high)})."
        )
