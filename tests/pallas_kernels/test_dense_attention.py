"""Dense attention over ranges and the oracle selection: literal case, float64 reference with gradients, hostile inputs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ops_helpers import IMPLEMENTATIONS, assert_close, clipped, in_float64, normal, ranges
from shapes import ATTENTION_SHAPES

import pallas_kernels as pk
from pallas_kernels import Visible


def inputs(shape, seed=0):
    rng = np.random.default_rng(seed)
    q = normal(rng, shape.batch, shape.queries, shape.heads, shape.dim)
    k = normal(rng, shape.batch, shape.keys, shape.groups, shape.dim)
    v = None if shape.value_dim is None else normal(rng, shape.batch, shape.keys, shape.groups, shape.value_dim)
    return q, k, v


def loss(q, k, v, d_out, d_lse, *, d_v, implementation, visible):
    out, lse = pk.dense_attention(q, k, v, softmax_scale=0.3, d_v=d_v, visible=visible, implementation=implementation)
    return (out * d_out).sum() + jnp.where(lse > -jnp.inf, lse * d_lse, 0).sum(), (out, lse)


def with_gradients(implementation, d_v, has_v):
    function = functools.partial(loss, d_v=d_v, implementation=implementation)
    if has_v:
        return jax.value_and_grad(function, (0, 1, 2), has_aux=True)
    latent = jax.value_and_grad(function, (0, 1), has_aux=True)
    return lambda q, k, *rest, visible: latent(q, k, None, *rest, visible=visible)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_literal_case(implementation):
    q = jnp.asarray([[[[1.0]], [[1.0]], [[0.0]]]])
    k, v = jnp.log(jnp.asarray([1.0, 3.0, 4.0])).reshape(1, 3, 1, 1), jnp.asarray([8.0, 4.0, 1.0]).reshape(1, 3, 1, 1)
    visible = Visible(jnp.asarray([[0, 2, 1]]), jnp.asarray([[3, 2, 9]]))
    out, lse = pk.dense_attention(q, k, v, softmax_scale=1.0, visible=visible, implementation=implementation)
    # Query 0: (8 + 3 * 4 + 4 * 1) / 8; query 1 sees nothing; query 2 averages keys 1 and 2, the bound 9 is clamped.
    np.testing.assert_allclose(out[0, :, 0, 0], [3.0, 0.0, 2.5], rtol=1e-6)
    np.testing.assert_allclose(lse[0, :, 0], [np.log(8.0), -np.inf, np.log(2.0)], rtol=1e-6)
    picked = pk.attention_topk(q, k, lse, softmax_scale=1.0, topk=2, visible=visible, implementation=implementation)
    np.testing.assert_array_equal(picked, [[[1, 2], [-1, -1], [1, 2]]])
    best = pk.attention_topk(q, k, lse, softmax_scale=1.0, topk=1, visible=visible, implementation=implementation)
    np.testing.assert_array_equal(best, [[[2], [-1], [1]]])  # query 2: a tie, the lower position wins
    visible = jax.tree.map(lambda x: jnp.where(x == 2, np.iinfo(np.int32).max, x), visible)
    picked = pk.attention_topk(q, k, lse, softmax_scale=1.0, topk=4, visible=visible, implementation=implementation)
    np.testing.assert_array_equal(picked, [[[0, 1, 2, -1], [-1] * 4, [1, 2, -1, -1]]])


CASES = [
    ("one_query", "causal"),
    ("no_queries", "causal"),
    ("no_keys", "causal"),
    ("latent", "random"),
    ("latent", "mostly_empty"),
    ("grouped", "packed"),
    ("several_chunks_and_blocks", "causal"),
]


@pytest.mark.parametrize(("name", "kind"), CASES, ids=["-".join(case) for case in CASES])
def test_matches_float64_with_gradients(name, kind):
    shape, rng = ATTENTION_SHAPES[name], np.random.default_rng(7)
    q, k, v = inputs(shape)
    visible = ranges(kind, shape.batch, shape.queries, shape.keys)
    width = shape.value_dim or shape.d_v or shape.dim
    arrays = (q, k, *(() if v is None else (v,)), normal(rng, *q.shape[:3], width), normal(rng, *q.shape[:3]))
    (_, expected), gradients = in_float64(with_gradients("reference", shape.d_v, v is not None), *arrays, visible=visible)
    for implementation in IMPLEMENTATIONS if name == "latent" else IMPLEMENTATIONS[1:]:
        (_, outputs), actual = jax.jit(with_gradients(implementation, shape.d_v, v is not None))(*arrays, visible=visible)
        for what, got, want in zip(("out", "lse"), outputs, expected, strict=True):
            assert_close(got, want, what=f"{implementation} {what}")
        for what, got, want in zip("qkv", actual, gradients, strict=False):
            assert_close(got, want, what=f"{implementation} d{what}")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_keys_nobody_sees_and_empty_queries_may_hold_anything(implementation):
    shape = ATTENTION_SHAPES["grouped"]
    q, k, v = inputs(shape)
    visible = ranges("random", shape.batch, shape.queries, shape.keys, 5)
    visible = jax.tree.map(lambda x: jnp.clip(x, 4, 18), visible)
    empty = np.equal(*clipped(visible, shape.keys))
    assert empty.any() and not empty.all()
    cotangents = normal(np.random.default_rng(3), *q.shape[:3], 5), normal(np.random.default_rng(4), *q.shape[:3])
    function = jax.jit(with_gradients(implementation, None, True))
    (_, clean), clean_gradients = function(q, k, v, *cotangents, visible=visible)
    for poison in (np.nan, 3e38):
        dirty_k, dirty_v = (x.at[:, :4].set(poison).at[:, 18:].set(poison) for x in (k, v))
        dirty_q, dirty_cotangent = (jnp.where(empty[..., None, None], poison, x) for x in (q, cotangents[0]))
        (_, dirty), gradients = function(dirty_q, dirty_k, dirty_v, dirty_cotangent, cotangents[1], visible=visible)
        jax.tree.map(np.testing.assert_array_equal, (dirty, gradients), (clean, clean_gradients))
    assert np.all(np.asarray(clean_gradients[0])[empty] == 0) and np.all(np.asarray(clean_gradients[1])[:, :4] == 0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_future_keys_have_exactly_zero_gradient_and_bfloat16_stays_close(implementation):
    shape = ATTENTION_SHAPES["latent"]
    q, k, _ = inputs(shape)
    visible = ranges("causal", shape.batch, shape.queries, shape.keys)

    def early(q, k):
        output = pk.dense_attention(q, k, None, softmax_scale=0.3, d_v=8, visible=visible, implementation=implementation)
        return output.out[:, :10].astype(jnp.float32).sum(), output

    (_, output), gradient = jax.jit(jax.value_and_grad(early, 1, has_aux=True))(q, k)
    first_hidden = int(visible.end[0, 9])
    assert np.all(np.asarray(gradient)[:, first_hidden:] == 0)
    assert np.all(np.abs(np.asarray(gradient)[:, :first_hidden]).sum((2, 3)) > 0)
    half = jax.jit(early)(q.astype(jnp.bfloat16), k.astype(jnp.bfloat16))[1]
    assert (half.out.dtype, half.lse.dtype) == (jnp.bfloat16, jnp.float32)
    assert_close(half.out, output.out, "bfloat16")


def test_oracle_selects_the_keys_of_largest_summed_probability():
    shape = ATTENTION_SHAPES["grouped"]
    q, k, v = inputs(shape)
    visible = ranges("random", shape.batch, shape.queries, shape.keys)
    dense = in_float64(
        functools.partial(pk.dense_attention, softmax_scale=0.3, implementation="reference"), q, k, v, visible=visible
    )
    logits = 0.3 * np.einsum("bthd,bshd->bths", np.asarray(q, float), np.repeat(np.asarray(k, float), 2, 2))
    with np.errstate(over="ignore", invalid="ignore"):
        mass = np.exp(logits - dense.lse[..., None]).sum(2)
    start, end = clipped(visible, shape.keys)
    for implementation in IMPLEMENTATIONS:
        call = functools.partial(pk.attention_topk, softmax_scale=0.3, topk=4, implementation=implementation)
        picked = np.asarray(jax.jit(call)(q, k, jnp.asarray(dense.lse, jnp.float32), visible=visible))
        for b, t in np.ndindex(*start.shape):
            seen = np.arange(start[b, t], end[b, t])
            best = np.sort(seen[np.argsort(-mass[b, t, seen], kind="stable")[:4]])
            np.testing.assert_array_equal(picked[b, t], np.pad(best, (0, 4 - len(best)), constant_values=-1))
