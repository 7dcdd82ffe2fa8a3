"""Keys that are selected whatever their scores: the contract in loops, by hand and for every implementation."""

import jax.numpy as jnp
import numpy as np
import pytest
from ops_helpers import IMPLEMENTATIONS, clipped, ranges
from shapes import INDEX_SHAPES
from test_index_topk import inputs

import pallas_kernels as pk
from pallas_kernels import ForcedKeys, IndexHeads, Visible


def written_out(scores, start, end, topk, sink, local):
    """Forced keys first, then the highest scores among the rest, lower position first; ascending; -1 last."""
    result = np.full((*scores.shape[:2], topk), -1)
    for b, t in np.ndindex(*scores.shape[:2]):
        visible = list(range(start[b, t], end[b, t]))
        forced = set(visible[:sink]) | set(visible[len(visible) - min(local, len(visible)) :])
        rest = sorted(set(visible) - forced, key=lambda s: (-scores[b, t, s], s))
        best = sorted([*forced, *rest[: topk - sink - local]])[:topk]
        result[b, t, : len(best)] = best
    return result


@pytest.mark.parametrize("kind", ["causal", "random"])
def test_forced_keys_and_the_best_of_the_rest(kind):
    shape = INDEX_SHAPES["odd_lengths"]
    arrays, visible = inputs(shape), ranges(kind, shape.batch, shape.queries, shape.keys)
    start, end = clipped(visible, shape.keys)
    products = np.maximum(np.einsum("bthd,bsd->bths", *map(np.asarray, arrays[:2])), 0)
    scores = (products * np.asarray(arrays[2])[..., None]).sum(2)
    for topk, sink, local in ((9, 2, 3), (4, 0, 3), (60, 1, 1)):
        expected = written_out(scores, start, end, topk, sink, local)
        assert (
            np.any(expected[..., -1] >= 0) == (topk < 50) and ((expected >= 0).sum(-1) == np.minimum(end - start, topk)).all()
        )
        for implementation in IMPLEMENTATIONS:
            options = {"topk": topk, "forced": ForcedKeys(sink, local), "implementation": implementation, "visible": visible}
            np.testing.assert_array_equal(pk.index_topk(arrays, **options), expected, err_msg=implementation)
        covering = pk.index_topk_coarse_to_fine(arrays, block_size=8, n_blocks=7, **options)
        np.testing.assert_array_equal(covering, expected)


def test_coarse_to_fine_searches_the_blocks_between_the_forced_keys():
    """Four keys per block, one competing block: key 9 is best, its block 8 to 11 wins, the ends of the range are forced."""
    k = jnp.zeros((1, 32, 1)).at[0, 9].set(5.0).at[0, 14].set(1.0)
    one = jnp.ones((1, 1, 1, 1))
    options = {"visible": Visible(jnp.asarray([[1]]), jnp.asarray([[31]])), "block_size": 4, "n_blocks": 1}
    found = pk.index_topk_coarse_to_fine(IndexHeads(one, k, one[..., 0]), topk=5, forced=ForcedKeys(2, 2), **options)
    np.testing.assert_array_equal(found, [[[1, 2, 9, 29, 30]]])


@pytest.mark.parametrize("forced", [(-1, 0), (3, 2), (0, 5)])
def test_counts_that_leave_nothing_to_the_scores_are_refused(forced):
    arrays = inputs(INDEX_SHAPES["one_query"])
    options = {"visible": ranges("causal", 1, 1, 1), "topk": 5, "forced": ForcedKeys(*forced)}
    with pytest.raises(ValueError, match=rf"index_topk: forced\.first is {forced[0]} and forced\.last {forced[1]} with topk 5"):
        pk.index_topk(arrays, **options)
    with pytest.raises(ValueError, match=r"index_topk_coarse_to_fine: forced\.first"):
        pk.index_topk_coarse_to_fine(arrays, block_size=1, n_blocks=1, **options)
