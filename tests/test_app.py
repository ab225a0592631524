"""The screen without a browser: words and figures, sessions, models, recorded runs, and the endpoint for programs."""

import gzip
import json
import re
import shutil
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest

from app import figures, record, recorded
from app.api import ENDPOINTS
from app.axis import axis_end
from app.demo import build_demo
from app.models import ModelShelf, needs_hub
from app.panels.race import Race, forget_gold
from app.runs import Lane, Run
from app.serving import serve
from app.session import Session, caution, check_blocks, check_gold, check_question, race
from rim_probe.errors import CheckpointError, LayoutError, QuestionError, RiMError, UnknownWordsError
from rim_probe.problems import Problem


def lane(value: str | None, seconds: float, tokens: int, correct: bool | None, readouts=(), **answer) -> Lane:
    """A finished lane whose tokens come at even intervals after a prefill that takes a tenth of the time."""
    events = [{"kind": "prefill", "seconds": seconds / 10, "text": ""}]
    for number in range(1, tokens + 1):
        at = seconds * (0.1 + 0.9 * number / tokens)
        events.append({"kind": "token", "seconds": at, "text": f"t{number}"})
    for block, (said, probability) in enumerate(readouts, start=1):
        entry = {"kind": "readout", "seconds": seconds, "text": said, "block": block, "value": said}
        events.append(entry | {"probability": probability})
    finished = {"value": value, "total_seconds": seconds, "generated_tokens": tokens, "ttft_seconds": seconds / 10}
    finished |= {"kv_cache_bytes": 4096, "cancelled": False, "truncated": False}
    return Lane(events, finished | answer, correct)


def finished_run(memory: Lane, cot: Lane, gold: str | None = "42", blocks: int = 3, question: str = "How many?") -> Run:
    return Run(
        "small",
        question,
        gold,
        blocks,
        "a machine",
        "2026-11-22T10:00:00+00:00",
        lanes={"memory": memory, "cot": cot},
        status="done",
    )


@pytest.fixture(scope="module")
def shelf(small_checkpoint) -> ModelShelf:
    return ModelShelf(small_checkpoint.parent)


@pytest.fixture(scope="module")
def loaded(shelf):
    return shelf.load("small")


# ------------------------------------------------------------------------------------------------------------- words


def test_verdict_is_the_line_of_the_issue():
    run = finished_run(lane("42", 0.031, 2, True), lane("42", 0.410, 37, True))
    assert figures.verdict(run) == (
        "RiM: 42, right, 31 ms, 1 pass + 2 tokens. CoT: 42, right, 410 ms, 1 pass + 37 tokens: 13 times slower."
    )


@pytest.mark.parametrize(
    ("memory", "cot", "expected"),
    [
        (
            lane("41", 0.5, 1, False),
            lane("42", 0.2, 12, True),
            "RiM: 41, wrong, 500 ms, 1 pass + 1 token. CoT: 42, right, 200 ms, 1 pass + 12 tokens: 2.5 times faster.",
        ),
        (
            lane(None, 1.0, 2, None),
            lane("7", 1.02, 2, None),
            "RiM: no answer, 1.0 s, 1 pass + 2 tokens. CoT: 7, 1.0 s, 1 pass + 2 tokens: as fast.",
        ),
        (
            lane("1", 0.0042, 2, None),
            lane("9", 0.1, 5, None, cancelled=True),
            "RiM: 1, 4.2 ms, 1 pass + 2 tokens. CoT: stopped, 100 ms, 1 pass + 5 tokens.",
        ),
        (lane("1", 0.0042, 2, None), Lane(), "RiM: 1, 4.2 ms, 1 pass + 2 tokens."),
        (
            lane("1", 0.01, 1, None),
            lane("9", 0.1, 5, None, truncated=True),
            "RiM: 1, 10 ms, 1 pass + 1 token. CoT: 9, 100 ms, 1 pass + 5 tokens, cut off at the limit.",
        ),
    ],
)
def test_verdict_is_honest(memory, cot, expected):
    assert figures.verdict(finished_run(memory, cot, gold=None)) == expected


