"""The glass box itself, and every probe on it: what is written there must be found, and nothing else."""

import json

import numpy as np
import pytest

from rim_probe.decoding import answer_batch
from rim_probe.glassbox.box import (
    DIMS,
    END_LAYER,
    HELD_LAYER,
    LAYERS,
    QUESTION_LENGTH,
    STEP,
    STEP_LAYER,
    glassbox,
)
from rim_probe.glassbox.problems import SIGNS, parts, swapped_answer
from rim_probe.probing import importance
from rim_probe.probing.attention import attention_shares
from rim_probe.probing.capture import capture
from rim_probe.probing.commitment import memory_course
from rim_probe.probing.correctness import sample
from rim_probe.probing.geometry import block_states, measure
from rim_probe.probing.heads import GoldScorer
from rim_probe.probing.hooks import spread_layers
from rim_probe.probing.judge import fit_judge
from rim_probe.probing.lens import VocabularyLens
from rim_probe.probing.nearest_step import search as steps
from rim_probe.probing.nearest_step.fit import StepDecoder
from rim_probe.probing.nearest_step.formula import Candidates, places_of, read_places, read_steps, step_space
from rim_probe.probing.patching import Patcher
from rim_probe.probing.results import Report, bootstrap, headline
from rim_probe.probing.selective import auroc
from rim_probe.probing.study import Study, observe
from rim_probe.probing.values import ValueProbes
from rim_probe.probing.words import carried_states, carry

BLOCKS = tuple(HELD_LAYER)


@pytest.fixture(scope="module")
def box():
    return glassbox()


@pytest.fixture(scope="module")
def untrained():
    return glassbox(trained=False)


@pytest.fixture(scope="module")
def problems(box):
    return box.problems(seed=1, n=100, split="report")


@pytest.fixture(scope="module")
def held(box, problems):
    return capture(box.rim, [problem.question for problem in problems])


def codes(problems, block: int) -> dict[str, list[int]]:
    """The step of a block as the one-hot indices that its subspaces hold."""
    rows = [parts(problem.steps[block - 1]) for problem in problems]
    return {name: [SIGNS.index(row[i]) if i == 1 else row[i] for row in rows] for i, name in enumerate(STEP)}


def window(block: int) -> range:
    """Layers at which the answer follows slot 1 of a block."""
    return range(HELD_LAYER[block], HELD_LAYER.get(block + 1, END_LAYER))


def one_hot(values: list[int], width: int) -> np.ndarray:
    return np.eye(width, dtype=np.float32)[values]


# ------------------------------------------------------------------------------------------------- the glass box itself


def test_every_readout_says_the_result_of_its_step(box):
    problems = [problem for split in ("fit", "choose", "report") for problem in box.problems(2, 60, split)]
    answers = answer_batch(box.rim, [problem.question for problem in problems], "memory")
    assert [a.value for a in answers] == [p.answer for p in problems]
    said = [[readout.text for readout in a.readouts] for a in answers]
    assert said == [[str(parts(step)[3]) for step in problem.steps] for problem in problems]
    assert not any(a.truncated for a in answers)
    assert {len(box.rim.encode_question(problem.question)) for problem in problems} == {QUESTION_LENGTH}


def test_splits_are_disjoint(box):
    sets = [{p.question for p in box.problems(0, n, s)} for s, n in (("fit", 4374), ("choose", 1458), ("report", 1458))]
    assert len(set.union(*sets)) == 7290


@pytest.mark.parametrize("block", BLOCKS)
def test_a_slot_holds_its_step_from_the_documented_layer_on_and_nothing_before(box, problems, held, block):
    for layer in range(LAYERS + 1):
        for slot in (1, 2):
            states = held.cell(layer, block, slot)
            if layer < box.held_layer[block]:
                np.testing.assert_allclose(states, np.broadcast_to(states[0], states.shape), atol=1e-6)
            else:
                for name, values in codes(problems, block).items():
                    wanted = one_hot(values, len(box.dims[name]))
                    np.testing.assert_allclose(states[:, box.dims[name]], wanted, atol=1e-4)


