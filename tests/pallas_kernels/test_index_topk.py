"""Index scores and the canonical selection, against numpy written out and the float64 reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_helpers import IMPLEMENTATIONS, RANGE_KINDS, assert_close, clipped, in_float64, normal, ranges, small_integers
from shapes import INDEX_SHAPES

import pallas_kernels as pk
from pallas_kernels import IndexHeads, Visible
from pallas_kernels.common.topk import canonical_topk, largest_ascending, rank_scores


def numpy_selection(scores, start, end, topk):
    """The contract in loops: highest score first, then lower position; ascending; -1 last."""
    result = np.full((*scores.shape[:2], topk), -1)
    for b, t in np.ndindex(*scores.shape[:2]):
        visible = range(start[b, t], end[b, t])
        best = sorted(visible, key=lambda s: (-scores[b, t, s], s))[:topk]
        result[b, t, : len(best)] = sorted(best)
    return result


def inputs(shape, maker=small_integers, seed=0):
    rng = np.random.default_rng(seed)
    return IndexHeads(
        maker(rng, shape.batch, shape.queries, shape.heads, shape.dim),
        maker(rng, shape.batch, shape.keys, shape.dim),
        maker(rng, shape.batch, shape.queries, shape.heads),
    )


@functools.partial(jax.jit, static_argnames=("topk", "implementation"))
def jitted(index, visible, *, topk, implementation):
    return pk.index_topk(index, visible, topk=topk, implementation=implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_literal_scores_and_selection(implementation):
    q = jnp.asarray([[[[1.0], [2.0]], [[-1.0], [1.0]], [[1.0], [1.0]]]])  # 3 queries, 2 heads of dimension 1
    k = jnp.asarray([[[1.0], [-1.0], [3.0], [0.0]]])
    weights = jnp.asarray([[[1.0, 1.0], [1.0, -1.0], [0.5, 0.5]]])
    visible = Visible(jnp.asarray([[0, 0, 1]]), jnp.asarray([[4, 3, 1]]))
    scores = pk.index_scores(IndexHeads(q, k, weights), visible, implementation=implementation)
    hidden = -np.inf
    np.testing.assert_array_equal(scores, [[[3, 0, 9, 0], [-1, 1, -3, hidden], [hidden] * 4]])
    picked = pk.index_topk(IndexHeads(q, k, weights), topk=3, visible=visible, implementation=implementation)
    # Query 0: keys 1 and 3 tie at 0 and the lower one wins; query 2 sees nothing.
    np.testing.assert_array_equal(picked, [[[0, 1, 2], [0, 1, 2], [-1, -1, -1]]])
    assert picked.dtype == jnp.int32
    best = pk.index_topk(IndexHeads(q, k, weights), topk=1, visible=visible, implementation=implementation)
    np.testing.assert_array_equal(best, [[[2], [1], [-1]]])


@pytest.mark.parametrize("kind", RANGE_KINDS)
@pytest.mark.parametrize("name", INDEX_SHAPES)
def test_selection_is_exact(name, kind):
    shape = INDEX_SHAPES[name]
    if name == "several_chunks_and_blocks" and kind in ("packed", "random"):
        kind = "causal"
    arrays, visible = inputs(shape), ranges(kind, shape.batch, shape.queries, shape.keys)
    start, end = clipped(visible, shape.keys)
    products = np.maximum(np.einsum("bthd,bsd->bths", *map(np.asarray, arrays[:2])), 0)
    expected = numpy_selection((products * np.asarray(arrays[2])[..., None]).sum(2), start, end, shape.topk)
    for implementation in IMPLEMENTATIONS:
        actual = jitted(arrays, visible, topk=shape.topk, implementation=implementation)
        np.testing.assert_array_equal(actual, expected, err_msg=implementation)


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, "pallas"])
@pytest.mark.parametrize("topk", [2, 3, 5])
def test_bounds_as_far_out_as_int32_goes_are_clamped(topk, implementation):
    low, high = np.iinfo(np.int32).min, np.iinfo(np.int32).max
    q, k, weights = jnp.ones((1, 4, 1, 1)), jnp.ones((1, 3, 1)), jnp.ones((1, 4, 1))
    start, end = jnp.asarray([[high, high - 1, low, low]]), jnp.asarray([[high, high, high, low + 1]])
    picked = jitted(IndexHeads(q, k, weights), Visible(start, end), topk=topk, implementation=implementation)
    everything = [*range(min(topk, 3)), *[-1] * (topk - 3)]
    np.testing.assert_array_equal(picked, [[[-1] * topk, [-1] * topk, everything, [-1] * topk]])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_scores_and_their_gradient_match_float64(implementation):
    shape, rng = INDEX_SHAPES["odd_lengths"], np.random.default_rng(1)
    arrays, visible = inputs(shape, normal), ranges("random", shape.batch, shape.queries, shape.keys)
    cotangent = normal(rng, shape.batch, shape.queries, shape.keys)

    def loss(index, visible, g, implementation):
        scores = pk.index_scores(index, visible, implementation=implementation)
        return jnp.where(scores > -jnp.inf, scores * g, 0).sum(), scores

    def run(implementation):
        return jax.value_and_grad(functools.partial(loss, implementation=implementation), has_aux=True)

    (_, expected), gradients = in_float64(run("reference"), arrays, visible, cotangent)
    (_, scores), actual = jax.jit(run(implementation))(arrays, visible, cotangent)
    assert_close(scores, expected, what="scores")
    for name, got, want in zip(("q_index", "k_index", "weights"), actual, gradients, strict=True):
        assert_close(got, want, what=name)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_invisible_keys_never_matter(implementation):
    shape = INDEX_SHAPES["odd_lengths"]
    q, k, w = inputs(shape)
    visible = jax.tree.map(lambda x: jnp.clip(x, 5, 40), ranges("random", 2, shape.queries, shape.keys))
    clean = jitted(IndexHeads(q, k, w), visible, topk=5, implementation=implementation)
    for poison in (np.nan, np.inf, 3e38):
        dirty = k.at[:, :5].set(poison).at[:, 40:].set(poison)
        np.testing.assert_array_equal(jitted(IndexHeads(q, dirty, w), visible, topk=5, implementation=implementation), clean)


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, "pallas"])
def test_a_query_that_sees_nothing_may_hold_anything(implementation):
    q, k, w = inputs(INDEX_SHAPES["odd_lengths"])
    start = jnp.zeros(q.shape[:2], jnp.int32)
    end = jnp.full(q.shape[:2], k.shape[1], jnp.int32).at[:, 1].set(0)

    def gradients(q, w):
        def total(index):
            scores = pk.index_scores(index, Visible(start, end), implementation=implementation)
            return jnp.where(jnp.isfinite(scores), scores, 0).sum()

        return jax.grad(total)(IndexHeads(q, k, w))

    clean, dirty = gradients(q, w), gradients(q.at[:, 1].set(jnp.nan), w.at[:, 1].set(jnp.nan))
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_awkward_scores(implementation):
    """-0.0 equals 0.0; NaN and -inf are the lowest finite number but visible, so they are taken before nothing."""
    k = jnp.asarray([[[1.0], [-1.0], [np.nan], [2.0], [3e38], [-5.0]]])
    q, w = jnp.asarray([[[[1.0]], [[3e38]]]]), jnp.asarray([[[-1.0], [-1.0]]])
    visible = Visible(jnp.zeros((1, 2), jnp.int32), jnp.full((1, 2), 6, jnp.int32))
    # Row 0: scores -1 -0 nan -2 -3e38 -0; row 1: -3e38 -0 nan -inf -inf -0.
    for topk, rows in {
        2: [[1, 5], [1, 5]],
        3: [[0, 1, 5], [0, 1, 5]],
        4: [[0, 1, 3, 5], [0, 1, 2, 5]],
        6: [range(6), range(6)],
    }.items():
        picked = pk.index_topk(IndexHeads(q, k, w), topk=topk, visible=visible, implementation=implementation)
        np.testing.assert_array_equal(picked[0], np.asarray([list(row) for row in rows]))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_selection_carries_no_gradient_and_is_deterministic(implementation):
    shape = INDEX_SHAPES["odd_lengths"]
    arrays, visible = inputs(shape, normal), ranges("causal", 2, shape.queries, shape.keys)

    def loss(q):
        picked = pk.index_topk(arrays._replace(q=q), visible, topk=5, implementation=implementation)
        return picked.astype(jnp.float32).sum() + q.sum()

    gradient = jax.jit(jax.grad(loss))(arrays[0])
    np.testing.assert_array_equal(gradient, np.ones(gradient.shape))
    first, second = (jitted(arrays, visible, topk=5, implementation=implementation) for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_float64_and_bfloat16_inputs():
    shape = INDEX_SHAPES["odd_lengths"]
    visible = ranges("causal", 2, shape.queries, shape.keys)
    arrays = inputs(shape)
    half = arrays._replace(q=arrays.q.astype(jnp.bfloat16), k=arrays.k.astype(jnp.bfloat16))
    expected = jitted(arrays, visible, topk=5, implementation="reference")
    for implementation in IMPLEMENTATIONS:
        np.testing.assert_array_equal(jitted(half, visible, topk=5, implementation=implementation), expected)
        call = functools.partial(pk.index_topk, topk=5, implementation=implementation)
        np.testing.assert_array_equal(in_float64(call, arrays, visible), expected)
        scores = in_float64(functools.partial(pk.index_scores, implementation=implementation), arrays, visible)
        assert scores.dtype == np.float64


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from([-2.0, -0.0, 0.0, 1.0, 1.0000001, 3e38, -np.inf, np.nan]), min_size=24, max_size=24), st.data())
def test_reference_and_blocks_agree_on_any_scores(values, data):
    keep = data.draw(st.integers(0, 24))
    visible = jnp.arange(24)[None, None] < keep
    scores = jnp.asarray(values, jnp.float32)[None, None]
    expected = canonical_topk(scores, visible, 7)
    ranked = jnp.where(visible, rank_scores(scores), -jnp.inf)
    ascending = largest_ascending(ranked, 7)
    np.testing.assert_array_equal(jnp.where(ascending < 24, ascending, -1), expected)