def test_memory_is_timed_to_its_own_last_token():
    """Reading the other blocks, which only the strip needs, is not counted as answering."""
    memory = lane("42", 0.030, 2, True)
    memory.answer["total_seconds"] = 0.050
    run = finished_run(memory, lane("42", 0.3, 9, True))
    assert "RiM: 42, right, 30 ms" in figures.verdict(run)
    assert 'class="rest"' in figures.stage(run)


def test_the_page_says_when_chain_of_thought_has_no_weights_of_its_own():
    run = finished_run(lane("42", 0.03, 2, True), lane("42", 0.3, 9, True))
    assert "no CoT model of its own" not in figures.stage(run)
    run.matched = False
    assert "no CoT model of its own" in figures.stage(run)


def cells(run: Run) -> list[str]:
    """What the memory blocks of a drawn race say."""
    found = re.findall(r'<li class="cell[^>]*>(.*?)</li>', figures.stage(run), re.S)
    return [" ".join(re.sub("<[^>]*>", " ", cell).split()) for cell in found]


def test_a_block_on_the_way_is_no_error():
    memory = lane("41", 0.03, 2, False, readouts=[("3", 0.5), ("9", 0.8), ("41", 0.99)])
    run = finished_run(memory, lane("42", 0.4, 9, True))
    run.steps = ("<<1+2=3>>", "<<3*14=42>>")
    assert cells(run) == ["Block 1 3 on the way: step 1", "Block 2 9", "Block 3 41 ✗ wrong"]
    memory.events[-1] |= {"value": "42", "text": "42"}
    memory.answer["value"] = "42"
    assert cells(run)[-1] == "Block 3 42 ✓ right"
    run.gold = memory.correct = None
    assert cells(run)[-1] == "Block 3 42 the answer" and "not checked" in figures.stage(run)


def test_a_block_that_states_a_step_shows_its_result():
    memory = lane("7", 0.03, 2, None, readouts=[("7", 0.5), ("7", 0.8)])
    memory.events[-2] |= {"value": None, "text": "<<1*8=8>>"}
    run = finished_run(memory, lane("7", 0.4, 9, None), None, 2)
    run.steps = ("<<1*8=8>>", "<<8-1=7>>")
    assert cells(run)[0] == "Block 1 8 on the way: step 1" and "Block 1 says 1 × 8 = 8" in figures.stage(run)


def test_steps_are_written_for_readers_a_line_each_and_raw_on_demand():
    cot = lane("42", 0.4, 1, True)
    texts = ["<<1", "*8=8>>", " <<-2-", "8/2=4>>", " #### 42"]
    cot.events = [{"kind": "token", "seconds": i / 10, "text": text} for i, text in enumerate(texts)]
    html = figures.stage(finished_run(lane("42", 0.03, 2, True), cot))
    lines = re.findall(r"<li>(.*?)</li>", html, re.S)
    assert [re.sub("<[^>]*>", "", line) for line in lines] == ["1 × 8 = 8", "-2 − 8 ÷ 2 = 4"]
    assert 'data-t="0.100000"> × 8 = 8<' in lines[0], "a piece appears with its token"
    assert "&lt;&lt;1*8=8&gt;&gt;" in html


@pytest.mark.parametrize("blocks", [0, 1, 16])
def test_any_number_of_blocks_is_drawn(blocks):
    readouts = [("42", 0.9)] * blocks
    run = finished_run(lane("42", 0.1, 2, True, readouts), lane("1", 0.1, 2, False), blocks=blocks)
    assert len(cells(run)) == max(blocks, 1)


def headline(run: Run) -> str:
    text = re.sub(r'<span class="tooltip".*?</span>', "", figures.headline(run), flags=re.S)
    return " ".join(re.sub("<[^>]*>", "", text).split())


