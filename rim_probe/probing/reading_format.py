"""The form of a reading: plain data of fixed shape, checked entry by entry when it comes from outside.

Method: small checks (`checks`) are put together to those of the whole reading; how long lists have to be follows from
the sizes at its head (K blocks, M slots, L layers, W tokens). What passes can be drawn: every list has the length that
it should have, every number is finite and of a bounded size, and every text can be written as UTF-8.

Knows JSON and shapes. Knows nothing of models, of what the numbers mean, or of how they are drawn.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rim_probe.errors import RiMError
from rim_probe.memory import MAX_BLOCKS, MAX_SLOTS
from rim_probe.probing import experiment_format
from rim_probe.probing.checks import (
    LARGEST,
    MAX_ITEMS,
    Check,
    Damage,
    each,
    either,
    grid,
    maybe,
    number,
    one_of,
    record,
    rising,
    text,
    truth,
    whole,
)

FORMAT = "rim-probe-reading/1"
MAX_BYTES = 32 * 2**20  # of a file; a reading of the model in the box takes 0.4 MB
MAX_LAYERS, MAX_HEADS = 512, 512
EXPERIMENTS = {"surgery": experiment_format.surgery, "counterfactual": experiment_format.counterfactual}
MODES = ("logit lens", "tuned lens", "nearest step", "own words")


@dataclass(frozen=True)
class Reading:
    """Everything the probes said of one question, as plain data.

    Attributes:
        data: see `to_dict`.
    """

    data: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The data itself, not a copy: lists, dicts, texts, finite numbers, truth values and None.

        Keys: "format", "question", "tokens" [W], "num_blocks" K, "slots" M, "num_layers" L, "gold", "steps", "chain",
        "readouts" [K], "answer", "provenance", "complaints" and "probes": by name what each probe's `explain` gives,
        and under "depth" what `depth` reads layer by layer. A probe that is not there has a sentence in "complaints".
        Where experiments were made on the question: "surgery" (of `surgery.operate`) and "counterfactual" (of `trial`).
        """
        return dict(self.data)

    @classmethod
    def from_dict(cls, data: Any) -> Reading:
        """The reading that `to_dict` came from; entries that are not known are left out.

        Raises:
            RiMError: another format, an entry that is missing or damaged.
        """
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            raise RiMError(f"This is no reading of this kind ({FORMAT}); export one from the page or save a Reading.")
        try:
            return cls(_reading(data))
        except Damage as damage:
            raise RiMError(f"This reading is damaged: {damage}; export it again.") from None

    @classmethod
    def load(cls, path: str | Path) -> Reading:
        """A reading from a file: its own, or the export of a run, which has it under "reading" and experiments beside.

        Raises:
            RiMError: a file that is missing, too large, no JSON, or holds no whole reading.
        """
        path = Path(path)
        try:
            if path.stat().st_size > MAX_BYTES:
                raise RiMError(f"{path} has more than {MAX_BYTES // 2**20} MB and is no reading; choose another file.")
            data = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise RiMError(f"{path} cannot be read ({error.strerror or error}); check its path.") from None
        except (ValueError, RecursionError) as error:
            if isinstance(error, RiMError):
                raise
            raise RiMError(f"{path} is no JSON file; export the reading again.") from None
        if isinstance(data, Mapping) and isinstance(data.get("reading"), Mapping):
            data = {**data["reading"], **{name: data[name] for name in EXPERIMENTS if data.get(name) is not None}}
        return cls.from_dict(data)

    def save(self, path: str | Path) -> Path:
        """Writes one line of JSON."""
        path = Path(path)
        text = json.dumps(self.data, ensure_ascii=False, allow_nan=False)
        try:
            path.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise RiMError(f"{path} cannot be written ({error.strerror or error}); choose another place.") from None
        return path


probability = number(0, 1.001)
cosine = number(-1.001, 1.001)
rank = number(0, LARGEST)


# ---------------------------------------------------------------------------------------------------------- the reading


