"""The interchange and the bypass test on glass boxes, where the routes to the answer are known."""

import pytest
import torch

from rim_probe.equations import value_bounds
from rim_probe.errors import RiMError
from rim_probe.glassbox.box import END_LAYER, HELD_LAYER, LAYERS, glassbox
from rim_probe.glassbox.graded import noisy_box
from rim_probe.probing import interchange
from rim_probe.probing.results import Report
from rim_probe.probing.study import Study

FALSE = {1: [3], 2: [1], 3: [2]}


def study_of(box, other=None, **roles) -> Study:
    # A study asks for room for the chain behind the blocks; the glass box has none, and nothing here puts it there.
    (other or box).rim.model.config.max_position_embeddings = 64
    splits = {"fit": box.problems(0, 40, "fit"), "choose": box.problems(0, 1, "choose")}
    splits["report"] = box.problems(1, 40, "report")
    return Study({"memory": (other or box).rim} | roles, splits, progress=False)


@pytest.fixture(scope="module")
def study():
    return study_of(glassbox())


@pytest.fixture(scope="module")
def report(study):
    return interchange.score(study)


def value(report, metric, of, group, **place):
    key = metric, of, group, place
    return next(r.estimate.value for r in report.results if (r.metric, r.of, r.group, dict(r.place)) == key)


def test_every_swap_of_the_block_that_holds_the_step_gives_the_predicted_answer(report):
    for group in (interchange.ONE, interchange.STRICT, "3 steps"):
        steps = (1, 2, 3) if group == "3 steps" else (None,)
        for step in steps:
            place = {} if step is None else {"changed step": step}
            assert value(report, interchange.PREDICTED, interchange.SWAP, group, **place) == 1
    assert all(r.goal.met(r.estimate) for r in report.results if r.goal)
    assert report.settings["route"] == "only" and report.verdict.startswith("The memory is the only route")


def test_wrong_blocks_random_problems_and_block_ends_fail(report):
    assert value(report, interchange.PREDICTED, interchange.WRONG, interchange.STRICT) == 0
    assert value(report, interchange.COPIED, interchange.WRONG, interchange.STRICT) > 0.3  # a later block's own change
    assert value(report, interchange.PREDICTED, interchange.RANDOM, interchange.ONE) <= 0.3
    assert value(report, interchange.PREDICTED, "end of block t", interchange.ONE) == 0


def test_single_layers_and_blocks_are_those_where_the_step_is_held_and_not_yet_read(report):
    ends = {1: HELD_LAYER[2], 2: HELD_LAYER[3], 3: END_LAYER}
    for step in (1, 2, 3):
        for block in (1, 2, 3):
            # With one changed number every block from the changed step on holds something that follows from it.
            place = {"changed step": step, "block": block}
            found = value(report, interchange.PREDICTED, "slots of one block", interchange.ONE, **place)
            assert found == (block >= step)
    for layer in range(1, LAYERS):
        held = [HELD_LAYER[t] <= layer < ends[t] for t in ends]
        found = value(report, interchange.PREDICTED, interchange.SWAP, interchange.ONE, layer=layer)
        assert found == 0 if not any(held) else 0 < found < 1


def test_an_answer_that_comes_from_memory_alone_needs_it_and_not_the_question(report):
    stays = {
        name: value(report, interchange.RIGHT, name, "answered right") for name in list(interchange.ROUTES_CUT)[1:]
    }
    assert stays["question cut from the answer"] == stays["block ends hidden"] == 1
    assert max(stays[name] for name in ("memory cut from the answer", interchange.BOTH, "slots hidden")) == 0
    assert value(report, interchange.CUT, interchange.SWAP, interchange.ONE) == 1
    assert value(report, interchange.CUT, interchange.FLOORS[interchange.SWAP], interchange.ONE) == 0


@pytest.mark.parametrize(
    ("share", "route", "swapped", "cut"), [(0.7, "one of two", 1, 1), (0.3, "one of two", 0, 1), (0, "none", 0, 0)]
)
def test_a_bypass_is_seen_and_a_memory_that_is_a_copy_nobody_reads_shows_with_the_question_cut(
    share, route, swapped, cut
):
    found = interchange.score(study_of(glassbox(memory_share=share)))
    assert found.settings["route"] == route
    assert value(found, interchange.RIGHT, "memory cut from the answer", "answered right") == 1
    assert value(found, interchange.PREDICTED, interchange.SWAP, interchange.STRICT) == swapped
    assert value(found, interchange.KEPT, interchange.SWAP, interchange.STRICT) == 1 - swapped
    assert value(found, interchange.CUT, interchange.MEMORY, interchange.ONE) == cut
    assert ("takes the question" in found.verdict) == (share == 0.3)


