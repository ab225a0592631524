"""Reading: everything that the probes say of one question, as one piece of plain data.

Method:
1. `Readers` restores the fitted decoders that lie beside a checkpoint, once for any number of questions.
2. `read` observes the question (one pass, one decoding) and lets every probe explain what it sees: steps, values, own
   words, the chance of being right, attention, commitment, importance, geometry, and all layers beside their control
   (`depth`). What cannot be said is named in a sentence; the rest stands.
3. The result is a `Reading` (`reading_format`): plain data that can be saved, loaded and drawn without a model.
Nothing is random. Any number of threads may read with the same models and readers.

Knows probes and their order. Knows nothing of how a probe works or how its findings are drawn.
"""

from __future__ import annotations

import datetime
import math
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from rim_probe.decoding import Answer, Readout, answer
from rim_probe.errors import RiMError
from rim_probe.model import RiM
from rim_probe.probing import attention, commitment, depth, importance, words
from rim_probe.probing.artifacts import FOLDER, fingerprint
from rim_probe.probing.hooks import num_layers, spread_layers
from rim_probe.probing.lens import VocabularyLens
from rim_probe.probing.probes import restore
from rim_probe.probing.reading_format import FORMAT, Reading
from rim_probe.probing.study import Observation, load_models, observe
from rim_probe.problems import is_correct

__all__ = ["Readers", "Reading", "explain_blocks", "read", "read_checkpoint"]

FITTED = ("steps", "lens", "values", "correctness", "geometry")
DIGITS = 4  # significant ones
FOLLOWED = 24  # tokens
_STEP = re.compile(r"<<.*?>>")


@dataclass(frozen=True)
class Readers:
    """The fitted probes of one checkpoint, as far as there are any.

    Attributes:
        decoders: by name, of `FITTED`.
        complaints: why the others are missing, one sentence each.
    """

    decoders: Mapping[str, Any]
    complaints: tuple[str, ...] = ()

    @classmethod
    def load(cls, checkpoint: str | Path, models: Mapping[str, RiM]) -> Readers:
        """Those in the folder `probes` of a checkpoint; never raises for what is missing or foreign."""
        return cls.restore(Path(checkpoint) / FOLDER, models["memory"])

    @classmethod
    def restore(cls, folder: str | Path, rim: RiM) -> Readers:
        """Those in a folder of artifacts."""
        folder, decoders, complaints = Path(folder), {}, []
        there = [name for name in FITTED if (folder / f"{name}.json").exists()]
        if unfitted := [name for name in FITTED if name not in there]:
            complaints.append(
                f"Unfitted in {folder}: {', '.join(unfitted)}; "
                "`python -m rim_probe probe CHECKPOINT --data FILE` does it."
            )
        for name in there:
            try:
                decoders[name] = restore(name, folder, rim)
            except RiMError as error:  # of another checkpoint, or damaged
                complaints.append(str(error))
            except (KeyError, ValueError, TypeError, IndexError) as error:  # whole, but made by something else
                complaints.append(f"The fitted probe {folder / name}.json does not say what it should ({error!r}).")
        return cls(decoders, tuple(complaints))


def read_checkpoint(
    checkpoint: str | Path,
    question: str,
    *,
    num_blocks: int | None = None,
    gold: str | None = None,
    steps: Sequence[str] = (),
    device: str | None = None,
) -> Reading:
    """The reading of a question by a checkpoint folder: models and fitted probes are loaded first.

    Raises:
        RiMError: a checkpoint that cannot be loaded, a question that cannot be asked.
    """
    models = load_models(checkpoint, device)
    return read(models, Readers.load(checkpoint, models), question, num_blocks=num_blocks, gold=gold, steps=steps)


