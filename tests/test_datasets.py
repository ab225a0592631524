"""The procedural world against its promises, read from the problems it makes; and how sources are named."""

import re
import zlib
from dataclasses import replace
from itertools import pairwise

import huggingface_hub
import pytest

from rim_probe.datasets import arithmetic
from rim_probe.datasets.arithmetic import NAMES, SPLITS, THINGS, Chain, World, generate, vocabulary
from rim_probe.datasets.sources import load_problems
from rim_probe.encoding import Encoder
from rim_probe.errors import ProblemError, RecipeError
from rim_probe.memory import MemoryLayout
from rim_probe.problems import extract_answer, format_line, is_correct, parse_line
from rim_probe.training.scratch import word_tokenizer

WORLDS = {
    "default": World(),
    "every style": World(max_steps=5, max_value=20, story=1, relation=1, bare=1),
    "large": World(min_steps=3, max_steps=8, max_value=120, story=1, relation=1, bare=1, distract=1, shuffle=1),
    "plus and minus": World(max_steps=2, max_value=9, operations="+-", distract=0, shuffle=0),
    "plus only": World(max_steps=2, max_value=9, operations="+"),
    "shared table": World(max_value=9, bare=0.5, held_out_steps=2),
}
STEP = re.compile(r"<<(\d+)([-+*/])(\d+)=(\d+)>>")
COMPUTE = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": int.__floordiv__}


def problems(world, split="train", rows=80, **arguments):
    return list(generate(world, split, rows, **arguments))


def numbers_of(problem):
    """[(a, op, b, c)] of its steps."""
    return [(int(a), op, int(b), int(c)) for a, op, b, c in (STEP.fullmatch(step).groups() for step in problem.steps)]


def chain_of(problem):
    steps = numbers_of(problem)
    return (steps[0][0], *((op, b) for _, op, b, _ in steps))


@pytest.fixture(params=WORLDS)
def world(request):
    return WORLDS[request.param]


@pytest.mark.parametrize("split", SPLITS)
def test_every_chain_is_right_and_stays_inside_the_world(world, split):
    for problem in problems(world, split):
        steps = numbers_of(problem)
        assert world.min_steps <= len(steps) <= world.max_steps
        for a, op, b, c in steps:
            assert COMPUTE[op](a, b) == c
            assert op in world.operations
            assert all(1 <= number <= world.max_value for number in (a, b, c))
            if op == "/":
                assert a % b == 0
            if op in "*/":
                assert b > 1
        assert all(before[3] == after[0] for before, after in pairwise(steps))
        assert problem.answer == str(steps[-1][3])
        assert parse_line(format_line(problem)) == problem


@pytest.mark.parametrize("split", SPLITS)
def test_the_question_tells_every_operand_and_asks_for_the_right_person(world, split):
    for problem in problems(world, split):
        steps = numbers_of(problem)
        told = re.findall(r"\d+", problem.question)
        for number in (steps[0][0], *(b for _, _, b, _ in steps)):
            assert str(number) in told  # each operand as often as the chain uses it:
            told.remove(str(number))
        assert len(told) <= (world.distract > 0)  # one irrelevant fact at most
        if " now" in problem.question or "how many" in problem.question.lower():
            (asked,) = re.findall(r"[Hh]ow many (?:of the )?(\w+)", problem.question)
            assert asked in THINGS
            assert owner_asked(problem.question) in NAMES


def ask_of(question):
    """The last sentence: the question proper."""
    return question.rsplit(". ", 1)[-1]


def owner_asked(question):
    (name,) = [word for word in re.findall(r"\w+", ask_of(question)) if word in NAMES]
    return name


@pytest.mark.parametrize("split", SPLITS)
def test_relations_ask_for_the_end_of_the_chain(split):
    """Walks from person to person as a reader would, whatever the order of the sentences."""
    world = World(max_steps=4, max_value=20, story=0, relation=1, distract=0)
    for problem in problems(world, split):
        *facts, ask = re.split(r"\. ", problem.question)
        people = [[word for word in re.findall(r"\w+", fact) if word in NAMES] for fact in facts]
        (start,) = [names[0] for names in people if len(names) == 1]
        relations = {frozenset(names) for names in people if len(names) == 2}
        assert len(relations) == len(problem.steps) == len(facts) - 1
        person = start
        for _ in problem.steps:
            (link,) = [pair for pair in relations if person in pair]
            relations.remove(link)
            (person,) = link - {person}
        assert person == owner_asked(ask)


