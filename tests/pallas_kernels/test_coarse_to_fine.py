import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels

SIZES = ("topk", "block_size", "n_blocks")
index_topk = jax.jit(pallas_kernels.index_topk, static_argnames="topk")
index_topk_coarse_to_fine = jax.jit(pallas_kernels.index_topk_coarse_to_fine, static_argnames=SIZES)

BATCH, LENGTH, HEADS, DIM = 2, 96, 2, 8


@pytest.fixture(scope="module")
def arrays():
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (BATCH, LENGTH, HEADS, DIM))
    k = jax.random.normal(keys[1], (BATCH, LENGTH, DIM))
    return q, k, jax.random.normal(keys[2], (BATCH, LENGTH, HEADS))


def ranges(start=0):
    place = np.arange(LENGTH)
    start = np.where(place >= start, start, 0)
    return {
        "visible_start": jnp.asarray(np.tile(start, (BATCH, 1)), jnp.int32),
        "visible_end": jnp.asarray(np.tile(place + 1, (BATCH, 1)), jnp.int32),
    }


def by_hand(q, k, weights, start, end, topk, block_size, n_blocks):
    """One query, in numpy: block means, then keys; ties to the lower position."""
    if end <= start:
        return []
    score = lambda keys: (np.maximum(q @ keys.T, 0) * weights[:, None]).sum(0)
    first, last = start // block_size, (end - 1) // block_size
    between = range(first + 1, last)
    means = [score(k[b * block_size : (b + 1) * block_size].mean(0, keepdims=True))[0] for b in between]
    kept = [between[i] for i in np.argsort(-np.array(means), kind="stable")[:n_blocks]] if means else []
    candidates = [
        p for b in sorted({first, last, *kept}) for p in range(b * block_size, (b + 1) * block_size) if start <= p < end
    ]
    order = np.argsort(-score(k[candidates]), kind="stable")[:topk]
    return sorted(candidates[i] for i in order)


@pytest.mark.parametrize("start", [0, 37])
@pytest.mark.parametrize(("block_size", "n_blocks", "topk"), [(8, 2, 6), (8, 3, 64), (16, 1, 10), (10, 2, 5)])
def test_against_a_plain_search(arrays, start, block_size, n_blocks, topk):
    visible = ranges(start)
    found = np.asarray(index_topk_coarse_to_fine(*arrays, topk=topk, block_size=block_size, n_blocks=n_blocks, **visible))
    q, k, w = (np.asarray(x, np.float64) for x in arrays)
    for b in range(BATCH):
        for t in range(0, LENGTH, 5):
            s, e = int(visible["visible_start"][b, t]), int(visible["visible_end"][b, t])
            expected = by_hand(q[b, t], k[b], w[b, t], s, e, topk, block_size, n_blocks)
            assert found[b, t].tolist() == expected + [-1] * (topk - len(expected))


def test_exact_where_the_candidates_cover_the_context(arrays):
    for block_size, n_blocks in [(8, 10), (16, 4), (100, 1)]:
        found = index_topk_coarse_to_fine(*arrays, topk=7, block_size=block_size, n_blocks=n_blocks, **ranges())
        np.testing.assert_array_equal(found, index_topk(*arrays, topk=7, **ranges()))


def test_early_queries_are_exact_too(arrays):
    """The first four blocks of eight: two that compete, the first and the last."""
    found = index_topk_coarse_to_fine(*arrays, topk=6, block_size=8, n_blocks=2, **ranges())
    exact = index_topk(*arrays, topk=6, **ranges())
    np.testing.assert_array_equal(found[:, :32], exact[:, :32])
    assert (np.asarray(found[:, 32:]) != np.asarray(exact[:, 32:])).any()


def test_invisible_keys_do_not_matter(arrays):
    q, k, w = arrays
    visible = {name: jnp.full((BATCH, LENGTH), value, jnp.int32) for name, value in zip(ranges(), (11, 70), strict=True)}
    settings = {"topk": 5, "block_size": 8, "n_blocks": 2, **visible}
    clean = index_topk_coarse_to_fine(q, k, w, **settings)
    poisoned = k.at[:, :11].set(jnp.nan).at[:, 70:].set(1e30)
    np.testing.assert_array_equal(index_topk_coarse_to_fine(q, poisoned, w, **settings), clean)
    empty = {name: jnp.full((BATCH, LENGTH), 20, jnp.int32) for name in visible}
    assert (np.asarray(index_topk_coarse_to_fine(q, k, w, topk=5, block_size=8, n_blocks=2, **empty)) == -1).all()


def test_sizes_must_be_positive(arrays):
    with pytest.raises(ValueError, match="n_blocks 0"):
        index_topk_coarse_to_fine(*arrays, topk=5, block_size=8, n_blocks=0, **ranges())