def read(
    models: Mapping[str, RiM],
    readers: Readers,
    question: str,
    *,
    num_blocks: int | None = None,
    gold: str | None = None,
    steps: Sequence[str] = (),
    chain: Answer | None = None,
) -> Reading:
    """Everything the probes say of one question.

    Args:
        models: by role, `memory` and whichever there are of `cot`, `direct`, `stage1`, `base` (`study.load_models`).
        num_blocks: K; None for the layout's own. Without blocks there is an answer and nothing to look into.
        gold: the right answer, where it is known.
        steps: the gold steps ("<<3+4=7>>"), where they are known.
        chain: what the chain of thought answered; asked where it is not given and there is a cot model.

    Raises:
        RiMError: a question that cannot be asked, or a number of blocks that there cannot be.
    """
    rim, steps, gold = models["memory"], tuple(steps), gold or None
    blocks, complaints = rim.layout.check_blocks(num_blocks), []
    seen = observe(rim, question, num_blocks)
    given = seen.answer
    if chain is None and "cot" in models:
        try:
            chain = answer(models["cot"], question, "cot")
        except RiMError as error:
            complaints.append(f"The chain of thought cannot be asked this question: {error}")
    chain_steps = _STEP.findall(chain.text) if chain is not None else []
    found = _Findings(models, readers, seen)
    if blocks:
        found.tell_all(steps, chain, chain_steps)
    else:
        found.complaints.append("Without memory blocks there is nothing to look into; choose at least one.")
    return Reading(
        {
            "format": FORMAT,
            "question": question,
            "tokens": seen.tokens,
            "num_blocks": blocks,
            "slots": rim.layout.slots_per_block,
            "num_layers": num_layers(rim),
            "gold": gold,
            "steps": list(steps),
            "chain": None if chain is None else {"text": chain.text, "steps": chain_steps, "value": chain.value},
            "readouts": [{"block": readout.block, **_said(readout, gold)} for readout in given.readouts if blocks],
            "answer": _said(given.readouts[-1], gold),
            "provenance": _provenance(rim),
            "probes": found.told,
            "complaints": complaints + found.complaints,
        }
    )


def explain_blocks(
    models: Mapping[str, RiM], readers: Readers, seen: Observation, steps: Sequence[str] = ()
) -> tuple[dict[str, Any], list[str]]:
    """What is said of every block of an observed question (steps, values, own words, the chance of being right), by
    probe, and why the others say nothing."""
    found = _Findings(models, readers, seen)
    found.tell_blocks(tuple(steps), *found.carry(by_layer=False)[:2])
    return found.told, found.complaints


