"""The row of two worlds and their branches against its definition: patching in all layers, and separate passes."""

import pytest
import torch
from conftest import ALL_FAMILIES, ATTENTIONS, FAMILIES, tiny_rim
from torch.nn.attention.flex_attention import create_mask
from torch.nn.functional import cross_entropy

from rim_probe.packing import IGNORED, Branch, flex_mask_mod, interchange_row, pad_rows, row_mask, stage1_row
from rim_probe.probing.hooks import edit_residual, num_layers, read_residual
from rim_probe.problems import Problem

SOURCE = Problem("Anna has 7 apples, buys 5 and eats 2. How many?", ("<<7+5=12>>", "<<12-2=10>>"), "10")
BASE = Problem("Anna has 3 apples, buys 4 and eats 1. How many?", ("<<3+4=7>>", "<<7-1=6>>"), "6")
LONGER = Problem("Anna has 35 apples, buys 46 and eats 17. How many?", ("<<35+46=81>>", "<<81-17=64>>"), "64")
RELATIVE = [family for family in ALL_FAMILIES if family not in ("gpt2", "opt")]  # whose positions are rotary
BLOCKS = 4

CASES = [(family, attention, BASE) for family in FAMILIES for attention in ATTENTIONS]
CASES += [(family, "sdpa", BASE) for family in ALL_FAMILIES if family not in FAMILIES]
CASES += [(family, "sdpa", LONGER) for family in RELATIVE]


def told(problem: Problem, steps: tuple[str, ...], answer: str) -> Problem:
    """The question of a problem with the steps and the answer that follow from another result."""
    return Problem(problem.question, steps, answer)


def pair(base: Problem) -> tuple[list[Problem], list[tuple[int, int, Problem]]]:
    """Two worlds, and branches of either at both steps and after the last."""
    first, second = ("<<10-1=9>>", "9") if base is BASE else ("<<12-17=-5>>", "-5")
    worlds = [SOURCE, base]
    branches = [
        (1, 1, told(base, ("<<7+5=12>>", first), second)),
        (0, 2, told(SOURCE, (SOURCE.steps[0], base.steps[1]), base.answer)),
        (1, 3, told(base, base.steps, SOURCE.answer)),
    ]
    return worlds, branches


def packed_row(rim, base: Problem):
    worlds, branches = pair(base)
    rows = [stage1_row(rim.encoder, problem, BLOCKS, label_slots=True) for problem in worlds]
    cut = [Branch(w, t, stage1_row(rim.encoder, problem, BLOCKS, label_slots=True)) for w, t, problem in branches]
    return interchange_row((rows[0], rows[1]), cut, rim.layout.slots_per_block)


def packed_logits(rim, rows):
    batch = pad_rows(rows, pad_id=1)
    logits = rim.model(
        input_ids=batch["input_ids"],
        position_ids=batch["position_ids"],
        attention_mask=row_mask(batch["readouts"], rim.dtype, batch["segments"], batch["audience"]),
        use_cache=False,
    ).logits
    return logits, batch


def separate(rim, base: Problem):
    """(segment, readout, targets, logits that predict them) of every readout, each from a causal pass of its own."""
    worlds, branches = pair(base)

    def targets(problem: Problem, k: int) -> list[int]:
        steps = problem.steps[1:]
        return rim.encoder.step_ids(steps[k - 1]) if k <= len(steps) else rim.encoder.answer_ids(problem.answer)

    def prompt(problem: Problem, k: int) -> list[int]:
        return rim.encode_question(problem.question) + rim.encoder.block_ids * k

    def read(ids: list[int], label_ids: list[int]) -> torch.Tensor:
        logits = rim.model(input_ids=torch.tensor([ids + label_ids[:-1]]), use_cache=False).logits
        return logits[0, len(ids) - 1 :]

    for segment, problem in enumerate(worlds):
        for k in range(1, BLOCKS + 1):
            label_ids = targets(problem, k)
            yield segment, k, label_ids, read(prompt(problem, k), label_ids)
    for segment, (w, t, follows) in enumerate(branches, start=2):
        places = [rim.layout.slot_positions(len(prompt(world, 0)))[t - 1] for world in worlds]
        states = {}
        with read_residual(rim, range(num_layers(rim) + 1), lambda layer, x, kept=states: kept.update({layer: x})):
            rim.model(input_ids=torch.tensor([prompt(worlds[1 - w], t)]), use_cache=False)
        edits = {
            layer: lambda x, donor=donor, w=w, places=places: x.index_copy(
                1, torch.tensor(places[w]), donor[:, places[1 - w]]
            )
            for layer, donor in states.items()
        }
        for k in range(t, BLOCKS + 1):
            label_ids = targets(follows, k)
            with edit_residual(rim, edits):
                yield segment, k, label_ids, read(prompt(worlds[w], k), label_ids)


