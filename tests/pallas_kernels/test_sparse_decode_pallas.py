"""Sparse attention of few queries: the selection split over programs, and the packed fp8 pool, against float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ops_helpers import assert_close, in_float64, normal
from shapes import AttentionShape
from test_sparse_attention import inputs, selection

import pallas_kernels as pk
from pallas_kernels.common.gpu_tiles import Problem, Tiles
from pallas_kernels.quantize import latent_row_bytes, pack_latent_fp8, unpack_latent_fp8
from pallas_kernels.sparse_attention import pallas_gpu, pallas_gpu_fp8, reference
from pallas_kernels.sparse_attention.pallas_gpu_tiles import Options, default_options, default_splits

SCALE = 0.3
SMALL = Tiles(16, 16)
HOSTILE = (np.iinfo(np.int32).min, -123456, -1, 114514, np.iinfo(np.int32).max)


def split(count):
    return Options(SMALL, SMALL, SMALL, deterministic=True, splits=count)


@pytest.mark.parametrize("splits", [2, 8])
@pytest.mark.parametrize(
    "shape",
    [AttentionShape(2, 1, 62, 4, 1, 20, None, 16, 70), AttentionShape(1, 3, 213, 6, 2, 16, 16, None, 100)],
    ids=["latent_topk_beyond_context", "grouped"],
)
def test_splits_match_float64(shape, splits):
    q, k, v = inputs(shape)
    # The second half of every list is absent, so that whole programs have nothing to do.
    indices = selection(shape).at[..., shape.topk // 2 :].set(-1)
    call = functools.partial(pallas_gpu.sparse_attention, softmax_scale=SCALE, d_v=shape.d_v, options=split(splits))
    out, lse = jax.jit(call)(q, k, v, indices)

    def definition(q, k, indices, v=None):
        return reference.sparse_attention(q, k, v, indices, softmax_scale=SCALE, d_v=shape.d_v)

    expected = in_float64(definition, q, k, indices, *(() if v is None else (v,)))
    assert_close(out, expected[0], what="out")
    assert_close(lse, expected[1], what="lse")


def test_gradient_does_not_depend_on_the_split():
    shape = AttentionShape(1, 2, 40, 4, 1, 20, None, 16, 48)
    (q, k, _), indices = inputs(shape), selection(shape)

    def loss(q, k, splits):
        out, lse = pallas_gpu.sparse_attention(q, k, None, indices, softmax_scale=SCALE, d_v=16, options=split(splits))
        return out.sum() + jnp.where(lse > -jnp.inf, lse, 0).sum()

    whole, parts = (jax.jit(jax.grad(functools.partial(loss, splits=n), (0, 1)))(q, k) for n in (1, 4))
    for got, want in zip(parts, whole, strict=True):
        assert_close(got, want)


def test_rule_for_splits():
    latent = Problem(128, 1, 576, 512, True, 1.0, False)
    options = functools.partial(default_options, latent, jnp.dtype(jnp.bfloat16), topk=2048)
    # Two blocks of 64 heads: 1 query leaves room for 66 programs each, but no more than 64 keys go to one.
    assert [options(queries=n).splits for n in (1, 8, 32, 66, 4096)] == [32, 8, 2, 1, 1]
    assert default_splits(latent, SMALL, 1, 60) == 1
    grouped = dataclasses.replace(latent, heads=32, groups=8, dim=128, width=128, is_shared=False)
    assert default_options(grouped, jnp.dtype(jnp.bfloat16), queries=1, topk=2048).splits == 16


def packed(rng, rows, latent_dim, rope_dim, **kwargs):
    return pack_latent_fp8(normal(rng, rows, latent_dim) * 3, normal(rng, rows, rope_dim), **kwargs)


def slots(rng, batch, queries, topk, rows):
    picked = np.stack([rng.permutation(rows)[:topk] for _ in range(batch * queries)]).astype(np.int32)
    hostile = rng.choice((*HOSTILE, rows), picked.shape)
    picked = np.where(rng.random(picked.shape) < 0.3, hostile, picked).reshape(batch, queries, -1)
    picked[0, 0] = -1  # a query without any key
    return jnp.asarray(picked, jnp.int32)


@pytest.mark.parametrize(("latent_dim", "rope_dim", "heads", "splits"), [(512, 64, 3, 4), (160, 16, 20, 1), (36, 8, 2, 2)])
def test_fp8_pool_matches_float64_on_the_dequantised_rows(latent_dim, rope_dim, heads, splits):
    rng = np.random.default_rng(latent_dim)
    pool, picked = packed(rng, 95, latent_dim, rope_dim), slots(rng, 2, 2, 62, 95)
    q = normal(rng, 2, 2, heads, latent_dim + rope_dim)
    keys = jnp.concatenate(unpack_latent_fp8(pool, latent_dim), -1)[None, :, None]
    joined = q.reshape(1, 4, heads, -1), keys, picked.reshape(1, 4, -1)

    def definition(q, k, indices):
        return reference.sparse_attention(q, k, None, indices, softmax_scale=SCALE, d_v=latent_dim)

    expected = in_float64(definition, *joined)
    call = functools.partial(pallas_gpu_fp8.sparse_attention_fp8, softmax_scale=SCALE, latent_dim=latent_dim)
    out, lse = jax.jit(functools.partial(call, tiles=SMALL, splits=splits))(q, pool, picked)
    assert_close(out.reshape(expected[0].shape), expected[0], what="out")
    assert_close(lse.reshape(expected[1].shape), expected[1], what="lse")
    assert np.all(np.asarray(out[0, 0]) == 0) and np.all(np.isneginf(np.asarray(lse[0, 0])))


@pytest.mark.parametrize("implementation", ["reference", "xla", "pallas"])
def test_fp8_public_op(implementation):
    rng = np.random.default_rng(5)
    pool, picked = packed(rng, 40, 32, 16), slots(rng, 1, 3, 20, 40)
    q = normal(rng, 1, 3, 4, 48)
    call = functools.partial(pk.sparse_attention_fp8, softmax_scale=SCALE, latent_dim=32, implementation=implementation)
    call = jax.jit(call)
    keys = jnp.concatenate(unpack_latent_fp8(pool, 32), -1)[None, :, None]
    expected = pk.sparse_attention(q, keys, None, picked, softmax_scale=SCALE, d_v=32, implementation="reference")
    for got, want in zip(call(q, pool, picked), expected, strict=True):
        assert_close(got, want)
    half = call(q.astype(jnp.bfloat16), pool, picked)
    assert half.out.dtype == jnp.bfloat16 and half.lse.dtype == jnp.float32
    assert_close(half.out, expected.out, "bfloat16")
    # 0xff is NaN in fp8, float32 and bfloat16: rows that nobody selects may hold it.
    unused = np.setdiff1d(np.arange(40), np.asarray(picked))
    dirty = pool.at[unused].set(0xFF)
    jax.tree.map(np.testing.assert_array_equal, call(q, dirty, picked), call(q, pool, picked))
    for empty in (call(q[:, :0], pool, picked[:, :0]), call(q, pool[:0], picked)):
        assert np.all(np.asarray(empty.out) == 0) and np.all(np.isneginf(np.asarray(empty.lse)))


def test_fp8_argument_errors():
    pool, picked = jnp.zeros((4, latent_row_bytes(32, 16)), jnp.uint8), jnp.zeros((1, 1, 2), jnp.int32)
    call = functools.partial(pk.sparse_attention_fp8, jnp.ones((1, 1, 2, 48)), softmax_scale=1.0)
    with pytest.raises(ValueError, match=r"pool has shape \[4, 68\]; expected \[any, 60\]"):
        call(pool, picked, latent_dim=40)
    with pytest.raises(ValueError, match="pool has dtype int8; expected uint8"):
        call(pool.astype(jnp.int8), picked, latent_dim=32)
    with pytest.raises(ValueError, match="latent_dim is 64; expected 1 to 48"):
        call(pool, picked, latent_dim=64)
    with pytest.raises(NotImplementedError, match=r"latent_dim \(30\) and the bytes of a row \(70\) to be multiples of 4"):
        call(jnp.zeros((4, latent_row_bytes(30, 18)), jnp.uint8), picked, latent_dim=30, implementation="pallas")