def test_the_headline_compares_medians_of_repeats_and_tells_their_spread():
    memory, cot = lane("42", 0.5, 2, True), lane("42", 0.6, 24, True)
    run = finished_run(memory, cot)
    assert "times" not in headline(run), "one run is no comparison"
    memory.repeats, cot.repeats = [0.010, 0.012, 0.5], [0.039, 0.030, 0.048]
    assert headline(run) == ("Same answer: 42 ✓ right. Memory: 1 read. Chain of thought: 24 tokens, 3.2 times longer.")
    assert "CoT 39 ms (30 ms to 48 ms)" in figures.headline(run) and "3 repeats" in figures.headline(run)


@pytest.mark.parametrize(
    ("memory", "cot", "gold", "expected"),
    [
        (lane("41", 1, 2, False), lane("42", 1, 9, True), "42", "memory 41 ✗ wrong, chain of thought 42 ✓ right."),
        (lane("41", 1, 2, None), lane("42", 1, 9, None), None, "memory 41, chain of thought 42 (not checked)."),
        (lane("7", 1, 2, None), lane("7", 1, 9, None), None, "Same answer: 7 (not checked)."),
        (lane("7", 1, 2, None), lane(None, 1, 256, None, truncated=True), None, "256 tokens, cut off at the limit."),
        (lane("7", 1, 2, None), lane("7", 1, 5, None, cancelled=True), None, "Memory answers 7 (not checked)."),
        (lane("7", 1, 2, None), Lane(), None, "Memory: 1 read."),
        (Lane(), Lane(), None, "Stopped before an answer."),
    ],
)  # fmt: skip
def test_the_headline_is_honest(memory, cot, gold, expected):
    memory.repeats, cot.repeats = [1.0] * 3, [2.0] * 3
    run = finished_run(memory, cot, gold)
    run.status = "stopped"
    assert expected in headline(run)
    whole = cot.answer and not (cot.answer["cancelled"] or cot.answer["truncated"])
    assert ("longer" in headline(run)) == bool(whole), "no ratio where a lane did not come to its end"


@pytest.mark.parametrize("seconds", [0.0004, 0.0099, 0.031, 0.41, 1.0, 7.7, 93.0, 600.0])
def test_axis_ends_just_after_the_race(seconds):
    run = finished_run(lane("1", seconds / 3, 2, None), lane("1", seconds, 5, None))
    assert seconds <= axis_end(run) <= max(1.6 * seconds, 0.01)
    assert "ms" in figures.stage(run) or " s" in figures.stage(run)


def test_every_text_is_escaped():
    evil = "<img src=x onerror=alert(1)> \"'& {{value}} ${1+1}"
    run = finished_run(lane(evil, 0.1, 1, None, [(evil, 0.5)] * 3), lane(evil, 0.2, 1, None), gold=evil, question=evil)
    run.checkpoint = run.machine = evil
    run.lanes["cot"].events[1]["text"] = evil
    problem = Problem(evil, (), evil)
    pages = [
        figures.stage(run),
        figures.stage(run, True),
        figures.notice(evil, [problem], [evil]),
        figures.headline(run),
    ]
    pages += [figures.model_state(evil, "failed", evil, evil), figures.recorded_selector([run, run], 0, [evil, evil])]
    for page in pages:
        assert "<img" not in page
        assert 'onerror=alert(1)> "' not in page


# ---------------------------------------------------------------------------------------------------------- sessions


@pytest.mark.parametrize("question", ["", "  \n\t ", None, 7, ["a"]])
def test_empty_question_is_refused(question):
    with pytest.raises(QuestionError, match="empty"):
        check_question(question)


@pytest.mark.parametrize("char", ["\x00", "\x07", "\x1b", "\x7f", "\ud800"])
def test_control_characters_are_named(char):
    with pytest.raises(QuestionError, match=f"U\\+{ord(char):04X}"):
        check_question(f"Ann has 3{char} apples")