def _reading(data: Mapping[str, Any]) -> dict[str, Any]:
    said = {"text": text, "value": maybe(text), "probability": probability, "right": maybe(truth)}
    head = record(
        {
            "format": one_of(FORMAT),
            "question": text,
            "tokens": each(text, least=1),
            "num_blocks": whole(0, MAX_BLOCKS),
            "slots": whole(1, MAX_SLOTS),
            "num_layers": whole(1, MAX_LAYERS),
            "gold": maybe(text),
            "steps": each(text, most=100),
            "chain": maybe(record({"text": text, "steps": each(text), "value": maybe(text)})),
            "answer": record(said),
            "provenance": record(
                dict.fromkeys(("checkpoint", "fingerprint", "device", "dtype", "date"), text)
                | {"seed": whole(-(2**63), 2**63), "versions": _versions}
            ),
            "complaints": each(text, most=100),
        }
    )(data, "the reading")
    sizes = Sizes(head["num_blocks"], head["slots"], head["num_layers"], head["tokens"])
    rest = record(
        {
            "readouts": _numbered(said, sizes.K),
            "probes": record({}, {name: part(sizes) for name, part in PROBES.items()} if sizes.K else {}),
        },
        {name: maybe(part) for name, part in EXPERIMENTS.items()},
    )(data, "the reading")
    found = head | rest
    return {key: found[key] for key in data if key in found}


def _versions(value: Any, at: str) -> dict[str, str]:
    if not isinstance(value, Mapping) or len(value) > 20 or not all(isinstance(name, str) for name in value):
        raise Damage(f"{at} should be a dictionary of at most 20 versions")
    return {text(name, at): text(version, f"{at}.{name}") for name, version in value.items()}


@dataclass(frozen=True)
class Sizes:
    """K blocks of M slots, L layers, the question's tokens."""

    K: int
    M: int
    L: int
    tokens: Sequence[str]

    @property
    def block(self) -> Check:
        return whole(1, self.K)

    @property
    def layer(self) -> Check:
        return whole(0, self.L)

    @property
    def layers(self) -> Check:
        return rising(self.layer, self.L + 1)


def _numbered(entries: Mapping[str, Check], length: int) -> Check:
    """One record for each of the blocks 1 to `length`, in order."""
    every = each(record({"block": whole(1, MAX_BLOCKS), **entries}), length)

    def check(value: Any, at: str) -> list:
        found = every(value, at)
        if [item["block"] for item in found] != list(range(1, length + 1)):
            raise Damage(f"{at} should name the blocks 1 to {length} in order")
        return found

    return check


def _some(entries: Mapping[str, Check], sizes: Sizes, optional: Mapping[str, Check] | None = None) -> Check:
    """One record for each of some of the blocks, in order."""
    every = each(record({"block": sizes.block, **entries}, optional), most=sizes.K)

    def check(value: Any, at: str) -> list:
        found = every(value, at)
        rising(sizes.block, sizes.K)([item["block"] for item in found], f"the blocks of {at}")
        return found

    return check


def _steps(sizes: Sizes) -> Check:
    nearest = record({"step": text, "cosine": cosine, "gold": maybe(whole(0, 100))})
    decode = {
        "step": whole(1, 1000),
        "cell": text,
        "accuracy": probability,
        "nearest": each(nearest, least=1, most=20),
        "match": maybe(truth),
    }
    covered = {"coverage": probability}  # files of before it was measured lack it
    blocks = _some(decode | {"others": each(record(decode, covered), most=1000)}, sizes, covered)
    return record({"bank": whole(1, 10**9), "reading_layer": sizes.layer, "blocks": blocks})


def _values(sizes: Sizes) -> Check:
    value = {
        "step": maybe(whole(1, 1000)),
        "quantity": text,
        "value": text,
        "confidence": probability,
        "accuracy": probability,
    }
    return record({"blocks": _some({"values": each(record(value), most=1000)}, sizes)})


def _words(sizes: Sizes) -> Check:
    return record({"blocks": _numbered(dict.fromkeys(("memory", "stage1", "carried"), maybe(text)), sizes.K)})


def _correctness(sizes: Sizes) -> Check:
    chances = dict.fromkeys(("own_probability", "chance_right", "chance_right_paper_probe"), probability)
    return record(
        {"judge": text, "blocks": _numbered({"value": maybe(text)} | chances, sizes.K), "chosen_block": sizes.block}
    )


def _attention(sizes: Sizes) -> Check:
    def check(value: Any, at: str) -> dict[str, Any]:
        head = record({"heads": whole(1, MAX_HEADS)})(value, at)
        A, H, K, W = sizes.L, head["heads"], sizes.K, len(sizes.tokens)
        found = record(
            {
                "tokens": each(text, W),
                "numbers": each(truth, W),
                "layers": whole(A, A),
                "heads": whole(H, H),
                "aggregation": text,
                "slots_to_tokens": record(
                    {
                        "mean over heads": grid(probability, A, K, W),
                        "max over heads": grid(probability, A, K, W),
                        "per head": maybe(grid(probability, A, H, K, W)),
                    }
                ),
                "answer_to_blocks": grid(probability, A, H, K),
                "answer_to_tokens": maybe(grid(probability, A, H, W)),
                "slots_to_blocks": record({"mean over heads": grid(probability, A, K, K)}),
                "slots_to_slots": record({"mean over heads": grid(probability, A, K, K)}),
            }
        )(value, at)
        if found["tokens"] != sizes.tokens:
            raise Damage(f"{at}.tokens should be those of the question")
        return found

    return check


