"""The packed row against its definition: K separate causal passes. Logits, gradients, masks, targets."""

import pytest
import torch
from conftest import ALL_FAMILIES, ATTENTIONS, FAMILIES, tiny_rim
from torch.nn.attention.flex_attention import create_mask
from torch.nn.functional import cross_entropy

from rim_probe.packing import (
    IGNORED,
    PADDING,
    cot_row,
    direct_row,
    flex_mask_mod,
    pack_memory,
    pad_rows,
    row_mask,
    stage1_row,
    stage2_row,
)
from rim_probe.problems import Problem

QUESTION = "Anna has 3 apples and buys 14 more. How many?"
THREE_STEPS = Problem(QUESTION, ("<<3+14=17>>", "<<17-1=16>>", "<<16/4=4>>"), "4")
ONE_STEP = Problem("3 apples and 14 more?", ("<<3+14=17>>",), "17")
NO_STEPS = Problem("How many apples has Anna?", (), "1234567")
PROBLEMS = (THREE_STEPS, ONE_STEP, NO_STEPS)

STAGES = {
    "stage1": lambda rim, problem: stage1_row(rim.encoder, problem),
    "stage1, 4 blocks": lambda rim, problem: stage1_row(rim.encoder, problem, 4),
    "stage2": lambda rim, problem: stage2_row(rim.encoder, problem, 3),
}
# Every stage and back end for the three families of the paper's kind, one case for each of the others.
CASES = [(family, attention, stage) for family in FAMILIES for attention in ATTENTIONS for stage in STAGES]
CASES += [(family, "sdpa", "stage1, 4 blocks") for family in ALL_FAMILIES if family not in FAMILIES]


def readouts_of(row):
    """What every readout is trained to say: one list of label ids for each."""
    pairs = list(zip(row.labels, row.label_readouts, strict=True))
    return [[label for label, k in pairs if k == number] for number in range(1, row.num_readouts + 1)]


def packed_logits(rim, rows):
    """Logits of one batch [B, L, vocabulary], and the batch."""
    batch = pad_rows(rows, pad_id=1)
    logits = rim.model(
        input_ids=batch["input_ids"],
        position_ids=batch["position_ids"],
        attention_mask=row_mask(batch["readouts"], rim.dtype),
        use_cache=False,
    ).logits
    return logits, batch


def separate_logits(rim, row):
    """For every readout the logits that predict its tokens, from a plain causal pass over `x m_1..m_k R_k` alone."""
    prefix = [id for id, number in zip(row.ids, row.readouts, strict=True) if number == 0]
    block = len(rim.encoder.block_ids)
    result = []
    for k, readout in enumerate(readouts_of(row), start=1):
        prompt = prefix[: len(prefix) - (row.num_readouts - k) * block]
        ids = torch.tensor([prompt + readout[:-1]])
        result.append(rim.model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :])
    return result


def difference(rim, rows):
    """Largest difference between packed and separate logits over all readouts of all rows."""
    logits, batch = packed_logits(rim, rows)
    worst = 0.0
    for i, row in enumerate(rows):
        for k, expected in enumerate(separate_logits(rim, row), start=1):
            found = logits[i][batch["label_readouts"][i] == k]
            assert found.shape == expected.shape
            worst = max(worst, (found - expected).abs().max().item())
    return worst


@pytest.mark.parametrize(("family", "attention", "stage"), CASES)
def test_packed_row_equals_separate_passes(family, attention, stage):
    rim = tiny_rim(family, attention)
    rows = [STAGES[stage](rim, problem) for problem in PROBLEMS]
    with torch.no_grad():
        assert difference(rim, rows[:1]) < 1e-5  # alone
        assert len({len(row) for row in rows}) > 1
        assert difference(rim, rows) < 1e-5  # in a padded batch


