import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import IndexHeads, Visible

SETTINGS = ("topk", "block_size", "n_blocks", "pooling")
index_topk = jax.jit(pallas_kernels.index_topk, static_argnames="topk")
index_topk_coarse_to_fine = jax.jit(pallas_kernels.index_topk_coarse_to_fine, static_argnames=SETTINGS)

BATCH, LENGTH, HEADS, DIM = 2, 96, 2, 8


@pytest.fixture(scope="module")
def arrays():
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (BATCH, LENGTH, HEADS, DIM))
    k = jax.random.normal(keys[1], (BATCH, LENGTH, DIM))
    return IndexHeads(q, k, jax.random.normal(keys[2], (BATCH, LENGTH, HEADS)))


def ranges(start=0):
    place = np.arange(LENGTH)
    start = np.where(place >= start, start, 0)
    return Visible(jnp.asarray(np.tile(start, (BATCH, 1)), jnp.int32), jnp.asarray(np.tile(place + 1, (BATCH, 1)), jnp.int32))


def pooled(keys, pooling):
    """The one key of a block, [1, D], in numpy."""
    mean = keys.mean(0)
    squared = ((keys - mean) ** 2).sum(-1)
    share = np.maximum(0, 1 - np.median(squared) / squared) if pooling == "salient" else np.zeros(len(keys))
    return (mean + share @ (keys - mean))[None]


def by_hand(q, k, weights, start, end, topk, block_size, n_blocks, pooling):
    """One query, in numpy: one key per block, then keys; ties to the lower position."""
    if end <= start:
        return []
    score = lambda keys: (np.maximum(q @ keys.T, 0) * weights[:, None]).sum(0)
    first, last = start // block_size, (end - 1) // block_size
    between = range(first + 1, last)
    coarse = [score(pooled(k[b * block_size : (b + 1) * block_size], pooling))[0] for b in between]
    kept = [between[i] for i in np.argsort(-np.array(coarse), kind="stable")[:n_blocks]] if coarse else []
    candidates = [
        p for b in sorted({first, last, *kept}) for p in range(b * block_size, (b + 1) * block_size) if start <= p < end
    ]
    order = np.argsort(-score(k[candidates]), kind="stable")[:topk]
    return sorted(candidates[i] for i in order)


@pytest.mark.parametrize("pooling", ["mean", "salient"])
@pytest.mark.parametrize("start", [0, 37])
@pytest.mark.parametrize(("block_size", "n_blocks", "topk"), [(8, 2, 6), (8, 3, 64), (16, 1, 10), (10, 2, 5)])
def test_against_a_plain_search(arrays, start, block_size, n_blocks, topk, pooling):
    visible = ranges(start)
    sizes = {"topk": topk, "block_size": block_size, "n_blocks": n_blocks}
    found = np.asarray(index_topk_coarse_to_fine(arrays, **sizes, pooling=pooling, visible=visible))
    q, k, w = (np.asarray(x, np.float64) for x in arrays)
    for b in range(BATCH):
        for t in range(0, LENGTH, 5):
            s, e = int(visible.start[b, t]), int(visible.end[b, t])
            expected = by_hand(q[b, t], k[b], w[b, t], s, e, topk, block_size, n_blocks, pooling)
            assert found[b, t].tolist() == expected + [-1] * (topk - len(expected))


def test_exact_where_the_candidates_cover_the_context(arrays):
    for block_size, n_blocks in [(8, 10), (16, 4), (100, 1)]:
        found = index_topk_coarse_to_fine(arrays, topk=7, block_size=block_size, n_blocks=n_blocks, visible=ranges())
        np.testing.assert_array_equal(found, index_topk(arrays, topk=7, visible=ranges()))


@pytest.mark.parametrize(("batch", "queries"), [(2, 0), (0, 5)])
def test_no_queries_or_rows(batch, queries):
    q, k, w = jnp.zeros((batch, queries, HEADS, DIM)), jnp.zeros((batch, LENGTH, DIM)), jnp.zeros((batch, queries, HEADS))
    empty = jnp.zeros((batch, queries), jnp.int32)
    settings = {"topk": 6, "block_size": 8, "n_blocks": 2, "visible": Visible(empty, empty)}
    assert index_topk_coarse_to_fine(IndexHeads(q, k, w), **settings).shape == (batch, queries, 6)