def test_ends_hold_the_result_of_their_block_and_the_question_token_holds_nothing(problems, held):
    for block in BLOCKS:
        results = one_hot(codes(problems, block)["result"], 10)
        np.testing.assert_allclose(held.cell(END_LAYER, block, "end")[:, DIMS["result"]], results, atol=1e-4)
        assert np.ptp(held.cell(END_LAYER - 1, block, "end"), axis=0).max() < 1e-6
    for layer in range(LAYERS + 1):
        assert np.ptp(held.question_cell(layer), axis=0).max() < 1e-6


def test_the_untrained_box_holds_and_says_nothing(untrained, problems):
    questions = [problem.question for problem in problems[:20]]
    held = capture(untrained.rim, questions, attention=False)
    assert held.slots.std(0).max() < 1e-6 and held.ends.std(0).max() < 1e-6
    assert {answer.value for answer in answer_batch(untrained.rim, questions, "memory", max_new_tokens=2)} == {None}


def test_the_confused_box_is_wrong_exactly_where_it_doubts(problems):
    confused, questions = glassbox(confused_by=7), [problem.question for problem in problems]
    held = capture(confused.rim, questions, attention=False)
    for i, answer in enumerate(answer_batch(confused.rim, questions, "memory")):
        for k, readout in enumerate(answer.readouts, start=1):
            doubts = [held.cell(LAYERS, k, position)[i, DIMS["doubt"][0]] > 0.5 for position in (1, 2, "end")]
            assert doubts == [readout.value != str(parts(problems[i].steps[k - 1])[3])] * 3


# -------------------------------------------------------------------------------------------------- the probes on it


@pytest.fixture(scope="module")
def study(box, untrained):
    splits = {name: box.problems(3, n, name) for name, n in (("fit", 300), ("choose", 60), ("report", 60))}
    with Study({"memory": box.rim, "base": untrained.rim}, splits, progress=False) as study:
        yield study


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    """Intervals are not what is tested here, and most of the time is theirs."""
    monkeypatch.setitem(bootstrap.__kwdefaults__, "draws", 50)


def test_the_nearest_step_of_block_k_is_step_k_and_no_control_finds_it(study, monkeypatch):
    for name, count in {"FIT_PROBLEMS": 200, "CHOOSE_PROBLEMS": 40}.items():
        monkeypatch.setattr(steps, name, count)
    monkeypatch.setattr(steps, "spread_layers", lambda layers: spread_layers(layers, 5))  # 0, 2, 4, 6, 8
    decoder = StepDecoder.fit(study)
    report = decoder.score(study)
    assert decoder.claims == {step: [step] for step in BLOCKS}
    score, control = headline(report)
    assert score.estimate.value > 0.98 and control.estimate.value < 0.15 and ": more than" in report.verdict
    assert all(result.goal.met(result.estimate) for result in report.results if result.goal)
    for (block, step), one in decoder.maps.items():
        assert one.alignment > 0.9 if block == step else one.alignment < 0.5
        assert block != step or one.layer >= HELD_LAYER[block]
    (problem,) = study.problems("report")[:1]
    told = decoder.explain(observe(study.models["memory"], problem.question), problem.steps)
    assert [block["nearest"][0]["step"] for block in told["blocks"]] == list(problem.steps)
    assert all(block["match"] for block in told["blocks"])


@pytest.mark.parametrize("part", range(4))
def test_to_know_one_part_of_a_step_is_not_to_know_the_step(box, part):
    """Block ends hold the result and nothing else of their step; hard distractors must tell that from the step."""
    problems, rng = box.problems(12, 40, "choose"), np.random.default_rng(0)
    texts = list(dict.fromkeys(step for problem in problems for step in problem.steps))
    places = places_of(problems, range(len(problems)), texts, rng)
    read = read_places(box.rim, problems, places, texts[:8], STEP_LAYER)
    space = step_space(places, read)
    vectors = space.matrix(texts) - space.matrix(texts).mean(0)
    for step in BLOCKS:
        asked = Candidates.at(step, places, read, space)
        known = [[parts(text)[part] == parts(own)[part] for text in texts] for own in asked.texts]
        oracle = np.stack([vectors[rows].mean(0) for rows in known])
        assert (asked.ranks(oracle) <= 0).mean() < 0.6  # 7 of 20 distractors keep the result


