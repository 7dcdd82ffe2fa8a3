"""Useful operations and fewest bytes of the benchmarked ops, and the time a device's peaks allow for them."""

from typing import NamedTuple

import jax.numpy as jnp

from dsa_jax.benchmarks.op_shapes import OpShape
from dsa_jax.costs.devices import peaks_of
from pallas_kernels.quantize import latent_row_bytes


class Cost(NamedTuple):
    """Floating-point operations (a multiply-add is two) and bytes read or written at least once."""

    flops: float
    bytes: float


def cost(op: str, shape: OpShape) -> Cost:
    """What `op` takes at `shape`, padding, recomputation and work arrays not counted.

    A key that several queries select is read once. The backward pass recomputes q . k; no way around that is known.
    """
    s, size = shape, jnp.dtype(shape.dtype).itemsize
    rows, pairs = s.batch * s.queries, s.batch * s.queries * s.topk
    if op in ("index_scores", "index_topk"):
        visible = rows * s.keys
        scale = 4 if s.dtype.startswith("float8") else 0
        indexer = s.batch * s.keys * (s.index_dim * size + scale) + rows * s.index_heads * (s.index_dim * size + 4)
        return Cost(2 * visible * s.index_heads * s.index_dim, indexer + 4 * (visible if op == "index_scores" else pairs))
    key_bytes = size * s.groups * (s.dim + (s.value_dim or 0))
    if op == "decode_fp8":
        key_bytes = latent_row_bytes(s.width, s.dim - s.width)
    if op == "dense_attention":
        moved = size * rows * s.heads * (s.dim + s.width) + 4 * rows * s.heads + s.batch * s.keys * key_bytes
        return Cost(2 * rows * s.keys * s.heads * (s.dim + s.width), moved)
    read = min(s.batch * s.keys, pairs)
    lists, lse = 4 * pairs, 4 * rows * s.heads
    query, result = size * rows * s.heads * s.dim, size * rows * s.heads * s.width
    if op in ("sparse_attention", "decode", "decode_fp8"):
        return Cost(2 * pairs * s.heads * (s.dim + s.width), query + result + read * key_bytes + lists + lse)
    if op == "sparse_attention_backward":
        # Gradients of the keys are summed in float32, which is one write and one read more, and then rounded.
        keys = read * key_bytes * (2 + 8 / size)
        return Cost(2 * pairs * s.heads * (3 * s.dim + 2 * s.width), 2 * (query + result) + keys + lists + lse)
    if op in ("indexer_kl_selected", "indexer_kl_visible"):
        selected = op == "indexer_kl_selected"
        terms = pairs if selected else rows * s.keys
        read = read if selected else s.batch * s.keys
        learned = size * s.index_dim * (rows * s.index_heads + read) + 4 * rows * s.index_heads
        moved = query + lse + read * size * s.groups * s.dim + 2 * learned + (lists if selected else 0)
        return Cost(2 * terms * (s.heads * s.dim + 3 * s.index_heads * s.index_dim), moved)
    raise ValueError(f"there is no cost for op {op!r}; add it to dsa_jax.benchmarks.costs.")


def floor_seconds(op: str, shape: OpShape, device_kind: str) -> float | None:
    """The longer of arithmetic and memory traffic at the device's peaks; None for a device whose peaks are not listed."""
    peaks = peaks_of(device_kind)
    if peaks is None:
        return None
    needed = cost(op, shape)
    fp8 = op.startswith("index_") and shape.dtype.startswith("float8")
    return max(needed.flops / (peaks.fp8_flops if fp8 else peaks.flops), needed.bytes / peaks.bytes)
