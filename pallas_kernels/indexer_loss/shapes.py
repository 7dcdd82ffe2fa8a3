"""Named shapes of the indexer loss, shared by its tests."""

from typing import NamedTuple


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


TEST_SHAPES = {
    "one_query": LossShape(1, 1, 1, 2, 4, 2, 1, 4, 1),
    "no_queries": LossShape(1, 0, 5, 2, 4, 2, 1, 4, 2),
    "no_keys": LossShape(1, 3, 0, 2, 4, 2, 1, 4, 2),
    "latent": LossShape(2, 37, 53, 3, 8, 4, 1, 12, 5),
    "grouped": LossShape(1, 19, 23, 2, 4, 4, 2, 6, 40),
    "several_chunks_and_blocks": LossShape(1, 300, 1100, 2, 4, 2, 2, 4, 33),
}
