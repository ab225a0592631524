"""From text to token ids: the segments of a row, each tokenised on its own so that their borders are stable.

Knows the tokenizer and the memory layout. Knows nothing about weights, masks or training.
Text typed by a user never becomes control tokens: it is tokenised with every special token switched off.
"""

from rim_probe.errors import CheckpointError, QuestionError, UnknownWordsError
from rim_probe.memory import MemoryLayout
from rim_probe.problems import ANSWER_MARKER, QUESTION_END, STEP_SEPARATOR, Problem

MAX_QUESTION_CHARACTERS = 20_000


class Encoder:
    """Token ids of questions, steps, answers and memory blocks for one tokenizer and one layout.

    Attributes:
        block_ids: one memory block, [M + 2].
        marker_ids: the answer marker `#### `, [>= 1].
        prefix_ids: what the tokenizer itself puts before a text (BOS for Llama and OPT).
        eos_id: the id that ends a readout or an answer.
        control_ids: memory and other special tokens, EOS among them.

    Raises:
        LayoutError: the tokenizer lacks a memory token.
        CheckpointError: the tokenizer has no end-of-sequence token.
    """

    def __init__(self, tokenizer, layout: MemoryLayout):
        self.tokenizer = tokenizer
        self.layout = layout
        self.block_ids = layout.block_ids(tokenizer)
        if tokenizer.eos_token_id is None:
            raise CheckpointError("The tokenizer has no end-of-sequence token; set its eos_token before attaching.")
        self.eos_id = tokenizer.eos_token_id
        self.marker_ids = self.text_ids(ANSWER_MARKER)
        # What the tokenizer appends is not wanted here.
        self.prefix_ids = _ids_before_text(tokenizer)
        special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.control_ids = special | set(tokenizer.all_special_ids) | set(self.block_ids)

    def text_ids(self, text: str) -> list[int]:
        """`text` as ids, no special token added or recognised."""
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def batch_ids(self, texts: list[str]) -> list[list[int]]:
        """`text_ids` of many texts at once; the fast tokenizers use all cores for that."""
        return self.tokenizer(
            texts,
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            return_token_type_ids=False,
        )["input_ids"]

    def question_ids(self, question: str) -> list[int]:
        """The question segment: the tokenizer's own prefix (BOS), the question, a line end.

        Raises:
            QuestionError: see `question_text`; or (rare tokenizers, whose words include their control tokens) the name
                of a control token.
            UnknownWordsError: words outside a closed vocabulary.
        """
        text = question_text(question)
        ids = self.text_ids(text)
        if self.tokenizer.unk_token_id is not None and self.tokenizer.unk_token_id in ids:
            raise UnknownWordsError(self._unknown_words(text.removesuffix(QUESTION_END)))
        if control := self.control_ids.intersection(ids):
            token = self.tokenizer.convert_ids_to_tokens(min(control))
            raise QuestionError(f"The question holds {token}, which steers this model; please leave it out.")
        return self.prefix_ids + ids

    def step_ids(self, step: str) -> list[int]:
        """A readout that states one reasoning step, ended by EOS."""
        return self.text_ids(step) + [self.eos_id]

    def result_ids(self, step: str) -> list[int]:
        """The result of a step, see `result_text`; none where it has none."""
        return self.text_ids(result_text(step))

    def answer_ids(self, answer: str) -> list[int]:
        """A readout that states the answer, ended by EOS."""
        return self.text_ids(answer) + [self.eos_id]

    def chain_ids(self, problem: Problem) -> list[int]:
        """All steps, the answer marker, the answer, EOS: what chain of thought generates."""
        return self.text_ids(chain_text(problem)) + self.marker_ids + self.answer_ids(problem.answer)

    def _unknown_words(self, question: str) -> list[str]:
        encoded = self.tokenizer(
            question, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
        )
        spans = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        words = [question[start:end] for token, (start, end) in spans if token == self.tokenizer.unk_token_id]
        # A control character that Python takes for white space is a word to the tokenizer, and has to be named.
        return list(dict.fromkeys(word.strip() or word for word in words if word))


def question_text(question: str) -> str:
    """The text that stands for a question: without outer white space, and with a line end.

    Raises:
        QuestionError: not a text, empty, or longer than MAX_QUESTION_CHARACTERS.
    """
    if not isinstance(question, str):
        raise QuestionError(f"The question must be text, not {type(question).__name__}.")
    question = question.strip()
    if not any(char.isprintable() and not char.isspace() for char in question):
        raise QuestionError("The question is empty; type a word problem.")
    if len(question) > MAX_QUESTION_CHARACTERS:
        raise QuestionError(
            f"The question has {len(question):,} characters; shorten it to at most {MAX_QUESTION_CHARACTERS:,}."
        )
    # Lone surrogates (a broken emoji pasted from elsewhere) cannot be encoded as UTF-8.
    return question.encode("utf-8", "replace").decode("utf-8") + QUESTION_END


def result_text(step: str) -> str:
    """What stands right of a step's last equals sign, delimiters aside; empty where it has none."""
    return step.rstrip(" >").rpartition("=")[2].strip() if "=" in step else ""


def chain_text(problem: Problem) -> str:
    """All steps of a problem as chain of thought writes them, up to the answer marker."""
    return "".join(step + STEP_SEPARATOR for step in problem.steps)


def has_closed_vocabulary(tokenizer) -> bool:
    """Whether the tokenizer is a list of words, so that a word it lacks cannot be asked at all."""
    return tokenizer.is_fast and type(tokenizer.backend_tokenizer.model).__name__ == "WordLevel"


def _ids_before_text(tokenizer) -> list[int]:
    """The special ids the tokenizer prepends to any text, found by encoding one and looking."""
    probe = "1"
    bare = tokenizer(probe, add_special_tokens=False)["input_ids"]
    full = tokenizer(probe)["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start]
    return []
