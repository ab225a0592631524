"""The check at the door: whether a model does with masks, positions and a cache what memory blocks need.

Method, on one short row `x m_1 R_1 m_2 R_2` of ordinary tokens (see `packing`), in the model's own precision:
1. Beside it the same row with other tokens in R_1. Nothing but R_1 may see them, so no other logit may move: layers
   that ignore a mask (linear attention, convolutions, recurrences, back ends that drop it) give themselves away.
2. Its logits are those of the passes over `x m_1 R_1` and `x m_1 m_2 R_2` without a mask (arXiv:2605.30343).
3. So are those of the first tokens of R_1 and R_2 fed together into the cache of `x m_1 m_2`, as `greedy` does.
4. The final norm and the head on the last layer's states are the model's own logits, or the logit lens is off.
Logits are compared at each position by the root mean square of their differences, in standard deviations of the row's.
What fails in 1 to 3 is refused. What passed is remembered by architecture, precision, device, versions and a sample of
the weights in `cache_folder()/verdicts`, so that it is tried once.

Knows models, ids and rows. Knows nothing of questions, hooks or probes, which add what they find to the `Verdict`.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from transformers import DynamicCache

from rim_probe.anatomy import before_head, causal_lm, decoder_layers
from rim_probe.bases import cache_folder
from rim_probe.encoding import Encoder
from rim_probe.errors import CheckpointError, LayoutError, RiMError
from rim_probe.files import write_atomic
from rim_probe.loading import first_line
from rim_probe.packing import additive_mask, pack_memory, pad_rows, row_mask

MASKED_ATTENTION = ("sdpa", "eager")  # the back ends that take a dense mask
LENS = "the logit lens"
MEMORY = "asking it through memory blocks"
_VERSION = 1  # of what is tried
_SAMPLE = 4096  # values of each parameter
_ATTENTION_LAYERS = {"full_attention", "sliding_attention", "attention"}
_SCALES = ("final_logit_softcapping", "logits_scaling", "logit_scale", "lm_head_multiplier")
_FAILS = "trying it fails"
_ROW = 3 + 2 * 4 + 2  # positions that the check needs


@dataclass
class Verdict:
    """What a model can be used for.

    Attributes:
        name: of the model.
        features: what was tried: None where it works, else the reason why it is switched off.
        file: where that is remembered; None for nowhere.
    """

    name: str
    features: dict[str, str | None] = field(default_factory=dict)
    file: Path | None = None

    @property
    def off(self) -> dict[str, str]:
        """The features that are switched off, each with the reason."""
        return {feature: reason for feature, reason in self.features.items() if reason is not None}

    def works(self, feature: str, trial: Callable[[], str | None]) -> bool:
        """Whether a feature works; the first time that is tried.

        Args:
            trial: gives the reason why it does not work, or None. Any error counts as one, except want of memory.
        """
        if feature not in self.features:
            self.features[feature] = None  # a trial uses what it tries
            try:
                self.features[feature] = _reason(trial)
            except BaseException:  # stopped: it has not been tried
                del self.features[feature]
                raise
            self._remember()
        return self.features[feature] is None

    def require(self, feature: str, trial: Callable[[], str | None] = lambda: None) -> None:
        """Refuses a feature that is switched off.

        Raises:
            RiMError: with the reason.
        """
        if not self.works(feature, trial):
            raise RiMError(f"{self.name}: {feature} cannot be used here, for {self.features[feature]}.")

    def _remember(self) -> None:
        if self.file is None:
            return
        with suppress(OSError):  # a cache that cannot be written costs time, no more
            self.file.parent.mkdir(parents=True, exist_ok=True)
            sure = {name: reason for name, reason in self.features.items() if not (reason or "").startswith(_FAILS)}
            write_atomic(self.file, json.dumps(sure).encode())  # what broke a trial may not break the next

    def __str__(self) -> str:
        told = [] if MEMORY in self.off else ["masks are followed, packed and cached readouts equal separate passes"]
        told += [f"{feature} is off, for {reason}" for feature, reason in self.off.items()]
        return f"{self.name}: {'; '.join(told)}."


def examine(model: torch.nn.Module, encoder: Encoder, max_length: int, name: str, anew: bool = False) -> Verdict:
    """Checks a model where it is and as it is; see the head of this module.

    Args:
        anew: try it whatever is remembered.

    Raises:
        LayoutError: memory tokens that share an id, with each other or with another token.
        CheckpointError: a model that memory blocks cannot be used with, with the reason.
    """
    _check_ids(encoder, name)
    inner = causal_lm(model)
    back_end = getattr(inner.config, "_attn_implementation", None)
    if back_end not in MASKED_ATTENTION:
        return Verdict(name, {MEMORY: f"the attention back end {back_end} takes no mask; use attention='sdpa'"})
    if "local" in (getattr(inner.config, "attention_layers", None) or ()):  # too wide a window to show on a short row
        raise CheckpointError(
            f"{name}: {type(inner).__name__} cannot be used with memory blocks: its local attention counts the tokens "
            "of a row, of which not all stand before one another."
        )
    if max_length < _ROW:
        raise CheckpointError(f"{name}: a context of {max_length} tokens holds no question and memory blocks.")
    file = cache_folder() / "verdicts" / f"{_key(model, encoder)}.json"
    verdict = Verdict(name, {} if anew else _remembered(file), file)
    if not verdict.features:
        training = model.training
        model.eval()
        try:
            verdict.features = _try(model, encoder)
        except torch.OutOfMemoryError:
            raise
        except CheckpointError as error:
            raise CheckpointError(
                f"{name}: {type(inner).__name__} cannot be used with memory blocks: {error}"
            ) from None
        except Exception as error:  # a foreign model can fail in any way, and its user needs a sentence
            raise CheckpointError(
                f"{name}: {type(inner).__name__} cannot be used with memory blocks, for a pass over them fails "
                f"({first_line(error)})."
            ) from error
        finally:
            model.train(training)
        verdict._remember()
    return verdict


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest, over positions, root mean square of differences of logits [..., V], in standard deviations."""
    found, expected = found.float(), expected.float()
    largest = (found - expected).pow(2).mean(-1).sqrt().max() / expected.std().clamp(min=1e-30)
    return largest.item() if largest.isfinite() else float("inf")


