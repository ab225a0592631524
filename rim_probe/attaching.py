"""Memory tokens added to a tokenizer and their rows to a model, and what its configuration then has to say.

Knows tokenizers, embedding matrices and configurations. Knows nothing of what blocks are for.
"""

from collections.abc import Sequence

import torch

from rim_probe.errors import LayoutError


def add_tokens(tokenizer, tokens: list[str]) -> None:
    """Adds control tokens, and an EOS where a tokenizer calls it otherwise.

    Raises:
        LayoutError: the tokenizer gives them ids that it has given already.
    """
    known = tokenizer.get_vocab()
    tokenizer.add_special_tokens({"additional_special_tokens": tokens}, replace_extra_special_tokens=False)
    if tokenizer.eos_token is None and tokenizer.sep_token is not None:
        tokenizer.eos_token = tokenizer.sep_token
    ids = {tokenizer.convert_tokens_to_ids(token) for token in tokens}
    if taken := sorted(token for token, id in known.items() if id in ids and token not in tokens):
        raise LayoutError(
            f"The tokenizer gives {', '.join(tokens)} the ids of {', '.join(taken)}, for there are gaps between its "
            "own; number them anew."
        )


def add_rows(model, tokenizer, ids: Sequence[int]) -> None:
    """Gives the model an embedding row for every token; initialises those added, and `ids`, which may be spare ones."""
    rows, wanted = model.get_input_embeddings().weight.shape[0], max([len(tokenizer), *(id + 1 for id in ids)])
    if rows < wanted:
        model.resize_token_embeddings(wanted, mean_resizing=False)
    if fresh := set(ids) | set(range(rows, wanted)):
        _initialise_rows(model, sorted(fresh))


def _initialise_rows(model, ids: list[int]) -> None:
    """Sets the embedding rows `ids` (input, and output where it is a matrix of its own) near the mean of the others."""
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    matrices = {id(layer.weight): layer.weight for layer in layers}  # tied ones once
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in matrices.values():
            others = torch.ones(weight.shape[0], dtype=torch.bool)
            others[ids] = False
            old = weight[others.to(weight.device)].float()
            noise = torch.randn(len(ids), weight.shape[1], generator=generator).to(weight.device)
            weight[ids] = (old.mean(0) + 0.1 * old.std(0) * noise).to(weight.dtype)


def settle_config(model, eos_id: int, whole: bool = True) -> None:
    """Has the configurations say what is: where answers end, and whether the head is the embedding matrix.

    A base may end texts with another token, or with several, than its tokenizer names, which RiM trains it to stop at.
    An adapter that was merged into one of two tied matrices has parted them, and only one would be saved.

    Args:
        whole: the weights are here, not sharded elsewhere.
    """
    for config in (model.config, model.generation_config):
        if config is not None:
            config.eos_token_id = eos_id
    head, embeddings = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    if whole and head.shape == embeddings.shape:
        model.config.tie_word_embeddings = head is embeddings
