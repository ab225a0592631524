"""Every probe by name: how it is run for a report, and how what it fitted is restored.

Method: a probe that is fitted gives a decoder (`fit`, `score`, `tensors`, `settings`, `restore`, `explain`); one that
is not is a pair of functions (`score`, `explain`). Modules are imported when their probe is used, so that one question
does not wait for scikit-learn.

Knows which probes there are and what builds on what. Knows nothing of files beyond loading a decoder that is done.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from rim_probe.model import RiM
from rim_probe.probing.artifacts import is_done, load_artifact
from rim_probe.probing.results import Report
from rim_probe.probing.study import Study


@dataclass(frozen=True)
class Fitted:
    """What one probe leaves: its results, and the arrays and settings it is restored from."""

    report: Report
    tensors: Mapping[str, np.ndarray] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Workbench:
    """Where probes work: a study, the folder of what is done, and the key that each probe's result must carry."""

    study: Study
    folder: Path
    keys: Mapping[str, str]

    def decoder(self, name: str) -> Any:
        """The decoder of a probe this one builds on: restored where it is done, else fitted."""
        memory = self.study.models["memory"]
        if is_done(self.folder, name, self.keys[name]):
            return restore(name, self.folder, memory)
        return _decoder(name).fit(self.study)


@dataclass(frozen=True)
class Probe:
    """One probe.

    Attributes:
        title, question: what it is called and what it asks, in plain words.
        module, decoder: where it lives; no decoder where nothing is fitted.
        run: from a workbench to what it leaves.
        needs: probes whose decoders it builds on.
        form: of what is stored; what lies there in another form is fitted anew.
    """

    title: str
    question: str
    module: str
    decoder: str | None
    run: Callable[[Workbench], Fitted]
    needs: tuple[str, ...] = ()
    form: int = 1


def _fitted(name: str) -> Callable[[Workbench], Fitted]:
    def run(workbench: Workbench) -> Fitted:
        return _scored(_decoder(name).fit(workbench.study), workbench.study)

    return run


def _scored(decoder: Any, study: Study) -> Fitted:
    return Fitted(decoder.score(study), decoder.tensors(), decoder.settings())


def _function(name: str) -> Callable[[Workbench], Fitted]:
    return lambda workbench: Fitted(_module(name).score(workbench.study))


def _adaptive(workbench: Workbench) -> Fitted:
    return _scored(_decoder("adaptive").fit(workbench.study, workbench.decoder("correctness")), workbench.study)


PROBES: dict[str, Probe] = {
    "steps": Probe(
        "Nearest explicit step",
        "Which step of an explicit reasoning does a memory block lie nearest to, read from plain text by the "
        "same model, and is it the step that the problem needs?",
        "nearest_step.fit",
        "StepDecoder",
        _fitted("steps"),
        form=2,
    ),
    "words": Probe(
        "Own words",
        "What does the model itself say after block k, is it the step, and do the words come from the memory?",
        "words",
        None,
        _function("words"),
        form=2,
    ),
    "lens": Probe(
        "Vocabulary lens",
        "Which words does the model's own head read in the memory slots, layer by layer, and is the result of "
        "an explicit step among them?",
        "lens",
        "VocabularyLens",
        _fitted("lens"),
    ),
    "values": Probe(
        "Values",
        "Can a linear probe read the operands, the operator and the result of each explicit step in the "
        "memory blocks, and where?",
        "values",
        "ValueProbes",
        _fitted("values"),
    ),
    "correctness": Probe(
        "Will it be right?",
        "Can a linear probe on the memory blocks tell, before anything is read out, whether a readout will be "
        "right? Does it know more than the probability the readout gives itself?",
        "correctness",
        "CorrectnessProbe",
        _fitted("correctness"),
    ),
    "adaptive": Probe(
        "Answer by memory when sure, else think aloud",
        "Does it pay to answer by memory where the probe trusts the answer, and by chain of thought where it does not?",
        "adaptive",
        "AdaptivePolicy",
        _adaptive,
        needs=("correctness",),
    ),
    "commitment": Probe(
        "Commitment",
        "How early is the model sure of the answer it will give: after which block, and after which step of a chain of "
        "thought?",
        "commitment",
        None,
        _function("commitment"),
    ),
    "attention": Probe(
        "Attention to memory",
        "Where do the memory slots and the answer attend, and do the heads that attend most to memory matter "
        "most for the answer?",
        "attention",
        None,
        _function("attention"),
        form=2,
    ),
    "geometry": Probe(
        "The shape of memory",
        "Do the blocks follow paths of their own, and does the path depend on the question? Is that so without "
        "training?",
        "geometry",
        "Geometry",
        _fitted("geometry"),
    ),
    "importance": Probe(
        "Importance of blocks and layers",
        "What does the answer lose when a block is taken away, at one layer or everywhere?",
        "importance",
        None,
        _function("importance"),
    ),
    "interchange": Probe(
        "Interchange test",
        "If the slots of block t are taken from a problem that differs in one number, does the model then give the "
        "answer that the problem's own equations predict? And which routes lead to the answer?",
        "interchange",
        None,
        _function("interchange"),
    ),
}
"""In the order of the report; the command line's help says what each is."""


def restore(name: str, folder: str | Path, rim: RiM) -> Any:
    """The fitted decoder that lies in `folder`.

    Raises:
        ArtifactError: it is missing, damaged, or belongs to another checkpoint.
    """
    tensors, settings, _ = load_artifact(folder, name, rim)
    decoder = _decoder(name)
    if name == "lens":
        return decoder.restore(tensors, settings, rim)
    if name == "adaptive":
        return decoder.restore(tensors, settings, lambda: restore("correctness", folder, rim))
    return decoder.restore(tensors, settings)


def _module(name: str) -> Any:
    return import_module(f"rim_probe.probing.{PROBES[name].module}")


def _decoder(name: str) -> Any:
    return getattr(_module(name), PROBES[name].decoder)
