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
from rim_probe.probing.section import Section
from rim_probe.probing.study import Study


@dataclass(frozen=True)
class Result:
    """What one probe leaves: its report, and the arrays and settings it is restored from."""

    section: Section
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
        module, decoder: where it lives; no decoder where nothing is fitted.
        run: from a workbench to a result.
        needs: probes whose decoders it builds on.
        form: of what is stored; what lies there in another form is fitted anew.
    """

    module: str
    decoder: str | None
    run: Callable[[Workbench], Result]
    needs: tuple[str, ...] = ()
    form: int = 1


def _fitted(name: str) -> Callable[[Workbench], Result]:
    def run(workbench: Workbench) -> Result:
        return _scored(_decoder(name).fit(workbench.study), workbench.study)

    return run


def _scored(decoder: Any, study: Study) -> Result:
    return Result(decoder.score(study), decoder.tensors(), decoder.settings())


def _function(name: str) -> Callable[[Workbench], Result]:
    return lambda workbench: Result(_module(name).score(workbench.study))


def _adaptive(workbench: Workbench) -> Result:
    return _scored(_decoder("adaptive").fit(workbench.study, workbench.decoder("correctness")), workbench.study)


def _interchange(workbench: Workbench) -> Result:
    return Result(_module("interchange").score(workbench.study, workbench.decoder("steps").claims))


PROBES: dict[str, Probe] = {
    "steps": Probe("nearest_step.fit", "StepDecoder", _fitted("steps"), form=2),
    "words": Probe("words", None, _function("words")),
    "lens": Probe("lens", "VocabularyLens", _fitted("lens")),
    "values": Probe("values", "ValueProbes", _fitted("values")),
    "correctness": Probe("correctness", "CorrectnessProbe", _fitted("correctness")),
    "adaptive": Probe("adaptive", "AdaptivePolicy", _adaptive, needs=("correctness",)),
    "commitment": Probe("commitment", None, _function("commitment")),
    "attention": Probe("attention", None, _function("attention")),
    "geometry": Probe("geometry", "Geometry", _fitted("geometry")),
    "importance": Probe("importance", None, _function("importance")),
    "interchange": Probe("interchange", None, _interchange, needs=("steps",)),
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
