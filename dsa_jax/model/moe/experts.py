"""The routed experts applied to their tokens: sorted by expert, multiplied group by group, weighted and summed.

On a mesh, rows travel to the device that owns their expert and back; the experts' width is split over `tensor`. An owner must
have room for all rows of all senders, so long sequences travel in pieces, one after the other, and each piece is sent again in
the backward pass instead of being kept.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from dsa_jax.model.kernels import Place
from dsa_jax.model.moe.exchange import AXIS, to_owners, to_senders
from dsa_jax.model.moe.grouped_matmul import grouped_matmul
from dsa_jax.parallel.ambient import ROWS, axis_index, axis_size, per_device, splits_evenly, sum_over
from pallas_kernels.quantize import QuantizedBlocks

EXCHANGE_BYTES = 2**28
"""Most bytes that one piece of the tokens may send to an owner."""


class ExpertKernels(NamedTuple):
    """SwiGLU projections of all routed experts, plain or in fp8 blocks."""

    gate: Float[Array, "X E F"] | QuantizedBlocks
    up: Float[Array, "X E F"] | QuantizedBlocks
    down: Float[Array, "X F E"] | QuantizedBlocks


_IN, _OUT = PartitionSpec(AXIS, None, "tensor"), PartitionSpec(AXIS, "tensor", None)
# `tensor` may cut blocks: every device has the scales of its experts' whole matrices.
_SCALES: Any = PartitionSpec(AXIS)
_PLAIN_SPECS: Any = (_IN, _IN, _OUT)
_FP8_SPECS: Any = tuple(QuantizedBlocks(spec, _SCALES) for spec in _PLAIN_SPECS)


def routed_sum(
    x: Float[Array, "B T E"], experts: Int[Array, "B T K"], weights: Float[Array, "B T K"], kernels: ExpertKernels
) -> Float[Array, "B T E"]:
    """sum_k weights[k] * swiglu(x; kernels of experts[k]) of every token, float32.

    Dropless. Nothing of size tokens x experts x dim is held.
    """
    rows = ROWS if splits_evenly(x.shape) else PartitionSpec()  # a few decoded tokens are computed by every device
    specs = _FP8_SPECS if isinstance(kernels.gate, QuantizedBlocks) else _PLAIN_SPECS
    spread = per_device(_routed_sum, in_specs=(rows, rows, rows, ExpertKernels(*specs)), out_specs=rows)
    return spread(x, experts, weights, kernels)


def _routed_sum(x: Array, experts: Array, weights: Array, kernels: ExpertKernels) -> Array:
    flat = lambda rows: rows.reshape(-1, rows.shape[-1])
    tokens = flat(x), flat(experts), flat(weights)
    n_tokens, n_pieces = len(tokens[0]), _n_pieces(x, experts.shape[-1])
    if n_pieces == 1:
        routed = _one_piece(*tokens, kernels)
    else:
        # The gradients of the pieces add up in float32, whatever the dtype of the matmuls; fp8 kernels have none.
        is_summed = not isinstance(kernels.gate, QuantizedBlocks)
        wide = jax.tree.map(lambda kernel: kernel.astype(jnp.float32), kernels) if is_summed else kernels

        @functools.partial(jax.checkpoint, prevent_cse=False)
        def piece(tokens: tuple[Array, Array, Array]) -> Array:
            narrow = jax.tree.map(lambda own, kernel: kernel.astype(own.dtype), kernels, wide)
            return _one_piece(*tokens, narrow)

        per_piece = -(-n_tokens // n_pieces)
        padding = n_pieces * per_piece - n_tokens  # tokens of no weight, which expert 0 computes
        cut = lambda rows: jnp.pad(rows, ((0, padding), (0, 0))).reshape(n_pieces, per_piece, -1)
        routed = jax.lax.map(piece, jax.tree.map(cut, tokens)).reshape(-1, x.shape[-1])[:n_tokens]
    return sum_over("tensor", routed.reshape(x.shape))


def _n_pieces(x: Array, per_token: int) -> int:
    """Pieces of the tokens of which none brings more than `EXCHANGE_BYTES` to an owner, or that are one token each."""
    if axis_size(AXIS) == 1:
        return 1
    n_tokens = x.shape[0] * x.shape[1]
    per_piece = EXCHANGE_BYTES // (axis_size(AXIS) * per_token * x.shape[-1] * x.dtype.itemsize)
    return -(-n_tokens // max(1, per_piece))


def _one_piece(x: Array, experts: Array, weights: Array, kernels: ExpertKernels) -> Array:
    """The sum [N, E] of tokens [N, E], over the part of the experts' width that this device has."""
    dim, per_token = x.shape[-1], experts.shape[-1]
    n_experts = len(jax.tree.leaves(kernels)[0]) * axis_size(AXIS)
    assigned = experts.reshape(-1)
    order = jnp.argsort(assigned, stable=True)
    counts = jnp.zeros(n_experts, jnp.int32).at[assigned].add(1)
    # A copy per choice, then permutations of unique rows: no scatter with collisions, so the backward is deterministic.
    copies = jnp.repeat(x, per_token, axis=0)
    by_expert = copies.at[order].get(unique_indices=True)
    apply = _at_owners if axis_size(AXIS) > 1 else _swiglu
    out = apply(by_expert, counts, kernels)
    per_choice = out.at[_inverse(order)].get(unique_indices=True).reshape(*experts.shape, dim)
    return jnp.sum(per_choice.astype(jnp.float32) * weights[..., None], axis=-2)


def _at_owners(rows: Array, counts: Array, kernels: ExpertKernels) -> Array:
    """`_swiglu` where the experts live."""
    received = to_owners(rows, counts)
    ends = jnp.cumsum(received.counts, axis=1)
    expert = jax.vmap(lambda end: jnp.searchsorted(end, jnp.arange(len(rows)), side="right"))(ends)
    order = jnp.argsort(expert.reshape(-1), stable=True)  # rows that are none come last, in no group
    flat = received.rows.reshape(-1, rows.shape[-1])
    out = _swiglu(flat.at[order].get(unique_indices=True), received.counts.sum(axis=0), kernels)
    placed = out.at[_inverse(order)].get(unique_indices=True).reshape(received.rows.shape)
    return to_senders(placed, counts, received.counts)


def _swiglu(rows: Array, group_sizes: Array, kernels: ExpertKernels) -> Array:
    into, out_of = _first_columns(kernels)
    hidden = jax.nn.silu(grouped_matmul(rows, kernels.gate, group_sizes, first=into))
    hidden = hidden * grouped_matmul(rows, kernels.up, group_sizes, first=into)
    return grouped_matmul(hidden, kernels.down, group_sizes, first=out_of)


def _first_columns(kernels: ExpertKernels) -> tuple[Place | None, Place | None]:
    """Where this device's part of the experts' width begins, in the kernels into it and out of it; None: it has all."""
    if axis_size("tensor") == 1:
        return None, None
    start, zero = axis_index("tensor") * jax.tree.leaves(kernels.gate)[0].shape[-1], jnp.int32(0)
    return (zero, start), (start, zero)


def _inverse(order: Array) -> Array:
    return jnp.zeros_like(order).at[order].set(jnp.arange(len(order), dtype=order.dtype), unique_indices=True)