def test_early_queries_are_exact_too(arrays):
    """The first four blocks of eight: two that compete, the first and the last."""
    found = index_topk_coarse_to_fine(arrays, topk=6, block_size=8, n_blocks=2, visible=ranges())
    exact = index_topk(arrays, topk=6, visible=ranges())
    np.testing.assert_array_equal(found[:, :32], exact[:, :32])
    assert (np.asarray(found[:, 32:]) != np.asarray(exact[:, 32:])).any()


def test_invisible_keys_do_not_matter(arrays):
    q, k, w = arrays
    visible = Visible(*(jnp.full((BATCH, LENGTH), value, jnp.int32) for value in (11, 70)))
    settings = {"topk": 5, "block_size": 8, "n_blocks": 2, "visible": visible}
    clean = index_topk_coarse_to_fine(IndexHeads(q, k, w), **settings)
    poisoned = k.at[:, :11].set(jnp.nan).at[:, 70:].set(1e30)
    np.testing.assert_array_equal(index_topk_coarse_to_fine(IndexHeads(q, poisoned, w), **settings), clean)
    empty = Visible(*[jnp.full((BATCH, LENGTH), 20, jnp.int32)] * 2)
    assert (
        np.asarray(index_topk_coarse_to_fine(IndexHeads(q, k, w), topk=5, block_size=8, n_blocks=2, visible=empty)) == -1
    ).all()


def test_keys_among_fillers_stand_for_their_block():
    """Seven fillers and a record, six and two: an eighth of a record is left in the mean, nearly all of each in the other."""
    filler, record, other = np.eye(8, dtype=np.float32)[:3]
    k = jnp.asarray(np.tile(filler, (1, 24, 1))).at[0, 11].set(record).at[0, 17].set(record).at[0, 22].set(other)
    mean, salient = (np.asarray(pallas_kernels.pool_blocks(k, 8, pooling))[0] for pooling in ("mean", "salient"))
    np.testing.assert_allclose(mean @ record, [0, 1 / 8, 1 / 8], rtol=1e-6)
    # The squared distance from the mean: of one record 49 times that of a filler; of two (49 + 1 + 36) / (1 + 1 + 4) times.
    one, two = 1 - 1 / 49, 1 - 6 / 86
    expected = [0, 1 / 8 + one * 7 / 8, 1 / 8 + two * (7 / 8 - 1 / 8)]
    np.testing.assert_allclose(salient @ record, expected, rtol=1e-5)
    np.testing.assert_allclose(salient[2] @ other, expected[2], rtol=1e-5)
    assert salient[0] @ filler == 1


@pytest.mark.parametrize("pooling", ["mean", "salient"])
def test_pooled_keys_of_any_block(pooling):
    """Like keys, tiny and huge ones have a finite pooled key and gradient; no block tells of another."""
    counted = jnp.arange(8.0).reshape(1, 4, 2)
    k = jnp.concatenate([jnp.full((1, 4, 2), 3.0), 1e-15 * counted, 1e15 * counted], axis=1)
    pool = lambda k: pallas_kernels.pool_blocks(k, 4, pooling)
    assert pool(k[:, :11]).shape == (1, 2, 2) and pool(k[:, :3]).shape == (1, 0, 2)
    assert np.isfinite(pool(k)).all() and np.isfinite(jax.grad(lambda k: pool(k).sum())(k)).all()
    np.testing.assert_array_equal(pool(k.at[:, 4:8].set(jnp.nan))[:, ::2], pool(k)[:, ::2])
    assert pool(k.astype(jnp.bfloat16)).dtype == jnp.float32


def test_an_unknown_pooling_is_refused(arrays):
    with pytest.raises(ValueError, match="pooling is 'median'; expected one of mean, salient"):
        index_topk_coarse_to_fine(arrays, topk=5, block_size=8, n_blocks=2, pooling="median", visible=ranges())
    with pytest.raises(ValueError, match="pool_blocks: pooling is 'median'"):
        pallas_kernels.pool_blocks(arrays[1], 8, "median")
    with pytest.raises(ValueError, match="block_size is 0"):
        pallas_kernels.pool_blocks(arrays[1], 0)


def test_sizes_must_be_positive(arrays):
    with pytest.raises(ValueError, match="n_blocks 0"):
        index_topk_coarse_to_fine(arrays, topk=5, block_size=8, n_blocks=0, visible=ranges())
