"""The report of the correctness probe: tables, figures, controls and targets on problems that nothing was chosen on.

Most problems share their chain of steps with one that the judge was fitted on, so that part of what it knows may be
recall. Whether it knows more than the controls is therefore decided on the new chains alone: report problems whose
steps are in neither the fitting nor the choosing split.

Knows judges, scores and outcomes. Knows nothing of how the probe was fitted (`correctness`) or how pages are drawn.
"""

from dataclasses import asdict, dataclass

import numpy as np

from rim_probe.probing import selective
from rim_probe.probing.correctness import (
    MEMORY,
    MEMORY_OWN,
    MEMORY_READOUTS,
    PROBE,
    PROBE_OWN,
    SPLIT_PAIRS,
    CorrectnessProbe,
    sample,
)
from rim_probe.probing.curves import curve
from rim_probe.probing.hooks import layers_told
from rim_probe.probing.judge import (
    OWN_VIEWS,
    PENALTIES,
    Judge,
    Sample,
    fit_judge,
    log_odds,
    own_probability,
    probability,
    wide_layers,
)
from rim_probe.probing.section import Estimate, Figure, Section, Table, Target, bootstrap, proportion_estimate
from rim_probe.probing.study import Study

SIZES = (64, 256, 1024)  # 256 is the paper's
SHUFFLES = 20
ALTERNATIVE_PROBLEMS = 2000  # most problems a fit on another split uses, so that sizes are comparable
AUROC_GOAL = 0.90
PAPER_AUROC = "published: 0.836 to 0.860, on other models"
OWN, AGREEMENT = "own probability (baseline)", "agreement of readouts (baseline)"
WORDS = "words of the question"


