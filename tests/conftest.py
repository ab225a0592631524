"""Tiny random models with a tiny tokenizer, made in memory: no download, no training, the same on every run."""

import os

for library in ("OMP", "OPENBLAS", "MKL"):  # read when numpy is imported; two tests at a time, each on one thread
    os.environ.setdefault(f"{library}_NUM_THREADS", "1")

import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from rim_probe.memory import MemoryLayout
from rim_probe.model import RiM

# With several threads the last bits of a row depend on its place in the batch; one is faster here, too.
torch.set_num_threads(1)

FAMILIES = ("llama", "gpt2", "qwen3")
ALL_FAMILIES = (*FAMILIES, "mistral", "gpt_neox", "opt")
ATTENTIONS = ("sdpa", "eager")
_TEXT = ["Anna has 3 apples and buys 14 more. How many apples has she? <<3+14=17>> #### 17", "0 1 2 3 4 5 6 7 8 9"]


def tiny_tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE with EOS `<eos>`, padding `<pad>` and, on request, a BOS `<bos>` put before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<eos>", "<pad>"] + ["<bos>"] * bos
    tokenizer.train_from_iterator(
        _TEXT,
        trainers.BpeTrainer(
            vocab_size=300,
            show_progress=False,
            special_tokens=special,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        ),
    )
    if bos:
        tokenizer.post_processor = TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", bos_token="<bos>" if bos else None
    )


def tiny_base(family: str = "llama", attention: str = "sdpa", seed: int = 0, vocab_size: int = 300, context: int = 512):
    """A random causal LM in float32 and eval mode: 2 layers, 4 heads (2 for keys and values, where the family can)."""
    # Weights fifteen times wider than usual, so that what a token says depends clearly on all that stands before it.
    common = {"vocab_size": vocab_size, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1}
    rope = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": context,
        "tie_word_embeddings": False,
        "initializer_range": 0.3,
    }
    config = {
        "llama": lambda: LlamaConfig(**common, **rope),
        "qwen3": lambda: Qwen3Config(**common, **rope, head_dim=8),
        "gpt2": lambda: GPT2Config(
            **common,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=context,
            initializer_range=0.3,
            tie_word_embeddings=False,
        ),
        "mistral": lambda: MistralConfig(**common, **rope),
        "gpt_neox": lambda: GPTNeoXConfig(
            **common,
            **{key: rope[key] for key in rope if key != "num_key_value_heads"},
        ),
        "opt": lambda: OPTConfig(
            **common,
            hidden_size=32,
            word_embed_proj_dim=32,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=context,
            init_std=0.3,
            tie_word_embeddings=False,
        ),
    }[family]()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32).eval()


def tiny_rim(
    family: str = "llama",
    attention: str = "sdpa",
    *,
    num_blocks: int = 4,
    seed: int = 0,
    bos: bool = False,
    context: int = 512,
) -> RiM:
    """A tiny base with memory tokens added by `RiM.attach`."""
    tokenizer = tiny_tokenizer(bos)
    base = tiny_base(family, attention, seed, len(tokenizer), context)
    return RiM.attach(base, tokenizer, MemoryLayout(num_blocks=num_blocks), name=f"tiny-{family}")


def add_lora(rim: RiM, **config) -> RiM:
    """LoRA around a model, with weights that are not zero: a pass through the bare base would be noticed."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    asked = {"r": 2, "target_modules": "all-linear", "init_lora_weights": False, "task_type": "CAUSAL_LM"} | config
    rim.model = get_peft_model(rim.model, LoraConfig(**asked))
    return rim


@pytest.fixture(autouse=True, scope="session")
def own_verdicts(tmp_path_factory):
    """What is remembered of models checked here stays out of the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rim_probe.door.cache_folder", lambda: folder)
        yield


@pytest.fixture
def make_rim():
    """The function `tiny_rim`, for tests that need a special one."""
    return tiny_rim


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(params=ATTENTIONS)
def attention(request) -> str:
    return request.param


@pytest.fixture
def rim() -> RiM:
    """A tiny Llama."""
    return tiny_rim()


@pytest.fixture
def every_rim(family, attention) -> RiM:
    """Each family with each attention back end."""
    return tiny_rim(family, attention)


@pytest.fixture(scope="session")
def small_checkpoint(tmp_path_factory):
    """A checkpoint folder with random weights, a closed vocabulary, examples of three depths: for tests of the page."""
    from rim_probe.datasets.arithmetic import World, generate, vocabulary
    from rim_probe.training.scratch import small_llama, word_tokenizer

    folder = tmp_path_factory.mktemp("checkpoints") / "small"
    tokenizer = word_tokenizer(vocabulary())
    base = small_llama(tokenizer, layers=1, width=16, heads=2, inner=32, context=128, seed=0)
    RiM.attach(base, tokenizer, MemoryLayout()).save_pretrained(folder)
    problems = [
        problem
        for depth in (1, 2, 3)
        for problem in generate(World(min_steps=depth, max_steps=depth), "test", 2, seed=depth)
    ]
    examples = [{"question": p.question, "steps": list(p.steps), "answer": p.answer} for p in problems]
    (folder / "examples.json").write_text(json.dumps(examples), encoding="utf-8")
    return folder


def pytest_collection_modifyitems(items):
    """Whatever drives a browser is slow."""
    for item in items:
        if item.path.parent.name == "browser":
            item.add_marker(pytest.mark.slow)