def _commitment(sizes: Sizes) -> Check:
    moment = {"probability": probability, "matches": truth, "entropy": number(-1e-3, 1e3)}
    blocks = _numbered(moment | {"kl_to_last": number(-1e-3, 1e3)}, sizes.K)
    step = record({"step": whole(0, MAX_ITEMS), "text": text} | moment)
    return record(
        {
            "answer": maybe(text),
            "blocks": either(each(text, 0), blocks),  # none of an answer that was cut off
            "first_block": maybe(sizes.block),
            "stable_block": maybe(sizes.block),
            "cot": maybe(record({"answer": maybe(text), "steps": each(step)})),
        }
    )


def _importance(sizes: Sizes) -> Check:
    def check(value: Any, at: str) -> dict[str, Any]:
        axes = {"layers": sizes.layers, "blocks": rising(sizes.block, sizes.K)}
        head = record(axes)(value, at)
        shape = len(head["layers"]), len(head["blocks"])
        cells = {"change": grid(number(), *shape), "says": grid(truth, *shape)}
        return record({"answer": text, "log_probability": number()} | axes | cells)(value, at)

    return check


def _geometry(sizes: Sizes) -> Check:
    def cloud(value: Any, at: str) -> dict[str, Any]:
        n = record({"n": whole(0, MAX_ITEMS)})(value, at)["n"]
        parts = {"points": grid(number(), n, 2), "right": each(truth, n), "steps": each(whole(0, 1000), n)}
        return record(parts | {"n": whole(n, n)})(value, at)

    def check(value: Any, at: str) -> dict[str, Any]:
        count = len(record({"depth_layers": sizes.layers})(value, at)["depth_layers"])
        return record(
            {
                "layer": sizes.layer,
                "blocks": grid(number(), sizes.K, 3),
                "depth_layers": sizes.layers,
                "depth": grid(number(), count, sizes.K, 3),
                "explained_blocks": each(probability, 3),
                "explained_depth": each(probability, 3),
            },
            # Of known questions, which may have been asked with another number of blocks.
            {"cloud": cloud, "mean_path": each(each(number(), 3), least=1, most=MAX_BLOCKS)},
        )(value, at)

    return check


def _depth(sizes: Sizes) -> Check:
    place = record(
        {"block": sizes.block, "position": either(one_of("end", "slots"), whole(1, sizes.M))},
        {"step": whole(1, 1000), "fitted_layer": sizes.layer},
    )

    def mode(value: Any, at: str) -> dict[str, Any]:
        axes = {
            "layers": sizes.layers,
            "positions": each(place, least=1, most=sizes.K * (sizes.M + 1)),
        }
        head = record(axes)(value, at)
        shape = len(head["layers"]), len(head["positions"])
        cells, minus = (
            grid(each(record({"text": text, "score": score}), most=5), *shape) for score in (cosine, number(-2.1, 2.1))
        )
        return record(
            axes
            | {
                "name": one_of(*MODES),
                "what": text,
                "score_name": one_of("probability", "cosine"),
                "cells": cells,
                "control": maybe(text),
                "control_cells": maybe(cells),
                "minus": maybe(minus),
            }
        )(value, at)

    def course(value: Any, at: str) -> dict[str, Any]:
        count = len(record({"layers": sizes.layers})(value, at)["layers"])
        return record(
            {
                "value": text,
                "step": whole(1, MAX_ITEMS),
                "what": text,
                "layers": sizes.layers,
                "best": each(rank, count),
                "by_block": grid(rank, sizes.K, count),
                "control": maybe(each(rank, count)),
                "control_name": text,
            }
        )(value, at)

    every = record({"modes": each(mode, most=len(MODES)), "ranks": each(course, most=1000)})

    def check(value: Any, at: str) -> dict[str, Any]:
        found = every(value, at)
        names = [own["name"] for own in found["modes"]]
        if len(set(names)) != len(names):
            raise Damage(f"{at}.modes should name every mode once")
        return found

    return check


PROBES: dict[str, Callable[[Sizes], Check]] = {
    "steps": _steps,
    "values": _values,
    "words": _words,
    "correctness": _correctness,
    "attention": _attention,
    "commitment": _commitment,
    "importance": _importance,
    "geometry": _geometry,
    "depth": _depth,
}
"""In the order of the screen."""
