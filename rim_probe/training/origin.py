"""The model a run begins with: new, a base with an adapter around it, or an adapter to go on from.

Knows recipes and how models are put together. Knows nothing about rows, losses or the order of stages.
"""

import dataclasses
import warnings
from pathlib import Path

import torch

from rim_probe.adapters import ADAPTER_FILE
from rim_probe.datasets.arithmetic import vocabulary
from rim_probe.errors import RecipeError
from rim_probe.model import RiM, load_base
from rim_probe.options import show_progress
from rim_probe.training.recipe import Recipe
from rim_probe.training.scratch import small_llama, word_tokenizer


def make_model(plan: Recipe) -> RiM:
    """The model that a recipe begins with: of `start`, from nothing, or a base with memory tokens and an adapter."""
    if plan.start is not None:
        return _load_start(plan)
    if plan.scratch is not None:
        tokenizer = word_tokenizer(vocabulary())
        tokenizer.add_special_tokens({"additional_special_tokens": list(plan.layout.tokens)})
        size = plan.scratch
        model = small_llama(
            tokenizer,
            layers=size.layers,
            width=size.width,
            heads=size.heads,
            inner=size.inner,
            context=size.context,
            seed=plan.seed,
        )
    else:
        model, tokenizer = load_base(plan.base, progress=show_progress())
    rim = RiM.attach(model, tokenizer, plan.layout, name=plan.output)
    return add_adapter(rim, plan) if plan.lora else rim


def add_adapter(rim: RiM, plan: Recipe) -> RiM:
    """LoRA on all linear layers; of the embeddings only the three memory rows are trained."""
    from peft import LoraConfig, TaskType, TrainableTokensConfig, get_peft_model

    name = next(n for n, m in rim.model.named_modules() if m is rim.model.get_input_embeddings()).rsplit(".", 1)[-1]
    rows = sorted(rim.memory_ids)
    if plan.lora.r == 0:
        config = TrainableTokensConfig(target_modules=[name], token_indices=rows, task_type=TaskType.CAUSAL_LM)
    else:
        config = LoraConfig(
            r=plan.lora.r,
            lora_alpha=plan.lora.alpha,
            lora_dropout=plan.lora.dropout,
            target_modules="all-linear",
            trainable_token_indices={name: rows},
            task_type=TaskType.CAUSAL_LM,
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # between PEFT and transformers
        rim.model = get_peft_model(rim.model, config)
    rim.model.peft_config["default"].base_model_name_or_path = plan.base
    return rim


def _load_start(plan: Recipe) -> RiM:
    """The adapter of `start`, ready to be trained further."""
    if not (Path(plan.start) / ADAPTER_FILE).exists():
        raise RecipeError(
            f"start: {plan.start} is no adapter folder ({ADAPTER_FILE} is missing); use base for a model."
        )
    held = RiM.from_pretrained(plan.start, device="cpu", dtype=torch.float32, trainable=True)
    if dataclasses.replace(held.layout, num_blocks=plan.layout.num_blocks) != plan.layout:
        raise RecipeError(
            f"The memory blocks of start are {held.layout.block_text}, those of the recipe {plan.layout.block_text}; "
            "give the recipe the layout of start (num_blocks may differ)."
        )
    return RiM(held.model, held.tokenizer, plan.layout, name=plan.output)


def reload(rim: RiM, folder: Path) -> RiM:
    """The best checkpoint of the stage before, ready to be trained further."""
    adapted = hasattr(rim.model, "peft_config")
    fresh = RiM.from_pretrained(folder, device="cpu", dtype=torch.float32, trainable=adapted)
    return RiM(fresh.model, fresh.tokenizer, rim.layout, rim.name)


def set_dropout(model: torch.nn.Module, dropout: float) -> None:
    """Gives every LoRA layer a dropout of its own."""
    for name, module in model.named_modules():
        if name.endswith("lora_dropout"):
            for key in module:
                module[key] = torch.nn.Dropout(dropout)
