"""Interventions: a question's memory blocks removed or replaced, and what the answer becomes.

Method:
1. A variant names blocks, layers, positions within a block, and a mode:
   `zero`      the states become 0;
   `mean`      each becomes its mean over the questions of a pool;
   `resample`  they become those of one other question of the pool, drawn by seed;
   `swap`      they become those of a given question;
   `noise`     Gaussian noise is added: per dimension as wide as the state's spread over a pool, or, without a pool, in
               every dimension as wide as the spread of the state's own values.
2. Forward hooks write the states at the chosen positions alone, at every chosen layer; all variants of a question run
   in a few batches (see `patching`).
3. The answer is decoded greedily, and the answer before and a gold answer are teacher-forced, in the same batch as the
   clean row they are compared with.

Swapping at several layers writes the donor's states of each of them.

Knows modes and their donors. Knows nothing of gold steps or of what a change means.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from rim_probe.decoding import Readout
from rim_probe.errors import RiMError
from rim_probe.model import RiM
from rim_probe.probing.hooks import layer_number, num_layers
from rim_probe.probing.patching import Edit, Patcher

MODES = ("zero", "mean", "resample", "swap", "noise")
POOL_QUESTIONS = 256


@dataclass(frozen=True)
class Pool:
    """The clean memory states of n questions: where means, donors and spreads come from.

    Attributes:
        states: [n, L + 1, K, M + 2, d] for begin, slots and end of every block, on the CPU in the model's dtype.
        question_ids: token ids of each question, so that a question is never its own donor.
    """

    states: torch.Tensor
    question_ids: list[list[int]]

    @classmethod
    def of(
        cls,
        source: Pool | Sequence[str],
        rim: RiM,
        num_blocks: int | None = None,
        limit: int = POOL_QUESTIONS,
    ) -> Pool:
        """A pool from the first `limit` of some questions, or one made before.

        Raises:
            RiMError: fewer than two questions, or a pool with other blocks.
        """
        blocks = rim.layout.check_blocks(num_blocks)
        if isinstance(source, Pool):
            pool = source
        elif isinstance(source, Sequence) and not isinstance(source, str):
            states = [Patcher(rim, question, num_blocks=num_blocks).memory.cpu() for question in source[:limit]]
            ids = [rim.encode_question(question) for question in source[:limit]]
            pool = cls(torch.stack(states) if states else torch.empty(0), ids)
        else:
            raise RiMError("The modes mean, resample and noise take a list of questions as their source.")
        if len(pool.states) < 2:
            raise RiMError("A pool needs at least two questions; give more.")
        if pool.states.shape[1:4] != (num_layers(rim) + 1, blocks, rim.layout.block_length):
            raise RiMError(
                f"The pool has other layers or blocks than the {blocks} blocks of this intervention; make it anew."
            )
        return pool

    def mean(self) -> torch.Tensor:
        """float32 [L + 1, K, M + 2, d]."""
        return self.states.float().mean(0)

    def spread(self) -> torch.Tensor:
        """Standard deviation over questions, float32 [L + 1, K, M + 2, d]."""
        return self.states.float().std(0)

    def donors(self, question_ids: Sequence[int], count: int, rng: np.random.Generator) -> list[int]:
        """`count` random questions of the pool other than this one, without repeats as far as there are enough."""
        others = [i for i, ids in enumerate(self.question_ids) if list(ids) != list(question_ids)]
        if not others:
            raise RiMError("The pool holds no question other than this one; give more questions.")
        return rng.choice(others, count, replace=count > len(others)).tolist()


@dataclass(frozen=True)
class Variant:
    """One intervention.

    Attributes:
        blocks: 1..K.
        layers: numbers 0..L or TransformerLens names; None for all of 1..L.
        slots: 1..M, "begin" or "end"; None for all M slots.
        mode: see the head of this module.
        source: `swap`: a question. `mean`, `resample`: a `Pool`, or questions. `noise`: the
            same, or None. `zero`: None.
    """

    blocks: Sequence[int]
    layers: Sequence[int | str] | None = None
    slots: Sequence[int | str] | None = None
    mode: str = "zero"
    source: str | Pool | Sequence[str] | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Intervention:
    """What one variant did.

    Attributes:
        before, after: the final readout without and with it.
        before_answer_change: log probability of the *before* answer, with minus without the variant.
        gold_log_probability, gold_change: of the gold answer without it, and the change; None where no gold was given.
    """

    variant: Variant
    before: Readout
    after: Readout
    before_answer_change: float
    gold_log_probability: float | None
    gold_change: float | None


def intervene(
    rim: RiM,
    question: str,
    blocks: Sequence[int],
    layers: Sequence[int | str] | None = None,
    slots: Sequence[int | str] | None = None,
    mode: str = "zero",
    source=None,
    *,
    gold: str | None = None,
    num_blocks: int | None = None,
    seed: int = 0,
    max_new_tokens: int = 256,
) -> Intervention:
    """One intervention on one question; arguments as those of `Variant` and `intervene_many`."""
    variant = Variant(blocks, layers, slots, mode, source)
    return intervene_many(
        rim, question, [variant], gold=gold, num_blocks=num_blocks, seed=seed, max_new_tokens=max_new_tokens
    )[0]


def intervene_many(
    rim: RiM,
    question: str,
    variants: Sequence[Variant],
    *,
    gold: str | None = None,
    num_blocks: int | None = None,
    seed: int = 0,
    max_new_tokens: int = 256,
) -> list[Intervention]:
    """Many interventions on one question, whose prefix is computed once.

    Args:
        gold: an answer whose log probability is followed.
        num_blocks: K; None for the layout's own.
        seed: of the donors and the noise; a variant's draws depend on its place in the list.

    Raises:
        RiMError: a question that cannot be asked; a block, layer, slot or mode that does not exist; a missing source.
    """
    clean = Patcher(rim, question, num_blocks=num_blocks)
    donors = Donors(clean)
    edits = [donors.edits(variant, np.random.default_rng([seed, number])) for number, variant in enumerate(variants)]
    before, *after = [told.readouts[-1] for told in clean.answers([[], *edits], max_new_tokens)]
    # The answer before is teacher-forced like any other target.
    targets = [list(before.token_ids)] + ([] if gold is None else [rim.encoder.answer_ids(gold)])
    scores = Patcher(rim, question, targets, num_blocks=num_blocks).score(edits)
    changes = (scores.log_probability - scores.clean).tolist()
    return [
        Intervention(variant, before, told, change[0], *((None, None) if gold is None else (own[1], change[1])))
        for variant, told, change, own in zip(variants, after, changes, scores.clean.tolist(), strict=True)
    ]


class Donors:
    """Turns variants into edits for one question; pools and swap sources are made once and shared."""

    def __init__(self, clean: Patcher):
        self._clean = clean
        self._rim = clean.rim
        self._pools: dict[int, tuple[object, Pool]] = {}
        self._statistics: dict[tuple[int, str], torch.Tensor] = {}
        self._swaps: dict[str, torch.Tensor | None] = {}

    def edits(self, variant: Variant, rng: np.random.Generator) -> list[Edit]:
        """The edits of a variant, one per layer.

        Raises:
            RiMError: as `intervene_many`.
        """
        blocks, layers, positions = resolve(variant, self._clean)
        if variant.mode not in MODES:
            raise RiMError(f"Unknown mode {variant.mode!r}; choose one of {', '.join(MODES)}.")
        states = self._states(variant, rng)
        return self._clean.edits(states, blocks, layers, positions, add=variant.mode == "noise")

    def _states(self, variant: Variant, rng: np.random.Generator) -> torch.Tensor | None:
        """What is written, [L + 1, K, M + 2, d]; None for the question's own states."""
        own, mode, source = self._clean.memory, variant.mode, variant.source
        if mode == "zero":
            if source is not None:
                raise RiMError("The mode zero takes no source; leave it out.")
            return torch.zeros_like(own)
        if mode == "swap":
            if not isinstance(source, str):
                raise RiMError("The mode swap takes a question, as text, whose states are put in; give it as source.")
            if source not in self._swaps:
                same = self._rim.encode_question(source) == self._rim.encode_question(self._clean.question)
                other = None if same else Patcher(self._rim, source, num_blocks=self._clean.K)
                self._swaps[source] = other and other.memory
            return self._swaps[source]
        if mode == "noise" and source is None:
            spread = own.float().std(-1, keepdim=True)
            return self._noise(spread.expand(own.shape), rng)
        if source is None:
            raise RiMError(f"The mode {mode} needs a source: a list of questions.")
        pool = self._pool(source)
        if mode == "resample":
            return pool.states[pool.donors(self._rim.encode_question(self._clean.question), 1, rng)[0]].to(own)
        key = id(source), mode
        if key not in self._statistics:
            self._statistics[key] = (pool.mean() if mode == "mean" else pool.spread()).to(own.device)
        found = self._statistics[key]
        return found if mode == "mean" else self._noise(found, rng)

    def _pool(self, source) -> Pool:
        # The source is kept beside its pool, so that its id stays its own.
        if id(source) not in self._pools:
            self._pools[id(source)] = source, Pool.of(source, self._rim, self._clean.K)
        return self._pools[id(source)][1]

    @staticmethod
    def _noise(spread: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        drawn = torch.from_numpy(rng.standard_normal(spread.shape, dtype=np.float32))
        return drawn.to(spread.device) * spread


def resolve(variant: Variant, clean: Patcher) -> tuple[list[int], list[int], list[int]]:
    """Blocks 1..K, layers 0..L and positions 0 (begin) to M + 1 (end) of a variant, each sorted and once.

    Raises:
        RiMError: one that does not exist, or none named.
    """
    slots_per_block = clean.block_length - 2
    count = num_layers(clean.rim)
    blocks = _listed(variant.blocks, "blocks")
    for block in blocks:
        if isinstance(block, bool) or not isinstance(block, int) or not 1 <= block <= clean.K:
            raise RiMError(f"There is no block {block!r}; blocks are numbered 1 to {clean.K}.")
    layers = range(1, count + 1) if variant.layers is None else _listed(variant.layers, "layers")
    places = {"begin": 0, "end": slots_per_block + 1} | {slot: slot for slot in range(1, slots_per_block + 1)}
    slots = range(1, slots_per_block + 1) if variant.slots is None else _listed(variant.slots, "slots")
    for slot in slots:
        if isinstance(slot, bool) or slot not in places:
            raise RiMError(f"There is no slot {slot!r}; name 1 to {slots_per_block}, 'begin' or 'end'.")
    return (
        sorted(set(blocks)),
        sorted({layer_number(layer, count) for layer in layers}),
        sorted({places[slot] for slot in slots}),
    )


def _listed(values: object, what: str) -> list:
    if isinstance(values, str) or not isinstance(values, (Sequence, range, set, frozenset)) or not values:
        raise RiMError(f"Name the {what} as a list with at least one of them, not {values!r}.")
    return list(values)
