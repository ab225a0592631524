"""The glass box: a small transformer whose weights are written by hand, so that what its memory holds is known.

It is an ordinary `GPT2LMHeadModel` (ReLU, learned positions) wrapped as a RiM with K = 3 blocks of M = 2 slots. It
answers questions such as "what is 3 + 2 - 1 + 4 ?" (see `problems`). Nothing is trained: a decoder that does not find
what is written down here is wrong, and so is one that finds more. Layer by layer (layer l = the residual stream after
decoder layer l, 0 = embeddings):

    layer 0        every token holds its position; digits and signs what they are; `<m>`, `</b>` and `>>` their kind
    layer 1        the last token of an explicit step, `>>`, reads that step: left, operator, right, result
    layers 2, 4, 6 both slots of block 1, 2, 3 read their step: `operator` and `right` from the question, `left` from
                   the start (block 1) or from the result in slot 1 of the block before; a lookup table of ReLU gates
                   adds the `result`. Earlier a slot is the same for every question; later it never changes.
    layers 3, 5, 8 do nothing: at two layers a block is written and not yet read by the next
    layer 7        the end of each block reads the result in slot 1 of its own block; the unembedding says it
    after that     a digit says EOS, always

So readout k says the result of step k, and the last readout the answer. What follows from this is the ground truth:
- Block k holds exactly step k from layer HELD_LAYER[k] on, and of other steps only what step k repeats: its `left` is
  the result of step k - 1.
- Slot 2 of a block is an equal copy that nobody reads: it can be decoded, but to swap or remove it changes nothing.
- Slot 1 of block k is read by block k + 1 in layer HELD_LAYER[k + 1] and by its own end in layer END_LAYER. A swap at
  layers HELD_LAYER[k] .. HELD_LAYER[k + 1] - 1 (block 3: END_LAYER - 1) changes the answer to what `swapped_answer`
  says. Until END_LAYER later ones change readout k alone; all others change nothing.
- The last question token reads nothing: no step can be found there, at any layer.
- Without blocks, and from a fourth block on, nothing is written: the readout ends at once and says nothing.

Two tricks keep the weights readable. LayerNorm with an epsilon of a million and a weight of a thousand only subtracts
the mean; the dimension `ground` is always zero, and each reader subtracts it, which takes the mean out again. A head
that has nothing to read looks at token 0, "what", which holds nothing that is ever copied. Every weight is a whole
number that bfloat16 holds exactly.
"""

import itertools
import math
from dataclasses import dataclass

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from rim_probe.glassbox.problems import SIGNS, draw_problems, true_result
from rim_probe.memory import MemoryLayout
from rim_probe.model import RiM
from rim_probe.problems import Problem
from rim_probe.training.scratch import word_tokenizer

LAYOUT = MemoryLayout(num_blocks=3, slots_per_block=2)
STEP_LAYER, HELD_LAYER, END_LAYER, LAYERS = 1, {1: 2, 2: 4, 3: 6}, 7, 8

# Where things stand: "what is 3 + 2 - 1 + 4 ?" is always ten tokens.
QUESTION_LENGTH = 10
START = 2
OPERATOR, RIGHT = {1: 3, 2: 5, 3: 7}, {1: 4, 2: 6, 3: 8}
SLOTS = dict(enumerate(LAYOUT.slot_positions(QUESTION_LENGTH), start=1))
ENDS = dict(enumerate(LAYOUT.end_positions(QUESTION_LENGTH), start=1))
CONTEXT = 96  # room for the question and 16 blocks, so that K can be swept as on any other checkpoint
PLACES = 34  # positions known as such, one-hot, and the width of a head: question, three explicit steps and a bit more

_HEADS = 4
_STRENGTH = 352.0  # weight on what a head looks for: its score is 60, that of token 0 half as much, all others' nothing
_EPSILON = 1e6

VOCABULARY = ("what", "is", "?", "=", "<<", ">>", "####", *SIGNS, *map(str, range(10)))
_WIDTHS = {
    "position": PLACES,  # of every token
    "digit": 10,  # of the tokens 0..9
    "sign": len(SIGNS),  # of the tokens + and -
    "left": 10,  # these four are a step: in slots, and at the last token of an explicit step
    "operator": len(SIGNS),
    "right": 10,
    "result": 10,  # also at block ends; the unembedding reads it
    "doubt": 1,  # of slots and ends: how many results up to here came out wrong (a box with `confused_by` alone)
    "is_slot": 1,
    "is_end": 1,
    "is_step_end": 1,
    "ground": 1,  # always zero
}
_STARTS = itertools.accumulate(_WIDTHS.values(), initial=0)
DIMS = {name: list(range(start, start + _WIDTHS[name])) for name, start in zip(_WIDTHS, _STARTS, strict=False)}
"""Residual dimensions of every subspace by name; each holds a one-hot vector (or nothing), flags a 1."""
STEP = ("left", "operator", "right", "result")