@pytest.mark.parametrize("family", FAMILIES)
def test_readouts_of_the_no_memory_twin_see_the_question_and_their_end_token_alone(family):
    rim = tiny_rim(family, "sdpa")
    with_memory, row = (stage1_row(rim.encoder, THREE_STEPS, 4, memory=memory) for memory in (True, False))
    assert readouts_of(row) == readouts_of(with_memory)
    question = rim.encoder.question_ids(THREE_STEPS.question)
    with torch.no_grad():
        logits, batch = packed_logits(rim, [row])
        for k, readout in enumerate(readouts_of(row), start=1):
            ids = torch.tensor([[*question, rim.encoder.block_ids[-1], *readout[:-1]]])
            end = len(question) + k * len(rim.encoder.block_ids) - 1  # where the end token of block k stands
            positions = torch.tensor([[*range(len(question)), *range(end, end + len(readout))]])
            seen = torch.ones_like(ids)  # or transformers takes a jump of positions for the start of another text
            alone = rim.model(input_ids=ids, position_ids=positions, attention_mask=seen, use_cache=False).logits
            alone = alone[0, len(question) :]
            assert (logits[0][batch["label_readouts"][0] == k] - alone).abs().max() < 1e-5


def gradients(rim, loss):
    rim.model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in rim.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("family", "attention", "stage"), CASES)
def test_gradient_of_the_packed_batch_is_the_sum_of_separate_gradients(family, attention, stage):
    rim = tiny_rim(family, attention)
    rows = [STAGES[stage](rim, problem) for problem in PROBLEMS]
    logits, batch = packed_logits(rim, rows)
    losses = cross_entropy(logits.transpose(1, 2), batch["labels"], ignore_index=IGNORED, reduction="none")
    packed = gradients(rim, losses.sum())
    loss = sum(
        cross_entropy(expected, torch.tensor(readout), reduction="sum")
        for row in rows
        for expected, readout in zip(separate_logits(rim, row), readouts_of(row), strict=True)
    )
    separate = gradients(rim, loss)
    assert packed.keys() == separate.keys() and packed
    largest = max(gradient.abs().max() for gradient in separate.values())
    for name, gradient in separate.items():
        assert (packed[name] - gradient).abs().max() < 1e-5 * largest, name


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_padding_never_gives_nan(attention, dtype):
    rim = tiny_rim(attention=attention)
    rim.model.to(dtype)
    long = stage2_row(rim.encoder, THREE_STEPS, 4)
    short = stage1_row(rim.encoder, Problem("1", (), "1"))
    assert len(long) > 3 * len(short)
    logits, _ = packed_logits(rim, [short, long])
    assert logits.isfinite().all()
    # The loss of every position, padding too: no gradient may be NaN whatever stands in its place.
    found = gradients(rim, logits.float().square().mean())
    assert found and all(gradient.isfinite().all() for gradient in found.values())


def dense_rule(readouts):
    """The visibility rule, written out: [B, L] -> bool [B, L, L]."""
    return torch.tensor(
        [
            [[j <= i and (row[j] == 0 or row[j] == row[i]) for j in range(len(row))] for i in range(len(row))]
            for row in readouts.tolist()
        ]
    )


def test_both_masks_are_the_rule():
    rim = tiny_rim()
    rows = [stage1_row(rim.encoder, THREE_STEPS, 5), stage2_row(rim.encoder, ONE_STEP, 2)]
    readouts = pad_rows(rows, pad_id=1)["readouts"]
    assert (readouts == PADDING).any()
    expected = dense_rule(readouts)
    dense = row_mask(readouts, torch.float32)
    length = readouts.shape[1]
    assert dense.shape == (2, 1, length, length)
    assert torch.equal(dense[:, 0] == 0, expected)
    flex = create_mask(flex_mask_mod(readouts), B=2, H=1, Q_LEN=length, KV_LEN=length, device="cpu")
    assert torch.equal(flex[:, 0], expected)
    assert expected.any(-1).all()  # every query, padding too, sees something


