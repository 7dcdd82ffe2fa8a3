"""A logit without a value in every softmax: float64 with the logit written out, gradients, rows that see nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ops_helpers import IMPLEMENTATIONS, assert_close, clipped, normal, ranges
from shapes import ATTENTION_SHAPES
from test_sparse_attention import inputs, selection

import pallas_kernels as pk

SCALE = 0.3
CASES = [
    *((op, implementation, "float32") for op in ("sparse", "dense") for implementation in IMPLEMENTATIONS),
    ("sparse", "pallas", "float32"),
    *((op, "xla", "bfloat16") for op in ("sparse", "dense")),
    ("sparse", "pallas", "bfloat16"),
]


def case(op, name):
    """(q, k, v, sink, cotangents of out and lse, where each query attends [B, T, S], how often; the op's own argument)."""
    shape, rng = ATTENTION_SHAPES[name], np.random.default_rng(5)
    q, k, v = inputs(shape)
    sink = 2 * normal(rng, shape.heads)
    width = k.shape[-1] if v is None else v.shape[-1]
    cotangents = normal(rng, *q.shape[:3], width), normal(rng, *q.shape[:3])
    position = np.arange(shape.keys)
    if op == "sparse":
        chosen = selection(shape).at[:, 1].set(-1)
        count = (np.asarray(chosen)[..., None] == position).sum(2)
    else:
        chosen = ranges("random", shape.batch, shape.queries, shape.keys)
        chosen = jax.tree.map(lambda bound: bound.at[:, 1].set(3), chosen)
        start, end = clipped(chosen, shape.keys)
        count = ((position >= start[..., None]) & (position < end[..., None])).astype(int)
    assert (count.sum(-1) == 0).any() and (count.sum(-1) > 0).any()
    return q, k, v, sink, cotangents, count, chosen


def written_out(q, k, v, sink, count):
    """(out, lse): the sink is one more column of the logits, and the values have a row of zeros for it."""
    repeat = lambda x: jnp.repeat(x, q.shape[2] // k.shape[2], axis=2)
    values = k if v is None else v
    logits = SCALE * jnp.einsum("bthd,bshd->bths", q, repeat(k)) + jnp.log(count)[:, :, None]
    logits = jnp.concatenate([logits, jnp.broadcast_to(sink[:, None], (*logits.shape[:3], 1))], axis=-1)
    probability = jax.nn.softmax(logits, axis=-1)[..., :-1]
    return jnp.einsum("bths,bshd->bthd", probability, repeat(values)), jax.nn.logsumexp(logits, axis=-1)


@pytest.mark.parametrize("name", ["latent", "grouped"])
@pytest.mark.parametrize(("op", "implementation", "dtype"), CASES)
def test_outputs_and_gradients_match_float64(op, implementation, dtype, name):
    q, k, v, sink, (d_out, d_lse), count, chosen = case(op, name)
    q, k, v = jax.tree.map(lambda x: x.astype(dtype), (q, k, v))
    attend = pk.sparse_attention if op == "sparse" else pk.dense_attention
    call = functools.partial(attend, softmax_scale=SCALE, implementation=implementation)

    def loss(arrays, attend):
        q, k, v, sink = arrays
        out, lse = attend(q, k, v, sink)
        return (out.astype(lse.dtype) * d_out).sum() + (lse * d_lse).sum(), (out, lse)

    ours = functools.partial(loss, attend=lambda q, k, v, sink: call(q, k, v, chosen, sink=sink))
    actual, outputs = jax.jit(jax.grad(ours, has_aux=True))((q, k, v, sink))
    assert outputs[0].dtype == dtype and outputs[1].dtype == jnp.float32 and actual[3].dtype == jnp.float32
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), (q, k, v, sink))
        by_hand = functools.partial(loss, attend=functools.partial(written_out, count=jnp.asarray(count, jnp.float64)))
        gradients, expected = jax.tree.map(np.asarray, jax.grad(by_hand, has_aux=True)(wide))
    for what, got, want in zip(("out", "lse"), outputs, expected, strict=True):
        assert_close(got, want, dtype if what == "out" else "float32", what)
    for what, got, want in zip(("q", "k", "v", "sink"), actual, gradients, strict=True):
        if want is not None:
            assert_close(got, want, dtype, f"d{what}")
    empty = count.sum(-1) == 0
    assert np.all(np.asarray(outputs[0])[empty] == 0)
    np.testing.assert_array_equal(np.asarray(outputs[1])[empty], np.broadcast_to(sink, outputs[1].shape)[empty])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_cotangent_of_an_empty_row_may_be_anything_and_a_sink_of_minus_infinity_is_none(implementation):
    q, k, v, _, _, count, chosen = case("sparse", "grouped")
    call = functools.partial(pk.sparse_attention, softmax_scale=SCALE, implementation=implementation)
    nothing = jnp.full(q.shape[2], -jnp.inf)
    plain, same = call(q, k, v, chosen), call(q, k, v, chosen, sink=nothing)
    jax.tree.map(np.testing.assert_array_equal, plain, same)
    empty = jnp.asarray(count.sum(-1) == 0)[..., None, None]

    def gradients(poison, sink):
        weight = jnp.where(empty, poison, 1.0)
        out = lambda *arrays: jnp.sum(call(*arrays[:3], chosen, sink=arrays[3]).out * weight)
        return jax.grad(out, (0, 1, 2, 3))(q, k, v, sink)

    for sink in (jnp.zeros(q.shape[2]), nothing):
        clean, dirty = gradients(1.0, sink), gradients(jnp.nan, sink)
        jax.tree.map(np.testing.assert_array_equal, dirty, clean)
        assert all(np.isfinite(x).all() for x in clean)