@dataclass(frozen=True)
class GlassBox:
    """The model and its ground truth; see the head of this module.

    Attributes:
        rim: the model.
        held_layer: block -> the first layer at which both its slots hold their step.
        dims: subspace -> residual dimensions; `STEP` names the four of a step.
    """

    rim: RiM
    held_layer: dict[int, int]
    dims: dict[str, list[int]]

    def problems(self, seed: int, n: int, split: str) -> list[Problem]:
        """See `problems.draw_problems`."""
        return draw_problems(seed, n, split)


def glassbox(*, trained: bool = True, confused_by: int | None = None, memory_share: float = 1.0) -> GlassBox:
    """The glass box, float32 on the CPU, the same every time.

    Args:
        trained: False gives the base model before RiM training: it reads explicit steps, but its memory tokens are as
            `RiM.attach` leaves them, so its slots hold nothing and its readouts say nothing.
        confused_by: a result that always comes out one too high. Its block knows: it and all that build on it hold
            `doubt`, so readout k is wrong exactly where the slots and the end of block k do. For probes of correctness.
        memory_share: below 1 there is a bypass: the question's numbers work the steps out as well, and the answer takes
            this share of its result from the last block's slot, the rest from the question. For tests of causes.
    """
    tokenizer = word_tokenizer(VOCABULARY)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=CONTEXT,
        n_embd=PLACES * _HEADS,
        n_head=_HEADS,
        n_layer=LAYERS,
        n_inner=10 * len(SIGNS) * 10,  # one gate for each step there is
        activation_function="relu",
        layer_norm_epsilon=_EPSILON,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        _clear(model)
        _write_embeddings(model, tokenizer)
        _write_explicit_steps(model)
        for block in SLOTS:
            _write_block(model, block, confused_by)
        _write_ends(model, tokenizer)
        if memory_share < 1:
            _write_bypass(model, memory_share)
        _ground(model)
        rim = RiM.attach(model, tokenizer, LAYOUT, name="glass box" if trained else "glass box before training")
        if trained:
            _write_memory_tokens(rim)
    return GlassBox(rim, HELD_LAYER, DIMS)


# ------------------------------------------------------------------------------------------ what is written where


def _write_embeddings(model: GPT2LMHeadModel, tokenizer) -> None:
    tokens, positions = model.transformer.wte.weight, model.transformer.wpe.weight
    positions[range(PLACES), DIMS["position"]] = 1
    for digit in range(10):
        tokens[tokenizer.convert_tokens_to_ids(str(digit)), DIMS["digit"][digit]] = 1
    for i, sign in enumerate(SIGNS):
        tokens[tokenizer.convert_tokens_to_ids(sign), DIMS["sign"][i]] = 1
    tokens[tokenizer.convert_tokens_to_ids(">>"), DIMS["is_step_end"]] = 1


def _write_memory_tokens(rim: RiM) -> None:
    """What RiM training would teach: a slot is a slot and an end is an end, and nothing ever says either."""
    begin, slot, end = rim.memory_ids
    rim.model.get_output_embeddings().weight[[begin, slot, end]] = 0
    tokens = rim.model.get_input_embeddings().weight
    tokens[[begin, slot, end]] = 0
    tokens[slot, DIMS["is_slot"]] = 1
    tokens[end, DIMS["is_end"]] = 1


def _write_explicit_steps(model: GPT2LMHeadModel) -> None:
    """`>>` looks back over "<<3+2=5>>": 5 tokens to its left number, 4 to the sign, 3, and 1 to the result."""
    back = {"left": (5, "digit"), "operator": (4, "sign"), "right": (3, "digit"), "result": (1, "digit")}
    for head, (target, (distance, source)) in enumerate(back.items()):
        look = {position: position - distance for position in range(distance, PLACES)}
        _attend(model, STEP_LAYER, head, "is_step_end", look, source, target)


def _write_block(model: GPT2LMHeadModel, block: int, confused_by: int | None) -> None:
    """Both slots of a block read the parts of their step in one layer and look its result up."""
    layer = HELD_LAYER[block]
    left, source = (START, "digit") if block == 1 else (SLOTS[block - 1][0], "result")
    _attend(model, layer, 0, "is_slot", dict.fromkeys(SLOTS[block], left), source, "left")
    _attend(model, layer, 3, "is_slot", dict.fromkeys(SLOTS[block], left), "doubt", "doubt")
    _attend(model, layer, 1, "is_slot", dict.fromkeys(SLOTS[block], OPERATOR[block]), "sign", "operator")
    _attend(model, layer, 2, "is_slot", dict.fromkeys(SLOTS[block], RIGHT[block]), "digit", "right")
    _look_up(model, layer, SLOTS[block], confused_by)


