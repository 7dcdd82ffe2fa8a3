"""Named shapes of the index scores and the selection, shared by their tests."""

from typing import NamedTuple


class IndexShape(NamedTuple):
    """Sizes of one call."""

    batch: int
    queries: int
    keys: int
    heads: int
    dim: int
    topk: int


TEST_SHAPES = {
    "one_query": IndexShape(1, 1, 1, 2, 4, 1),
    "no_queries": IndexShape(1, 0, 5, 2, 4, 3),
    "no_keys": IndexShape(1, 3, 0, 2, 4, 3),
    "odd_lengths": IndexShape(2, 37, 53, 3, 8, 5),
    "topk_is_context": IndexShape(1, 11, 11, 2, 4, 11),
    "topk_beyond_context": IndexShape(2, 7, 9, 2, 4, 16),
    "several_chunks_and_blocks": IndexShape(1, 700, 2600, 2, 4, 33),
}