def tolerance(dtype: torch.dtype) -> float:
    """The `difference` that rounding explains: bfloat16 keeps three digits, and many layers add up what they lose."""
    return 1e-3 if dtype in (torch.float32, torch.float64) else 0.2


@torch.no_grad()
def _try(model: torch.nn.Module, encoder: Encoder) -> dict[str, str | None]:
    """The features found; CheckpointError with the reason alone where the model has to be refused."""
    ids, device, dtype = _ordinary_ids(encoder, 9), model.device, model.dtype
    question, first, second, other = ids[:3], ids[3:5], ids[5:7], ids[7:9]
    block = encoder.block_ids[:2] + encoder.block_ids[-2:]  # two slots are as good as many
    if len(encoder.block_ids) == 3:
        block = encoder.block_ids
    rows = [
        pack_memory(question, block, [said + [encoder.eos_id], second + [encoder.eos_id]]) for said in (first, other)
    ]
    batch = {name: tensor.to(device) for name, tensor in pad_rows(rows, encoder.eos_id).items()}
    readouts, start = batch["readouts"][0], len(question)

    packed = model(
        input_ids=batch["input_ids"],
        position_ids=batch["position_ids"],
        attention_mask=row_mask(batch["readouts"], dtype),
        use_cache=False,
    ).logits
    if not packed.isfinite().all():
        raise CheckpointError("its logits are not finite; the weights are damaged, or were trained to nothing.")
    moved = difference(packed[1][readouts != 1], packed[0][readouts != 1])
    if moved > tolerance(dtype) / 4:  # the same shapes are computed in the same way
        raise CheckpointError(
            f"tokens that are masked move the logits by {moved:.2g} standard deviations{_kinds(model)}, so that "
            "readouts would see each other."
        )

    alone = [question + block + first, question + block * 2 + second]
    longest = max(map(len, alone))
    padded = torch.tensor([row + [encoder.eos_id] * (longest - len(row)) for row in alone], device=device)
    plain, states = _pass_with_states(model, padded)
    after_first = torch.arange(len(readouts), device=device) < start + len(block) + len(first)
    parts = packed[0][after_first], packed[0][readouts != 1]
    missed = max(difference(part, plain[k, : len(part)]) for k, part in enumerate(parts))
    if missed > tolerance(dtype):
        raise CheckpointError(
            f"packed into one row its readouts miss separate passes by {missed:.2g} standard deviations: it does not "
            f"follow the positions or masks it is given{_kinds(model)}."
        )

    ends = [start + len(block), start + 2 * len(block)]
    cache = DynamicCache()
    positions = torch.arange(ends[1], device=device)[None]
    model(input_ids=padded[1:, : ends[1]], position_ids=positions, past_key_values=cache, use_cache=True)
    sees = torch.cat([positions < torch.tensor([ends], device=device).mT, torch.eye(2, device=device).bool()], dim=1)
    step = model(
        input_ids=torch.tensor([[first[0], second[0]]], device=device),
        position_ids=torch.tensor([ends], device=device),
        attention_mask=additive_mask(sees[None], dtype),
        past_key_values=cache,
        use_cache=True,
    ).logits[0]
    missed = difference(step, torch.stack([plain[k, end] for k, end in enumerate(ends)]))
    if missed > tolerance(dtype):
        raise CheckpointError(
            f"decoded with a cache its readouts miss plain passes by {missed:.2g} standard deviations."
        )
    return {LENS: _reason(lambda: _lens(model, plain, states))}


