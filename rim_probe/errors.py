"""Errors a user can cause. The message of every one is a sentence that says what is wrong and what to do."""


class RiMError(ValueError):
    """Base of all errors shown to users as a plain sentence."""


class LayoutError(RiMError):
    """A memory layout with impossible values, unknown keys, or one that does not match its tokenizer."""


class ProblemError(RiMError):
    """A problem line that does not parse."""


class QuestionError(RiMError):
    """A question that cannot be asked: empty, too long for the model's context, or not text."""


class UnknownWordsError(QuestionError):
    """A question with words outside a closed vocabulary; `words` lists them in order of appearance."""

    def __init__(self, words: list[str]):
        self.words = words
        shown = ", ".join(f"“{_legible(word)}”" for word in words[:8]) + (" …" if len(words) > 8 else "")
        super().__init__(f"This small model has never seen {shown}; please use other words.")

    def __reduce__(self) -> tuple:  # pickling calls the class with its arguments, and those are not the message
        return type(self), (self.words,)


def _legible(word: str) -> str:
    """A word as a sentence can show it: invisible characters by their number, long words cut."""
    shown = "".join(char if char.isprintable() else f"U+{ord(char):04X}" for char in word[:30])
    return shown + ("…" if len(word) > 30 else "")


class CheckpointError(RiMError):
    """Weights, tokenizer or metadata that are missing, damaged or do not fit together."""


class RecipeError(RiMError):
    """A training recipe or a command-line value that makes no sense."""


class ArtifactError(RiMError):
    """Stored probes that are missing, damaged, or belong to another checkpoint or memory layout."""
