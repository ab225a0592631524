"""May this checkpoint be probed? Every assumption that probes make, checked on the model itself, each in one sentence.

Method:
1. What stands in files and configuration is told: memory tokens, layout, dtype, heads, context.
2. What probes rely on is tried out anew (`door`, `hooks`, `patching`): that packed readouts equal separate passes
   (arXiv:2605.30343), that the logit lens of the last layer is the model's own output, that hooks read the residual
   stream transformers tells of, that attention rows sum to 1, that own states written back change nothing.

Knows what probes assume. Knows nothing of what they find, nor whether the model answers well.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property

import torch

from rim_probe.door import LENS
from rim_probe.errors import QuestionError, RiMError
from rim_probe.model import RiM
from rim_probe.probing.hooks import ATTENTION, RESIDUAL, causal_lm, num_layers, require_residual, tells_attention
from rim_probe.probing.patching import INTERVENING, Patcher

_QUESTIONS = ("Anna has 3 apples and buys 14 more. How many apples has she?", "How many is 3 + 4?")


@dataclass(frozen=True)
class Check:
    """One thing looked at. `ok` is None where there is nothing to be right or wrong about: a fact worth knowing."""

    name: str
    ok: bool | None
    sentence: str


@dataclass(frozen=True)
class Verdict:
    """All checks of one model; `ok` where none of them failed."""

    lines: list[Check]

    @property
    def ok(self) -> bool:
        return all(check.ok is not False for check in self.lines)

    def __str__(self) -> str:
        width = max(len(check.name) for check in self.lines)
        marks = {True: "ok", False: "FAILS", None: "note"}
        return "\n".join(f"{marks[check.ok]:5}  {check.name:{width}}  {check.sentence}" for check in self.lines)


@torch.no_grad()
def verdict(rim: RiM) -> Verdict:
    """Checks a model before it is probed; whatever is wrong with it comes back as a sentence, never as an error."""
    trial = _Trial(rim)
    return Verdict([Check(name, *_outcome(check, trial)) for name, check in _CHECKS.items()])


def _outcome(check: Callable, trial: "_Trial") -> tuple[bool | None, str]:
    try:
        return check(trial)
    except RiMError as error:
        return False, str(error)
    except Exception as error:  # a foreign model can fail in any way, and its user needs a sentence
        reason = (str(error).strip().splitlines() or [""])[0][:150].rstrip(" .:")
        return False, f"This cannot be checked on {type(causal_lm(trial.rim)).__name__} ({reason})."


class _Trial:
    """A model and what the trials of it need."""

    def __init__(self, rim: RiM):
        self.rim = rim
        self.config = causal_lm(rim).config
        if rim.model.training:
            rim.model.eval()

    @cached_property
    def refusal(self) -> str | None:
        """Why the model cannot be used with memory blocks; None where it can."""
        try:
            self.rim.examine(anew=True)
        except RiMError as error:
            return str(error)
        return None

    @cached_property
    def questions(self) -> list[str]:
        words = [self.rim.decode([id]).strip() for id in _readable_ids(self.rim, 8)]
        # A closed vocabulary is asked in its own words.
        for questions in (list(_QUESTIONS), [" ".join(words), " ".join(words[:3])], words[:1]):
            try:
                for question in questions:
                    self.rim.prompt_ids(question, "memory")
            except QuestionError:
                continue
            if questions:
                return questions
        raise QuestionError("The model reads none of the questions tried; look at its vocabulary and its context.")


def _readable_ids(rim: RiM, count: int) -> list[int]:
    """The first ids that stand for a text which can be asked."""
    found: list[int] = []
    for id in range(rim.model.get_input_embeddings().weight.shape[0]):
        try:
            if id not in rim.encoder.control_ids and rim.encode_question(rim.decode([id])):
                found.append(id)
        except QuestionError:
            continue
        if len(found) == count:
            break
    return found


# ---------------------------------------------------------------------------------------------- what files tell


def _memory_tokens(trial: _Trial) -> tuple[bool | None, str]:
    rim, layout = trial.rim, trial.rim.layout
    names, ids = ", ".join(layout.tokens), ", ".join(map(str, rim.memory_ids))
    if len(set(rim.memory_ids)) < 3:
        return False, f"{names} have the ids {ids}, which have to be three different ones; restore the tokenizer."
    if rim.tokenizer(layout.block_text, add_special_tokens=False)["input_ids"] != rim.encoder.block_ids:
        return False, (
            f"{names} have the ids {ids}, but the tokenizer splits them up in a text, so no other program would see "
            "the blocks; add them as special tokens."
        )
    return True, f"{names} are single tokens with the ids {ids}."


def _layout(trial: _Trial) -> tuple[bool | None, str]:
    layout = trial.rim.layout
    if not layout.num_blocks:
        return None, "The layout has no memory block; choose how many there are to be with --num-blocks."
    return True, (
        f"K = {layout.num_blocks} blocks of M = {layout.slots_per_block} slots: "
        f"{layout.num_blocks * layout.block_length} tokens follow a question."
    )


def _memory_rows(trial: _Trial) -> tuple[bool | None, str]:
    """Where `RiM.attach` puts new rows is known (a fixed seed), and where rows end up that never occur in a text."""
    rim = trial.rim
    weight = rim.model.get_input_embeddings().weight.detach().float()
    ids = sorted(rim.memory_ids)
    names = [rim.tokenizer.convert_ids_to_tokens(id) for id in ids]
    others = torch.ones(len(weight), dtype=torch.bool, device=weight.device)
    others[ids] = False
    std, mean = torch.std_mean(weight[others], dim=0)
    noise = torch.randn(len(ids), weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight.device)
    noise *= 0.1 * std
    moved = (weight[ids] - mean - noise).norm(dim=1) / noise.norm(dim=1)
    distances = ", ".join(f"{name} {distance:.1f}" for name, distance in zip(names, moved.tolist(), strict=True))
    if (weight[ids] == weight[ids[0]]).all():
        return (
            False,
            f"The embedding rows of {', '.join(names)} are all equal, so blocks cannot be told from their ends.",
        )
    if initial := [name for name, distance in zip(names, moved.tolist(), strict=True) if distance < 0.5]:
        return None, (
            f"The embedding rows of {', '.join(initial)} stand where RiM.attach puts them: untrained, so that what "
            "probes find is a baseline."
        )
    alike = torch.nn.functional.normalize(weight - mean, dim=1)
    nearest = (alike[ids] @ alike.T)[:, others].argmax(1)
    nearest = torch.arange(len(weight), device=weight.device)[others][nearest].tolist()
    unused = set(rim.banned_ids) - {rim.tokenizer.bos_token_id}
    if all(id in unused for id in nearest):
        token = rim.tokenizer.convert_ids_to_tokens(nearest[0]) or f"unused row {nearest[0]}"
        return None, (
            f"The embedding rows of {', '.join(names)} lie nearest to {token}, which never occurs in a text: they look "
            "untrained, so that what probes find is a baseline."
        )
    return True, f"Trained: they stand away from where RiM.attach puts them ({distances} times its noise)."


def _weights(trial: _Trial) -> tuple[bool | None, str]:
    rim = trial.rim
    count = f"{sum(parameter.numel() for parameter in causal_lm(rim).parameters()):,} parameters"
    config = rim.adapter
    if config is None:
        return True, f"Full weights, {count}."
    kind = getattr(config.peft_type, "value", config.peft_type)
    rank = f" of rank {config.r}" if getattr(config, "r", 0) else ""
    return True, f"A {kind} adapter{rank} on {config.base_model_name_or_path or 'an unnamed base'}, {count} in all."


def _dtype(trial: _Trial) -> tuple[bool | None, str]:
    name = str(trial.rim.dtype).removeprefix("torch.")
    coarse = (
        ""
        if trial.rim.dtype in (torch.float32, torch.float64)
        else "; scores are computed in float32 from states of three digits"
    )
    return True, f"{name} on {trial.rim.device}{coarse}."


def _back_end(trial: _Trial) -> tuple[bool | None, str]:
    name = trial.config._attn_implementation
    if name not in ("sdpa", "eager"):
        return False, f"{name} drops the masks of readouts and tells no weights; load the model with attention='sdpa'."
    slow = "" if name == "sdpa" else " (sdpa would be faster and is observed as well)"
    return True, f"{name}{slow}."


def _architecture(trial: _Trial) -> tuple[bool | None, str]:
    name = type(causal_lm(trial.rim)).__name__
    return True, f"{name}: {num_layers(trial.rim)} decoder layers found, residual stream of {trial.config.hidden_size}."


def _heads(trial: _Trial) -> tuple[bool | None, str]:
    heads = trial.config.num_attention_heads
    shared = getattr(trial.config, "num_key_value_heads", None) or heads
    if shared == heads:
        return True, f"{heads} attention heads, each with keys and values of its own."
    return True, f"{heads} attention heads share {shared} of keys and values (GQA); weights are told for all {heads}."


def _head(trial: _Trial) -> tuple[bool | None, str]:
    if trial.config.tie_word_embeddings:
        return True, "Tied to the embeddings: training a memory token's row changes what is written as well as read."
    return True, "A matrix of its own, not tied to the embeddings."


def _context(trial: _Trial) -> tuple[bool | None, str]:
    rim, layout = trial.rim, trial.rim.layout
    room = rim.max_length - layout.num_blocks * layout.block_length - 2
    if room < 1:
        return False, f"{rim.max_length} tokens leave no room for a question; choose fewer memory blocks."
    return True, f"{rim.max_length:,} tokens, of which a question may take {room:,}."


# ---------------------------------------------------------------------------------------------- what a trial tells


def _readouts(trial: _Trial) -> tuple[bool | None, str]:
    if trial.refusal is not None:
        return False, trial.refusal
    return True, "Masks are followed; packed into one row, or decoded with a cache, they equal separate passes."


def _feature(feature: str, sentence: str, look: Callable[[_Trial], object]) -> Callable:
    def check(trial: _Trial) -> tuple[bool | None, str]:
        if trial.refusal is not None:
            return None, "Not tried, for the readouts fail."
        look(trial)
        reason = trial.rim.verdict.features.get(feature)
        return (
            (True, sentence) if reason is None else (False, f"{feature[0].upper()}{feature[1:]} is off, for {reason}.")
        )

    return check


def _patch(trial: _Trial) -> None:
    with suppress(RiMError):
        Patcher(trial.rim, trial.questions[0], num_blocks=trial.rim.layout.num_blocks or 1)


def _read(trial: _Trial) -> None:
    with suppress(RiMError):
        require_residual(trial.rim)


_CHECKS: dict[str, Callable[[_Trial], tuple[bool | None, str]]] = {
    "memory tokens": _memory_tokens,
    "memory layout": _layout,
    "memory embeddings": _memory_rows,
    "weights": _weights,
    "numbers": _dtype,
    "attention back end": _back_end,
    "architecture": _architecture,
    "attention heads": _heads,
    "output head": _head,
    "context": _context,
    "readouts": _readouts,
    "logit lens": _feature(
        LENS, "Final norm and head on the last layer give the model's own logits.", lambda trial: None
    ),
    "residual stream": _feature(RESIDUAL, "Hooks read what transformers tells at every layer.", _read),
    "attention weights": _feature(
        ATTENTION, "Every layer tells its weights, whose rows sum to 1.", lambda trial: tells_attention(trial.rim)
    ),
    "interventions": _feature(INTERVENING, "Its own states written back change nothing.", _patch),
}