@pytest.mark.parametrize(
    "question", ["🍎 3 + 4?", "كم تفاحة؟ \u202e3+4", "line one\nline two\r\n\tthree", "x" * 20_000]
)
def test_unusual_text_is_left_to_the_model(question):
    assert check_question(question) == question.strip()


@pytest.mark.parametrize("blocks", [-1, 17, 2.5, float("nan"), float("inf"), 10**30, "8", None, True, [8], "x" * 5000])
def test_blocks_out_of_range(blocks):
    with pytest.raises(RiMError, match="from 0 to 16") as error:
        check_blocks(blocks)
    assert len(str(error.value)) < 150


def test_blocks_and_gold_in_range():
    assert [check_blocks(value) for value in (0, 8.0, 16)] == [0, 8, 16]
    assert [check_gold(value) for value in ("", "  ", None, " 42 ", 42)] == [None, None, None, "42", "42"]
    with pytest.raises(RiMError, match="100 characters"):
        check_gold("4" * 101)


def test_race_answers_with_both_methods(loaded, shelf):
    problem = shelf.examples("small")[0]
    run = Run("small", problem.question, problem.answer, 3)
    statuses = [step.status for step in race(loaded, run)]
    assert statuses[0] == "running" and statuses[-1] == "done"
    memory, cot = run.lanes["memory"], run.lanes["cot"]
    assert sorted(event["block"] for event in memory.events if event["kind"] == "readout") == [1, 2, 3]
    assert memory.correct in (True, False) and cot.correct in (True, False)
    assert sum(event["kind"] == "token" for event in cot.events) == cot.answer["generated_tokens"]
    for one in (memory, cot):
        times = [event["seconds"] for event in one.events if event["kind"] != "readout"]
        assert times == sorted(times) and 0 < one.answered_seconds <= one.answer["total_seconds"]
    again = Run.from_dict(json.loads(json.dumps(run.to_dict())))
    assert again.to_dict() == run.to_dict()


def test_a_race_that_is_closed_ends_its_decoding_and_lets_the_next_one_through(loaded, shelf, monkeypatch):
    ended, question = [], shelf.examples("small")[0].question
    slow(monkeypatch, 0.05, at_end=lambda: ended.append(True))
    run = Run("small", question, None, 8)
    closed = race(loaded, run)
    next(closed), next(closed)
    assert not ended
    closed.close()
    assert ended and run.status == "stopped" and run.lanes["cot"].answer is None
    monkeypatch.undo()
    assert list(race(loaded, Run("small", question, None, 1)))[-1].status == "done"


def test_two_races_do_not_use_the_model_at_once(loaded, shelf, monkeypatch):
    question, first, second = shelf.examples("small")[0].question, [], []
    slow(monkeypatch, 0.002)
    begun = race(loaded, Run("small", question, None, 8))
    next(begun), next(begun)
    thread = threading.Thread(target=lambda: second.extend(race(loaded, Run("small", question, None, 8))))
    thread.start()
    thread.join(0.3)
    assert thread.is_alive() and not second[0].lanes["memory"].events
    first.extend(begun)
    thread.join(30)
    assert first[-1].status == second[-1].status == "done"


def test_race_passes_on_the_models_objections(loaded):
    with pytest.raises(UnknownWordsError, match="zeppelins"):
        list(race(loaded, Run("small", "Ann has 3 zeppelins.", None, 8)))
    with pytest.raises(QuestionError, match="tokens"):
        list(race(loaded, Run("small", "3 " * 400, None, 8)))


