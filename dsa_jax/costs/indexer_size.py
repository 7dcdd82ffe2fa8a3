"""The size of an indexer that pays, by formula: how many index heads a model may have at a length, and from where they pay."""

import dataclasses

from dsa_jax.config import ModelConfig
from dsa_jax.costs.model import forward_flops_per_token

MOST_HEADS = 16
LONGEST = 2**20


def paying_heads(config: ModelConfig, length: int) -> int:
    """Index heads with which sparse attention costs no more FLOPs than dense in sequences of `length` tokens.

    A layer saves 4 H D (S - K) FLOPs per token, H heads of D channels that read K keys instead of S = (length + 1) / 2. It
    pays 2 Hi Di S for the scores of Hi index heads of Di channels, and 2 E (Hi Di + Di + Hi) for their projections from a
    hidden state of E (in latent attention the queries' from their latent). The number is the largest power of two, up to 16,
    whose price is within the saving of all layers; the whole forward pass is counted as `forward_flops_per_token` does. It is 1
    where even one head costs more, as up to a length of `topk` in every model; the retrofit then warns with both costs.

    Args:
        config: the model, with an indexer whose `n_heads` is not read.
        length: tokens of the sequences that it will be trained at.
    """
    dense = forward_flops_per_token(with_index_heads(config, 1), length, "dense")
    heads = MOST_HEADS
    while heads > 1 and forward_flops_per_token(with_index_heads(config, heads), length, "sparse") > dense:
        heads //= 2
    return heads


def with_index_heads(config: ModelConfig, n_heads: int) -> ModelConfig:
    """A copy with so many index heads."""
    indexer = dataclasses.replace(config.attention.indexer, n_heads=n_heads)
    return dataclasses.replace(config, attention=dataclasses.replace(config.attention, indexer=indexer))


def pays_from_length(config: ModelConfig) -> int | None:
    """The least length, in tokens, at which a sparse forward pass takes fewer FLOPs than a dense one; None up to 2**20.

    What sparse attention saves grows with the length once that is beyond topk, so every longer sequence pays as well.
    """
    pays = lambda length: forward_flops_per_token(config, length, "sparse") < forward_flops_per_token(config, length, "dense")
    short, long = config.attention.indexer.topk, LONGEST
    if not pays(long):
        return None
    while long - short > 1:
        middle = (short + long) // 2
        short, long = (short, middle) if pays(middle) else (middle, long)
    return long
