"""KL over the selected keys (sparse training): gathered per query chunk, recomputed in the backward."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.special import xlogy
from jaxtyping import Array

from pallas_kernels.common.chunks import map_queries, rows_per_chunk, scan_queries
from pallas_kernels.common.numerics import (
    accumulation_dtype,
    activate,
    constant_lse,
    dot,
    no_gradient,
    softmax_and_lse,
    sum_over_axis,
    times_slope,
    weighted_sum,
)
from pallas_kernels.sparse_attention.xla import (
    CHUNKS_PER_STEP,
    GATHER_BUDGET,
    gather_rows,
    grouped,
    per_query_dot,
    per_query_sum,
    scatter_add_rows,
    with_zero_row,
)
from pallas_kernels.types import IndexHeads, Visible


def _block_q(q: Array, k: Array, topk: int) -> int:
    return rows_per_chunk(GATHER_BUDGET, q.shape[0] * topk * max(k.shape[2] * k.shape[3], q.shape[2]), smallest=1, largest=128)


def _indexer_side(
    q_index: Array,
    padded_k_index: Array,
    weights: Array,
    members: Array,
    indices: Array,
    activation: str,
) -> tuple[Array, Array, Array, Array, Array]:
    """(clean q_index, clean weights, gathered index keys, q . k, scores); a query with an empty set may hold NaN."""
    dtype = accumulation_dtype(q_index, padded_k_index, weights)
    some = members.any(-1)[..., None]
    q_index, weights = jnp.where(some[..., None], q_index, 0), jnp.where(some, weights, 0).astype(dtype)
    k_sel = gather_rows(padded_k_index, indices)[0]
    products = per_query_dot(q_index[:, :, None], k_sel[:, :, :, None], dtype)[:, :, 0]
    return q_index, weights, k_sel, products, weighted_sum(products, weights, activation)


def _target(
    q: Array, padded_k: Array, lse: Array, members: Array, indices: Array, softmax_scale: float, head_axis: str | None
) -> Array:
    """Head-summed attention probability over the set, summing to 1, or 0 throughout where there is none; [B, C, K]."""
    dtype, groups = accumulation_dtype(q, padded_k), padded_k.shape[2]
    k_sel = gather_rows(padded_k, indices)[0]
    logits = softmax_scale * per_query_dot(grouped(q, groups), k_sel, dtype)
    mass = jnp.exp(logits - grouped(constant_lse(lse, dtype), groups)[..., None]).sum((2, 3))
    mass = jnp.where(members, sum_over_axis(mass, head_axis), 0)
    total = mass.sum(-1, keepdims=True)
    return jnp.where(total > 0, mass / jnp.where(total > 0, total, 1), 0)


def set_members(indices: Array, visible: Visible, n_keys: int) -> tuple[Array, Array]:
    """(which slots belong to a query's set, the indices with all others at -1)."""
    start, end = jnp.maximum(visible.start, 0), jnp.minimum(visible.end, n_keys)
    inside = (indices >= start[..., None]) & (indices < end[..., None])
    return inside, jnp.where(inside, indices, -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def kl_over_selected(
    index: IndexHeads,
    visible: Visible,
    q: Array,
    k: Array,
    lse: Array,
    topk_indices: Array,
    softmax_scale: float,
    head_axis: str | None,
    activation: str,
) -> Array:
    """KL(p || softmax(score)) over the selected visible keys, [B, T]; gradient in `index`."""
    padded_k_index, padded_k = with_zero_row(index.k), with_zero_row(k)

    def step(chunk: tuple[Any, ...]) -> Array:
        q_index, weights, q, lse, visible, indices = chunk
        members, indices = set_members(indices, visible, k.shape[1])
        scores = _indexer_side(q_index, padded_k_index, weights, members, indices, activation)[-1]
        target = _target(q, padded_k, lse, members, indices, softmax_scale, head_axis).astype(scores.dtype)
        _, score_lse = softmax_and_lse(scores, members)
        cross = jnp.where(target > 0, target * (scores - score_lse[..., None]), 0)
        return (xlogy(target, target) - cross).sum(-1)

    chunks = (index.q, index.weights, q, lse, visible, topk_indices)
    return map_queries(step, chunks, _block_q(q, k, topk_indices.shape[2]), per_step=CHUNKS_PER_STEP)


def _forward(*arguments: Any) -> tuple[Array, tuple[Any, ...]]:
    return kl_over_selected(*arguments), arguments[:-3]


def _backward(
    softmax_scale: float, head_axis: str | None, activation: str, residuals: tuple[Any, ...], d_kl: Array
) -> tuple[Any, ...]:
    index, visible, q, k, lse, topk_indices = residuals
    dtype = accumulation_dtype(*index)
    padded_k_index, padded_k = with_zero_row(index.k), with_zero_row(k)

    def step(d_k: Array, chunk: tuple[Any, ...]) -> tuple[Array, tuple[Any, ...]]:
        q_index, weights, q, lse, visible, indices, d_kl = chunk
        members, indices = set_members(indices, visible, k.shape[1])
        q_index, weights, k_sel, products, scores = _indexer_side(
            q_index, padded_k_index, weights, members, indices, activation
        )
        target = _target(q, padded_k, lse, members, indices, softmax_scale, head_axis).astype(dtype)
        learns = target.sum(-1, keepdims=True) > 0
        softmax, _ = softmax_and_lse(scores, members)
        d_scores = jnp.where(members & learns, d_kl[..., None] * (softmax - target), 0)[:, :, None].astype(dtype)
        d_weights = (d_scores * activate(products, activation)).sum(-1)
        d_products = times_slope(d_scores * weights[..., None].astype(dtype), products, activation)
        d_q = per_query_sum(d_products.astype(k_sel.dtype)[:, :, None], k_sel[:, :, :, None], dtype)[:, :, 0]
        d_k_sel = dot("bchk,bchd->bckd", d_products.astype(q_index.dtype), q_index, dtype=dtype)
        return scatter_add_rows(d_k, indices, d_k_sel), (d_q, d_weights)

    chunks = (index.q, index.weights, q, lse, visible, topk_indices, d_kl)
    zeros = jnp.zeros_like(index.k, dtype)
    d_k, (d_q, d_weights) = scan_queries(step, zeros, chunks, _block_q(q, k, topk_indices.shape[2]))
    d_index = jax.tree.map(lambda gradient, x: gradient.astype(x.dtype), IndexHeads(d_q, d_k, d_weights), index)
    return d_index, no_gradient(visible), None, None, None, no_gradient(topk_indices)


kl_over_selected.defvjp(_forward, _backward)
