"""Index scores and selection in Pallas: interpreted against the float64 reference, exact selections, hostile inputs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ops_helpers import RANGE_KINDS, assert_close, in_float64, normal, ranges, small_integers
from shapes import INDEX_SHAPES, IndexShape
from test_index_topk import inputs

import pallas_kernels as pk
from pallas_kernels import IndexHeads, Visible
from pallas_kernels.index_topk import pallas_gpu, reference
from pallas_kernels.quantize import quantize_fp8
from pallas_kernels.tuning import QueryTiles

SMALL = QueryTiles(16, 32, block_q=8)
SHAPES = {
    **{name: shape for name, shape in INDEX_SHAPES.items() if name != "several_chunks_and_blocks"},
    "62_queries_several_blocks": IndexShape(1, 62, 213, 5, 24, 17),
    "213_queries": IndexShape(1, 213, 95, 20, 16, 8),
}


@functools.partial(jax.jit, static_argnames=("topk", "score_budget"))
def selected(index, visible, *, topk, score_budget=pallas_gpu.KERNEL_SCORE_BUDGET):
    return pallas_gpu.index_topk(index, visible, topk=topk, score_budget=score_budget, tiles=SMALL)


@pytest.mark.parametrize("name", SHAPES)
def test_scores_match_float64(name):
    shape = SHAPES[name]
    arrays = inputs(shape, normal)
    for kind in RANGE_KINDS if name == "213_queries" else ("causal", "random"):
        visible = ranges(kind, shape.batch, shape.queries, shape.keys)
        scores = pallas_gpu.index_scores(arrays, visible, tiles=SMALL)
        assert scores.dtype == jnp.float32
        assert_close(scores, in_float64(reference.index_scores, arrays, visible), what=kind)


@pytest.mark.parametrize("name", ["no_queries", "no_keys", "one_query", "odd_lengths", "62_queries_several_blocks"])
def test_selection_is_exact(name):
    shape = SHAPES[name]
    arrays = inputs(shape)
    for kind in RANGE_KINDS if name == "62_queries_several_blocks" else ("random", "mostly_empty"):
        visible = ranges(kind, shape.batch, shape.queries, shape.keys)
        expected = pk.index_topk(arrays, visible, topk=shape.topk, implementation="reference")
        np.testing.assert_array_equal(selected(arrays, visible, topk=shape.topk), expected, err_msg=kind)


def test_selection_is_the_same_in_chunks_of_queries():
    shape = SHAPES["62_queries_several_blocks"]
    arrays, visible = inputs(shape), ranges("causal", shape.batch, shape.queries, shape.keys)
    whole = selected(arrays, visible, topk=shape.topk)
    np.testing.assert_array_equal(selected(arrays, visible, topk=shape.topk, score_budget=9 * shape.keys), whole)


def test_thousands_of_equal_scores_go_to_the_lower_positions():
    keys, topk = 2600, 300
    k = jnp.where(jnp.arange(keys) % 25 == 7, 1.0, -1.0)[None, :, None]  # 104 positive scores, all others exactly zero
    q, w = jnp.ones((1, 2, 1, 1)), jnp.asarray([[[1.0], [-1.0]]])
    visible = Visible(jnp.asarray([[3, 0]]), jnp.full((1, 2), keys))
    picked = np.asarray(selected(IndexHeads(q, k, w), visible, topk=topk))
    positive = np.arange(7, keys, 25)
    zeros = np.setdiff1d(np.arange(3, keys), positive)[: topk - len(positive)]
    np.testing.assert_array_equal(picked[0, 0], np.sort(np.concatenate([positive, zeros])))
    # A negative weight turns the positive scores negative and the zeros into -0.0, which are still equal.
    np.testing.assert_array_equal(picked[0, 1], np.setdiff1d(np.arange(keys), positive)[:topk])


def test_awkward_scores():
    """-0.0 equals 0.0; NaN and -inf are the lowest finite number but visible, so they are taken before nothing."""
    k = jnp.asarray([[[1.0], [-1.0], [np.nan], [2.0], [3e38], [-5.0]]])
    q, w = jnp.asarray([[[[1.0]], [[3e38]]]]), jnp.asarray([[[-1.0], [-1.0]]])
    visible = Visible(jnp.zeros((1, 2), jnp.int32), jnp.full((1, 2), 6, jnp.int32))
    for topk, rows in {2: [[1, 5], [1, 5]], 4: [[0, 1, 3, 5], [0, 1, 2, 5]]}.items():
        np.testing.assert_array_equal(selected(IndexHeads(q, k, w), visible, topk=topk)[0], rows)


@pytest.mark.parametrize("poison", [np.nan, np.inf, 3e38])
def test_invisible_keys_never_matter(poison):
    shape = SHAPES["odd_lengths"]
    q, k, w = inputs(shape)
    visible = jax.tree.map(lambda x: jnp.clip(x, 5, 40), ranges("random", 2, shape.queries, shape.keys))
    empty = visible.start == visible.end
    dirty_q, dirty_k = jnp.where(empty[..., None, None], poison, q), k.at[:, :5].set(poison).at[:, 40:].set(poison)
    clean, dirty = IndexHeads(q, k, w), IndexHeads(dirty_q, dirty_k, w)
    for function in (functools.partial(selected, topk=5), functools.partial(pallas_gpu.index_scores, tiles=SMALL)):
        np.testing.assert_array_equal(function(dirty, visible), function(clean, visible))


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_low_precision_inputs_are_exact_products(dtype):
    shape = SHAPES["odd_lengths"]
    q, k, w = inputs(shape)
    visible = ranges("causal", shape.batch, shape.queries, shape.keys)
    low = IndexHeads(q.astype(dtype), k.astype(dtype), w)
    np.testing.assert_array_equal(selected(low, visible, topk=5), selected(IndexHeads(q, k, w), visible, topk=5))
    for implementation in ("pallas", "xla"):
        scores = pk.index_scores(low, visible, implementation=implementation)
        np.testing.assert_array_equal(scores, reference.index_scores(IndexHeads(q, k, w), visible))


def test_fp8_scales_fold_into_weights_and_keys():
    shape, rng = SHAPES["62_queries_several_blocks"], np.random.default_rng(3)
    q, k, w = inputs(shape, normal)
    k = k * jnp.exp2(jnp.asarray(rng.integers(-6, 6, (1, shape.keys, 1)), jnp.float32))
    visible = ranges("causal", shape.batch, shape.queries, shape.keys)
    q8, k8 = quantize_fp8(q), quantize_fp8(k)
    quantized = IndexHeads(q8.values, k8.values, w * q8.scales)
    rounded = q8.values.astype(jnp.float32) * q8.scales[..., None], k8.values.astype(jnp.float32) * k8.scales[..., None], w
    expected = in_float64(reference.index_scores, IndexHeads(*rounded), visible)
    poisoned = k8.scales.at[:, -1].set(np.nan)  # the last key is seen by the last query only
    for implementation in ("pallas", "xla", "reference"):
        call = functools.partial(pk.index_scores, quantized, visible, implementation=implementation)
        assert_close(call(k_scale=k8.scales), expected, what=implementation)
        np.testing.assert_array_equal(call(k_scale=poisoned)[:, :-1], call(k_scale=k8.scales)[:, :-1])
    picked = [pk.index_topk(quantized, visible, k_scale=k8.scales, topk=9, implementation=name) for name in ("pallas", "xla")]
    np.testing.assert_array_equal(*picked)


def test_gradient_of_the_scores():
    shape, rng = SHAPES["odd_lengths"], np.random.default_rng(1)
    arrays, visible = inputs(shape, normal), ranges("random", shape.batch, shape.queries, shape.keys)
    k_scale = jnp.abs(normal(rng, shape.batch, shape.keys)) + 0.5
    cotangent = normal(rng, shape.batch, shape.queries, shape.keys)

    def loss(index, k_scale, g, visible, implementation):
        scores = pk.index_scores(index, visible, k_scale=k_scale, implementation=implementation)
        return jnp.where(scores > -jnp.inf, scores * g, 0).sum()

    def gradient(implementation):
        return jax.grad(functools.partial(loss, implementation=implementation), (0, 1))

    expected = in_float64(gradient("reference"), arrays, k_scale, cotangent, visible)
    jax.tree.map(assert_close, gradient("pallas")(arrays, k_scale, cotangent, visible), expected)


def test_small_integers_repeat_their_bits_through_the_public_op():
    rng = np.random.default_rng(4)
    arrays = IndexHeads(small_integers(rng, 1, 1, 4, 16), small_integers(rng, 1, 500, 16), small_integers(rng, 1, 1, 4))
    visible = Visible(jnp.zeros((1, 1), jnp.int32), jnp.full((1, 1), 500, jnp.int32))
    first, second = (pk.index_topk(arrays, visible, topk=64, implementation=name) for name in ("pallas", "reference"))
    np.testing.assert_array_equal(first, second)
    assert "pallas" in pk.implementations_chosen()["index_topk"].split(",")


def test_what_is_not_covered_says_so():
    q, k, w = inputs(SHAPES["odd_lengths"])
    visible = ranges("causal", 2, 37, 53)
    with pytest.raises(NotImplementedError, match=r"pallas got bfloat16, float32; it needs index\.q and index\.k"):
        pk.index_scores(IndexHeads(q.astype(jnp.bfloat16), k, w), visible, implementation="pallas")
    with pytest.raises(ValueError, match=r"k_scale has shape \[2, 52\]; expected \[2, 53\]"):
        pk.index_scores(IndexHeads(q, k, w), visible, k_scale=jnp.ones((2, 52)))
    with pytest.raises(ValueError, match=r"index\.q has dtype float8_e4m3fn"):
        pk.index_scores(IndexHeads(q.astype(jnp.float8_e4m3fn), k, w), visible)
