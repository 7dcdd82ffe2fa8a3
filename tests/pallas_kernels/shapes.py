"""Named shapes of the ops, shared by their tests."""

from typing import NamedTuple


class AttentionShape(NamedTuple):
    """Sizes of one call; `value_dim` None means the values are given as the leading `d_v` channels of the keys."""

    batch: int
    queries: int
    keys: int
    heads: int
    groups: int
    dim: int
    value_dim: int | None
    d_v: int | None
    topk: int


DEEPSEEK_V32 = AttentionShape(1, 4096, 4096, 128, 1, 576, None, 512, 2048)
LLAMA3_8B = AttentionShape(1, 4096, 4096, 32, 8, 128, 128, None, 2048)


class IndexShape(NamedTuple):
    """Sizes of one call."""

    batch: int
    queries: int
    keys: int
    heads: int
    dim: int
    topk: int


class LossShape(NamedTuple):
    """Sizes of one call: the indexer's and the attention's."""

    batch: int
    queries: int
    keys: int
    index_heads: int
    index_dim: int
    heads: int
    groups: int
    dim: int
    topk: int


INDEX_SHAPES = {
    "one_query": IndexShape(1, 1, 1, 2, 4, 1),
    "no_queries": IndexShape(1, 0, 5, 2, 4, 3),
    "no_keys": IndexShape(1, 3, 0, 2, 4, 3),
    "odd_lengths": IndexShape(2, 37, 53, 3, 8, 5),
    "topk_is_context": IndexShape(1, 11, 11, 2, 4, 11),
    "topk_beyond_context": IndexShape(2, 7, 9, 2, 4, 16),
    "several_chunks_and_blocks": IndexShape(1, 700, 2600, 2, 4, 33),
}

LOSS_SHAPES = {
    "one_query": LossShape(1, 1, 1, 2, 4, 2, 1, 4, 1),
    "no_queries": LossShape(1, 0, 5, 2, 4, 2, 1, 4, 2),
    "no_keys": LossShape(1, 3, 0, 2, 4, 2, 1, 4, 2),
    "latent": LossShape(2, 37, 53, 3, 8, 4, 1, 12, 5),
    "grouped": LossShape(1, 19, 23, 2, 4, 4, 2, 6, 40),
    "several_chunks_and_blocks": LossShape(1, 300, 1100, 2, 4, 2, 2, 4, 33),
}

ATTENTION_SHAPES = {
    "one_query": AttentionShape(1, 1, 1, 2, 1, 4, None, 2, 1),
    "no_queries": AttentionShape(1, 0, 5, 2, 1, 4, 3, None, 2),
    "no_keys": AttentionShape(1, 3, 0, 2, 1, 4, None, 2, 2),
    "latent": AttentionShape(2, 37, 53, 4, 1, 12, None, 8, 5),
    "grouped": AttentionShape(2, 19, 23, 4, 2, 6, 5, None, 40),
    "several_chunks_and_blocks": AttentionShape(1, 300, 1100, 2, 2, 4, 4, None, 33),
}