def test_a_failing_model_gives_a_sentence(loaded, shelf, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("CUDA error: an illegal memory access")
        yield

    monkeypatch.setattr("rim_probe.decoding.stream", broken)
    run = Run("small", shelf.examples("small")[0].question, None, 8)
    with pytest.raises(RiMError, match="failed while answering"):
        list(race(loaded, run))
    assert run.status == "stopped"


def test_a_question_that_is_stopped_before_its_turn_is_not_asked(shelf):
    panel, session = Race(shelf), Session()
    changes = list(panel.ask(shelf.examples("small")[0].question, "", 3, "small", session))
    assert changes[0]["notice"] == "" and session.asked is not None
    list(panel.stop(session))
    list(panel.run(session))
    assert session.run is None


def test_gold_of_an_example_does_not_outlive_its_question():
    session = Session(picked=("3 + 4?", "7", ("<<3+4=7>>",)))
    assert forget_gold("3 + 4?", "7", session) == "7"
    assert session.steps_for("3 + 4?") == ("<<3+4=7>>",) and session.steps_for("3 + 5?") == ()
    assert forget_gold("3 + 5?", "7", session) == ""
    assert forget_gold("3 + 5?", "8", session) == "8"
    assert forget_gold("3 + 5?", "7", session) == "7"


def test_a_sum_is_graded_and_a_word_problem_is_not(shelf):
    panel = Race(shelf)
    assert panel.prepare("3 + 4 = ?", 3, "", "small").gold == "7"
    assert panel.prepare("3 + 4 = ?", 3, "8", "small").gold == "8", "what a visitor says counts"
    assert panel.prepare(shelf.examples("small")[0].question, 3, "", "small").gold is None


@pytest.mark.parametrize(
    ("question", "words"),
    [
        ("Tom has 3 apples and eats 2. How many are left?", ""),
        ("Tom has three apples. How many?", ""),
        ("Tom has 12 apples.", "larger than the numbers"),
        ("How are you?", "no number"),
        ("كم عدد التفاح 3؟", "English"),
    ],
)
def test_what_a_model_was_not_trained_for_is_said_before(question, words):
    examples = [Problem("Ann has 3 apples. How many?", (), "3"), Problem("Ben buys 4 nuts and 5 pears.", (), "9")]
    said = caution(question, examples)
    assert words in said and bool(words) == bool(said)


def test_a_model_of_one_form_says_so():
    assert "one form" in caution("3 + 4", [Problem("what is 3 + 4 - 2 ?", (), "5")])
    assert caution("what is 9 - 9 + 1?", [Problem("what is 3 + 4 - 2 ?", (), "5")]) == ""


def test_a_finished_race_is_timed_again(shelf):
    panel, session = Race(shelf), Session()
    session.add(panel.prepare(shelf.examples("small")[0].question, 3, "", "small"))
    assert list(panel.measure(session)) == [{}], "not before it is over"
    for _ in panel.answer(session.run):
        pass
    (changes,) = panel.measure(session)
    assert all(len(lane.repeats) == 3 and min(lane.repeats) > 0 for lane in session.run.lanes.values())
    assert "Memory" in changes["headline"] and list(panel.measure(session)) == [{}]
    assert Run.from_dict(json.loads(json.dumps(session.run.to_dict()))).lanes["cot"].repeats


# ------------------------------------------------------------------------------------------------------------ models


def test_the_page_opens_with_the_first_model_that_is_complete_and_loads(small_checkpoint, tmp_path, monkeypatch):
    for name in ("a-model", "rim-tiny", "smollm2-135m"):
        shutil.copytree(small_checkpoint, tmp_path / name)
    assert ModelShelf(tmp_path).greeting == "a-model", "without models of their own for both methods"
    for name in ("rim-tiny", "smollm2-135m"):
        for role in ("cot", "direct"):
            shutil.copytree(small_checkpoint, tmp_path / name / role)
    shutil.copytree(small_checkpoint, tmp_path / "rim-tiny" / "paper")
    (tmp_path / "rim-tiny" / "paper" / "examples.json").unlink()
    shelf = ModelShelf(tmp_path)
    assert shelf.names == ["smollm2-135m", "rim-tiny", "rim-tiny-paper", "a-model"]
    assert shelf.examples("rim-tiny-paper") == shelf.examples("rim-tiny")
    truncate_weights(tmp_path / "smollm2-135m")
    with pytest.raises(CheckpointError):
        shelf.load("smollm2-135m")
    assert shelf.greeting == "rim-tiny"
    state = list(Race(shelf).watch_model("smollm2-135m", Session()))[-1]["model_state"]
    assert 'data-model="rim-tiny"' in state


def test_a_visitor_brings_a_checkpoint_of_their_own(small_checkpoint, tmp_path):
    shelf = ModelShelf(tmp_path / "none")
    with pytest.raises(CheckpointError, match="Hugging Face Hub"):
        shelf.add(str(small_checkpoint), folders=False)
    assert shelf.add(str(small_checkpoint), folders=True) == "small" == shelf.add(str(small_checkpoint), folders=True)
    assert shelf.names == ["small"] and "8 memory blocks" in shelf.verdict("small")
    assert "not trained for it" in shelf.verdict("small"), "it has no model of its own for chain of thought"
    shutil.copytree(small_checkpoint, tmp_path / "torn")
    truncate_weights(tmp_path / "torn")
    for source in (str(tmp_path / "torn"), "nobody/nothing", "../etc", ""):
        (changes,) = Race(shelf, own_machine=True).bring(source)
        assert 'role="alert"' in changes["own_state"] and shelf.names == ["small"]


def test_shelf_lists_checkpoints_and_reads_them_without_weights(small_checkpoint, tmp_path):
    shelf = ModelShelf(small_checkpoint.parent, preferred="someone/from-the-hub")
    assert shelf.names == ["from-the-hub", "small"]
    assert shelf.layout("small").num_blocks == 8 and len(shelf.examples("small")) == 6
    assert "CPU" in ModelShelf(small_checkpoint.parent, device="cpu").load("small").machine
    with pytest.raises(CheckpointError, match="choose one of"):
        shelf.path("../../etc")
    with pytest.raises(CheckpointError, match="no checkpoint to ask"):
        ModelShelf(tmp_path).path(None)


def test_a_folder_that_waits_for_its_weights_is_not_offered(small_checkpoint, tmp_path):
    (tmp_path / "planned").mkdir()
    shutil.copy(small_checkpoint / "examples.json", tmp_path / "planned")
    (tmp_path / "planned" / "README.md").write_text("To be trained.")
    shutil.copytree(small_checkpoint, tmp_path / "small")
    assert ModelShelf(tmp_path).names == ["small"]


def test_another_model_brings_a_question_of_its_own_but_leaves_a_typed_one(small_checkpoint, tmp_path, shelf):
    panel, (first, second, *_) = Race(shelf, tmp_path), shelf.examples("small")
    session = Session(picked=(second.question, second.answer, ()))
    (chosen,) = panel.choose_model("small", second.question, session)
    assert (chosen["question"], chosen["gold"]) == (first.question, first.answer)
    assert session.steps_for(first.question) == first.steps
    (typed,) = panel.choose_model("small", "3 + 4 = ?", session)
    assert "question" not in typed and "gold" not in typed


@pytest.fixture
def slow_base(loaded, monkeypatch):
    """Stands in for loading: says how far it is, as a download does, and goes on when it is told to."""
    base = types.SimpleNamespace(go=threading.Semaphore(0), calls=0, error=None)

    def load(path, device, progress):
        base.calls += 1
        progress("Downloading tiny", 41_000_000, 93_000_000)
        base.go.acquire(timeout=30)
        if base.error is not None:
            raise base.error
        return loaded.models, ""

    monkeypatch.setattr("app.models._load_somewhere", load)
    yield base
    base.go.release(9)


def test_a_base_that_is_fetched_is_fetched_once_and_says_how_far_it_is(small_checkpoint, slow_base):
    shelf, told = ModelShelf(small_checkpoint.parent), []

    def tell(stage):
        told.append(stage)
        slow_base.go.release()

    assert shelf.load("small", tell=tell) is shelf.load("small")
    assert told[0] == ("Downloading tiny", 41_000_000, 93_000_000) and slow_base.calls == 1


def test_a_base_that_cannot_be_fetched_costs_one_sentence_and_another_try(small_checkpoint, slow_base):
    panel = Race(ModelShelf(small_checkpoint.parent))
    slow_base.error = CheckpointError("tiny cannot be fetched; go online.")
    slow_base.go.release(1)
    last = list(panel.watch_model("small", Session()))[-1]["model_state"]
    assert "go online" in last and 'role="alert"' in last and "data-again" in last
    slow_base.error = None
    slow_base.go.release(1)
    told = [changes["model_state"] for changes in panel.watch_model("small", Session()) if changes]
    assert "Ready" in told[-1] and slow_base.calls == 2


def truncate_weights(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


@pytest.mark.parametrize(
    ("damage", "kind", "words"),
    [
        (truncate_weights, CheckpointError, "weights"),
        (lambda folder: (folder / "model.safetensors").unlink(), CheckpointError, "weights"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), CheckpointError, "tokenizer"),
        (lambda folder: (folder / "memory_layout.json").write_text("{nonsense"), LayoutError, "JSON"),
        (lambda folder: (folder / "memory_layout.json").write_text('{"num_blocks": "8"}'), LayoutError, "num_blocks"),
    ],
)
def test_damaged_checkpoint_gives_one_sentence(small_checkpoint, tmp_path, damage, kind, words):
    shutil.copytree(small_checkpoint, tmp_path / "damaged")
    damage(tmp_path / "damaged")
    shelf = ModelShelf(tmp_path)
    build_demo(shelf)  # the page itself is not lost
    with pytest.raises(kind, match=words) as error:
        shelf.load("damaged")
    assert "\n" not in str(error.value) and str(tmp_path) not in str(error.value)
    assert 'role="alert"' in list(Race(shelf).watch_model("damaged", Session()))[-1]["model_state"]


def test_damaged_examples_leave_the_model_usable(small_checkpoint, tmp_path):
    shutil.copytree(small_checkpoint, tmp_path / "damaged")
    (tmp_path / "damaged" / "examples.json").write_text('[{"question": 3}]')
    shelf = ModelShelf(tmp_path)
    assert Race(shelf).offered("damaged") == []
    assert "examples.json" in Race(shelf).state("damaged", shelf.load("damaged"))
    assert shelf.load("damaged")


def test_the_hub_is_asked_only_for_what_is_nowhere_else(small_checkpoint, tmp_path):
    shutil.copytree(small_checkpoint, tmp_path / "adapter")
    assert not needs_hub(None, tmp_path) and not needs_hub(str(small_checkpoint), tmp_path)
    assert needs_hub("someone/from-the-hub", tmp_path)
    for source in ("gguf", "hub"):
        (tmp_path / "adapter" / "base.json").write_text(json.dumps({"source": source}))
        assert needs_hub(None, tmp_path) == needs_hub(str(tmp_path / "adapter"), tmp_path / "none") == (source == "hub")


def test_the_command_explains_itself():
    command = [sys.executable, str(Path(__file__).parent.parent / "app.py"), "--help"]
    shown = subprocess.run(command, check=True, timeout=60, capture_output=True, text=True).stdout
    assert all(flag in shown for flag in ("--host", "--port", "--model", "--device"))


def test_nothing_heavy_is_imported_before_the_page_is_up():
    code = (
        "import sys; from app.demo import build_demo; from app.models import ModelShelf; build_demo(ModelShelf());"
        "sys.exit(','.join({'torch', 'transformers', 'plotly'} & set(sys.modules)) or 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# ---------------------------------------------------------------------------------------------------- recorded runs


def test_recording_and_showing_it_without_a_model(small_checkpoint, tmp_path, monkeypatch, capsys):
    path = record.record(str(small_checkpoint), "cpu", tmp_path, "python -m app.record small")
    assert path == tmp_path / "small.json.gz" and "RiM:" in capsys.readouterr().out
    recordings = recorded.load("small", tmp_path)
    assert all(entry.run.reading["num_blocks"] == 8 and entry.run.steps for entry in recordings)
    assert [entry.label for entry in recordings] == ["1 step", "2 steps", "3 steps"]
    monkeypatch.setattr(ModelShelf, "start", lambda *_: pytest.fail("a recorded run needs no model"))
    stage, run = Race(ModelShelf(small_checkpoint.parent), tmp_path).opening("small")
    assert "Recorded" in stage and run.date[:10] in stage and "CPU" in stage
    assert (
        Race(ModelShelf(small_checkpoint.parent), tmp_path).opening("small", 0)[1].question
        == recordings[0].run.question
    )


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"format": "other", "runs": []}', '{"format": "rim-probe-recorded/2", "runs": [{}]}', None]
)
def test_damaged_recording_gives_a_sentence(tmp_path, text, small_checkpoint):
    (tmp_path / "small.json.gz").write_bytes(b"no gzip" if text is None else gzip.compress(text.encode()))
    stage, run = Race(ModelShelf(small_checkpoint.parent), tmp_path).opening("small")
    assert run is None and "small.json.gz cannot be shown" in stage