def places_of(row, segment: int, k: int) -> torch.Tensor:
    """Where readout k of a segment is predicted."""
    return (torch.tensor(row.segments) == segment) & (torch.tensor(row.label_readouts) == k)


@pytest.mark.parametrize(("family", "attention", "base"), CASES)
def test_the_row_equals_patching_the_slots_in_all_layers(family, attention, base):
    rim = tiny_rim(family, attention, num_blocks=BLOCKS)
    row = packed_row(rim, base)
    plain = stage1_row(rim.encoder, SOURCE, BLOCKS)  # in a padded batch with a row of one world
    with torch.no_grad():
        logits, _ = packed_logits(rim, [plain, row])
        compared = 0
        for segment, k, label_ids, expected in separate(rim, base):
            places = places_of(row, segment, k)
            assert [label for label, here in zip(row.labels, places, strict=True) if here] == label_ids
            assert (logits[1, : len(row)][places] - expected).abs().max() < 1e-5, (segment, k)
            compared += len(label_ids)
        assert compared == sum(label != IGNORED for label in row.labels)


@pytest.mark.parametrize("base", [BASE, LONGER])
def test_the_gradient_is_that_of_patching(base):
    """Through the donor's slots, too."""
    rim = tiny_rim(num_blocks=BLOCKS)

    def gradients(loss):
        rim.model.zero_grad()
        loss.backward()
        return {name: p.grad.clone() for name, p in rim.model.named_parameters() if p.grad is not None}

    logits, batch = packed_logits(rim, [packed_row(rim, base)])
    packed = gradients(cross_entropy(logits[0], batch["labels"][0], ignore_index=IGNORED, reduction="sum"))
    losses = [
        cross_entropy(found, torch.tensor(label_ids), reduction="sum") for _, _, label_ids, found in separate(rim, base)
    ]
    expected = gradients(sum(losses))
    largest = max(gradient.abs().max() for gradient in expected.values())
    assert packed.keys() == expected.keys() and largest > 0
    for name, gradient in expected.items():
        assert (packed[name] - gradient).abs().max() < 1e-5 * largest, name


@pytest.mark.parametrize("base", [BASE, LONGER])
def test_both_masks_show_the_same(base):
    rim = tiny_rim(num_blocks=BLOCKS)
    row = packed_row(rim, base)
    batch = pad_rows([row, stage1_row(rim.encoder, SOURCE, BLOCKS)], pad_id=1)
    numbers = [batch[name] for name in ("readouts", "segments", "audience")]
    dense = row_mask(numbers[0], torch.float32, *numbers[1:])[:, 0] == 0
    length = dense.shape[-1]
    flex = create_mask(flex_mask_mod(*numbers), B=2, H=1, Q_LEN=length, KV_LEN=length, device="cpu")
    assert torch.equal(flex[:, 0], dense)
    assert dense.any(-1).all()  # every query, padding too, sees something


def test_slots_name_the_results_of_their_steps():
    """With M = 2: the digits of a result of two, the last slot alone for one, the first two digits of three."""
    rim = tiny_rim(num_blocks=BLOCKS)
    problem = Problem("3 4 5?", ("<<3+4=7>>", "<<7*5=35>>", "<<35*7=245>>"), "245")
    row = stage1_row(rim.encoder, problem, BLOCKS + 1, label_slots=True)
    slot = rim.memory_ids[1]
    labels = [label for id, label in zip(row.ids, row.slot_labels, strict=True) if id == slot]
    two, three, four, five, seven = (rim.encode_text(text)[0] for text in "23457")
    assert rim.encode_text("245") == [two, four, five]
    assert labels == [IGNORED, seven, three, five, two, four, two, four, two, four]
    depths = [depth for id, depth in zip(row.ids, row.slot_depths, strict=True) if id == slot]
    assert depths == [0, 3, 4, 4, 5, 5, 6, 6, 6, 6]
    assert not any(label != IGNORED for id, label in zip(row.ids, row.slot_labels, strict=True) if id != slot)
    assert not stage1_row(rim.encoder, problem, BLOCKS).slot_labels
