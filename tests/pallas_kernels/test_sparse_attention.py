"""Sparse attention: literal case, float64 reference with gradients through out and lse, hostile inputs, properties."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_helpers import IMPLEMENTATIONS, assert_close, in_float64, normal, ranges
from shapes import ATTENTION_SHAPES

import pallas_kernels as pk

INVALID = (-1, -123456, np.iinfo(np.int32).min, np.iinfo(np.int32).max, 114514)


def inputs(shape, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    q = normal(rng, shape.batch, shape.queries, shape.heads, shape.dim, dtype=dtype)
    k = normal(rng, shape.batch, shape.keys, shape.groups, shape.dim, dtype=dtype)
    v = None if shape.value_dim is None else normal(rng, shape.batch, shape.keys, shape.groups, shape.value_dim, dtype=dtype)
    return q, k, v


def selection(shape, seed=0):
    """Distinct keys in random order, about a third of the slots invalid, every fifth query with none valid."""
    rng = np.random.default_rng(seed)
    rows = np.empty((shape.batch * shape.queries, shape.topk), np.int32)
    for number, row in enumerate(rows):
        row[:] = rng.choice([*INVALID, shape.keys], shape.topk)
        chosen = rng.permutation(shape.keys)[: shape.topk]
        kept = rng.random(len(chosen)) < (0.0 if number % 5 == 4 else 0.67)
        row[: len(chosen)][kept] = chosen[kept]
    return jnp.asarray(rows.reshape(shape.batch, shape.queries, shape.topk))


def loss(q, k, v, indices, d_out, d_lse, *, d_v, implementation):
    out, lse = pk.sparse_attention(q, k, v, indices, softmax_scale=0.3, d_v=d_v, implementation=implementation)
    total = (out * d_out).sum() + jnp.where(lse > -jnp.inf, lse * d_lse, 0).sum()
    return total, (out, lse)


def with_gradients(implementation, d_v, has_v):
    function = functools.partial(loss, d_v=d_v, implementation=implementation)
    return jax.value_and_grad(function, (0, 1, 2) if has_v else (0, 1), has_aux=True)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_literal_case(implementation):
    q = jnp.asarray([[[[1.0]], [[1.0]], [[0.0]]]])
    k, v = jnp.log(jnp.asarray([1.0, 3.0, 7.0])).reshape(1, 3, 1, 1), jnp.asarray([8.0, 4.0, 100.0]).reshape(1, 3, 1, 1)
    picked = jnp.asarray([[[0, 1], [-1, 3], [1, -1]]])
    out, lse = pk.sparse_attention(q, k, v, picked, softmax_scale=1.0, implementation=implementation)
    # Query 0 weighs keys 0 and 1 as 1 : 3; query 1 has no valid key; query 2 has key 1 alone.
    np.testing.assert_allclose(out[0, :, 0, 0], [5.0, 0.0, 4.0], rtol=1e-6)
    np.testing.assert_allclose(lse[0, :, 0], [np.log(4.0), -np.inf, 0.0], rtol=1e-6)


@pytest.mark.parametrize("name", ATTENTION_SHAPES)
def test_matches_float64_with_gradients(name):
    shape, rng = ATTENTION_SHAPES[name], np.random.default_rng(7)
    (q, k, v), indices = inputs(shape), selection(shape)
    width = shape.value_dim or shape.d_v or shape.dim
    cotangents = normal(rng, *q.shape[:3], width), normal(rng, *q.shape[:3])
    arrays = (q, k, *(() if v is None else (v,)), indices, *cotangents)

    def run(implementation):
        function = with_gradients(implementation, shape.d_v, v is not None)
        return function if v is not None else lambda q, k, *rest: function(q, k, None, *rest)

    (_, expected), gradients = in_float64(run("reference"), *arrays)
    for implementation in IMPLEMENTATIONS if name == "latent" else IMPLEMENTATIONS[1:]:
        (_, outputs), actual = jax.jit(run(implementation))(*arrays)
        for what, got, want in zip(("out", "lse"), outputs, expected, strict=True):
            assert_close(got, want, what=f"{implementation} {what}")
        for what, got, want in zip("qkv", actual, gradients, strict=False):
            assert_close(got, want, what=f"{implementation} d{what}")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_unselected_keys_and_empty_queries_may_hold_anything(implementation):
    shape = ATTENTION_SHAPES["latent"]
    (q, k, _), indices = inputs(shape), np.array(selection(shape))
    indices[(indices >= 0) & (indices < 10)] = -1  # keys 0 to 9 are selected by nobody
    indices, empty = jnp.asarray(indices), jnp.asarray(((indices < 0) | (indices >= shape.keys)).all(-1))
    cotangents = normal(np.random.default_rng(3), *q.shape[:3], 8), normal(np.random.default_rng(4), *q.shape[:3])
    function = jax.jit(lambda q, k: with_gradients(implementation, 8, False)(q, k, None, indices, *cotangents))
    (_, clean), clean_gradients = function(q, k)
    for poison in (np.nan, 3e38):
        (_, dirty), gradients = function(jnp.where(empty[..., None, None], poison, q), k.at[:, :10].set(poison))
        jax.tree.map(np.testing.assert_array_equal, (dirty, gradients), (clean, clean_gradients))
    empty = np.asarray(empty)
    assert np.all(np.asarray(clean[0])[empty] == 0) and np.all(np.isneginf(np.asarray(clean[1])[empty]))
    assert np.all(np.asarray(clean_gradients[0])[empty] == 0) and np.all(np.asarray(clean_gradients[1])[:, :10] == 0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_and_float64(implementation):
    shape = ATTENTION_SHAPES["grouped"]
    (q, k, v), indices = inputs(shape), selection(shape)
    call = functools.partial(pk.sparse_attention, softmax_scale=0.3)
    half = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    expected = in_float64(functools.partial(call, implementation="reference"), *half, indices)
    out, lse = jax.jit(functools.partial(call, implementation=implementation))(*half, indices)
    assert (out.dtype, lse.dtype) == (jnp.bfloat16, jnp.float32)
    assert_close(out, expected.out, "bfloat16", "out")
    assert_close(lse, expected.lse, "float32", "lse")
    wide = in_float64(functools.partial(call, implementation=implementation), *half, indices)
    assert (wide.out.dtype, wide.lse.dtype) == (np.float64, np.float64)
    assert_close(wide.out, expected.out, "float64", "out in float64")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_topk_of_whole_context_is_dense_attention_and_runs_are_bitwise_equal(implementation):
    shape = ATTENTION_SHAPES["latent"]
    q, k, _ = inputs(shape)
    visible = ranges("random", shape.batch, shape.queries, shape.keys)
    position = jnp.arange(shape.keys, dtype=jnp.int32)
    inside = (position >= visible.start[..., None]) & (position < visible.end[..., None])
    everything = jnp.where(inside, position, -1)
    dense = pk.dense_attention(q, k, None, softmax_scale=0.3, d_v=8, visible=visible, implementation=implementation)

    def sparse():
        return pk.sparse_attention(q, k, None, everything, softmax_scale=0.3, d_v=8, implementation=implementation)

    first, second = sparse(), sparse()
    assert_close(first.out, dense.out, what="out")
    assert_close(first.lse, dense.lse, what="lse")
    jax.tree.map(np.testing.assert_array_equal, first, second)


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 2**31 - 1))
def test_order_of_the_selection_does_not_matter_and_halves_merge_by_lse(seed):
    shape = ATTENTION_SHAPES["grouped"]
    (q, k, v), indices = inputs(shape, seed), selection(shape, seed)
    call = jax.jit(functools.partial(pk.sparse_attention, softmax_scale=0.3, implementation="xla"))
    whole = call(q, k, v, indices)
    shuffled = call(q, k, v, jnp.asarray(np.random.default_rng(seed).permutation(np.asarray(indices), axis=-1)))
    assert_close(shuffled.out, whole.out, what="shuffled")
    parts = [call(q, k, v, part) for part in (indices.at[..., :20].set(-1), indices.at[..., 20:].set(-1))]
    merged = np.logaddexp(*(np.asarray(part.lse) for part in parts))
    assert_close(merged, whole.lse, what="merged lse")
    with np.errstate(invalid="ignore"):
        shares = [np.nan_to_num(np.exp(np.asarray(part.lse) - merged)) for part in parts]
    assert_close(
        sum(s[..., None] * np.asarray(part.out) for s, part in zip(shares, parts, strict=True)), whole.out, what="merged"
    )