def test_value_probes_find_every_quantity_where_it_is_held_and_only_there(study):
    frame = ValueProbes.fit(study).score(study).frame()
    where, best = frame[frame.metric == "accuracy"], frame[frame["at step"].notna()].set_index(["metric", "at step"])
    for step in BLOCKS:
        # What a block repeats of its neighbours: its `left` is the result before.
        also = {"operand 1": step - 1, "result": step + 1}
        for quantity in ("operand 1", "operator", "operand 2", "result"):
            last = quantity == "result" and step == BLOCKS[-1]  # it is the answer, a quantity of its own
            metric, name = f"accuracy, {quantity}", f"{quantity} of {'the last step' if last else f'step {step}'}"
            values = best.loc[(metric, "last" if last else step)].set_index("of").value
            majority = values.pop("majority class")
            assert values["memory"] == 1 and values["random function of the step"] < 0.9
            assert values["last question token"] == values["base model's memory"] == majority
            found = where[where.of == name].value.to_numpy().reshape(LAYERS + 1, len(BLOCKS), 2)  # slots, end
            assert (found[HELD_LAYER[step] :, step - 1, 0] == 1).all()
            assert (found[: HELD_LAYER[1]] == majority).all() and majority < 0.7
            others = [block - 1 for block in BLOCKS if block not in (step, also.get(quantity))]
            assert found[:, others].max() < 0.9


def test_the_vocabulary_lens_reads_the_result_from_the_layer_where_it_is_written(box, study):
    lens = VocabularyLens.fit(study, steps=20, rows=300)
    captured, problems = study.capture("memory", "report"), study.problems("report")
    for block in BLOCKS:
        results = [box.rim.encode_text(str(parts(problem.steps[block - 1])[3]))[0] for problem in problems]
        for kind in ("logit", "tuned"):
            for position in (1, 2, "end"):
                begins = END_LAYER if position == "end" else HELD_LAYER[block]
                for layer in range(LAYERS + 1):
                    top = lens.logits(captured.cell(layer, block, position), layer, kind).argmax(-1)
                    hits = np.mean(top.numpy() == results)
                    assert hits == 1 if layer >= begins else hits < 0.4


def test_the_bank_reads_a_step_and_what_it_might_have_said(box):
    (problem,) = box.problems(4, 1, "report")
    for t, step in enumerate(problem.steps):
        texts = (step, "<<1+1=2>>", "<<9-8=1>>", "<<0-0=0>>")
        (states,) = read_steps(box.rim, [(problem.question, problem.steps[:t], texts)], [STEP_LAYER, LAYERS])
        for row, text in zip(states, texts, strict=True):
            left, sign, right, result = parts(text)
            for name, value in zip(STEP, (left, SIGNS.index(sign), right, result), strict=True):
                wanted = one_hot([value, value], len(DIMS[name]))
                np.testing.assert_allclose(row[:, DIMS[name]], wanted, atol=1e-4)


def test_a_judge_sees_doubt_and_its_controls_do_not(untrained):
    confused = glassbox(confused_by=7)
    splits = {name: confused.problems(7, n, name) for name, n in (("fit", 200), ("choose", 80), ("report", 100))}
    with Study({"memory": confused.rim, "base": untrained.rim}, splits, progress=False) as study:
        right = study.right("report")[:, -1]

        def score(view: str, role: str = "memory") -> float:
            fit, choose, report = (sample(study, name, role) for name in splits)
            judge = fit_judge(fit, choose, study.layers, view, penalties=(0.1,), blocks=[study.K])
            return auroc(judge.logits(report.capture, report.answers)[:, -1], right)

        assert 0.5 < right.mean() < 0.9
        assert score("end") == score("slots") == score("both") == 1
        assert score("question") == score("slots", "base") == 0.5
        # The box never doubts its words, only its memory does.
        own = [answer.readouts[-1].probability for answer in study.answers("memory", "report")]
        assert auroc(np.round(own, 3), right) == 0.5


def test_commitment_comes_with_the_last_block(study):
    problems = study.problems("report")
    ids = [answer.token_ids for answer in study.answers("memory", "report")]
    course = memory_course(study.models["memory"], [problem.question for problem in problems], ids, study.K)
    said = np.array([[step.endswith(f"={p.answer}>>") for step in p.steps] for p in problems])
    np.testing.assert_allclose(course.probability, said, atol=1e-3)
    assert (course.greedy == said).all() and course.entropy.max() < 1e-3