class _Findings:
    """What every probe says of one observed question, and why others say nothing."""

    def __init__(self, models: Mapping[str, RiM], readers: Readers, seen: Observation):
        self.models, self.decoders, self.seen = models, readers.decoders, seen
        self.told: dict[str, Any] = {}
        self.complaints = list(readers.complaints)

    def tell_all(self, steps: tuple[str, ...], chain: Answer | None, chain_steps: list[str]) -> None:
        """Every probe there is, in the order of the screen."""
        seen, rim, K = self.seen, self.models["memory"], self.seen.capture.K
        plain, carried, by_layer = self.carry(by_layer=True)
        self.tell_blocks(steps, plain, carried)
        self._tell("attention", lambda: attention.explain(seen))
        self._tell("commitment", lambda: commitment.explain(self.models, seen, chain))
        followed, swept = _followed(rim, seen.answer), spread_layers(range(num_layers(rim)))
        self._tell(
            "importance", lambda: importance.explain(rim, seen.question, gold=followed, layers=swept, num_blocks=K)
        )
        self._fitted("geometry")
        self._tell("depth", lambda: self._depth(steps, chain_steps, plain, by_layer))
        if "geometry" in self.told and (known := len(self.told["geometry"]["mean_path"])) != K:
            self.complaints.append(
                f"geometry: the known questions have {known} blocks, so their cloud is that of block {known}."
            )

    def tell_blocks(self, steps: tuple[str, ...], plain: Answer | None, carried: Answer | None) -> None:
        """The probes that tell blocks apart."""
        self._fitted("steps", steps)
        self._fitted("values")
        self._tell("words", lambda: words.explain(self.seen, plain, carried))
        self._fitted("correctness")
        for name in ("steps", "values"):
            if name in self.told and (fewer := len(self.told[name]["blocks"])) < self.seen.capture.K:
                self.complaints.append(f"{name}: fitted for {fewer} blocks, so it says nothing of later ones.")

    def carry(self, by_layer: bool) -> tuple[Answer | None, Answer | None, dict[int, Answer]]:
        """What the stage-1 model says as it is, with this memory's slots at every layer, and (where it is asked for) at
        one layer by itself, by layer."""
        stage1, layers = self.models.get("stage1"), range(num_layers(self.models["memory"]) + 1)
        chosen = spread_layers(layers) if by_layer else []  # of a deep model not every layer is worth a row
        if stage1 is None:
            self.complaints.append(
                "words: there is no stage-1 model beside this checkpoint, so only the model's own readouts are told."
            )
            return None, None, {}
        try:
            if not depth.same_shape(stage1, self.models["memory"]):
                raise RiMError(f"The slots do not fit into {stage1.name}, which has another shape.")
            variants = [(), layers, *zip(chosen, strict=True)]
            plain, carried, *single = words.carried_answers(stage1, self.seen, variants)
        except RiMError as error:
            self.complaints.append(f"words: {error}")
            return None, None, {}
        return plain, carried, dict(zip(chosen, single, strict=True))

    def _tell(self, name: str, explain: Callable[[], Any]) -> None:
        try:
            self.told[name] = _rounded(explain())
        except RiMError as error:
            self.complaints.append(f"{name}: {error}")

    def _fitted(self, name: str, *given: Any) -> None:
        if name in self.decoders:
            self._tell(name, lambda: self.decoders[name].explain(self.seen, *given))

    def _depth(
        self, steps, chain_steps: list[str], plain: Answer | None, by_layer: dict[int, Answer]
    ) -> dict[str, Any]:
        seen, control = self.seen, depth.Control.of(self.models, self.seen)
        if control.missing:
            self.complaints.append(f"depth: {control.missing}")
        fitted = self.decoders.get("lens")
        lens = fitted or VocabularyLens.plain(self.models["memory"])
        modes = depth.lens_modes(lens, seen, control, tuned=fitted is not None)
        if "steps" in self.decoders:
            modes += [mode for mode in [depth.step_mode(self.decoders["steps"], seen, control)] if mode is not None]
        if plain is not None:
            modes.append(depth.words_mode(self.models["stage1"], seen, plain, by_layer))
        known, whose = (steps, "gold") if steps else (chain_steps, "chain-of-thought")
        return {"modes": modes, "ranks": depth.ranks(lens, seen, control, known, whose)}


def _followed(rim: RiM, given: Answer) -> str:
    """The answer whose chance is followed; of one that came to no end its beginning, for the rest is meaningless."""
    return rim.decode(list(given.token_ids[:FOLLOWED])) if given.truncated else given.text


def _said(readout: Readout, gold: str | None) -> dict[str, Any]:
    return {
        "text": readout.text.strip(),
        "value": readout.value,
        "probability": _round(readout.probability),
        "right": is_correct(readout.value, gold) if gold else None,
    }


def _provenance(rim: RiM) -> dict[str, Any]:
    return {
        "checkpoint": rim.name,
        "fingerprint": fingerprint(rim),
        "seed": 0,  # of a page's later experiments; a reading draws nothing
        "device": str(rim.device),
        "dtype": str(rim.dtype).removeprefix("torch."),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _rounded(data: Any) -> Any:
    """Plain data with every fraction cut to `DIGITS` significant digits."""
    if isinstance(data, float):
        return _round(data)
    if isinstance(data, Mapping):
        return {key: _rounded(value) for key, value in data.items()}
    return [_rounded(value) for value in data] if isinstance(data, (list, tuple)) else data


def _round(value: float) -> float:
    if value == 0 or not math.isfinite(value):
        return value
    return round(value, DIGITS - 1 - math.floor(math.log10(abs(value))))
