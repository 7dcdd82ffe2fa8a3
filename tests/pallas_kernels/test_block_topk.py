"""Block selection: a literal case, equation 9 term by term, both implementations against each other, hostile inputs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ops_helpers import IMPLEMENTATIONS, clipped, normal, ranges

import pallas_kernels as pk
from pallas_kernels import Visible
from pallas_kernels.block_topk.reference import overlapping_steps
from pallas_kernels.block_topk.xla import block_scores

GEOMETRY = pk.BlockGeometry(compress_block=8, compress_stride=4, select_block=16, topk=4, n_initial=1, n_local=2)


@functools.partial(jax.jit, static_argnames=("n_keys", "geometry", "implementation"))
def select(q, k, visible, *, n_keys, geometry=GEOMETRY, implementation=None):
    lse = pk.dense_attention(q, k, k, geometry.compressed_range(visible), softmax_scale=0.4).lse
    settings = {"softmax_scale": 0.4, "n_keys": n_keys, "geometry": geometry, "implementation": implementation}
    return pk.block_topk(q, k, lse, visible, **settings)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_literal_case(implementation):
    """Keys of 2 tokens each 1 apart, blocks of 2: compressed keys 0 to 6 of 8 tokens, of which 3 has all probability.

    It covers tokens 3 and 4, half of block 1 and half of block 2; the lower one wins. Blocks 0 and 3 are forced.
    """
    geometry = pk.BlockGeometry(2, 1, 2, topk=3, n_initial=1, n_local=1)
    k = jnp.zeros((1, 7, 1, 1)).at[0, 3].set(1e3)
    visible = Visible(jnp.zeros((1, 3), jnp.int32), jnp.asarray([[8, 3, 0]], jnp.int32))
    chosen = select(jnp.ones((1, 3, 2, 1)), k, visible, n_keys=8, geometry=geometry, implementation=implementation)
    np.testing.assert_array_equal(chosen[0, :, 0], [[0, 1, 3], [0, 1, -1], [-1, -1, -1]])


def test_scores_are_those_of_equation_9():
    """With the paper's counting from 1: score[j] = sum over m < l'/d, n < l/d of p[(l'/d) j - m - n]."""
    p = np.random.default_rng(0).random(23)
    n_blocks = 6
    by_hand = [
        sum(p[4 * j - m - n - 1] for m in range(4) for n in range(2) if 0 <= 4 * j - m - n - 1 < len(p))
        for j in range(1, n_blocks + 1)
    ]
    np.testing.assert_allclose(p @ overlapping_steps(GEOMETRY, len(p), n_blocks), by_hand)
    np.testing.assert_allclose(block_scores(jnp.asarray(p), GEOMETRY, n_blocks), by_hand, rtol=1e-6)


@pytest.mark.parametrize("kind", ["packed", "random"])
def test_implementations_agree_and_follow_the_rules(kind):
    """Ragged lengths, two groups: the same blocks; all visible ones if they fit, the forced ones in any case."""
    rng = np.random.default_rng(1)
    n_keys, batch, queries = 109, 2, 109
    q, k = normal(rng, batch, queries, 4, 8), normal(rng, batch, GEOMETRY.n_compressed(n_keys), 2, 8)
    visible = ranges(kind, batch, queries, n_keys)
    start, end = (jnp.asarray(x, jnp.int32) for x in clipped(visible, n_keys))
    visible = Visible(jnp.minimum(start, end), end)
    chosen = [np.asarray(select(q, k, visible, n_keys=n_keys, implementation=name)) for name in IMPLEMENTATIONS]
    np.testing.assert_array_equal(*chosen)
    start, end = map(np.asarray, visible)
    for b, t, g in np.ndindex(*chosen[0].shape[:3]):
        got = chosen[0][b, t, g]
        got = got[got >= 0]
        first, own = start[b, t] // 16, (end[b, t] - 1) // 16
        there = list(range(first, own + 1)) if start[b, t] < end[b, t] else []
        assert set(got) <= set(there) and len(got) == min(len(there), 4) and list(got) == sorted(set(got))
        assert set(there[:1] + there[-2:]) <= set(got)


def test_what_a_query_cannot_see_never_matters_and_no_gradient_flows():
    """Compressed keys that reach past the visible range hold NaN."""
    rng = np.random.default_rng(2)
    q, k = normal(rng, 1, 4, 2, 8), normal(rng, 1, GEOMETRY.n_compressed(96), 1, 8)
    visible = Visible(jnp.full((1, 4), 5, jnp.int32), jnp.full((1, 4), 80, jnp.int32))
    first, end = (int(x[0, 0]) for x in GEOMETRY.compressed_range(visible))
    assert (first, end) == (2, 19)
    unseen = (np.arange(k.shape[1]) < first) | (np.arange(k.shape[1]) >= end)
    poisoned = jnp.where(unseen[None, :, None, None], jnp.nan, k)
    for name in IMPLEMENTATIONS:
        chosen = select(q, k, visible, n_keys=96, implementation=name)
        np.testing.assert_array_equal(select(q, poisoned, visible, n_keys=96, implementation=name), chosen)
    gradient = jax.grad(lambda q: jnp.sum(select(q, k, visible, n_keys=96) * q.sum()))(q)
    np.testing.assert_array_equal(gradient, float(chosen.sum()))


@pytest.mark.parametrize("n_keys", [0, 1, 7])
def test_too_few_keys_for_a_compressed_one(n_keys):
    visible = Visible(jnp.zeros((1, 2), jnp.int32), jnp.full((1, 2), n_keys, jnp.int32))
    for name in IMPLEMENTATIONS:
        chosen = select(jnp.ones((1, 2, 2, 4)), jnp.zeros((1, 0, 1, 4)), visible, n_keys=n_keys, implementation=name)
        np.testing.assert_array_equal(chosen[0, :, 0], [[0 if n_keys else -1, -1, -1, -1]] * 2)


def test_errors_say_what_to_change():
    q, k = jnp.ones((1, 3, 2, 4)), jnp.ones((1, 4, 1, 4))
    visible = Visible(jnp.zeros((1, 3), jnp.int32), jnp.ones((1, 3), jnp.int32))
    with pytest.raises(ValueError, match="k_compressed has 4 keys; expected 23"):
        select(q, k, visible, n_keys=96)
    with pytest.raises(ValueError, match="compress_stride is 3; expected a positive divisor of compress_block"):
        select(q, k, visible, n_keys=96, geometry=GEOMETRY._replace(compress_stride=3))