def test_geometry_tells_paths_of_questions_from_untrained_memory(study):
    states = {role: block_states(study.capture(role, "report"), LAYERS) for role in ("memory", "base")}
    trained, plain = (measure(states[role]) for role in ("memory", "base"))
    name = "share of variance of block and question together"
    assert trained[name].value > 0.4 and plain[name].value < 1e-6


# ------------------------------------------------------------------------------------------------------ interventions


@pytest.mark.parametrize("slots", [None, [1], [2]])
def test_swaps_give_the_predicted_answer_in_the_window_and_nothing_elsewhere(box, slots):
    for own, partner in zip(box.problems(8, 4, "report"), box.problems(9, 4, "choose"), strict=True):
        targets = [own.answer, *(swapped_answer(own, partner, block) for block in BLOCKS)]
        clean = Patcher(box.rim, own.question, [box.rim.encoder.answer_ids(target) for target in targets])
        memory = Patcher(box.rim, partner.question).memory
        cells = [(layer, block) for layer in range(LAYERS + 1) for block in BLOCKS]
        says = dict(
            zip(cells, clean.score([clean.edits(memory, [b], [layer], slots) for layer, b in cells]).says, strict=True)
        )
        for block in BLOCKS:
            for layer in range(LAYERS + 1):
                said = targets[block if layer in window(block) and slots != [2] else 0]
                assert says[layer, block].tolist() == [target == said for target in targets]


def test_words_carried_from_another_question_are_those_of_its_memory(box):
    own, donors = box.problems(10, 12, "report"), box.problems(11, 12, "choose")
    held = capture(box.rim, [problem.question for problem in donors], attention=False)
    for block in BLOCKS:
        for layer in range(LAYERS + 1):
            states = {layer: carried_states(held, block, [layer], ends=False)[layer]}
            said = [answer.text for answer in carry(box.rim, [problem.question for problem in own], states)]
            donor_says = HELD_LAYER[block] <= layer < END_LAYER
            follows = [parts(problem.steps[block - 1])[3] for problem in (donors if donor_says else own)]
            if donor_says or layer < HELD_LAYER[1] or layer >= END_LAYER:
                assert said == [str(result) for result in follows]


def test_importance_is_that_of_the_window(study):
    report = importance.score(study, problems=6, pool=20, donors=2)
    frame = report.frame()
    cells = frame[(frame.metric == importance.FALL) & frame["at block"].notna()]
    assert len(cells) == 3 * LAYERS * len(BLOCKS)
    for removal, layer, block, fall in cells[["of", "at layer", "at block", "value"]].itertuples(index=False):
        # Zero also takes away that it is a slot, without which nothing is written later.
        begin = 0 if "zero" in removal else window(block).start
        assert (abs(fall) > 0.05) == (begin <= layer < window(block).stop), (removal, layer, block)
    said = frame[frame.metric == importance.SAID].set_index(["at taken away", "of"]).value
    assert said["nothing", "clean"] == 1
    assert said[importance.SLOTS, "set to zero"] < 0.5 and said[importance.ALONE, "left out"] < 0.5
    score, _ = headline(report)
    assert score.place == {"taken away": importance.SLOTS} and score.estimate.low > 1
    assert Report.from_dict(json.loads(json.dumps(report.to_dict()))).to_dict() == report.to_dict()


def test_attention_that_is_read_is_found_by_knockout(box, problems):
    scorer = GoldScorer(box.rim, problems[:6])
    heads = [(layer, head) for layer in range(1, LAYERS + 1) for head in range(1, 5)]
    needed = {
        role: {head for head in heads if not scorer.scores([head], role).says.all()} for role in ("reader", "writer")
    }
    assert needed["reader"] == {(END_LAYER, 1)}
    assert needed["writer"] == {(layer, head) for layer in HELD_LAYER.values() for head in (1, 2, 3)}
    shares = attention_shares(box.rim, [problem.question for problem in problems[:6]])
    # Targets: the question's numbers, its other tokens, blocks 1 to 3.
    assert shares.ends[:, END_LAYER - 1, 0, -1, 4].min() > 0.999
    for block, layer in HELD_LAYER.items():
        left, sign, right = (shares.slots[:, layer - 1, head, block - 1] for head in range(3))
        assert left[:, block if block > 1 else 0].min() > 0.999
        assert sign[:, 1].min() > 0.999 and right[:, 0].min() > 0.999
