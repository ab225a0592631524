"""Token ids made at once equal those of the encoder, one by one; their file is trusted only if it is whole and ours."""

import numpy as np
import pytest
from conftest import tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from rim_probe.datasets.arithmetic import World, generate, vocabulary
from rim_probe.encoding import Encoder
from rim_probe.memory import MemoryLayout
from rim_probe.packing import cot_row, direct_row, stage1_row, stage2_row
from rim_probe.problems import Problem
from rim_probe.training import tokens as tokens_module
from rim_probe.training.scratch import word_tokenizer
from rim_probe.training.tokens import Tokens, tokenise

LAYOUT = MemoryLayout(num_blocks=3)
ODD = [
    Problem("  What is 3 + 4?\t", (), "7"),
    Problem("Say <eos>, <m> or </b>: 😀 naïve é \ud83d?", ("<<1+1=2>>",), "-2.5"),
    Problem("Two\nlines", ("<<a || b>>", "<<a || b>>", "<<1 000 = 1e3>>"), "a word answer"),
]
PROBLEMS = [*generate(World(max_steps=5), "train", 60, seed=1), *ODD]


def digits_tokenizer() -> PreTrainedTokenizerFast:
    """Digits one by one, then bytes: the way of SmolLM2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return trained(tokenizer)


def pieces_tokenizer() -> PreTrainedTokenizerFast:
    """A space before every text, BOS before it and EOS after it: the way of SentencePiece."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer = trained(tokenizer)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 0)]
    )
    return tokenizer


