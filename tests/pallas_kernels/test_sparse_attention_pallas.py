"""Pallas kernels of sparse attention: interpreted against the float64 reference, and lowered for an H200 at real shapes."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lowering import lower_for_h200
from ops_helpers import assert_close, in_float64, normal
from shapes import AttentionShape
from test_sparse_attention import inputs, selection

import pallas_kernels as pk
from pallas_kernels.common import index_scores as _head_sums
from pallas_kernels.common.gpu_tiles import Problem, Tiles, cut_columns
from pallas_kernels.sparse_attention import pallas_gpu, pallas_gpu_fp8, reference
from pallas_kernels.sparse_attention.pallas_gpu_tiles import Options, default_options
from tests.pallas_kernels.shapes import DEEPSEEK_V32, LLAMA3_8B

SCALE = 0.3
SMALL = Tiles(16, 16)
ORDERED = Options(SMALL, SMALL, SMALL, deterministic=True, budget_bytes=100_000)
ATOMIC = dataclasses.replace(ORDERED, deterministic=False)

CASES = {
    "one_query_one_key": (AttentionShape(1, 1, 1, 2, 1, 4, None, 2, 1), ATOMIC),
    "latent_topk_beyond_context": (AttentionShape(2, 3, 11, 4, 1, 80, None, 64, 40), ATOMIC),
    "latent_several_head_blocks": (AttentionShape(1, 6, 53, 40, 1, 36, None, 32, 21), ORDERED),
    "latent_62_queries": (AttentionShape(1, 62, 40, 2, 1, 12, None, 8, 7), ATOMIC),
    "values_are_the_keys": (AttentionShape(1, 5, 19, 2, 1, 16, None, 16, 4), ATOMIC),
    "1_head_per_group": (AttentionShape(2, 4, 19, 2, 2, 16, 16, None, 8), ATOMIC),
    "2_heads_per_group": (AttentionShape(2, 6, 23, 4, 2, 6, 5, None, 40), ORDERED),
    "4_heads_per_group": (AttentionShape(1, 5, 30, 8, 2, 40, 24, None, 17), ATOMIC),
    "16_heads_per_group": (AttentionShape(1, 5, 30, 32, 2, 16, 32, None, 16), ATOMIC),
}


def gradients(function, shape, arrays, indices, cotangents, **kwargs):
    """((out, lse), gradients) of an implementation; gradients through both outputs."""
    d_out, d_lse = cotangents

    def loss(*arrays):
        q, k, v = arrays if len(arrays) == 3 else (*arrays, None)
        out, lse = function(q, k, v, indices, softmax_scale=SCALE, d_v=shape.d_v, **kwargs)
        return (out * d_out).sum() + jnp.where(lse > -jnp.inf, lse * d_lse, 0).sum(), (out, lse)

    (_, outputs), grads = jax.value_and_grad(loss, range(len(arrays)), has_aux=True)(*arrays)
    return outputs, grads


def case(shape, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed + 7)
    arrays = tuple(x for x in inputs(shape, seed, dtype) if x is not None)
    width = shape.value_dim or shape.d_v
    outputs = (shape.batch, shape.queries, shape.heads)
    return arrays, selection(shape, seed), (normal(rng, *outputs, width), normal(rng, *outputs))


def expected_in_float64(shape, arrays, indices, cotangents):
    def run(*flat):
        split = len(arrays)
        return gradients(reference.sparse_attention, shape, flat[:split], flat[split], flat[split + 1 :])

    return in_float64(run, *arrays, indices, *cotangents)


def interpreted(shape, options):
    function = functools.partial(pallas_gpu.sparse_attention, options=options)
    return jax.jit(lambda arrays, indices, cotangents: gradients(function, shape, arrays, indices, cotangents))


@pytest.mark.parametrize("options", [ORDERED, ATOMIC], ids=["ordered", "atomic"])
def test_runs_where_64_bit_types_are_enabled(options):
    shape = CASES["2_heads_per_group"][0]
    arrays = case(shape)
    expected = interpreted(shape, options)(*arrays)
    with jax.enable_x64(True):
        jax.tree.map(assert_close, interpreted(shape, options)(*arrays), expected)


def compare(actual, expected, dtype="float32"):
    names = ("out", "lse", "dq", "dk", "dv")
    for what, got, want in zip(names, jax.tree.leaves(actual), jax.tree.leaves(expected), strict=False):
        assert_close(got, want, dtype, what)


@pytest.mark.parametrize("name", CASES)
def test_matches_float64_with_gradients(name):
    shape, options = CASES[name]
    arrays, indices, cotangents = case(shape)
    actual = interpreted(shape, options)(arrays, indices, cotangents)
    compare(actual, expected_in_float64(shape, arrays, indices, cotangents))


def test_a_branch_between_the_products_changes_no_bit():
    """Programs of several warpgroups have one in the forward."""
    shape = CASES["latent_several_head_blocks"][0]
    arrays = case(shape)
    wide = Tiles(64, 16, num_warps=8)
    several, one = (
        interpreted(shape, dataclasses.replace(ORDERED, forward=x))(*arrays) for x in (wide, Tiles(64, 16, num_warps=4))
    )
    jax.tree.map(np.testing.assert_array_equal, one, several)
    compare(several, expected_in_float64(shape, *arrays))


def test_literal_case_through_the_public_op():
    q = jnp.asarray([[[[1.0]], [[1.0]], [[0.0]]]])
    k, v = jnp.log(jnp.asarray([1.0, 3.0, 7.0])).reshape(1, 3, 1, 1), jnp.asarray([8.0, 4.0, 100.0]).reshape(1, 3, 1, 1)
    picked = jnp.asarray([[[0, 1], [-1, 3], [1, -1]]])
    out, lse = pk.sparse_attention(q, k, v, picked, softmax_scale=1.0, implementation="pallas")
    np.testing.assert_allclose(out[0, :, 0, 0], [5.0, 0.0, 4.0], rtol=1e-6)
    np.testing.assert_allclose(lse[0, :, 0], [np.log(4.0), -np.inf, 0.0], rtol=1e-6, atol=1e-7)
    assert "pallas" in pk.implementations_chosen()["sparse_attention"].split(",")


@pytest.mark.parametrize("empty", [(1, 0, 5, 2, 1, 4, 3, None, 2), (1, 3, 0, 2, 1, 4, None, 2, 2)], ids=["queries", "keys"])
def test_without_queries_or_keys(empty):
    shape = AttentionShape(*empty)
    (q, k, v), indices = inputs(shape), jnp.zeros((shape.batch, shape.queries, shape.topk), jnp.int32)
    out, lse = pk.sparse_attention(q, k, v, indices, softmax_scale=SCALE, d_v=shape.d_v, implementation="pallas")
    assert out.shape == (1, shape.queries, 2, shape.value_dim or shape.d_v)
    assert np.all(np.asarray(out) == 0) and np.all(np.isneginf(np.asarray(lse)))


@pytest.mark.parametrize("options", [ORDERED, ATOMIC], ids=["ordered", "atomic"])
def test_unselected_keys_and_empty_queries_may_hold_anything(options):
    shape = AttentionShape(2, 11, 33, 4, 1, 12, None, 8, 20)
    (q, k), indices, (d_out, d_lse) = case(shape)
    indices = np.array(indices)
    indices[(indices >= 0) & (indices < 10)] = -1  # keys 0 to 9 are selected by nobody
    empty = ((indices < 0) | (indices >= shape.keys)).all(-1)
    assert empty.any()
    function = interpreted(shape, options)
    clean = function((q, k), jnp.asarray(indices), (d_out, d_lse))
    for poison in (np.nan, 3e38):
        dirty_q, dirty_d = (jnp.where(empty[..., None, None], poison, x) for x in (q, d_out))
        dirty_lse = jnp.where(empty[..., None], poison, d_lse)
        dirty = function((dirty_q, k.at[:, :10].set(poison)), jnp.asarray(indices), (dirty_d, dirty_lse))
        jax.tree.map(np.testing.assert_array_equal, dirty, clean)
    (out, lse), (dq, dk) = jax.tree.map(np.asarray, clean)
    assert np.all(out[empty] == 0) and np.all(np.isneginf(lse[empty])) and np.all(dq[empty] == 0) and np.all(dk[:, :10] == 0)


def test_bfloat16_with_gradients():
    shape = AttentionShape(1, 5, 30, 8, 2, 16, 16, None, 20)
    arrays, indices, cotangents = case(shape, dtype=jnp.bfloat16)
    actual = interpreted(shape, ATOMIC)(arrays, indices, cotangents)
    assert [x.dtype.name for x in jax.tree.leaves(actual)] == ["bfloat16", "float32", "bfloat16", "bfloat16", "bfloat16"]
    compare(actual, expected_in_float64(shape, arrays, indices, cotangents), "bfloat16")


def test_ordered_sums_repeat_their_bits_and_count_a_key_listed_twice():
    shape = AttentionShape(1, 9, 12, 4, 2, 16, 16, None, 32)
    arrays, indices, cotangents = case(shape)
    indices = jnp.concatenate([indices[..., :16], indices[..., :16]], -1)  # every selected key twice, in one tile of 32
    options = dataclasses.replace(ORDERED, d_key=Tiles(16, 32))
    function = interpreted(shape, options)
    first, second = (function(arrays, indices, cotangents) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)
    compare(first, expected_in_float64(shape, arrays, indices, cotangents))


def test_what_is_not_covered_says_so():
    shape = AttentionShape(1, 2, 3, 2, 1, 500, None, 500, 2)
    (q, k, _), indices = inputs(shape), selection(shape)
    call = functools.partial(pk.sparse_attention, softmax_scale=1.0, implementation="pallas")
    with pytest.raises(NotImplementedError, match="500 channels need 6 pieces; at most 4"):
        call(q, k, None, indices)
    with pytest.raises(NotImplementedError, match="pallas got bfloat16, float32; it needs q, k and v of one dtype"):
        call(q.astype(jnp.bfloat16), k, None, indices)
    with pytest.raises(ValueError, match="block_k is 24; expected a power of two of at least 16"):
        Tiles(16, 24)


def test_channels_are_cut_into_powers_of_two():
    assert [(piece.start, piece.width, piece.size) for piece in cut_columns(0, 512, 576)] == [(0, 512, 512), (512, 64, 64)]
    assert [(piece.start, piece.width, piece.size) for piece in cut_columns(0, 100)] == [(0, 64, 64), (64, 32, 32), (96, 4, 16)]


def test_gathers_ahead_only_what_shared_memory_holds():
    def stages(dim, width, is_shared, dtype=jnp.bfloat16):
        problem = Problem(64, 1, dim, width, is_shared, SCALE, False)
        options = default_options(problem, jnp.dtype(dtype), queries=4096, topk=2048)
        return options.forward.num_stages, options.d_query.num_stages, options.d_key.num_stages

    assert stages(576, 512, True) == (5, 5, 3)
    assert stages(128, 128, False) == (5, 2, 2)
    # 64 x 256 numbers of q and three times 64 x 512 of keys and values: 229376 bytes, too near to the 232448 there are.
    assert stages(256, 256, False) == (2, 2, 2)
    assert stages(512, 512, False) == (2, 2, 2)
    assert stages(320, 256, False) == (5, 5, 3)
    assert stages(576, 512, True, jnp.float32) == (2, 2, 2)


def test_wide_channels_get_smaller_tiles_or_a_clear_no():
    def sizes(dim, width, is_shared):
        problem = Problem(128, 1, dim, width, is_shared, SCALE, False)
        options = default_options(problem, jnp.dtype(jnp.bfloat16), queries=64, topk=512)
        return [(tiles.block_h, tiles.block_k) for tiles in (options.forward, options.d_query, options.d_key)]

    assert sizes(576, 512, True) == [(64, 32), (32, 64), (32, 32)]
    assert sizes(1024, 1024, True) == [(32, 32), (16, 32), (16, 32)]
    assert sizes(1024, 1024, False) == [(32, 16), (16, 16), (16, 16)]
    with pytest.raises(NotImplementedError, match=r"no room for 4096 channels of bfloat16 in shared memory\. Pass"):
        sizes(4096, 4096, True)

    def heads(latent):
        problem = Problem(64, 1, latent + 64, latent, True, SCALE, False, piece=128)
        return pallas_gpu_fp8.fp8_forward_tiles(problem, jnp.dtype(jnp.bfloat16)).block_h

    assert (heads(512), heads(768), heads(1024)) == (64, 32, 16)


def test_sums_over_heads_hold_as_many_as_shared_memory_does():
    def heads(dim, dtype=jnp.bfloat16):
        return _head_sums.head_sum_tiles(Problem(128, 1, dim, dim, True, SCALE, False), jnp.dtype(dtype)).block_h

    assert (heads(576), heads(640), heads(576, jnp.float32), heads(128)) == (64, 32, 32, 64)


def mla(heads):
    return DEEPSEEK_V32._replace(heads=heads)


REAL_SHAPES = {
    "mla_128_heads": mla(128),
    "mla_64_heads": mla(64),
    "mla_16_heads": mla(16),
    "mla_8_heads": mla(8),
    "mla_70000_queries": mla(16)._replace(queries=70000),
    "gqa_32_8_dim_128": LLAMA3_8B,
    "gqa_32_8_dim_64": LLAMA3_8B._replace(dim=64, value_dim=64),
    "mha_16_16_dim_128": LLAMA3_8B._replace(heads=16, groups=16),
    "mha_16_16_dim_64": LLAMA3_8B._replace(heads=16, groups=16, dim=64, value_dim=64),
}


def lowered(shape, dtype, deterministic):
    """Forward and backward of one layer, lowered for an H200."""
    width = shape.value_dim or shape.d_v
    problem = Problem(shape.heads, shape.groups, shape.dim, width, shape.value_dim is None, SCALE, False)
    options = dataclasses.replace(
        default_options(problem, jnp.dtype(dtype), queries=shape.queries, topk=shape.topk), deterministic=deterministic
    )
    function = functools.partial(pallas_gpu.sparse_attention, options=options, interpret=False)
    dims = [(shape.queries, shape.heads, shape.dim), (shape.keys, shape.groups, shape.dim)]
    dims += [] if shape.value_dim is None else [(shape.keys, shape.groups, width)]
    arrays = tuple(jax.ShapeDtypeStruct((shape.batch, *x), dtype) for x in dims)
    rows = (shape.batch, shape.queries)
    cotangents = tuple(jax.ShapeDtypeStruct((*rows, *x), jnp.float32) for x in ((shape.heads, width), (shape.heads,)))
    indices = jax.ShapeDtypeStruct((*rows, shape.topk), jnp.int32)
    return lower_for_h200(functools.partial(gradients, function, shape), arrays, indices, cotangents), options


@pytest.mark.parametrize("name", REAL_SHAPES)
def test_lowers_for_h200_without_copies_of_the_gathered_keys(name):
    shape = REAL_SHAPES[name]
    keys = (shape.keys + 8) * shape.groups * (shape.dim + (shape.value_dim or 0))
    queries = shape.queries * max(shape.heads * shape.dim, shape.topk)
    for deterministic in (False, True):
        text, options = lowered(shape, jnp.bfloat16, deterministic)
        for kernel in ("forward", "d_query", "contributions" if deterministic else "d_key"):
            assert f"sparse_attention_{kernel}" in text
        assert ("sparse_attention_ordered_sum" in text) == deterministic
        largest = max(math.prod(map(int, x.split("x")[:-1])) for x in re.findall(r"tensor<((?:\d+x)+)[a-z]", text))
        # Chunks of queries may pad the last one.
        assert largest <= max(keys, int(1.1 * queries), options.budget_bytes // 4 if deterministic else 0)


def test_lowers_for_h200_in_float32():
    text, _ = lowered(mla(64), jnp.float32, False)
    assert "sparse_attention_d_key" in text
