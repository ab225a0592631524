"""Questions of any characters: none becomes a control token, none gives a traceback."""

import traceback

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from rim_probe.answers import is_correct
from rim_probe.datasets.arithmetic import World, generate, vocabulary
from rim_probe.decoding import answer
from rim_probe.errors import RiMError
from rim_probe.memory import MemoryLayout
from rim_probe.model import METHODS, RiM
from rim_probe.trained_on import TrainedOn
from rim_probe.training.scratch import small_llama, word_tokenizer

from . import Count

ODD = [
    "\u200b",
    "\u202e",
    "\ufeff",
    "\u2028",
    "\x00",
    "\x1b[31m",
    "\ud800",
    "e\u0301",
    "👩‍👩‍👧",
    "１２",
    "½",
    "٣",
    "﷽",
    "a" * 500,
]
FORMS = ["<<3+4=7>>", "####", "#### 7", "||", "\n", "\r", "<s>", "</s>", "<|endoftext|>", "[INST]", "{}", "%s", "'\"`"]


def attempt(count: int, number: int) -> Count:
    """Asks `count` questions of small random models with an open vocabulary, one with BOS, and a closed one."""
    from conftest import tiny_rim

    tokenizer = word_tokenizer(vocabulary())
    small = small_llama(tokenizer, layers=1, width=16, heads=2, inner=32, context=512, seed=0)
    rims = [tiny_rim(num_blocks=2), tiny_rim("gpt2", num_blocks=2, bos=True)]
    rims.append(RiM.attach(small, tokenizer, MemoryLayout(num_blocks=2)))
    known = [problem for problem in generate(World(bare=0.3), "test", 200)]
    rims[2].trained_on = TrainedOn.of(known, closed=True)
    tokens = sorted(
        {token for rim in rims for token in rim.tokenizer.convert_ids_to_tokens(list(rim.encoder.control_ids))}
    )
    words = st.sampled_from([*tokens, *ODD, *FORMS, "Ann", "has", "3", "apples", "1,234", "-2.5", " ", "?"])
    question = st.one_of(
        st.text(max_size=200),
        st.lists(words, max_size=30).map("".join),
        st.lists(words, max_size=30).map(" ".join),
        st.tuples(st.sampled_from(known), words, st.integers(0, 40)).map(
            lambda drawn: drawn[0].question[: drawn[2]] + drawn[1] + drawn[0].question[drawn[2] :]
        ),
    )
    found = Count()

    @seed(number)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(question, st.sampled_from(METHODS), st.sampled_from(rims))
    def ask(text: str, method: str, rim: RiM) -> None:
        if found.tried >= count:  # some are drawn to be thrown away
            return
        try:
            ids = rim.encode_question(text)[len(rim.encoder.prefix_ids) :]
            given = answer(rim, text, method, max_new_tokens=3)
            said = [*given.token_ids, *(id for readout in given.readouts for id in readout.token_ids)]
            control = rim.encoder.control_ids.intersection(ids) | (rim.encoder.control_ids - {rim.eos_id}).intersection(
                said
            )
            is_correct(given.value, text)
            if rim.trained_on is not None:
                rim.trained_on.outside(text)
            found.note("answered", f"{text!r} gave {control}" if control else None)
        except RiMError as error:
            found.note("refused", f"{text!r}: {error}" if "\n" in str(error) or not str(error) else None)
        except Exception:
            found.note("traceback", f"{text!r}: {traceback.format_exc()[-400:]}")

    ask()
    return found