def trained(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    texts = [problem.question + "\n" for problem in PROBLEMS[:60]] + [
        "".join(problem.steps) for problem in PROBLEMS[:60]
    ]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        special_tokens=["<eos>", "<bos>", "<unk>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(texts, trainer)
    unknown = "<unk>" if tokenizer.model.unk_token else None
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", bos_token="<bos>", unk_token=unknown)


TOKENIZERS = {
    "bytes": tiny_tokenizer,
    "bytes-bos": lambda: tiny_tokenizer(bos=True),
    "digits": digits_tokenizer,
    "pieces": pieces_tokenizer,
    "words": lambda: word_tokenizer(vocabulary()),
}


def encoder_of(kind: str) -> Encoder:
    tokenizer = TOKENIZERS[kind]()
    tokenizer.add_special_tokens({"additional_special_tokens": list(LAYOUT.tokens)})
    return Encoder(tokenizer, LAYOUT)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder of the files, and as few problems as there are in a test are worth one."""
    monkeypatch.setenv("RIM_PROBE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tokens_module, "_WORTH_KEEPING", 1)
    return tmp_path / "cache" / "tokens"


def unheard(line: str) -> None:
    pass


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_ids_equal_those_made_one_by_one(kind, monkeypatch):
    monkeypatch.setattr(tokens_module, "_AT_ONCE", 25)  # several calls
    encoder = encoder_of(kind)
    problems = [p for p in PROBLEMS if kind != "words" or p not in ODD[1:]]
    tokens = tokenise(encoder, problems, unheard)
    assert len(tokens) == len(problems)
    checked = 0
    for entry, problem in zip(tokens, problems, strict=True):
        assert [tokens.step_ids(step) for step in entry.steps] == [encoder.step_ids(step) for step in problem.steps]
        assert tokens.answer_ids(entry.answer) == encoder.answer_ids(problem.answer)
        assert tokens.chain_ids(entry) == encoder.chain_ids(problem)
        if not tokens.known[entry.question]:
            continue
        checked += 1
        assert tokens.question_ids(entry.question) == encoder.question_ids(problem.question)
        for row in (cot_row, direct_row, stage1_row):
            assert row(tokens, entry) == row(encoder, problem)
        assert stage1_row(tokens, entry, 4) == stage1_row(encoder, problem, 4)
        assert stage1_row(tokens, entry, 4, label_slots=True) == stage1_row(encoder, problem, 4, label_slots=True)
        assert stage2_row(tokens, entry, 3) == stage2_row(encoder, problem, 3)
    assert checked > 50
    if kind.endswith("bos") or kind == "pieces":
        assert tokens.question_ids(0)[0] == encoder.tokenizer.bos_token_id


def test_what_cannot_be_asked_or_is_not_known_is_marked():
    """And is no error, for one line of a file must not stop a training."""
    encoder = encoder_of("words")
    problems = [
        Problem("What is 3 + 4?", ("<<3+4=7>>",), "7"),
        Problem(" \u200b ", (), "7"),
        Problem("1 + " * 6000, (), "7"),
        Problem("What is zyzzyva?", ("<<3+4=7>>",), "7"),
        Problem("What is 3 + 4?", ("<<3+4=seven>>",), "7"),
        Problem("What is 3 + 4?", ("<<3+4=7>>",), "zyzzyva"),
    ]
    tokens = tokenise(encoder, problems, unheard)
    assert tokens.askable.tolist() == [True, False, False, True, True, True]
    assert tokens.known.tolist() == [True, True, True, False, False, False]

    rare = word_tokenizer([*vocabulary(), "vmv"])  # a control token that is a word to the tokenizer
    layout = MemoryLayout(slot="vmv")
    rare.add_special_tokens({"additional_special_tokens": [layout.begin, layout.end]})
    tokens = tokenise(
        Encoder(rare, layout), [Problem("What is vmv?", (), "7"), Problem("What is 3?", (), "3")], unheard
    )
    assert tokens.askable.tolist() == [False, True]


def test_a_file_is_made_once_and_read_from_then_on(cache, monkeypatch):
    encoder, lines = encoder_of("digits"), []
    made = tokenise(encoder, PROBLEMS, lines.append)
    (file,) = cache.iterdir()
    assert lines == [f"Tokenising {len(PROBLEMS)} problems; the ids are kept in {file}."]
    written = file.read_bytes()
    monkeypatch.setattr(encoder, "batch_ids", lambda texts: pytest.fail("tokenised again"))
    assert same(tokenise(encoder, PROBLEMS, lines.append), made)
    assert len(lines) == 1 and file.read_bytes() == written


@pytest.mark.parametrize("damage", ["cut", "changed", "foreign", "no safetensors", "folder gone"])
def test_a_file_that_cannot_be_trusted_is_made_anew(cache, monkeypatch, damage):
    encoder = encoder_of("digits")
    made = tokenise(encoder, PROBLEMS, unheard)
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    if damage == "cut":
        file.write_bytes(whole[:-100])
    elif damage == "changed":
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    elif damage == "foreign":
        tokenise(encoder, PROBLEMS[:7], unheard)
        (other,) = set(cache.iterdir()) - {file}
        other.replace(file)
    elif damage == "no safetensors":
        file.write_text("nothing")
    else:
        file.unlink()
        cache.rmdir()
    assert same(tokenise(encoder, PROBLEMS, unheard), made)
    assert list(cache.iterdir()) == [file]
    monkeypatch.setattr(encoder, "batch_ids", lambda texts: pytest.fail("tokenised again"))
    assert same(tokenise(encoder, PROBLEMS, unheard), made)


def test_other_tokenizers_and_other_problems_have_files_of_their_own(cache):
    plain = encoder_of("digits")
    more = encoder_of("digits")
    more.tokenizer.add_special_tokens({"additional_special_tokens": ["<more>"]})
    for encoder in (plain, encoder_of("bytes"), more):
        tokenise(encoder, PROBLEMS, unheard)
    for problems in (PROBLEMS[1:], [*PROBLEMS[:-1], Problem("Two\nlines", ("<<a || b>>",), "a word answer")]):
        tokenise(plain, problems, unheard)
    assert len(list(cache.iterdir())) == 5


def same(one: Tokens, other: Tokens) -> bool:
    parts = ("questions", "steps", "answers", "chains", "step_numbers")
    tables = [(getattr(one, part), getattr(other, part)) for part in parts]
    return np.array_equal(one.answer_numbers, other.answer_numbers) and all(
        np.array_equal(a.flat, b.flat) and np.array_equal(a.ends, b.ends) for a, b in tables
    )