def test_no_recording_and_no_checkpoint_is_not_an_error(tmp_path):
    stage, run = Race(ModelShelf(tmp_path), tmp_path).opening(None)
    assert run is None and "press Run" in stage
    build_demo(ModelShelf(tmp_path))


def test_the_opening_recording_is_the_deepest_one_solved():
    runs = [finished_run(lane("1", 1, 1, memory), lane("1", 1, 1, True)) for memory in (True, True, False)]
    assert recorded.opening([recorded.Recording(str(i), run) for i, run in enumerate(runs)]) == 1


def test_record_complains_in_one_sentence(tmp_path, capsys):
    assert record.main([str(tmp_path / "nothing")]) == 1
    assert capsys.readouterr().err.startswith("error: ")


# ------------------------------------------------------------------------------------------------- the named endpoint


@pytest.fixture(scope="module")
def client(shelf):
    from gradio_client import Client

    demo = build_demo(shelf)
    url = serve(demo, "127.0.0.1")
    yield Client(url, verbose=False)
    demo.close()


def test_endpoint_answers(client, shelf):
    problem = shelf.examples("small")[1]
    result = client.predict(problem.question, 4, problem.answer, api_name="/run")
    assert result["question"] == problem.question and result["num_blocks"] == 4
    assert len(result["memory"]["answer"]["readouts"]) == 4
    assert result["cot"]["correct"] in (True, False)
    assert result["summary"].startswith("RiM: ") and "CoT: " in result["summary"]
    assert client.predict(problem.question, api_name="/run")["num_blocks"] == 8


