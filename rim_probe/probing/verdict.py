"""May this checkpoint be probed? Every assumption that probes make, checked on the model itself, each in one sentence.

Method:
1. What stands in files and configuration is told: memory tokens, layout, dtype, heads, context.
2. What probes rely on is tried out on two short questions: that hooks read the residual stream transformers tells of,
   that the logit lens of the last layer is the model's own output, that packed readouts equal separate passes
   (arXiv:2605.30343), that captured attention rows sum to 1.

Knows what probes assume. Knows nothing of what they find, nor whether the model answers well.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

from rim_probe.errors import QuestionError, RiMError
from rim_probe.model import RiM
from rim_probe.packing import pack_memory, pad_rows, row_mask
from rim_probe.probing.capture import Capture, capture
from rim_probe.probing.hooks import causal_lm, num_layers, read_residual, unembed

_QUESTIONS = ("Anna has 3 apples and buys 14 more. How many apples has she?", "How many is 3 + 4?")
_ANYTHING_SCALED = ("final_logit_softcapping", "logits_scaling", "logit_scale", "lm_head_multiplier")
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}  # in standard deviations of the logits
_COARSE_TOLERANCE = 0.1  # bfloat16 keeps three digits, and many layers add up what they lose


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
    """Two questions of different length, put to the model once for all checks."""

    def __init__(self, rim: RiM):
        self.rim = rim
        self.config = causal_lm(rim).config
        self.tolerance = _TOLERANCE.get(rim.dtype, _COARSE_TOLERANCE)
        if rim.model.training:
            rim.model.eval()

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

    @cached_property
    def prompt(self) -> torch.Tensor:
        """Ids of the first question with its blocks, [1, T]."""
        return torch.tensor([self.rim.prompt_ids(self.questions[0], "memory")], device=self.rim.device)

    @cached_property
    def capture(self) -> Capture:
        return capture(self.rim, self.questions)

    def difference(self, found: torch.Tensor, expected: torch.Tensor) -> float:
        """The largest difference of logits in standard deviations of those expected; infinite for NaN."""
        found, expected = found.float(), expected.float()
        largest = ((found - expected).abs().max() / expected.std()).item()
        return largest if largest == largest else float("inf")


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
    coarse = "" if trial.rim.dtype in _TOLERANCE else "; scores are computed in float32 from states of three digits"
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


def _residual(trial: _Trial) -> tuple[bool | None, str]:
    states: dict[int, torch.Tensor] = {}
    layers = num_layers(trial.rim)
    with read_residual(trial.rim, range(layers + 1), states.__setitem__):
        told = trial.rim.model(input_ids=trial.prompt, output_hidden_states=True, use_cache=False).hidden_states
    wrong = [layer for layer in range(layers) if not torch.equal(states[layer], told[layer])]
    if wrong or not all(state.isfinite().all() for state in states.values()):
        what = f"differ from what transformers tells from layer {wrong[0]} on" if wrong else "hold NaN or infinity"
        return False, f"The residual states that hooks read {what}, so that no probe of them can be trusted."
    return True, f"Hooks read what transformers tells, layers 0 to {layers - 1}, and layer {layers} before the norm."


def _lens(trial: _Trial) -> tuple[bool | None, str]:
    last = num_layers(trial.rim)
    states: dict[int, torch.Tensor] = {}
    with read_residual(trial.rim, (last,), states.__setitem__):
        own = trial.rim.model(input_ids=trial.prompt, use_cache=False).logits
    difference = trial.difference(unembed(trial.rim, states[last]), own)
    if difference <= trial.tolerance:
        return (
            True,
            f"Final norm and head on layer {last} give the model's own logits (within {difference:.1g} deviations).",
        )
    changed = [key for key in _ANYTHING_SCALED if getattr(trial.config, key, None) not in (None, 1, 1.0)]
    cause = f", for the model changes its logits afterwards ({', '.join(changed)})" if changed else ""
    return False, (
        f"Final norm and head on layer {last} miss the model's own logits by up to {difference:.2g} standard "
        f"deviations{cause}; read probabilities of the logit lens with that in mind."
    )


def _readouts(trial: _Trial) -> tuple[bool | None, str]:
    rim = trial.rim
    question, block = rim.encode_question(trial.questions[0]), rim.encoder.block_ids
    blocks = min(rim.layout.num_blocks or 1, 3)
    # Any tokens will do, different ones for each readout, so that one which sees another gives itself away.
    readouts = [[*(question * 2)[k : k + 2], rim.eos_id] for k in range(blocks)]
    row = pack_memory(question, block, readouts)
    batch = {name: tensor.to(rim.device) for name, tensor in pad_rows([row], rim.eos_id).items()}
    packed = rim.model(
        input_ids=batch["input_ids"],
        position_ids=batch["position_ids"],
        attention_mask=row_mask(batch["readouts"], rim.dtype),
        use_cache=False,
    ).logits[0]
    difference = 0.0
    for k, readout in enumerate(readouts, start=1):
        ids = torch.tensor([question + block * k + readout[:-1]], device=rim.device)
        alone = rim.model(input_ids=ids, use_cache=False).logits[0, -len(readout) :]
        places = [place for place, label in enumerate(row.label_readouts) if label == k]
        difference = max(difference, trial.difference(packed[places], alone))
    if difference <= trial.tolerance:
        return True, f"Packed into one row they equal separate passes (within {difference:.1g} deviations)."
    return False, (
        f"Packed into one row they miss separate passes by up to {difference:.2g} standard deviations; the model does "
        "not follow the masks or positions it is given, so that its readouts see each other."
    )


def _attention(trial: _Trial) -> tuple[bool | None, str]:
    held = trial.capture
    if held.to_question is None:
        return None, "Without memory blocks there are no rows to look at."
    sums = held.to_question.float().sum(-1) + held.to_memory.float().sum(-1)
    difference = (sums - 1).abs().max().item()
    if difference <= max(trial.tolerance, 1e-3):
        return True, f"Rows captured at memory positions sum to 1 (within {difference:.1g})."
    return False, f"Rows captured at memory positions miss a sum of 1 by up to {difference:.2g}."


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
    "residual stream": _residual,
    "logit lens": _lens,
    "readouts": _readouts,
    "attention weights": _attention,
}
