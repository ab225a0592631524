"""Makes docs/architectures.md: what every causal language model of the installed transformers can be used for.

    python -m tools.architectures            all of them, a few minutes of one core
    python -m tools.architectures llama gpt2 these, printed

Each is a tiny random model: what is tried is how the architecture computes (`rim_probe.door` and the probes' own
trials), decoding in a batch against one question alone, and saving and loading. Nothing is downloaded.
"""

import argparse
import logging
import os
import sys
import tempfile
import textwrap
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rim_probe.decoding import answer, answer_batch
from rim_probe.door import difference, tolerance
from rim_probe.errors import RiMError
from rim_probe.loading import first_line
from rim_probe.memory import MemoryLayout
from rim_probe.model import METHODS, RiM
from rim_probe.probing.hooks import require_residual, tells_attention
from rim_probe.probing.patching import Patcher
from rim_probe.training.scratch import word_tokenizer

PAGE = Path(__file__).parent.parent / "docs" / "architectures.md"
WORDS = "anna has 3 apples and buys 14 more . how many ? 0 1 2 5 6 7 8 9 + - * / = #### << >>".split()
QUESTIONS = ["Anna has 3 apples", "How many ?"]
MOST_WEIGHTS = 2_000_000

# Of each configuration those that it knows.
SIZE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512,
    "initializer_range": 0.3, "is_decoder": True, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0,
    "rotary_dim": 4, "mamba_n_groups": 1, "n_groups": 1,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8,
    "mamba_num_heads": 4, "mamba_head_dim": 16, "state_size": 8, "num_heads": 4, "sliding_window": 256,
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "hidden_dropout_prob": 0.0, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64,
    "embedding_size": 32, "shared_expert_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16,
}  # fmt: skip
SHARED = {
    "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2
}  # fmt: skip
LATENT = "axk1 axk2 deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa minicpm3 youtu".split()
# Whatever else a kind needs to be built, or to be the one that is in use (all its kinds of layers, a chunk, a cap).
OWN: dict[str, dict] = {
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "llama4_text": {"attention_chunk_size": 64},
    "granite": {"logits_scaling": 4.0},
    "gemma3n_text": SHARED | {"activation_sparsity_pattern": [0.0] * 4},
    "gemma4_text": SHARED,
} | {kind: {"num_key_value_heads": 4} for kind in LATENT}


class NotTried(Exception):
    """Why no tiny model of a kind was made."""


def build(kind: str, **own) -> tuple:
    """(Tiny random model of a kind, tokenizer)."""
    whole = AutoConfig.for_model(kind)
    if hasattr(whole, "text_config"):
        raise NotTried("more than text; its text model is a kind of its own")
    known = set(whole.to_dict()) | set(whole.attribute_map)
    config = AutoConfig.for_model(
        kind, **{key: value for key, value in SIZE.items() if key in known} | OWN.get(kind, {})
    )
    with torch.device("meta"):
        weights = AutoModelForCausalLM.from_config(config, attn_implementation="eager").num_parameters()
    if weights > MOST_WEIGHTS:
        raise NotTried(f"no tiny one was made ({weights:,} weights)")
    torch.manual_seed(0)
    try:
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    except ValueError:  # a family that has eager attention alone
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    model(input_ids=torch.tensor([[5, 6, 7]]), use_cache=False)  # one that does not run says nothing of memory blocks
    return model.eval(), word_tokenizer(WORDS)


def outcome(kind: str) -> tuple[str, str, str]:
    """(class, `supported`, `partly`, `refused` or `not tried`, reasons)."""
    try:
        model, tokenizer = build(kind)
    except Exception as error:
        return kind, "not tried", first_line(error)
    name = type(model).__name__
    try:
        rim = RiM.attach(model, tokenizer, MemoryLayout(num_blocks=3), name=kind)
    except RiMError as error:
        return name, "refused", str(error).removeprefix(f"{kind}: {name} cannot be used with memory blocks")
    with suppress(RiMError):
        require_residual(rim)
    with suppress(RiMError):
        Patcher(rim, QUESTIONS[0])
    tells_attention(rim)
    off = [f"{feature}: {reason}" for feature, reason in rim.verdict.off.items()]
    off += [f"{trial.__name__}: {reason}" for trial in (batches, saving) if (reason := why(trial, rim))]
    return name, "partly" if off else "supported", "; ".join(off)


def why(trial: Callable[[RiM], None], rim: RiM) -> str | None:
    try:
        return trial(rim)
    except Exception as error:
        return f"fails ({first_line(error)})"


def batches(rim: RiM) -> str | None:
    for method in METHODS:
        together = answer_batch(rim, QUESTIONS, method, max_new_tokens=4)
        alone = [answer(rim, question, method, max_new_tokens=4) for question in QUESTIONS]
        if [(it.token_ids, it.text) for it in together] != [(it.token_ids, it.text) for it in alone]:
            return f"{method} answers otherwise than alone"
    return None


@torch.no_grad()
def saving(rim: RiM) -> str | None:
    ids = torch.tensor([rim.prompt_ids(QUESTIONS[0], "memory")])
    with tempfile.TemporaryDirectory() as folder:
        again = RiM.from_pretrained(rim.save_pretrained(folder), "cpu")
    missed = difference(again.model(input_ids=ids).logits, rim.model(input_ids=ids).logits)
    return f"loaded again its logits differ by {missed:.2g} deviations" if missed > tolerance(rim.dtype) else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", help="model types; all, into the docs, if left out")
    chosen = parser.parse_args().kinds
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    os.environ["RIM_PROBE_CACHE"] = tempfile.mkdtemp()
    rows = []
    for kind in chosen or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        rows.append((kind, *outcome(kind)))
        print(*rows[-1], sep=" | ", file=sys.stderr, flush=True)
    if not chosen:
        PAGE.write_text(page(rows), encoding="utf-8")


def page(rows: list[tuple[str, str, str, str]]) -> str:
    tried = [row for row in rows if row[2] != "not tried"]
    counts = ", ".join(f"{sum(row[2] == told for row in tried)} {told}" for told in ("supported", "partly", "refused"))
    head = f"""Made by `python -m tools.architectures` with transformers {transformers.__version__}: {len(tried)}
        families of causal language models, {counts}. Each is a tiny random model. *Supported*: masks and positions
        are followed, a packed row and readouts decoded with a cache equal plain passes, every probe can read it,
        batches equal single questions, and saved and loaded again it gives equal logits. *Partly*: the features
        named are switched off, with the reason. *Refused*: `RiM.attach` and loading end with this sentence. Every
        model is checked so when it is attached or loaded; the table only tells what to expect."""
    lines = [
        "# Architectures",
        "",
        *textwrap.wrap(" ".join(head.split()), 120),
        "",
        "| model type | class | | reason |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {kind} | {name} | {told} | {reason.replace('|', ' ').strip(' ,:')} |" for kind, name, told, reason in tried
    ]
    left = [(kind, reason) for kind, _, told, reason in rows if told == "not tried"]
    lines += ["", "Not tried: " + "; ".join(f"{kind} ({reason})" for kind, reason in left) + "."] if left else []
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
