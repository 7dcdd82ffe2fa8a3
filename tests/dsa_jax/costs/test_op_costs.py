"""FLOPs, bytes and rooflines of the ops by formula, against figures worked out by hand and against compiled matmuls."""

import jax
import jax.numpy as jnp
import pytest

from dsa_jax.benchmarks.op_shapes import SHAPES
from dsa_jax.costs.ops import HeadSizes, OpShape, floor_seconds, op_cost
from dsa_jax.dryrun import matmul_flops


@pytest.mark.parametrize(
    ("op", "name", "gflop", "megabytes", "floor"),
    [
        ("sparse_attention", "128_heads", 2336, 1214, 2.96e-3),
        ("sparse_attention", "64_heads", 1168, 642, 1.48e-3),
        ("sparse_attention", "32_heads_8_groups", 137, 235, 174e-6),
        ("sparse_attention_backward", "64_heads", 2955, 1401, 3.74e-3),
        ("sparse_attention_backward", "128_heads", 5910, 2542, 7.48e-3),
        ("index_scores", "prefill_32k_fp8", 2199, 576, 1.47e-3),
        ("index_scores", "prefill_32k", 2199, None, 2.78e-3),
        ("index_scores", "prefill_128k", 8796, None, 11.1e-3),
        ("index_scores", "decode_128k_fp8", 69, 571, 133e-6),
        ("decode_fp8", "batch_8", 4.6, 13, 5.8e-6),
        ("decode_fp8", "batch_32", 18, 52, 23e-6),
        ("decode_fp8", "batch_128", 73, 209, 92e-6),
        ("indexer_kl_selected", "128_heads", 1237 + 412, None, 1.57e-3 + 0.52e-3),
    ],
)
def test_costs_and_floors(op, name, gflop, megabytes, floor):
    shape = SHAPES[op][name]
    needed = op_cost(op, shape)
    assert needed.flops / 1e9 == pytest.approx(gflop, rel=0.02)
    assert megabytes is None or needed.bytes / 1e6 == pytest.approx(megabytes, rel=0.03)
    assert floor_seconds(op, shape, "NVIDIA H200") == pytest.approx(floor, rel=0.02)


def test_small_case_by_hand():
    shape = OpShape(2, 10, 3, heads=4, dim=6, d_v=5, index_heads=2, index_dim=8, dtype="float32")
    # 2 queries, 3 keys each; q, out, 6 rows of keys, lists, lse.
    assert op_cost("sparse_attention", shape) == (2 * 6 * 4 * 11, 4 * (2 * 4 * 6 + 2 * 4 * 5 + 6 * 6 + 6 + 8))
    # Keys, queries, weights, and 2 x 10 scores or 2 x 3 positions.
    indexer = 10 * 8 + 2 * 2 * 8 + 2 * 2
    assert op_cost("index_scores", shape) == (2 * 20 * 16, 4 * (indexer + 20))
    assert op_cost("index_topk", shape) == (2 * 20 * 16, 4 * (indexer + 6))


def test_unknown_device_and_op():
    assert floor_seconds("decode", SHAPES["decode"]["batch_8"], "cpu") is None
    with pytest.raises(ValueError, match="no cost for op 'sort'"):
        op_cost("sort", SHAPES["decode"]["batch_8"])


def test_flops_are_those_of_the_compiled_matmuls():
    """Forward, and backward with the logits recomputed, where keys and values differ in width: not 3.5 times the forward."""
    n_queries, n_keys, heads = 16, 32, HeadSizes(4, 1, 24, value_dim=8)

    def attend(q, k, v):
        return jax.nn.softmax(jnp.einsum("thd,sd->hts", q, k)) @ v

    def backward(d_out, *arrays):
        return jax.vjp(attend, *arrays)[1](d_out)

    arrays = [jnp.ones(shape) for shape in ((n_queries, 4, 24), (n_keys, 24), (n_keys, 8))]
    flops = lambda function, *given: matmul_flops(jax.jit(function).lower(*given).compile().as_text())
    assert flops(attend, *arrays) == n_queries * n_keys * heads.forward_flops
    assert flops(backward, attend(*arrays), *arrays) == n_queries * n_keys * heads.backward_flops