def test_text_rows_need_no_mask():
    rim = tiny_rim()
    rows = [cot_row(rim.encoder, THREE_STEPS), cot_row(rim.encoder, ONE_STEP)]
    batch = pad_rows(rows, pad_id=1)
    assert row_mask(batch["readouts"], torch.float32) is None
    # Readouts of one token are plain causal text, too, for the token is a label only.
    single = pack_memory(rim.encode_question("3?"), rim.encoder.block_ids, [[5], [6]])
    assert row_mask(pad_rows([single], 1)["readouts"], torch.float32) is None
    with torch.no_grad():
        assert difference(rim, [single]) < 1e-5


# ------------------------------------------------------------------------------------------------- rows and targets


def test_a_row_written_out():
    row = pack_memory([1, 2], [7, 8, 9], [[4, 5, 0], [6, 0], [3]], num_grounded=1)
    assert row.ids == [1, 2, 7, 8, 9, 4, 5, 7, 8, 9, 6, 7, 8, 9]
    assert row.positions == [0, 1, 2, 3, 4, 5, 6, 5, 6, 7, 8, 8, 9, 10]
    assert row.readouts == [0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 2, 0, 0, 0]
    x = IGNORED
    assert row.labels == [x, x, x, x, 4, 5, 0, x, x, 6, 0, x, x, 3]
    assert row.label_readouts == [0, 0, 0, 0, 1, 1, 1, 0, 0, 2, 2, 0, 0, 3]
    assert (len(row), row.num_readouts, row.num_grounded) == (14, 3, 1)


@pytest.mark.parametrize(
    ("problem", "blocks", "steps", "answers"),
    [
        (NO_STEPS, None, [], 1),
        (NO_STEPS, 3, [], 3),
        (ONE_STEP, None, [], 1),  # the first step is never a target
        (ONE_STEP, 3, [], 3),
        (THREE_STEPS, None, ["<<17-1=16>>", "<<16/4=4>>"], 1),
        (THREE_STEPS, 3, ["<<17-1=16>>", "<<16/4=4>>"], 1),
        (THREE_STEPS, 5, ["<<17-1=16>>", "<<16/4=4>>"], 3),
        (THREE_STEPS, 2, ["<<17-1=16>>", "<<16/4=4>>"], 1),  # more steps than blocks: no step is cut off
        (THREE_STEPS, 0, ["<<17-1=16>>", "<<16/4=4>>"], 1),
    ],
)
def test_stage1_targets(rim, problem, blocks, steps, answers):
    row = stage1_row(rim.encoder, problem, blocks)
    expected = [rim.encode_text(text) + [rim.eos_id] for text in steps + [problem.answer] * answers]
    assert readouts_of(row) == expected
    assert row.num_grounded == len(steps)
    assert row.num_readouts == len(steps) + answers
    assert prefix(row) == rim.prompt_ids(problem.question, "memory", row.num_readouts)


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("blocks", [1, 4])
def test_stage2_targets(rim, problem, blocks):
    row = stage2_row(rim.encoder, problem, blocks)
    assert readouts_of(row) == [rim.encode_text(problem.answer) + [rim.eos_id]] * blocks
    assert (row.num_readouts, row.num_grounded) == (blocks, 0)
    assert prefix(row) == rim.prompt_ids(problem.question, "memory", blocks)


def prefix(row):
    return [id for id, number in zip(row.ids, row.readouts, strict=True) if number == 0]


@pytest.mark.parametrize("problem", PROBLEMS)
def test_text_rows_continue_the_prompts_of_inference(rim, problem):
    steps = "".join(step + " " for step in problem.steps)
    for row, method, text in (
        (cot_row(rim.encoder, problem), "cot", f"{steps}#### {problem.answer}"),
        (direct_row(rim.encoder, problem), "direct", problem.answer),
    ):
        prompt = rim.prompt_ids(problem.question, method)
        (target,) = readouts_of(row)
        assert row.ids == prompt + target[:-1]
        assert target[-1] == rim.eos_id and rim.eos_id not in target[:-1]
        assert rim.decode(target) == text
    assert rim.decode(rim.prompt_ids(problem.question, "direct")) == f"{problem.question}\n#### "
