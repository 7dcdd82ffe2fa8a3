"""Sparse attention by query chunks: the gathered keys of one chunk are all that is held, forward and backward."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.dtypes import float0
from jaxtyping import Array, Bool, Float, Int32, Shaped, UInt8

from pallas_kernels.common.chunks import map_queries, rows_per_chunk, scan_queries
from pallas_kernels.common.numerics import accumulation_dtype, add_leading, dot, softmax_and_lse, values_of
from pallas_kernels.quantize.cache_layouts import unpack_latent_fp8

# Elements gathered per chunk: batch x queries x selected keys x channels. Half a MiB in float32, so that a chunk stays in
# cache; one large query at a time also spares XLA's slow batched matmuls on CPU.
GATHER_BUDGET = 2**17
# Chunks that one step of the loop works on, independent of each other: XLA on CPU runs their small matmuls side by side.
CHUNKS_PER_STEP = 8


def sparse_attention(
    q: Float[Array, "B T H Dk"],
    k: Float[Array, "B S G Dk"],
    v: Float[Array, "B S G Dv"] | None,
    topk_indices: Int32[Array, "B T K"],
    *,
    softmax_scale: float,
    d_v: int | None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
    """(out, lse); differentiable in q, k and v."""
    width = values_of(k, v, d_v).shape[-1]
    if 0 in (q.size, k.shape[1], topk_indices.shape[2]):
        dtype = accumulation_dtype(q, k)
        return jnp.zeros((*q.shape[:3], width), q.dtype), jnp.full(q.shape[:3], -jnp.inf, dtype)
    places = join_batch_indices(topk_indices, k.shape[1])
    values = None if v is None else join_batch(v)
    out, lse = _attend(join_batch(q), join_batch(k), values, places, float(softmax_scale), width)
    return out.reshape(*q.shape[:3], width), lse.reshape(q.shape[:3])


def sparse_attention_fp8(
    q: Float[Array, "B T H Dk"],
    pool: UInt8[Array, "P bytes"],
    slots: Int32[Array, "B T K"],
    *,
    softmax_scale: float,
    latent_dim: int,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
    """(out, lse); the rows that a chunk of queries selects are all that is dequantised, to the dtype of q."""
    (batch, length, heads, dim), topk = q.shape, slots.shape[2]
    if 0 in (q.size, *pool.shape, topk):
        dtype = accumulation_dtype(q)
        return jnp.zeros((*q.shape[:3], latent_dim), q.dtype), jnp.full(q.shape[:3], -jnp.inf, dtype)
    padded = with_zero_row(pool[None])

    def step(chunk: tuple[Array, Array]) -> tuple[Array, Array]:
        q, slots = chunk
        rows, valid = gather_rows(padded, slots)
        keys = jnp.concatenate(unpack_latent_fp8(rows, latent_dim), -1).astype(q.dtype)
        places = jnp.where(valid, jnp.arange(valid.size, dtype=jnp.int32).reshape(valid.shape), -1)
        return sparse_attention(q, keys.reshape(1, -1, 1, dim), None, places, softmax_scale=softmax_scale, d_v=latent_dim)

    block_q = rows_per_chunk(GATHER_BUDGET, topk * dim, smallest=1, largest=128)
    out, lse = map_queries(step, (join_batch(q), join_batch(slots)), block_q)
    return out.reshape(batch, length, heads, latent_dim), lse.reshape(q.shape[:3])


def join_batch(x: Array) -> Array:
    """[B, N, ...] as one row [1, B * N, ...]: gathers without a batch are faster, and chunks may span rows."""
    return x.reshape(1, x.shape[0] * x.shape[1], *x.shape[2:])


def join_batch_indices(indices: Int32[Array, "B T K"], n_keys: int) -> Int32[Array, "1 BT K"]:
    """Indices into `join_batch(keys)`; -1 where they lie outside [0, n_keys)."""
    first = n_keys * jnp.arange(indices.shape[0], dtype=jnp.int32)[:, None, None]
    return join_batch(jnp.where((indices >= 0) & (indices < n_keys), indices + first, -1))


def with_zero_row(keys: Shaped[Array, "B S *rest"]) -> Shaped[Array, "B P *rest"]:
    """The keys and one row of zeros, which every invalid index reads: cheaper than masking what was gathered."""
    return jnp.pad(keys, ((0, 0), (0, 1)) + ((0, 0),) * (keys.ndim - 2))


def gather_rows(
    padded_keys: Shaped[Array, "B P *rest"], indices: Int32[Array, "B C K"]
) -> tuple[Shaped[Array, "B C K *rest"], Bool[Array, "B C K"]]:
    """(rows, valid): the selected rows of `with_zero_row(keys)`, zeros where the index lies outside [0, S)."""
    n_keys = padded_keys.shape[1] - 1
    valid = (indices >= 0) & (indices < n_keys)
    place = jnp.where(valid, indices, n_keys)
    return jax.vmap(lambda x, i: x.at[i].get(mode="promise_in_bounds"))(padded_keys, place), valid


def scatter_add_rows(
    total: Float[Array, "B S *rest"], indices: Int32[Array, "B C K"], rows: Float[Array, "B C K *rest"]
) -> Float[Array, "B S *rest"]:
    """Adds every row to the key it came from; invalid indices are dropped."""
    safe = jnp.where((indices >= 0) & (indices < total.shape[1]), indices, total.shape[1])
    return jax.vmap(lambda x, i, r: x.at[i].add(r, mode="drop"))(total, safe, rows)


def _block_q(q: Array, k: Array, topk: int) -> int:
    return rows_per_chunk(GATHER_BUDGET, q.shape[0] * topk * k.shape[2] * k.shape[3], smallest=1, largest=128)


def grouped(q: Array, groups: int) -> Array:
    """[B, C, H, ...] as [B, C, G, H/G, ...]."""
    return q.reshape(*q.shape[:2], groups, q.shape[2] // groups, *q.shape[3:])


def per_query_dot(
    rows: Float[Array, "B C G M D"], keys: Float[Array, "B C K G D"], dtype: jnp.dtype
) -> Float[Array, "B C G M K"]:
    """rows . keys of each query and group."""
    if rows.shape[:3] == (1, 1, 1):  # a batch of one runs at half the speed of a plain matmul on CPU
        return dot("md,kd->mk", rows[0, 0, 0], keys[0, 0, :, 0], dtype=dtype)[None, None, None]
    return dot("bcgmd,bckgd->bcgmk", rows, keys, dtype=dtype)


def per_query_sum(
    weights: Float[Array, "B C G M K"], values: Float[Array, "B C K G V"], dtype: jnp.dtype
) -> Float[Array, "B C G M V"]:
    """Values of each query and group summed with the weights of each row."""
    if weights.shape[:3] == (1, 1, 1):
        return dot("mk,kv->mv", weights[0, 0, 0], values[0, 0, :, 0], dtype=dtype)[None, None, None]
    return dot("bcgmk,bckgv->bcgmv", weights, values, dtype=dtype)


def _logits(q: Array, k_sel: Array, valid: Array, softmax_scale: float) -> tuple[Array, Array]:
    """(clean grouped q, scaled logits) of one chunk; a query with an empty selection may hold NaN."""
    q = grouped(jnp.where(valid.any(-1)[..., None, None], q, 0), k_sel.shape[3])
    return q, softmax_scale * per_query_dot(q, k_sel, accumulation_dtype(q, k_sel))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(q: Array, k: Array, v: Array | None, topk_indices: Array, softmax_scale: float, width: int) -> tuple[Array, Array]:
    padded_k, padded_v = with_zero_row(k), None if v is None else with_zero_row(v)

    def step(chunk: tuple[Array, Array]) -> tuple[Array, Array]:
        q, indices = chunk
        k_sel, valid = gather_rows(padded_k, indices)
        v_sel = k_sel[..., :width] if padded_v is None else gather_rows(padded_v, indices)[0]
        _, logits = _logits(q, k_sel, valid, softmax_scale)
        mask = valid[:, :, None, None]
        some = valid.any(-1)[:, :, None, None]
        largest = jnp.where(some, jnp.where(mask, logits, -jnp.inf).max(-1), 0)
        weights = jnp.where(mask, jnp.exp(logits - largest[..., None]), 0)
        total = jnp.where(some, weights.sum(-1), 1)
        lse = jnp.where(some, largest + jnp.log(total), -jnp.inf)
        out = per_query_sum(weights.astype(v_sel.dtype), v_sel, weights.dtype) / total[..., None]
        return out.reshape(*q.shape[:3], width).astype(q.dtype), lse.reshape(q.shape[:3])

    return map_queries(step, (q, topk_indices), _block_q(q, k, topk_indices.shape[2]), per_step=CHUNKS_PER_STEP)


def _attend_forward(
    q: Array, k: Array, v: Array | None, topk_indices: Array, softmax_scale: float, width: int
) -> tuple[tuple[Array, Array], tuple[Array | None, ...]]:
    out, lse = _attend(q, k, v, topk_indices, softmax_scale, width)
    return (out, lse), (q, k, v, topk_indices, out)


def _attend_backward(
    softmax_scale: float, width: int, residuals: tuple[Any, ...], cotangents: tuple[Array, Array]
) -> tuple[Any, ...]:
    q, k, v, topk_indices, out = residuals
    d_out, d_lse = cotangents
    dtype = accumulation_dtype(q, k)
    padded_k, padded_v = with_zero_row(k), None if v is None else with_zero_row(v)

    def step(carry: tuple[Array, Array | None], chunk: tuple[Array, ...]) -> tuple[tuple[Array, Array | None], Array]:
        dk, dv = carry
        q, indices, out, d_out, d_lse = chunk
        k_sel, valid = gather_rows(padded_k, indices)
        v_sel = k_sel[..., :width] if padded_v is None else gather_rows(padded_v, indices)[0]
        clean_q, logits = _logits(q, k_sel, valid, softmax_scale)
        probability, _ = softmax_and_lse(logits, valid[:, :, None, None])
        some = valid.any(-1)[..., None]
        groups = k.shape[2]
        d_out = grouped(jnp.where(some[..., None], d_out, 0), groups)
        delta = (d_out.astype(dtype) * grouped(out, groups).astype(dtype)).sum(-1)
        d_lse = grouped(jnp.where(some, d_lse, 0), groups)
        d_probability = per_query_dot(d_out, v_sel, dtype)
        d_logits = softmax_scale * probability * (d_probability - (delta - d_lse)[..., None])
        d_q = per_query_sum(d_logits.astype(k_sel.dtype), k_sel, dtype)
        d_k_sel = dot("bcghk,bcghd->bckgd", d_logits.astype(clean_q.dtype), clean_q, dtype=dtype)
        d_v_sel = dot("bcghk,bcghd->bckgd", probability.astype(d_out.dtype), d_out, dtype=dtype)
        if dv is None:
            dk = scatter_add_rows(dk, indices, add_leading(d_k_sel, d_v_sel))
        else:
            dk, dv = scatter_add_rows(dk, indices, d_k_sel), scatter_add_rows(dv, indices, d_v_sel)
        return (dk, dv), d_q.reshape(q.shape)

    zeros = jnp.zeros_like(k, dtype), None if v is None else jnp.zeros_like(v, dtype)
    chunks = (q, topk_indices, out, d_out, d_lse)
    (dk, dv), dq = scan_queries(step, zeros, chunks, _block_q(q, k, topk_indices.shape[2]))
    no_gradient = np.zeros(topk_indices.shape, float0)
    return dq.astype(q.dtype), dk.astype(k.dtype), None if dv is None else dv.astype(v.dtype), no_gradient


_attend.defvjp(_attend_forward, _attend_backward)
