"""A small Llama and its word-level tokenizer, from nothing.

Knows configuration and vocabulary. Knows nothing about data or training.
"""

from collections.abc import Sequence

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"


def word_tokenizer(vocabulary: Sequence[str]) -> PreTrainedTokenizerFast:
    """A closed-vocabulary tokenizer: lower-case words, digits one by one, the signs of `<<3+4=7>> #### 7`.

    Decoding puts the spaces of that form back, so that a decoded chain parses and reads like the text it was made from.
    """
    ids = {token: i for i, token in enumerate((PAD, EOS, UNKNOWN, *vocabulary))}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    pieces = Regex(r"\d|<<|>>|####|[^\W\d_]+|[^\w\s]|_")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(pieces, behavior="isolated")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(Regex(r"^(?=[a-z])"), " "),  # a space before every word
            decoders.Replace(Regex(r"^>>$"), ">> "),
            decoders.Replace(Regex(r"^####$"), "#### "),
            decoders.Fuse(),
            decoders.Replace(Regex(r"(?<=[a-z.,])(?=\d)"), " "),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, unk_token=UNKNOWN)


def small_llama(
    tokenizer, *, layers: int, width: int, heads: int, inner: int, context: int, seed: int
) -> LlamaForCausalLM:
    """A randomly initialised Llama with tied embeddings, float32, the same for the same seed."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)