class Report:
    """The section of a probe, put together from the report split's scores by name, each [n, K]."""

    def __init__(self, probe: CorrectnessProbe, study: Study):
        self.probe, self.study = probe, study
        self.fit, self.choose = (sample(study, split) for split in probe.splits)
        self.report = sample(study, "report")
        self.right, self.n = self.report.right, len(self.report.right)
        self.seed = study.seed
        self.values = [[readout.value for readout in given.readouts] for given in self.report.answers]
        self.logits = {
            name: judge.logits(self.report.capture, self.report.answers) for name, judge in probe.judges.items()
        }
        own = own_probability(self.report.answers, study.K)
        self.baselines = {OWN: log_odds(own), AGREEMENT: selective.agreement(self.values)}
        self.controls = self._controls()
        seen = {problem.steps for split in probe.splits for problem in study.problems(split)}
        self.new = np.array([problem.steps not in seen for problem in study.problems("report")])
        # Where all final readouts end alike, no AUROC of them exists: goals are then neither met nor missed.
        self.alike = len(set(self.right[:, -1].tolist())) == 1

    # ---------------------------------------------------------------------------------------------------- controls

    def _controls(self) -> dict[str, np.ndarray]:
        study, probe = self.study, self.probe
        narrow, wide = probe.judges[PROBE], probe.judges[MEMORY]
        found = {
            # A block's mean state says which block it is and nothing of the question.
            "block means": np.tile(log_odds(self.fit.right.mean(axis=0)), (self.n, 1)),
            "last question token": self._refit(self.fit, self.choose, narrow, view="question"),
            f"last question token, {self._wide_layers()}": self._refit(
                self.fit, self.choose, wide, view="question everywhere"
            ),
            WORDS: self._words(),
        }
        if "base" in study.models:
            fit, choose, report = (sample(study, split, "base") for split in (*probe.splits, "report"))
            found[f"{PROBE}, base model"] = self._refit(fit, choose, narrow, report=report)
            found[f"{MEMORY}, base model"] = self._refit(fit, choose, wide, report=report)
        return found

    def _wide_layers(self) -> str:
        """How many layers the judges of the whole memory, and its control, look at."""
        layers = self.probe.judges[MEMORY].layers
        return layers_told(wide_layers(layers), layers[1:])

    def _refit(
        self, fit: Sample, choose: Sample, like: Judge, view: str | None = None, report: Sample | None = None
    ) -> np.ndarray:
        """The scores on the report split of a judge fitted anew in the manner of another."""
        view, report = view or like.view, report or self.report
        # The wide ones take the penalty over: a search costs as much as all the rest.
        options = {"penalties": (like.penalty,)} if view == "memory" else {}
        judge = fit_judge(fit, choose, self.study.layers, view, **options)
        return judge.logits(report.capture, report.answers)

    def _shuffled(self) -> Estimate:
        """AUROC of the paper's probe for the final readout, fitted on shuffled outcomes: the mean over shuffles and the
        range that 95 % of them lie in (n is the number of shuffles, since they are what varies)."""
        like, rng, found = self.probe.judges[PROBE], self.study.rng("correctness/shuffled"), []
        for _ in self.study.progress(range(SHUFFLES), "shuffled outcomes"):
            right = self.fit.right[rng.permutation(len(self.fit.right))]
            fit = Sample(self.fit.capture, self.fit.answers, right)
            judge = fit_judge(
                fit,
                self.choose,
                self.study.layers,
                like.view,
                penalties=(like.penalty,),
                blocks=[self.study.K],
                calibrate=False,  # calibration sees true outcomes and could turn the ranking round
            )
            scores = judge.logits(self.report.capture, self.report.answers)[:, -1]
            found.append(selective.auroc(scores, self.right[:, -1]))
        low, high = np.quantile(found, [0.025, 0.975])
        return Estimate(float(np.mean(found)), float(low), float(high), SHUFFLES)

    def _words(self) -> np.ndarray:
        """Scores of a logistic regression on the counts of words and pairs of words of the question, [n, K]."""
        from sklearn.feature_extraction.text import CountVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline

        fit, report = (
            [problem.question for problem in self.study.problems(split)] for split in (self.probe.splits[0], "report")
        )
        scores = np.zeros(self.right.shape)
        for k, right in enumerate(self.fit.right.T):
            if right.any() and not right.all():
                counts = CountVectorizer(ngram_range=(1, 2), token_pattern=r"\S+")
                model = make_pipeline(counts, LogisticRegression(C=0.1, max_iter=200)).fit(fit, right)
                scores[:, k] = model.decision_function(report)
        return scores

    # ------------------------------------------------------------------------------------------------------- tables

    def section(self) -> Section:
        choosing, picked = self._choosing()
        final = {}
        if not self.alike:
            final = {name: self._auroc(scores[:, -1], self.right[:, -1]) for name, scores in self._all().items()}
        tables = [self._main_table(final), self._block_table(), choosing]
        if self.alike:
            return self._section(self._nothing_to_tell(), tables, [], [], picked, None)
        hardest = max(self.controls, key=lambda name: final[name].value)
        gain, lead = (self._lead(other) for other in (self.baselines[OWN], self.controls[hardest]))
        new = self._new_chains()
        split_table, other_splits = self._split_table()
        areas = Table(
            "Answering less: area under the risk-coverage curve, final readout",
            ["score", "area (smaller is better)"],
            [[name, value] for name, value in self._areas().items()],
        )
        return self._section(
            self._summary(final, gain, hardest, lead, new, other_splits, picked),
            [*tables, split_table, self._chain_table(), areas],
            [self._sizes(), self._coverage_figure()],
            self._targets(final[self.probe.chosen], gain, hardest, lead, new),
            picked,
            new,
        )

    def _section(
        self,
        summary: str,
        tables: list[Table],
        figures: list[Figure],
        targets: list[Target],
        picked: dict[str, float],
        new: "NewChains | None",
    ) -> Section:
        fit, choose = self.probe.splits
        paper = self.probe.judges[PROBE]
        return Section(
            name="correctness",
            title="Will it be right?",
            question="Can a linear probe on the memory blocks tell, before anything is read out, whether a readout "
            "will be right? Does it know more than the probability the readout gives itself?",
            summary=summary,
            n={fit: len(self.fit.right), choose: len(self.choose.right), "report": self.n}
            | {"report, new chains": int(self.new.sum())},
            settings={
                "fitted on": fit,
                "chosen on": choose,
                "judge": self.probe.chosen,
                "probe": f"layer {paper.layers[-2]}, {paper.view}, C = {paper.penalty}",
                "judge's C": self.probe.judge.penalty,
                **({} if self._wide_layers() == "all layers" else {"whole memory, looked at": self._wide_layers()}),
                "searched": f"{len(OWN_VIEWS)} positions, {len(self.probe.judges)} judges, {len(PENALTIES)} penalties",
                "AUROC on the choosing split, mean over readouts": dict(self.probe.chosen_scores),
            },
            tables=tables,
            figures=figures,
            targets=targets,
            data={
                "choosing": picked,
                "right": float(self.right.mean()),
                "new chains": None if new is None else {name: asdict(value) for name, value in new.estimates().items()},
            },
        )

    def _lead(self, other: np.ndarray, of: np.ndarray | slice = slice(None)) -> Estimate:
        """AUROC of the judge minus that of other scores [n, K], final readout, paired by problem."""
        judge, right = self.logits[self.probe.chosen], self.right
        return selective.auroc_difference(judge[of][:, -1], other[of][:, -1], right[of][:, -1], self.seed)

    def _new_chains(self) -> "NewChains | None":
        """What holds on the new chains; None where there are none, or all of them end alike."""
        right = self.right[self.new][:, -1]
        if not right.any() or right.all():
            return None
        found = {name: self._auroc(scores[self.new][:, -1], right) for name, scores in self._all().items()}
        # The control that is strongest there: another may be so than on all problems.
        hardest = max(self.controls, key=lambda name: found[name].value)
        return NewChains(
            judge=found[self.probe.chosen],
            own=found[OWN],
            hardest=hardest,
            control=found[hardest],
            gain=self._lead(self.baselines[OWN], self.new),
            lead=self._lead(self.controls[hardest], self.new),
        )

    @staticmethod
    def _targets(
        final: Estimate, gain: Estimate, hardest: str, lead: Estimate, new: "NewChains | None"
    ) -> list[Target]:
        goal = f">= {AUROC_GOAL:.2f}"
        targets = [
            Target(f"AUROC of the judge, final readout ({PAPER_AUROC})", goal, final, final.value >= AUROC_GOAL),
            Target("AUROC of the judge minus the readout's own probability", "> 0", gain, gain.low > 0),
            Target(f"AUROC of the judge minus the strongest control ({hardest})", "> 0", lead, lead.low > 0),
        ]
        if new is not None:
            targets += [
                Target("AUROC of the judge, final readout, new chains", goal, new.judge, new.judge.value >= AUROC_GOAL),
                Target(
                    f"AUROC of the judge minus the strongest control ({new.hardest}), new chains",
                    "> 0",
                    new.lead,
                    new.lead.low > 0,
                ),
            ]
        return targets

    def _all(self) -> dict[str, np.ndarray]:
        return self.baselines | self.logits | self.controls

    def _auroc(self, scores: np.ndarray, right: np.ndarray | None = None) -> Estimate:
        return selective.auroc_estimate(scores, self.right if right is None else right, self.seed)

    def _main_table(self, final: dict[str, Estimate]) -> Table:
        """`final`: AUROC of the final readout by score; {} where it does not exist."""
        from sklearn.metrics import average_precision_score

        rows: list[list] = []
        both = (self.right, 1), (~self.right, -1)
        for name, scores in self._all().items():
            area = [average_precision_score(own.ravel(), (sign * scores).ravel()) for own, sign in both]
            chance = self._chance(name, scores)
            calibration = None
            if chance is not None:
                calibration = bootstrap(
                    (chance, self.right), selective.calibration_error, seed=self.seed, draws=selective.DRAWS
                )
            label = f"control: {name}" if name in self.controls else name
            rows.append([label, final.get(name), self._auroc(scores), *map(float, area), calibration])
        if not self.alike:
            label = f"control: {PROBE}, {SHUFFLES} shuffles of outcomes"
            rows.append([label, self._shuffled(), None, None, None, None])
        return Table(
            f"Telling right readouts from wrong ones, {self.study.K} readouts of n = {self.n} problems",
            ["score", "AUROC, final readout", "AUROC, all pooled", "AUPRC of right", "AUPRC of wrong", "ECE"],
            rows,
            note=f"{self.right.mean():.1%} of the readouts are right: the AUPRC of a score that knows nothing. Pooled "
            "figures gain from some blocks being right more often than others; the row “block means” is that gain. "
            "ECE: expected calibration error, ten bins. The interval of the shuffles is the range of 95 % of them. "
            "The last question token and the words of the question stand "
            "before the memory: what they reach is how hard the question is, not what the memory holds.",
        )

    def _chance(self, name: str, scores: np.ndarray) -> np.ndarray | None:
        return None if name in (AGREEMENT, WORDS) else probability(scores)

    def _block_table(self) -> Table:
        names = (OWN, PROBE, PROBE_OWN, MEMORY, MEMORY_OWN, MEMORY_READOUTS)
        scores = self._all()
        rows = [
            [
                f"block {k + 1}",
                proportion_estimate(self.right[:, k]),
                *(self._auroc(scores[name][:, k], self.right[:, k]) for name in names),
            ]
            for k in range(self.study.K)
        ]
        return Table("AUROC by block", ["block", "readout right", *names], rows)

    def _choosing(self) -> tuple[Table, dict[str, float]]:
        """Accuracy of the answer that each way of choosing a block gives."""
        everyone, solvable = np.arange(self.n), self.right.any(axis=1)
        chance = self.study.rng("correctness/choosing").integers(0, self.study.K, self.n)
        picks = {
            "final block (baseline)": np.full(self.n, self.study.K - 1),
            "majority of the readouts (baseline)": selective.majority(self.values),
            "highest own probability (baseline)": self.baselines[OWN].argmax(axis=1),
            "highest score of the probe (paper)": self.logits[PROBE].argmax(axis=1),
            f"highest score of the judge ({self.probe.chosen})": self.logits[self.probe.chosen].argmax(axis=1),
            "control: a block at random": chance,
        }
        rows, accuracies = [], {}
        for name, pick in picks.items():
            outcome = self.right[everyone, pick]
            difference = bootstrap(outcome.astype(float) - self.right[:, -1], seed=self.seed)
            rows.append([name, proportion_estimate(outcome), difference, proportion_estimate(outcome[solvable])])
            accuracies[name] = float(outcome.mean())
        rows.append(["ceiling: some block is right", proportion_estimate(solvable), None, None])
        return (
            Table(
                "Choosing among the blocks' answers",
                ["answer of", "right", "minus final block", "right where some block is right"],
                rows,
                note="Published: 90.0 % right choice where at least one block is right; the final block, which "
                "chooses nothing, is the figure to beat.",
            ),
            accuracies,
        )

    def _split_table(self) -> tuple[Table, dict[str, Estimate]]:
        """The table, and the AUROC of the whole memory by the split fitted on, for those that were not used."""
        rows, others = [], {}
        fit_used, choose_used = self.probe.splits
        pairs = [self.probe.splits, *(pair for pair in SPLIT_PAIRS if set(pair) <= set(self.study.splits))]
        for fit_name, choose_name in dict.fromkeys(pairs):
            used = (fit_name, choose_name) == (fit_used, choose_used)
            fit, choose = sample(self.study, fit_name), sample(self.study, choose_name)
            rng = self.study.rng("correctness/alternative")
            rows_used = np.sort(rng.permutation(len(fit.right))[:ALTERNATIVE_PROBLEMS])
            cells = []
            for name in (PROBE, MEMORY_READOUTS):
                judge = self.probe.judges[name]
                if not used:
                    penalties = (judge.penalty,) if judge.view == "memory" else None
                    judge = fit_judge(
                        fit,
                        choose,
                        self.study.layers,
                        judge.view,
                        judge.readouts,
                        rows=rows_used,
                        blocks=[self.study.K],
                        **({"penalties": penalties} if penalties else {}),
                    )
                scores = judge.logits(self.report.capture, self.report.answers)[:, -1]
                cells.append(self._auroc(scores, self.right[:, -1]))
            label = f"{fit_name} (chosen on {choose_name}){', used' if used else ''}"
            size = len(fit.right) if used else len(rows_used)
            rows.append([label, size, proportion_estimate(fit.right[:, -1]), *cells])
            if not used:
                others[fit_name] = cells[-1]
        table = Table(
            "Fitted on which problems: AUROC on report, final readout",
            ["fitted on", "problems", "readout right there", PROBE, MEMORY_READOUTS],
            rows,
            note="A model errs seldom, and for other reasons, on the kind of problem it was trained on.",
        )
        return table, others

    def _chain_table(self) -> Table:
        """AUROC apart for problems whose chain of steps was held when the judge was made and for the others."""
        judge, rows = self.logits[self.probe.chosen], []
        for name, scores in self._all().items():
            cells = [
                self._auroc(scores[mask][:, -1], self.right[mask][:, -1]) if mask.any() else None
                for mask in (~self.new, self.new)
            ]
            lead = self._lead(scores, self.new) if scores is not judge and self.new.any() else None
            rows.append([f"control: {name}" if name in self.controls else name, *cells, lead])
        fit, choose = self.probe.splits
        return Table(
            "Is it memorised? AUROC, final readout, by whether the judge was made on the same steps",
            [
                "score",
                f"known chains (n = {(~self.new).sum()})",
                f"new chains (n = {self.new.sum()})",
                "judge minus it, new",
            ],
            rows,
            note=f"New chains: problems whose steps are in neither “{fit}” nor “{choose}”. The last column is paired "
            "by problem; only where its interval is above 0 does the judge know more.",
        )

    # ------------------------------------------------------------------------------------------------------ figures

    def _sizes(self) -> Figure:
        """AUROC on report by the number of problems fitted on; the penalty is chosen anew at each size."""
        total = len(self.fit.right)
        sizes = [*(size for size in SIZES if size < total), total]
        order = self.study.rng("correctness/sizes").permutation(total)
        series = []
        for name in (PROBE, MEMORY_READOUTS):
            like, estimates = self.probe.judges[name], []
            penalties = {"penalties": (like.penalty,)} if like.view == "memory" else {}
            for size in self.study.progress(sizes, f"fit sizes, {name}"):
                judge = fit_judge(
                    self.fit,
                    self.choose,
                    self.study.layers,
                    like.view,
                    like.readouts,
                    rows=np.sort(order[:size]),
                    blocks=[self.study.K],
                    **penalties,
                )
                scores = judge.logits(self.report.capture, self.report.answers)[:, -1]
                estimates.append(self._auroc(scores, self.right[:, -1]))
            series.append(curve(name, sizes, estimates))
        baseline = self._auroc(self.baselines[OWN][:, -1], self.right[:, -1])
        series.append(curve(OWN, sizes, [baseline] * len(sizes), control=True))
        return Figure(
            "lines",
            f"AUROC of the final readout by the number of problems fitted on (report, n = {self.n})",
            f"problems of the split “{self.probe.splits[0]}” (the paper: 256)",
            "AUROC",
            {"series": series},
        )

    def _abstaining(self) -> dict[str, np.ndarray]:
        """Scores by which answers can be left out, [n] each."""
        random = self.study.rng("correctness/random order").random(self.n)
        names = (self.probe.chosen, PROBE, OWN)
        scores = self._all()
        return {name: scores[name][:, -1] for name in dict.fromkeys(names)} | {"control: random order": random}

    def _areas(self) -> dict[str, Estimate | float]:
        right = self.right[:, -1]
        areas = {
            name: bootstrap((score, right), selective.risk_area, seed=self.seed, draws=selective.DRAWS)
            for name, score in self._abstaining().items()
        }
        # All right answers before all wrong ones; equal scores would be taken in together.
        perfect = right + np.linspace(0, 0.5, self.n)
        return areas | {"ceiling: perfect order": selective.risk_area(perfect, right)}

    def _coverage_figure(self) -> Figure:
        series = []
        for name, score in self._abstaining().items():
            coverage, accuracy = selective.risk_coverage(score, self.right[:, -1])
            series.append(
                {
                    "name": name,
                    "x": coverage,
                    "y": accuracy,
                    "low": None,
                    "high": None,
                    "control": name.startswith("control"),
                }
            )
        return Figure(
            "lines",
            f"Risk and coverage: accuracy of the final readouts that score highest (report, n = {self.n})",
            "share of problems answered",
            "right among the answered",
            {"series": series},
        )

    def _nothing_to_tell(self) -> str:
        """The summary where all final readouts are right, or all wrong."""
        return (
            f"Every one of the {self.n} report problems was answered {'right' if self.right[0, -1] else 'wrong'}, so "
            "there is nothing to tell apart: the AUROC of the final readout does not exist, and no goal is met or "
            "missed. What the judge makes of earlier readouts is in the table by block."
        )

    def _summary(
        self,
        final: dict[str, Estimate],
        gain: Estimate,
        hardest: str,
        lead: Estimate,
        new: "NewChains | None",
        other_splits: dict[str, Estimate],
        picked: dict[str, float],
    ) -> str:
        chosen = self.probe.chosen
        reached = final[chosen].value
        goal = f"the goal of {AUROC_GOAL:.2f} is " + (
            "met" if reached >= AUROC_GOAL else f"missed by {AUROC_GOAL - reached:.3f}"
        )
        others = "; ".join(f"fitted on “{name}” it is {_text(value)}" for name, value in other_splits.items())
        return (
            f"The judge ({chosen}) tells right final readouts from wrong ones with AUROC {_text(final[chosen])} on all "
            f"{self.n} problems, {goal}{others and f' ({others})'}. The paper's probe of one block "
            f"reaches {_text(final[PROBE])}, the readout's own probability {_text(final[OWN])} (judge minus own: "
            f"{_text(gain)}), the strongest control, {hardest}, {_text(final[hardest])} (judge minus it: "
            f"{_text(lead)}): how hard a question is can be told without the trained memory. {self._verdict(new)} "
            f"Choosing among the blocks by the judge is right in "
            f"{picked[f'highest score of the judge ({chosen})']:.1%}, the final block in "
            f"{picked['final block (baseline)']:.1%}."
        )

    def _verdict(self, new: "NewChains | None") -> str:
        """Whether the judge knows more than the controls: decided on the new chains, where nothing can be recalled."""
        if new is None:
            return (
                "No new chains of steps with both outcomes are in the report, so what the judge knows cannot be told "
                "from what it recalls."
            )
        count = int(self.new.sum())
        if new.lead.low > 0:
            verdict = "there the judge knows more than that"
        elif new.lead.high < 0:
            verdict = f"there it knows less than the {new.hardest}"
        else:
            verdict = f"there it knows no more than the {new.hardest}, as far as {count} problems can show"
        return (
            f"What it knows beyond recall shows on the {count} problems whose steps neither the fit nor the choice "
            f"held: the judge reaches {_text(new.judge)}, the strongest control there, {new.hardest}, "
            f"{_text(new.control)}; {verdict} "
            f"(difference {_text(new.lead)}; judge minus own probability: {_text(new.gain)})."
        )


@dataclass(frozen=True)
class NewChains:
    """AUROC of the final readout on new chains: judge, own probability, strongest control; judge minus the two."""

    judge: Estimate
    own: Estimate
    hardest: str
    control: Estimate
    gain: Estimate
    lead: Estimate

    def estimates(self) -> dict[str, Estimate]:
        return {
            "judge": self.judge,
            OWN: self.own,
            self.hardest: self.control,
            "judge minus own probability": self.gain,
            f"judge minus {self.hardest}": self.lead,
        }


def _text(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} ({estimate.low:.3f} to {estimate.high:.3f})"
