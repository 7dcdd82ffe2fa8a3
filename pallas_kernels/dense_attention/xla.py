"""Dense attention over visible ranges, flash style: online softmax over key blocks, truncated to what each chunk can see."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from pallas_kernels.common.chunks import KeyWalk, add_to_chunk, key_walk, map_queries, rows_per_chunk, scan_queries, slice_chunk
from pallas_kernels.common.numerics import accumulation_dtype, add_leading, clamped, constant_lse, dot, no_gradient, values_of
from pallas_kernels.common.topk import all_visible, select_in_blocks
from pallas_kernels.types import Visible

LOGIT_BUDGET = 2**20  # elements in one block of logits: batch x heads x queries x keys
BLOCK_K = 512


def dense_attention(
    q: Float[Array, "B T H Dk"],
    k: Float[Array, "B S G Dk"],
    v: Float[Array, "B S G Dv"] | None,
    visible: Visible,
    *,
    softmax_scale: float,
    d_v: int | None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
    """(out, lse); differentiable in q, k and v."""
    width = values_of(k, v, d_v).shape[-1]
    if 0 in (q.size, k.shape[1]):
        dtype = accumulation_dtype(q, k)
        return jnp.zeros((*q.shape[:3], width), q.dtype), jnp.full(q.shape[:3], -jnp.inf, dtype)
    return _attend(q, k, v, visible, float(softmax_scale), width)


def attention_topk(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S G D"],
    lse: Float[Array, "B T H"],
    visible: Visible,
    *,
    softmax_scale: float,
    topk: int,
) -> Int32[Array, "B T {topk}"]:
    """Canonical selection by head-summed probability, one chunk of queries after the other."""
    n_keys = k.shape[1]
    if topk >= n_keys or q.size == 0:
        return all_visible(clamped(visible, n_keys), topk)
    block_q, block_k = _block_q(q, n_keys), min(BLOCK_K, n_keys)

    def step(chunk: tuple[Any, ...]) -> Array:
        q, lse, visible = chunk

        def block_mass(first: Array) -> Array:
            return probability_mass(as_rows(q, k.shape[2]), slice_chunk(k, first, block_k), lse, softmax_scale)

        dtype = accumulation_dtype(q, k)
        return select_in_blocks(block_mass, visible, n_keys=n_keys, topk=topk, block_k=block_k, dtype=dtype)

    return map_queries(step, (q, lse, visible), block_q)


def probability_mass(
    q_rows: Float[Array, "B G CHg D"], k: Float[Array, "B Sb G D"], lse: Float[Array, "B C H"], softmax_scale: float
) -> Float[Array, "B C Sb"]:
    """Attention probability of each key of a block, summed over heads, unmasked."""
    (batch, length, heads), groups = lse.shape, k.shape[2]
    dtype = accumulation_dtype(q_rows, k)
    logits = softmax_scale * dot("bgrd,bsgd->bgrs", q_rows, k, dtype=dtype)
    divisor = as_rows(constant_lse(lse, dtype)[..., None], groups)
    mass = jnp.exp(logits - divisor).reshape(batch, groups, length, heads // groups, -1)
    return mass.sum((1, 3))


def _block_q(q: Array, n_keys: int) -> int:
    return rows_per_chunk(LOGIT_BUDGET, q.shape[0] * q.shape[2] * min(BLOCK_K, n_keys))


def as_rows(x: Array, groups: int) -> Array:
    """[B, C, H, D] as [B, G, C * H/G, D]: all rows that meet the same keys in one matrix."""
    batch, length, heads, dim = x.shape
    return jnp.moveaxis(x.reshape(batch, length, groups, heads // groups, dim), 2, 1).reshape(
        batch, groups, length * heads // groups, dim
    )


def from_rows(x: Array, length: int) -> Array:
    """Inverse of `as_rows`."""
    batch, groups, rows, dim = x.shape
    per_group = rows // length
    return jnp.moveaxis(x.reshape(batch, groups, length, per_group, dim), 1, 2).reshape(batch, length, groups * per_group, dim)


def _row_mask(visible: Array, heads_per_group: int) -> Array:
    """[B, C, Sb] as [B, 1, C * H/G, Sb]."""
    batch, length, size = visible.shape
    wide = jnp.broadcast_to(visible[:, :, None], (batch, length, heads_per_group, size))
    return wide.reshape(batch, 1, length * heads_per_group, size)


def _keys_and_values(k: Array, v: Array | None, first: Array, visible: Array, width: int) -> tuple[Array, Array]:
    """One block of keys and values, zero where no query of the chunk sees them: 0 * NaN would not vanish."""
    seen = visible.any((1,))[..., None, None]
    k_block = jnp.where(seen, slice_chunk(k, first, visible.shape[2]), 0)
    if v is None:
        return k_block, k_block[..., :width]
    return k_block, jnp.where(seen, slice_chunk(v, first, visible.shape[2]), 0)


def _clean(x: Array, walk: KeyWalk) -> Array:
    """Zeros in the rows of queries that see nothing."""
    return jnp.where(walk.visible.some[..., None, None], x, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(q: Array, k: Array, v: Array | None, visible: Visible, softmax_scale: float, width: int) -> tuple[Array, Array]:
    groups = k.shape[2]
    dtype = accumulation_dtype(q, k)

    def step(chunk: tuple[Any, ...]) -> tuple[Array, Array]:
        q, visible = chunk
        walk = key_walk(visible, k.shape[1], BLOCK_K)
        rows = as_rows(_clean(q, walk), groups)

        def attend_block(number: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            largest, total, acc = state
            first, visible = walk.block(number)
            k_block, v_block = _keys_and_values(k, v, first, visible, width)
            logits = softmax_scale * dot("bgrd,bsgd->bgrs", rows, k_block, dtype=dtype)
            logits = jnp.where(_row_mask(visible, q.shape[2] // groups), logits, -jnp.inf)
            new_largest = jnp.maximum(largest, logits.max(-1))
            # A row that has seen nothing yet keeps -inf; shifting it by 0 leaves its weights exp(-inf) = 0.
            shift = jnp.where(new_largest > -jnp.inf, new_largest, 0)
            weights = jnp.exp(logits - shift[..., None])
            decay = jnp.exp(largest - shift)
            acc = acc * decay[..., None] + dot("bgrs,bsgd->bgrd", weights.astype(v_block.dtype), v_block, dtype=dtype)
            return new_largest, total * decay + weights.sum(-1), acc

        shape = rows.shape[:3]
        zeros = functools.partial(jnp.zeros_like, rows, dtype)
        state = jnp.full_like(rows, -jnp.inf, dtype, shape), zeros(shape), zeros((*shape, width))
        largest, total, acc = lax.fori_loop(walk.low, walk.high, attend_block, state)
        divisor = jnp.where(total > 0, total, 1)
        lse = jnp.where(total > 0, largest + jnp.log(divisor), -jnp.inf)
        out = from_rows(acc / divisor[..., None], q.shape[1]).astype(q.dtype)
        return out, from_rows(lse[..., None], q.shape[1])[..., 0]

    return map_queries(step, (q, visible), _block_q(q, k.shape[1]))


def _attend_forward(
    q: Array, k: Array, v: Array | None, visible: Visible, softmax_scale: float, width: int
) -> tuple[tuple[Array, Array], tuple[Any, ...]]:
    out, lse = _attend(q, k, v, visible, softmax_scale, width)
    return (out, lse), (q, k, v, visible, out, lse)


def _attend_backward(
    softmax_scale: float, width: int, residuals: tuple[Any, ...], cotangents: tuple[Array, Array]
) -> tuple[Any, ...]:
    q, k, v, visible, out, lse = residuals
    groups = k.shape[2]
    dtype = accumulation_dtype(q, k)

    def step(carry: tuple[Array, Array | None], chunk: tuple[Any, ...]) -> tuple[tuple[Array, Array | None], Array]:
        q, visible, out, lse, d_out, d_lse = chunk
        walk = key_walk(visible, k.shape[1], BLOCK_K)
        rows, d_out = as_rows(_clean(q, walk), groups), _clean(d_out, walk)
        d_lse = _clean(d_lse[..., None], walk)
        # delta - d_lse: what every d_probability of a row is reduced by.
        offset = as_rows((d_out.astype(dtype) * out.astype(dtype)).sum(-1, keepdims=True) - d_lse, groups)
        d_rows, divisor = as_rows(d_out, groups), as_rows(constant_lse(lse, dtype)[..., None], groups)

        def block_gradients(number: Array, state: tuple[Array, Array, Array | None]) -> tuple[Array, Array, Array | None]:
            d_q, dk, dv = state
            first, visible = walk.block(number)
            k_block, v_block = _keys_and_values(k, v, first, visible, width)
            logits = softmax_scale * dot("bgrd,bsgd->bgrs", rows, k_block, dtype=dtype)
            mask = _row_mask(visible, q.shape[2] // groups)
            probability = jnp.exp(jnp.where(mask, logits - divisor, -jnp.inf))
            d_probability = dot("bgrd,bsgd->bgrs", d_rows, v_block, dtype=dtype)
            d_logits = softmax_scale * probability * (d_probability - offset)
            d_q = d_q + dot("bgrs,bsgd->bgrd", d_logits.astype(k_block.dtype), k_block, dtype=dtype)
            d_k_block = dot("bgrs,bgrd->bsgd", d_logits.astype(rows.dtype), rows, dtype=dtype)
            d_v_block = dot("bgrs,bgrd->bsgd", probability.astype(d_rows.dtype), d_rows, dtype=dtype)
            if dv is None:
                return d_q, add_to_chunk(dk, add_leading(d_k_block, d_v_block), first), None
            return d_q, add_to_chunk(dk, d_k_block, first), add_to_chunk(dv, d_v_block, first)

        state = (jnp.zeros_like(rows, dtype), *carry)
        d_q, dk, dv = lax.fori_loop(walk.low, walk.high, block_gradients, state)
        return (dk, dv), from_rows(d_q, q.shape[1])

    zeros = jnp.zeros_like(k, dtype), None if v is None else jnp.zeros_like(v, dtype)
    chunks = (q, visible, out, lse, *cotangents)
    (dk, dv), dq = scan_queries(step, zeros, chunks, _block_q(q, k.shape[1]))
    return dq.astype(q.dtype), dk.astype(k.dtype), None if dv is None else dv.astype(v.dtype), no_gradient(visible)


_attend.defvjp(_attend_forward, _attend_backward)