def test_the_same_arguments_give_the_same_problems(world):
    assert problems(world, rows=40, seed=3) == problems(world, rows=40, seed=3)
    assert problems(world, rows=40, seed=3)[:10] == problems(world, rows=10, seed=3)
    assert problems(world, rows=40, seed=3) != problems(world, rows=40, seed=4)


def test_the_problems_of_a_world_are_pinned():
    """A change of the generator changes every trained model's data; it must not happen unseen."""
    lines = [format_line(problem) for problem in problems(World(story=1, relation=1, bare=1), "test", 100)]
    assert zlib.crc32("\n".join(lines).encode()) == 1419521626


def test_splits_share_no_chain_and_no_question(world):
    chains, questions = {}, {}
    for split in SPLITS:
        found = problems(world, split, 150)
        found_long = [problem for problem in found if len(problem.steps) >= world.held_out_steps]
        chains[split] = {chain_of(problem) for problem in found_long}
        questions[split] = {problem.question.lower() for problem in found}
        assert all(Chain(*as_chain(problem)).split == split for problem in found_long)
    for one, other in (("train", "valid"), ("train", "test"), ("valid", "test")):
        assert not chains[one] & chains[other]
        assert not questions[one] & questions[other]


def as_chain(problem):
    steps = numbers_of(problem)
    return steps[0][0], tuple((op, b, c) for _, op, b, c in steps)


def test_a_shared_table_is_shared_without_sharing_questions():
    """With `held_out_steps=2` every split knows the sums of one step, drawn as often as without."""
    world = World(max_value=9, story=0, relation=0, bare=1, max_steps=2, held_out_steps=2)
    found = {split: problems(world, split, 1500) for split in SPLITS}
    table = {split: {chain_of(p) for p in found[split] if len(p.steps) == 1} for split in SPLITS}
    assert table["train"] & table["test"] and table["train"] & table["valid"]
    assert len(table["test"]) > 0.9 * len(table["train"] | table["test"])
    questions = {split: {problem.question for problem in found[split]} for split in SPLITS}
    assert not questions["train"] & questions["valid"] and not questions["train"] & questions["test"]
    held_out = problems(replace(world, held_out_steps=1), "train", 1500)
    share = {split: sum(len(p.steps) == 1 for p in found[split]) / 1500 for split in SPLITS}
    for split in SPLITS:
        assert abs(share[split] - sum(len(p.steps) == 1 for p in held_out) / 1500) < 0.1


def skeleton(problem):
    """The phrasings of a problem: its sentences without things, numbers and openers; N is the person asked about."""
    asked = [word for word in re.findall(r"\w+", ask_of(problem.question)) if word in NAMES]
    text = re.sub(rf"\b({'|'.join(NAMES)})\b", lambda name: "N" if name[0] in asked else "M", problem.question)
    text = re.sub(rf"\b({'|'.join((*THINGS, *arithmetic._SINGULAR.values()))})\b", "T", text)
    text = re.sub(r"\d+( ?[-+*/] ?\d+|, then [*/] \d+)*", "#", text).replace("here is", "here are").lower()
    return {sentence.removeprefix("then ").removeprefix("later ").removeprefix("next ")
            for sentence in re.split(r"\. ", text)}  # fmt: skip


def test_the_test_split_is_told_in_other_phrasings():
    world = WORLDS["every style"]
    told = {split: set().union(*map(skeleton, problems(world, split, 400))) for split in SPLITS}
    assert not told["test"] & (told["train"] | told["valid"])
    assert len(told["train"]) > 25 and len(told["test"]) > 15


def test_the_test_split_asks_for_other_pairs_of_person_and_thing():
    pairs = {}
    for split in SPLITS:
        world = replace(World(), max_value=20)
        asks = [problem.question for problem in problems(world, split, 1000)]
        pairs[split] = {(owner_asked(ask), re.search(r"ow many (?:of the )?(\w+)", ask_of(ask))[1]) for ask in asks}
    assert not pairs["test"] & (pairs["train"] | pairs["valid"])
    assert {name for name, _ in pairs["test"]} == {name for name, _ in pairs["train"]} == set(NAMES)


def test_unique_leaves_no_question_twice():
    world = World(max_steps=1, max_value=9, story=0, relation=0, bare=1)
    some = problems(world, "train", 300)
    assert len({problem.question for problem in some}) < 300
    every = problems(world, "train", 1000, unique=True)  # the world is smaller than that: it ends early
    assert len(every) == len({problem.question for problem in every}) < 1000
    assert {problem.question for problem in some} <= {problem.question for problem in every}
    assert len(problems(World(), "test", 200, unique=True)) == 200


