"""Named shapes of sparse and dense attention, shared by tests and benchmarks."""

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


TEST_SHAPES = {
    "one_query": AttentionShape(1, 1, 1, 2, 1, 4, None, 2, 1),
    "no_queries": AttentionShape(1, 0, 5, 2, 1, 4, 3, None, 2),
    "no_keys": AttentionShape(1, 3, 0, 2, 1, 4, None, 2, 2),
    "latent": AttentionShape(2, 37, 53, 4, 1, 12, None, 8, 5),
    "grouped": AttentionShape(2, 19, 23, 4, 2, 6, 5, None, 40),
    "several_chunks_and_blocks": AttentionShape(1, 300, 1100, 2, 2, 4, 4, None, 33),
}

DEEPSEEK_V32 = AttentionShape(1, 4096, 4096, 128, 1, 576, None, 512, 2048)
LLAMA3_8B = AttentionShape(1, 4096, 4096, 32, 8, 128, 128, None, 2048)