def _pass_with_states(model: torch.nn.Module, ids: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits of a plain pass and, where the family has a list of layers, the states after the last one."""
    states: list[torch.Tensor] = []

    def read(module, args, output):
        states.append(output[0] if isinstance(output, tuple) else output)

    with ExitStack() as hooks:
        with suppress(CheckpointError):
            hooks.callback(decoder_layers(model)[-1].register_forward_hook(read).remove)
        return model(input_ids=ids, use_cache=False).logits, states


def _lens(model: torch.nn.Module, logits: torch.Tensor, states: Sequence[torch.Tensor]) -> str | None:
    if not states:
        return "no list of its decoder layers was found"
    missed = difference(causal_lm(model).get_output_embeddings()(before_head(model)(states[0])), logits)
    if missed <= tolerance(model.dtype) / 20:  # the same states in the same shape
        return None
    scales = [key for key in _SCALES if getattr(causal_lm(model).config, key, None) not in (None, 1, 1.0)]
    cause = f" (the model changes its logits afterwards: {', '.join(scales)})" if scales else ""
    return f"norm and head on the last layer miss the model's logits by {missed:.2g} standard deviations{cause}"


def _kinds(model: torch.nn.Module) -> str:
    """The kinds of its layers that are not attention, as a configuration tells them."""
    kinds = set(getattr(causal_lm(model).config, "layer_types", None) or ()) - _ATTENTION_LAYERS
    return f" (its layers are of the kinds {', '.join(sorted(kinds))})" if kinds else ""


def _reason(trial: Callable[[], str | None]) -> str | None:
    try:
        return trial()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return f"{_FAILS} ({first_line(error)})"


def _check_ids(encoder: Encoder, name: str) -> None:
    ids = {encoder.block_ids[0], encoder.block_ids[1], encoder.block_ids[-1]}
    owners = sorted(token for token, id in encoder.tokenizer.get_vocab().items() if id in ids)
    if len(ids) < 3 or len(owners) != 3:
        raise LayoutError(
            f"{name}: the memory tokens {', '.join(encoder.layout.tokens)} must have ids that no other token has, but "
            f"the ids {', '.join(map(str, sorted(ids)))} belong to {', '.join(owners)}; mend the tokenizer."
        )


def _ordinary_ids(encoder: Encoder, count: int) -> list[int]:
    """Ids of ordinary tokens from all over the vocabulary, for a small vocabulary some of them twice."""
    ids = sorted(set(encoder.tokenizer.get_vocab().values()) - encoder.control_ids)
    return [ids[(2 * i + 1) * len(ids) // (2 * count)] for i in range(count)]


def _key(model: torch.nn.Module, encoder: Encoder) -> str:
    """What a verdict depends on, as a digest; of the weights a sample, for the whole takes longer than the check."""
    config = causal_lm(model).config
    told = {key: value for key, value in config.to_dict().items() if key != "_name_or_path"}
    about = [_VERSION, torch.__version__, transformers.__version__, type(causal_lm(model)).__name__, told]
    about += [config._attn_implementation, str(model.dtype), model.device.type, encoder.block_ids]
    whole = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
    for parameter in model.parameters():
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, len(flat) // _SAMPLE)].to("cpu", torch.float32)
        whole.update(repr(tuple(parameter.shape)).encode() + sample.numpy().tobytes())
    return whole.hexdigest()


def _remembered(file: Path) -> dict[str, str | None]:
    try:
        held = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    known = isinstance(held, dict) and all(value is None or isinstance(value, str) for value in held.values())
    return held if known else {}