def _write_ends(model: GPT2LMHeadModel, tokenizer) -> None:
    """Each end takes the result from slot 1 of its block; the unembedding reads results, and EOS after any digit."""
    look = {ENDS[block]: SLOTS[block][0] for block in ENDS}
    _attend(model, END_LAYER, 0, "is_end", look, "result", "result")
    _attend(model, END_LAYER, 1, "is_end", look, "doubt", "doubt")
    head = model.lm_head.weight
    for digit in range(10):
        head[tokenizer.convert_tokens_to_ids(str(digit)), DIMS["result"][digit]] = 20
    head[tokenizer.eos_token_id, DIMS["digit"]] = 20


def _write_bypass(model: GPT2LMHeadModel, memory_share: float) -> None:
    """The number on the right of operation k does what block k does, in the same layer by the same heads and gates.

    The end of the last block reads the last of them beside its slot; the difference of both scores sets the share.
    """
    for block, layer in HELD_LAYER.items():
        left, source = (START, "digit") if block == 1 else (RIGHT[block - 1], "result")
        _attend(model, layer, 0, "digit", {RIGHT[block]: left}, source, "left")
        _attend(model, layer, 1, "digit", {RIGHT[block]: OPERATOR[block]}, "sign", "operator")
        _attend(model, layer, 2, "digit", {RIGHT[block]: RIGHT[block]}, "digit", "right")
        gates = model.transformer.h[layer - 1].mlp.c_fc.weight
        gates[[*DIMS["digit"], DIMS["position"][RIGHT[block]]]] = 1
    last = max(ENDS)
    _attend(model, END_LAYER, 0, "is_end", {ENDS[last]: RIGHT[last]}, "result", "result")
    query = model.transformer.h[END_LAYER - 1].attn.c_attn.weight
    odds = math.log(memory_share / (1 - memory_share)) * math.sqrt(PLACES) if memory_share else -_STRENGTH
    query[DIMS["position"][ENDS[last]], SLOTS[last][0]] += odds


# ---------------------------------------------------------------------------------------------------- the assembler


def _clear(model: GPT2LMHeadModel) -> None:
    for name, parameter in model.named_parameters():
        is_norm_weight = name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight"))
        parameter.fill_(math.sqrt(_EPSILON) if is_norm_weight else 0)


def _attend(
    model: GPT2LMHeadModel, layer: int, head: int, reader: str, look: dict[int, int], source: str, target: str
) -> None:
    """One head: tokens with the flag `reader` at position p add `source` of the token at look[p] to their `target`.

    Scores in units of _STRENGTH: the token looked at 1; token 0 has 1/2 for readers and 5/2 for all others, so that
    whoever does not read, or whose source has lost its position, gets the nothing that token 0 holds.
    """
    attention = model.transformer.h[layer - 1].attn
    query, key, value = (weights.narrow(1, head * PLACES, PLACES) for weights in attention.c_attn.weight.chunk(3, 1))
    bias = attention.c_attn.bias.narrow(0, head * PLACES, PLACES)
    for position, seen in look.items():
        query[DIMS["position"][position], seen] = _STRENGTH
    bias[0] = 2.5 * _STRENGTH
    query[DIMS[reader], 0] = -2 * _STRENGTH
    key[DIMS["position"], range(PLACES)] = 1
    width = len(DIMS[source])
    value[DIMS[source], range(width)] = 1
    attention.c_proj.weight[range(head * PLACES, head * PLACES + width), DIMS[target]] = 1


def _look_up(model: GPT2LMHeadModel, layer: int, positions: list[int], confused_by: int | None) -> None:
    """Slots at `positions` add the `result` of their step: one gate for each step, open where all five inputs are 1."""
    mlp = model.transformer.h[layer - 1].mlp
    steps = itertools.product(range(10), enumerate(SIGNS), range(10))
    for gate, (left, (i, sign), right) in enumerate(steps):
        step = [DIMS["left"][left], DIMS["operator"][i], DIMS["right"][right]]
        mlp.c_fc.weight[step + DIMS["is_slot"], gate] = 1
        mlp.c_fc.weight[[DIMS["position"][position] for position in positions], gate] = 1
        mlp.c_fc.bias[gate] = -4
        result = true_result(left, sign, right)
        confused = result == confused_by
        mlp.c_proj.weight[gate, DIMS["result"][(result + confused) % 10]] = 1
        mlp.c_proj.weight[gate, DIMS["doubt"]] = float(confused)


def _ground(model: GPT2LMHeadModel) -> None:
    """Makes every reader subtract `ground`: its weights sum to zero, so the mean that LayerNorm took is not missed."""
    readers = [model.lm_head.weight.T]
    for layer in model.transformer.h:
        readers += [layer.attn.c_attn.weight, layer.mlp.c_fc.weight]
    for weights in readers:
        weights[DIMS["ground"]] = -weights.sum(0)