def test_only_the_named_endpoints_are_public(client):
    assert list(client.view_api(return_format="dict")["named_endpoints"]) == [f"/{name}" for name in ENDPOINTS]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("",), "empty"),
        (("x" * 20_001,), "characters"),
        (("3 " * 9_999,), "tokens"),
        (("كم عدد التفاح؟",), "never seen"),
        (("3 🍎 + 4 🍎 = ?",), "never seen"),
        (("a\x07b",), "control character"),
        (("3 + 4 = ?", 99), "from 0 to 16"),
        (("3 + 4 = ?", -1), "from 0 to 16"),
        (("3 + 4 = ?", "many"), "from 0 to 16"),
        (("3 + 4 = ?", 8, "9" * 200), "correct answer"),
    ],
)
def test_endpoint_refuses_in_one_sentence(client, arguments, words):
    with pytest.raises(Exception, match=words) as error:
        client.predict(*arguments, api_name="/run")
    assert "Traceback" not in str(error.value) and str(error.value).count("\n") == 0


def slow(monkeypatch, seconds: float, at_end=lambda: None) -> None:
    """Makes every decoding event take `seconds` longer, and says when a stream has come to its end or was closed."""
    from rim_probe import decoding

    real = decoding.stream

    def stream(*arguments, **options):
        try:
            for event in real(*arguments, **options):
                time.sleep(seconds)
                yield event
        finally:
            at_end()

    monkeypatch.setattr(decoding, "stream", stream)
