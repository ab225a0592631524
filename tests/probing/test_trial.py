"""A trial of a decode on the glass box, where a true claim must come and a false one must not."""

import json

import pytest

from rim_probe.decoding import answer
from rim_probe.equations import chain
from rim_probe.errors import RiMError
from rim_probe.glassbox import draw_problems, glassbox, swapped_answer
from rim_probe.glassbox.problems import problem_of
from rim_probe.probing.surgery import operate
from rim_probe.probing.trial import carry_out, predict, try_counterfactual
from rim_probe.problems import Problem, is_correct

PROBLEM = problem_of(0, (("+", 5), ("-", 2), ("+", 4)))  # 5, 3, 7
GSM = Problem("Tom has 12 eggs and buys 5. He halves them?", ("<<12+5=17>>",), "17")


@pytest.fixture(scope="module")
def box():
    return glassbox().rim


def as_problem(data) -> Problem:
    return Problem(data["question"], tuple(data["steps"]), data["answer"])


def test_a_true_claim_comes_and_a_wrong_block_does_not_bring_it(box):
    found = try_counterfactual(box, PROBLEM, None, block=2)
    partner = as_problem(found["partner"])
    assert found["came"] and found["outcome"] == "expected" and found["said"] == found["expected"] != found["own"]
    assert found["expected"] == swapped_answer(PROBLEM, partner, 2)
    assert found["blocks"] == [2] and found["step"] == 2 and found["layers"] == [1, 8]
    assert found["claimed"] == "<<5-2=3>>" and found["brought"] == partner.steps[1]
    assert found["change"].startswith("2 → ") and found["change"].endswith(" in step 2")
    assert found["control"] == {"what": "block 1 taken from the partner instead", "said": "7", "outcome": "own"}
    assert found["surgery"]["actions"] == {"2": "swap"}
    assert found["sentence"].startswith("Block 2 is said to hold 5-2=3; ") and "and it did" in found["sentence"]
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_with_the_question_cut_the_block_still_brings_the_answer_and_nothing_does_without_the_memory(box):
    found = try_counterfactual(box, PROBLEM, None, block=2)
    question, memory = found["routes"]
    assert question == {"cut": "question", "outcome": "expected", "clean": "own"}
    assert memory["cut"] == "memory" and memory["outcome"] == memory["clean"] != "own"


def test_a_prediction_is_written_before_the_model_is_swapped(box):
    predicted = predict(box, PROBLEM, None, block=2)
    assert "said" not in predicted and predicted["wrong"] == [1]
    assert carry_out(box, predicted) == try_counterfactual(box, PROBLEM, None, block=2)


def test_every_problem_that_can_be_tried_comes(box):
    tried = 0
    for problem in draw_problems(0, 40, "report"):
        try:
            found = try_counterfactual(box, problem, None)
        except RiMError as error:
            assert "No counterfactual" in str(error) or "No number" in str(error)
            continue
        tried += 1
        assert found["came"] and (found["control"] is None or found["control"]["outcome"] != "expected")
        partner = as_problem(found["partner"])
        assert chain(partner) and is_correct(answer(box, partner.question, "memory").value, partner.answer)
    assert tried >= 10


def test_for_the_first_step_a_second_number_makes_room_for_a_control(box):
    found = try_counterfactual(box, problem_of(8, (("-", 6), ("-", 1), ("+", 4))), None, block=1)
    assert found["step"] == 1 and found["came"] and found["expected"] != found["partner_answer"]
    assert " in step 1 and " in found["change"]
    assert found["control"]["outcome"] == "partner"  # a later block brings the second change, too


def test_a_false_claim_does_not_come(box):
    found = try_counterfactual(box, PROBLEM, {1: 2}, seed=3)
    assert not found["came"] and found["outcome"] == "own" and found["said"] == "7"
    assert "but it stayed 7: nothing here shows" in found["sentence"]


def test_all_blocks_said_to_hold_a_step_are_swapped_together(box):
    found = try_counterfactual(box, PROBLEM, {1: 1, 2: 2, 3: 2})
    assert found["blocks"] == [2, 3] and found["sentence"].startswith("Blocks 2 and 3 are said")
    alone = try_counterfactual(box, PROBLEM, {1: 1, 2: 2, 3: 2}, block=2)
    assert alone["blocks"] == [2] and 3 not in alone["surgery"]["actions"]


def test_the_same_seed_gives_the_same_trial_and_its_surgery_can_be_done_again(box):
    first, again = (try_counterfactual(box, PROBLEM, None, seed=5) for _ in range(2))
    assert first == again
    surgery = first["surgery"]
    options = {"partner": surgery["partner"], "layers": tuple(surgery["layers"]), "gold": surgery["gold"]}
    assert operate(box, PROBLEM.question, surgery["actions"], seed=5, **options) == surgery


@pytest.mark.parametrize(
    ("problem", "claims", "block", "reason"),
    [
        (Problem("what is 3 + 2 - 1 + 4 ?", (), "8"), None, None, "steps of this question are not known"),
        (Problem("what is 3 + 2 - 1 + 4 ?", ("<<so>>",), "8"), None, None, "not all equations"),
        (Problem("what is 3 + 2 - 1 + 4 ?", ("<<3+2=6>>",), "6"), None, None, "3[+]2=6 does not hold"),
        (Problem("what is 3 + 2 - 1 + 4 ?", ("<<3+2=5>>",), "8"), None, None, "not the result of its last step"),
        (problem_of(3, (("+", 2), ("-", 2), ("+", 4))), None, None, "No number of this question"),
        (Problem("what is 3 + 2 - 1 + 4 ?", ("<<3+2=5>>",), "5"), None, None, "The model answers 8 here and not 5"),
        (PROBLEM, {}, None, "No block is said"),
        (PROBLEM, {1: 4}, None, "No block is said"),
        (PROBLEM, {1: 1}, 2, "Block 2 is not said to hold"),
        (PROBLEM, {1: "1"}, None, "Claims name"),
        (PROBLEM, {0: 1}, None, "Claims name"),
    ],
)
def test_what_cannot_be_tried_is_told_in_one_sentence(box, problem, claims, block, reason):
    with pytest.raises(RiMError, match=reason) as error:
        try_counterfactual(box, problem, claims, block=2 if reason == "No number of this question" else block)
    assert str(error.value).endswith(".") and "\n" not in str(error.value)


def test_the_steps_may_be_those_that_chain_of_thought_wrote(box):
    told = {"text": f"{' '.join(PROBLEM.steps)} #### {PROBLEM.answer}", "value": PROBLEM.answer}
    gold = try_counterfactual(box, PROBLEM, None, steps={"text": "nothing", "value": None}, block=2)
    assert gold["steps_from"] == "gold"
    for answer_known in ("", PROBLEM.answer):
        found = try_counterfactual(box, Problem(PROBLEM.question, (), answer_known), None, steps=told, block=2)
        assert found["steps_from"] == "chain of thought" and "a step of chain of thought" in found["sentence"]
        same = ("problem", "partner", "expected", "said", "outcome", "surgery", "control")
        assert all(found[key] == gold[key] for key in same)
    without = try_counterfactual(box, Problem(PROBLEM.question, PROBLEM.steps, ""), None, block=2)
    assert without == gold