def test_false_claims_and_few_pairs_are_told(study):
    found = interchange.score(study, FALSE, pairs=15)
    assert value(found, interchange.PREDICTED, interchange.SWAP, interchange.STRICT) <= 0.3
    missed = [result.group for result in found.results if result.goal and not result.goal.met(result.estimate)]
    assert interchange.STRICT in missed
    assert found.settings["route"] == "unknown" and "too weak" in found.verdict


def test_other_memory_models_are_compared(study):
    found = interchange.score(
        study_of(glassbox(), paper=glassbox(memory_share=0.3).rim, stage1=glassbox().rim), pairs=20
    )
    assert value(found, f"paper's two stages: {interchange.PREDICTED}", interchange.SWAP, interchange.STRICT) == 0
    assert value(found, f"stage-1 model: {interchange.PREDICTED}", interchange.SWAP, interchange.STRICT) == 1
    assert value(found, f"paper's two stages: {interchange.CUT}", interchange.MEMORY, interchange.ONE) == 1


def plain_swap(model, ids, mask, slots, states) -> int:
    """The first token of the answer when `slots` get `states` after every layer but the last, which nobody reads."""
    hooks = []
    for layer, module in enumerate(model.transformer.h[:-1], start=1):

        def hook(module, args, output, layer=layer):
            (output[0] if isinstance(output, tuple) else output)[0, slots] = states[layer][0, slots]

        hooks.append(module.register_forward_hook(hook))
    try:
        return int(model(ids, attention_mask=mask).logits[0, -1].argmax())
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_swaps_equal_plain_transformers(attention):
    """Plain forward hooks and a mask of its own, no code of the probe: the same pairs, the same answers."""
    rim = (box := noisy_box(0.6, 0.01, seed=3)).rim
    rim.model.set_attn_implementation(attention)
    begin, slot, _ = rim.memory_ids
    with study_of(box) as study:
        pairs = interchange._pairs(study, rim, {t: (t,) for t in (1, 2, 3)}, value_bounds(study.problems("fit")), 12)
        runs = list(interchange._runs(study, rim, pairs))
    assert len(runs) >= 6
    for run in runs:
        step, partner = run.pair.partner.step, run.pair.partner
        prompts = [rim.prompt_ids(problem.question, "memory") for problem in (run.pair.problem, partner.problem)]
        ids, donor = (torch.tensor([prompt]) for prompt in prompts)
        slots = [i for i, token in enumerate(prompts[0]) if token == slot][2 * step - 2 : 2 * step]
        states = rim.model(donor, output_hidden_states=True).hidden_states
        causal = torch.full((1, 1, len(prompts[0]), len(prompts[0])), torch.finfo(torch.float32).min).triu(1)
        cut = causal.clone()
        cut[..., -1, 1 : prompts[0].index(begin)] = torch.finfo(torch.float32).min
        edits = {"swap": run.clean.edits(run.donor.memory, [step])}
        for mask, clean in ((causal, run.clean), (cut, run.cut("question"))):
            said = rim.decode([plain_swap(rim.model, ids, mask, slots, states)])
            told = [said == answer for answer in (partner.predicted, run.pair.problem.answer)]
            assert run.says(edits, clean)["swap"][:2].tolist() == told


def test_the_report_survives_json_and_is_the_same_again(study):
    first, again = (interchange.score(study, pairs=4).to_dict() for _ in range(2))
    assert first == again == Report.from_dict(first).to_dict()


def test_claims_must_name_blocks_and_some_pair_must_be_right(study):
    for claims in ({}, {1: []}, {1: [4]}, {1: [0]}):
        with pytest.raises(RiMError):
            interchange.score(study, claims, pairs=4)
    with pytest.raises(RiMError, match="answered right"):
        interchange.score(study_of(glassbox(), glassbox(trained=False)), pairs=4)
