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
        # What the tokenizer itself puts before a text (BOS for Llama and OPT); what it appends is not wanted here.
        self._prefix_ids = _ids_before_text(tokenizer)
        special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.control_ids = special | set(tokenizer.all_special_ids) | set(self.block_ids)

    def text_ids(self, text: str) -> list[int]:
        """`text` as ids, no special token added or recognised."""
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def question_ids(self, question: str) -> list[int]:
        """The question segment: the tokenizer's own prefix (BOS), the question, a line end.

        Raises:
            QuestionError: not a text, empty, longer than MAX_QUESTION_CHARACTERS, or (rare tokenizers, whose words
                include their control tokens) the name of a control token.
            UnknownWordsError: words outside a closed vocabulary.
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
        question = question.encode("utf-8", "replace").decode("utf-8")
        ids = self.text_ids(question + QUESTION_END)
        if self.tokenizer.unk_token_id is not None and self.tokenizer.unk_token_id in ids:
            raise UnknownWordsError(self._unknown_words(question))
        if control := self.control_ids.intersection(ids):
            token = self.tokenizer.convert_ids_to_tokens(min(control))
            raise QuestionError(f"The question holds {token}, which steers this model; please leave it out.")
        return self._prefix_ids + ids

    def step_ids(self, step: str) -> list[int]:
        """A readout that states one reasoning step, ended by EOS."""
        return self.text_ids(step) + [self.eos_id]

    def answer_ids(self, answer: str) -> list[int]:
        """A readout that states the answer, ended by EOS."""
        return self.text_ids(answer) + [self.eos_id]

    def chain_ids(self, problem: Problem) -> list[int]:
        """All steps, the answer marker, the answer, EOS: what chain of thought generates."""
        steps = "".join(step + STEP_SEPARATOR for step in problem.steps)
        return self.text_ids(steps) + self.marker_ids + self.answer_ids(problem.answer)

    def _unknown_words(self, question: str) -> list[str]:
        encoded = self.tokenizer(
            question, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
        )
        spans = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        words = [question[start:end] for token, (start, end) in spans if token == self.tokenizer.unk_token_id]
        # A control character that Python takes for white space is a word to the tokenizer, and has to be named.
        return list(dict.fromkeys(word.strip() or word for word in words if word))


def _ids_before_text(tokenizer) -> list[int]:
    """The special ids the tokenizer prepends to any text, found by encoding one and looking."""
    probe = "1"
    bare = tokenizer(probe, add_special_tokens=False)["input_ids"]
    full = tokenizer(probe)["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start]
    return []