def test_sums_without_a_story_mean_what_they_say():
    """`9 - 5 / 2` is not `(9 - 5) / 2`: read with the usual precedence between pauses, the text gives the answer."""
    world = World(max_steps=5, max_value=20, story=0, relation=0, bare=1)
    paused = 0
    for split in SPLITS:
        for problem in problems(world, split, 200):
            told = re.sub(r"^(What is|What)|is\?|= \?|\?", "", problem.question).strip()
            value = ""
            for part in told.split(", then "):
                value = str(eval(f"({value}) {part}" if value else part))  # digits and signs alone, see below
                assert re.fullmatch(r"[-+*/ \d]+", part)
            assert float(value) == int(problem.answer)
            paused += ", then " in told
    assert paused > 50


# ------------------------------------------------------------------------------------------------ the closed vocabulary


@pytest.fixture(scope="module")
def encoder():
    tokenizer = word_tokenizer(vocabulary())
    tokenizer.add_special_tokens({"additional_special_tokens": list(MemoryLayout().tokens)})
    return Encoder(tokenizer, MemoryLayout())


@pytest.mark.parametrize("split", SPLITS)
def test_the_word_tokenizer_knows_every_word_and_gives_the_chain_back(encoder, world, split):
    unknown = encoder.tokenizer.unk_token_id
    for problem in problems(world, split):
        question, chain = encoder.question_ids(problem.question), encoder.chain_ids(problem)
        assert unknown not in question + chain
        text = encoder.tokenizer.decode(chain, skip_special_tokens=True)
        assert text == f"{' '.join(problem.steps)} #### {problem.answer}"
        assert parse_line(f"{problem.question}||{text}") == problem
        assert is_correct(extract_answer(text), problem.answer)
        assert encoder.tokenizer.decode(encoder.answer_ids(problem.answer), skip_special_tokens=True) == problem.answer


def test_the_vocabulary_is_closed_and_needed():
    words = vocabulary()
    assert words == sorted(set(words)) and all(word == word.lower() and not word.isspace() for word in words)
    used = set()
    for split in SPLITS:
        for problem in problems(WORLDS["every style"], split, 600):
            used |= set(re.findall(r"[a-z]+|\d|<<|>>|[-+*/=?.,]", problem.question.lower() + "".join(problem.steps)))
    assert used <= set(words)
    assert {word for word in words if word.isalpha()} <= used


# --------------------------------------------------------------------------------------------------- impossible worlds


@pytest.mark.parametrize(
    "values",
    [
        {"min_steps": 0},
        {"min_steps": 3, "max_steps": 2},
        {"max_steps": 9},
        {"max_value": 3},
        {"max_value": 1000},
        {"operations": ""},
        {"operations": "+%"},
        {"operations": "*/"},
        {"story": -1},
        {"story": 0, "relation": 0, "bare": 0},
    ],
)
def test_an_impossible_world_is_refused_by_name(values):
    with pytest.raises(RecipeError, match="^World: ") as caught:
        World(**values)
    assert "\n" not in str(caught.value)


def test_a_world_without_problems_is_refused_instead_of_searched_for_ever(monkeypatch):
    monkeypatch.setattr(arithmetic, "_MAX_DRAWS", 2000)
    world = World(min_steps=8, max_steps=8, max_value=4, operations="+")  # 4 is reached after 3 steps
    with pytest.raises(RecipeError, match="no train problem of 8 steps or more .* allow fewer steps"):
        next(generate(world, "train", 1))


def test_an_unknown_split():
    with pytest.raises(RecipeError, match="Unknown split 'dev'; choose one of train, valid, test"):
        next(generate(World(), "dev", 1))


# -------------------------------------------------------------------------------------------------------------- sources


def test_a_hub_file_is_downloaded_from_its_data_set(tmp_path, monkeypatch):
    path = tmp_path / "some.txt"
    path.write_text("3 and 4?||<<3+4=7>> #### 7\n")
    asked = []

    def download(repo, name, repo_type):
        asked.append((repo, name, repo_type))
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert load_problems("hub:some-org/gsm8k.aug/sub/train.txt").problems[0].answer == "7"
    assert asked == [("some-org/gsm8k.aug", "sub/train.txt", "dataset")]


@pytest.mark.parametrize("source", ["hub:", "hub:owner", "hub:owner/name"])
def test_a_hub_source_without_a_file(source):
    with pytest.raises(ProblemError, match=f"^{source}: name a Hub file as hub:owner/dataset/file.txt"):
        load_problems(source)
