"""Will it be right? Whether the states of the memory blocks tell right readouts from wrong ones, before they are read.

Method (arXiv:2605.30343, the probe of the experiments: linear, a block's hidden state, penultimate layer, 256 held-out
problems, "this readout is right"):
1. The paper's probe: one logistic regression per block on its own states, penultimate layer; position (end, slots,
   both) and penalty chosen.
2. The same beside the readout's own probability; a judge of the whole memory (all blocks and layers), alone, beside the
   readout's own probability, and beside the agreement of all readouts as well. The one that ranks best on the choosing
   split is "the judge".
3. Reported on other problems: AUROC, AUPRC, calibration error, against the readout's own probability; choosing among
   the blocks' answers; risk and coverage.
4. Controls: shuffled outcomes; block means (no question can be told apart); the last question token; the base model's
   states; the words of the question without any model; problems whose chain of steps the fit never held.

A model errs otherwise on what it was trained on than on what it was not. Where a study has the splits `fit-heldout` and
`choose-heldout`, they are used, and what `fit` and `choose` would have given is told beside it.

Knows outcomes and judges (`judge`). Knows nothing of how answers come about.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rim_probe.decoding import Answer
from rim_probe.errors import RiMError
from rim_probe.probing.capture import Capture, CaptureSet
from rim_probe.probing.compact import is_large
from rim_probe.probing.judge import OWN_VIEWS, Judge, Sample, fit_judge, mean_auroc, probability
from rim_probe.probing.section import Section
from rim_probe.probing.study import Observation, Study

SPLIT_PAIRS = (("fit-heldout", "choose-heldout"), ("fit", "choose"))  # the first pair that a study has is used
WIDE_PENALTIES = (0.0001, 0.001, 0.01)
PROBE, PROBE_OWN = "probe (paper)", "probe + own probability"
MEMORY, MEMORY_OWN = "whole memory", "whole memory + own probability"
MEMORY_READOUTS = "whole memory + readouts"


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

    @classmethod
    def fit(cls, study: Study, fit: str | None = None, choose: str | None = None) -> "CorrectnessProbe":
        """Fits on one split and chooses on another; by default the first of SPLIT_PAIRS that the study has."""
        default = next((pair for pair in SPLIT_PAIRS if set(pair) <= set(study.splits)), None)
        if not (fit and choose) and default is None:
            raise RiMError("This study has no splits to fit on and to choose on; name them.")
        splits = (fit or default[0], choose or default[1])
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
        judges = {
            PROBE: own[view],
            PROBE_OWN: fitted(PROBE_OWN, view, "own"),
        }
        prepared: dict = {}
        wide = {MEMORY: "none", MEMORY_OWN: "own", MEMORY_READOUTS: "all"}
        for name, readouts in study.progress(wide.items(), "correctness of the whole memory"):
            judges[name] = fitted(name, "memory", readouts, penalties=WIDE_PENALTIES, prepared=prepared)
        chosen = max(judges, key=lambda name: np.nan_to_num(scores[name]))
        return cls(judges, chosen, splits, scores)

    @property
    def quick_judge(self) -> Judge:
        """The best on the choosing split of those that need no other readout than the one they judge."""
        names = [name for name, judge in self.judges.items() if judge.readouts != "all"]
        return self.judges[max(names, key=lambda name: np.nan_to_num(self.chosen_scores[name]))]

    def chances(self, capture: Capture | CaptureSet, answers: Sequence[Answer]) -> np.ndarray:
        """The chance that each readout is right, as the chosen judge sees it, [n, K]."""
        return probability(self.judge.logits(capture, answers))

    def score(self, study: Study) -> Section:
        """The report on the split `report`; controls are fitted here, on the splits of `fit`."""
        from rim_probe.probing.correctness_report import Report

        return Report(self, study).section()

    def explain(self, observation: Observation) -> dict[str, Any]:
        """For every block its readout, its own probability and the judge's; which block the judge would choose.

        Raises:
            RiMError: the question was asked with another number of blocks than the judge was fitted on.
        """
        answers = [observation.answer]
        chances, paper = (
            probability(judge.logits(observation.capture, answers))[0] for judge in (self.judge, self.judges[PROBE])
        )
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
