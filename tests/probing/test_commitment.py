"""Commitment: one packed pass gives what separate passes give, and matches are read from it as decoding would."""

import json
import math

import pytest
import torch

from rim_probe.decoding import answer_batch
from rim_probe.errors import RiMError
from rim_probe.probing import commitment
from rim_probe.probing.commitment import chain_course, memory_course
from rim_probe.probing.results import Report
from rim_probe.probing.study import Study, observe
from rim_probe.problems import Problem

QUESTIONS = ["Anna has 3 apples.", "How many apples has she? 14 more", "3 + 14"]
STEPS = [("<<3+14=17>>",), ("<<3+1=4>>", "<<4+13=17>>"), ()]


def separate(rim, prompt: list[int], answer: list[int]) -> tuple[float, bool, torch.Tensor]:
    """Probability of the answer, whether it is greedy, and the first token's distribution: by one plain pass."""
    with torch.no_grad():
        logits = rim.model(input_ids=torch.tensor([prompt + answer])).logits[0].float()
    logits[:, rim.banned_ids] = -math.inf
    told = logits[len(prompt) - 1 : -1].log_softmax(-1)
    probability = told[range(len(answer)), answer].sum().exp().item()
    return probability, told.argmax(-1).tolist() == answer, told[0].exp()


def test_one_packed_pass_equals_separate_passes(every_rim):
    rim, blocks = every_rim, 3
    answers = [rim.encoder.answer_ids(text) for text in ("17", "4", "145")]
    course = memory_course(rim, QUESTIONS, answers, blocks)
    for row, (question, answer) in enumerate(zip(QUESTIONS, answers, strict=True)):
        told = [separate(rim, rim.prompt_ids(question, "memory", k), answer) for k in range(1, blocks + 1)]
        last = told[-1][2]
        for k, (probability, greedy, first) in enumerate(told):
            assert course.probability[row, k] == pytest.approx(probability, rel=1e-3)
            assert course.greedy[row, k] == greedy
            assert course.entropy[row, k] == pytest.approx(torch.special.entr(first).sum().item(), abs=1e-4)
            kl = torch.where(last > 0, last * (last.log() - first.log()), 0).sum().item()
            assert course.divergence[row, k] == pytest.approx(kl, abs=1e-4)


def test_the_chain_is_told_step_by_step(rim):
    answers = [rim.encoder.answer_ids(text) for text in ("17", "4", "145")]
    for question, steps, answer, course in zip(
        QUESTIONS, STEPS, answers, chain_course(rim, QUESTIONS, STEPS, answers), strict=True
    ):
        assert course.probability.shape == (1, len(steps) + 1)
        for shown in range(len(steps) + 1):
            told = rim.encode_text("".join(step + " " for step in steps[:shown])) if shown else []
            prompt = rim.encode_question(question) + told + rim.encoder.marker_ids
            assert course.probability[0, shown] == pytest.approx(separate(rim, prompt, answer)[0], rel=1e-3)


def test_a_greedy_answer_is_the_one_that_decoding_gives(rim):
    given = answer_batch(rim, QUESTIONS, "memory", max_new_tokens=4)
    ids = [list(answer.token_ids) for answer in given]
    course = memory_course(rim, QUESTIONS, ids, rim.layout.num_blocks)
    said = [[readout.token_ids == answer.token_ids for readout in answer.readouts] for answer in given]
    assert course.greedy.tolist() == said
    assert course.greedy[:, -1].all() and not course.divergence[:, -1].any()


@pytest.fixture(scope="module")
def study():
    from conftest import tiny_rim

    rim, base, cot = (tiny_rim(num_blocks=2, context=64, seed=seed) for seed in range(3))
    problems = [Problem(f"Anna has {n} apples.", (f"<<{n}+1={n + 1}>>",), str(n + 1)) for n in range(8)]
    splits = {"fit": problems[:1], "choose": problems[1:2], "report": problems[2:]}
    with Study({"memory": rim, "base": base, "cot": cot}, splits, progress=False) as found:
        # Random models babble to the end of their context; these end with the answer and a chain of one step.
        for problem, memory, chain in zip(
            found.problems("report"), found.answers("memory", "report"), found.answers("cot", "report"), strict=True
        ):
            ended = {"token_ids": tuple(rim.encoder.answer_ids(problem.answer)), "truncated": False}
            ended["generated_tokens"] = len(ended["token_ids"])
            for answer, changes in ((memory, {}), (chain, {"text": f"{problem.steps[0]} #### {problem.answer}"})):
                for name, value in (ended | changes).items():
                    object.__setattr__(answer, name, value)
        yield found


def test_the_report_follows_both_answers_block_by_block_beside_controls(study):
    report = commitment.score(study)
    assert Report.from_dict(json.loads(json.dumps(report.to_dict()))).to_dict() == report.to_dict()
    assert report.n == {"report": 6, "chain of thought": 6}
    frame = report.frame()
    gold = frame[(frame.metric == "probability of the gold answer") & (frame.group == "all")]
    assert {of: list(blocks) for of, blocks in gold.groupby("of")["at block"]} == {
        name: [1, 2] for name in ("memory", "another problem's answer", "base model")
    }
    assert set(gold[gold.role == "control"].of) == {"another problem's answer", "base model"}
    # The final answer here is the gold one.
    final = frame[(frame.metric == "probability of the final answer") & (frame.group == "all")]
    assert final.value.tolist() == pytest.approx(gold[gold.of == "memory"].value.tolist())
    chain = frame[frame.metric == "probability of the gold answer, after steps of its own"]
    assert chain[chain.group == "all"]["at step"].tolist() == [0, 1]


def test_a_model_whose_answers_never_end_is_refused_in_a_sentence():
    from conftest import tiny_rim

    problems = [Problem(f"Anna has {n} apples.", (), str(n)) for n in range(3)]
    splits = {"fit": problems[:1], "choose": problems[1:2], "report": problems[2:]}
    with Study({"memory": tiny_rim(num_blocks=2, context=48)}, splits, progress=False) as study:
        for given in study.answers("memory", "report"):
            object.__setattr__(given, "truncated", True)
        with pytest.raises(RiMError, match="No answer of this model ends by itself"):
            commitment.score(study)


def test_a_truncated_answer_has_no_course(rim):
    observation = observe(rim, "Anna has 3 apples.")
    object.__setattr__(observation.answer, "truncated", True)
    told = commitment.explain({"memory": rim}, observation)
    assert told["blocks"] == [] and told["stable_block"] is None and told["cot"] is None


def test_explain_shows_blocks_and_the_steps_of_a_given_chain(study):
    memory, cot = study.models["memory"], study.models["cot"]
    observation = observe(memory, "Anna has 3 apples.")
    given = study.answers("memory", "report")[0]
    object.__setattr__(observation, "answer", given)
    chain = study.answers("cot", "report")[0]
    told = commitment.explain({"memory": memory, "cot": cot}, observation, chain)
    assert told == json.loads(json.dumps(told))
    course = memory_course(memory, [given.question], [given.token_ids], study.K)
    assert [block["probability"] for block in told["blocks"]] == pytest.approx(course.probability[0].tolist())
    assert [step["text"] for step in told["cot"]["steps"]] == ["", "<<2+1=3>>"]
