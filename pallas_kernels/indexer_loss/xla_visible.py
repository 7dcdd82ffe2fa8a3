"""KL over all visible keys (warm-up): one streaming pass over key blocks per query chunk, recomputed in the backward."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.special import xlogy
from jaxtyping import Array

from pallas_kernels.common.chunks import KeyWalk, add_to_chunk, key_walk, map_queries, rows_per_chunk, scan_queries, slice_chunk
from pallas_kernels.common.numerics import (
    accumulation_dtype,
    activate,
    head_products,
    head_products_transposed,
    no_gradient,
    sum_over_axis,
    times_slope,
    weighted_sum,
)
from pallas_kernels.dense_attention.xla import BLOCK_K, LOGIT_BUDGET, as_rows, probability_mass
from pallas_kernels.types import IndexHeads, Visible


def _block_k(n_keys: int, shared: int) -> int:
    """Keys of a block, which does not divide the `shared` keys of an index key."""
    return min(shared * max(1, BLOCK_K // shared), n_keys)


def _block_q(q_index: Array, q: Array, n_keys: int, shared: int) -> int:
    heads = max(q.shape[2], q_index.shape[2])
    return rows_per_chunk(LOGIT_BUDGET, q.shape[0] * heads * _block_k(n_keys, shared))


def _products(q_index: Array, k_index: Array, walk: KeyWalk, first: Array, visible: Array, shared: int) -> tuple[Array, Array]:
    """(block of index keys, q_index . k_index) with zeros for those the chunk does not see: 0 * NaN is no 0 in the gradient."""
    seen = _by_index_key(visible.any(1), shared).any(-1)
    k_block = jnp.where(seen[..., None], slice_chunk(k_index, first // shared, walk.block_k // shared), 0)
    return k_block, head_products(q_index, k_block, accumulation_dtype(q_index, k_index))


def _by_index_key(per_key: Array, shared: int) -> Array:
    """[..., S] as [..., N, shared]."""
    return per_key.reshape(*per_key.shape[:-1], -1, shared)


def _clean(x: Array, walk: KeyWalk) -> Array:
    """Zeros in the rows of queries that see nothing."""
    some = walk.visible.some
    return jnp.where(some.reshape(*some.shape, *[1] * (x.ndim - 2)), x, 0)


def _statistics(
    index: IndexHeads,
    visible: Visible,
    q: Array,
    k: Array,
    lse: Array,
    softmax_scale: float,
    head_axis: str | None,
    activation: str,
    shared: int,
) -> tuple[Array, Array, Array]:
    """(kl, log-sum-exp of the scores, sum of the unnormalised target), each [B, T]."""
    n_keys, dtype = k.shape[1], accumulation_dtype(*index)

    def step(chunk: tuple[Any, ...]) -> tuple[Array, Array, Array]:
        q_index, weights, q, lse, visible = chunk
        walk = key_walk(visible, n_keys, _block_k(n_keys, shared))
        q_index, weights, rows = _clean(q_index, walk), _clean(weights, walk), as_rows(q, k.shape[2])

        def add_block(number: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
            largest, total, mass, entropy, cross = state
            first, mask = walk.block(number)
            target = probability_mass(rows, slice_chunk(k, first, walk.block_k), lse, softmax_scale)
            target = sum_over_axis(target, head_axis)
            target = jnp.where(mask, target, 0).astype(dtype)
            _, products = _products(q_index, index.k, walk, first, mask, shared)
            scores = jnp.repeat(weighted_sum(products, weights, activation), shared, axis=-1)
            new_largest = jnp.maximum(largest, jnp.where(mask, scores, -jnp.inf).max(-1))
            shift = jnp.where(new_largest > -jnp.inf, new_largest, 0)
            shifted = scores - shift[..., None]
            total = total * jnp.exp(largest - shift) + jnp.where(mask, jnp.exp(shifted), 0).sum(-1)
            # Scores enter relative to the running maximum, which keeps the difference below free of cancellation.
            cross = cross - jnp.where(largest > -jnp.inf, shift - largest, 0) * mass
            cross = cross + jnp.where(target > 0, target * shifted, 0).sum(-1)
            return new_largest, total, mass + target.sum(-1), entropy + xlogy(target, target).sum(-1), cross

        zero = jnp.zeros_like(visible.start, dtype)
        state = (jnp.full_like(zero, -jnp.inf), zero, zero, zero, zero)
        largest, total, mass, entropy, cross = lax.fori_loop(walk.low, walk.high, add_block, state)
        some = mass > 0
        norm, log_total = jnp.where(some, mass, 1), jnp.log(jnp.where(total > 0, total, 1))
        kl = jnp.where(some, (entropy - cross) / norm - jnp.log(norm) + log_total, 0)
        return kl, largest + log_total, mass

    chunks = (index.q, index.weights, q, lse, visible)
    return map_queries(step, chunks, _block_q(index.q, q, n_keys, shared))


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8))
def kl_over_visible(
    index: IndexHeads,
    visible: Visible,
    q: Array,
    k: Array,
    lse: Array,
    softmax_scale: float,
    head_axis: str | None,
    activation: str,
    shared: int,
) -> Array:
    """KL(p || softmax(score)) over the visible keys, [B, T]; gradient in `index`.

    Each index key scores for `shared` consecutive keys.
    """
    return _statistics(index, visible, q, k, lse, softmax_scale, head_axis, activation, shared)[0]


def _forward(*arguments: Any) -> tuple[Array, tuple[Any, ...]]:
    kl, score_lse, mass = _statistics(*arguments)
    return kl, (*arguments[:-4], score_lse, mass)


def _backward(
    softmax_scale: float, head_axis: str | None, activation: str, shared: int, residuals: tuple[Any, ...], d_kl: Array
) -> tuple[Any, ...]:
    index, visible, q, k, lse, score_lse, mass = residuals
    dtype = accumulation_dtype(*index)

    def step(d_k: Array, chunk: tuple[Any, ...]) -> tuple[Array, tuple[Any, ...]]:
        q_index, weights, q, lse, visible, score_lse, mass, d_kl = chunk
        walk = key_walk(visible, k.shape[1], _block_k(k.shape[1], shared))
        q_index, weights, rows = _clean(q_index, walk), _clean(weights, walk), as_rows(q, k.shape[2])
        inverse = jnp.where(mass > 0, 1 / jnp.where(mass > 0, mass, 1), 0)[..., None]
        score_lse, d_kl = score_lse[..., None], jnp.where(mass > 0, d_kl, 0)[..., None]

        def block_gradients(number: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            d_q, d_weights, d_k = state
            first, mask = walk.block(number)
            target = probability_mass(rows, slice_chunk(k, first, walk.block_k), lse, softmax_scale)
            target = inverse * sum_over_axis(target, head_axis)
            k_block, products = _products(q_index, index.k, walk, first, mask, shared)
            scores = jnp.repeat(weighted_sum(products, weights, activation), shared, axis=-1)
            d_scores = jnp.where(mask, d_kl * (jnp.exp(scores - score_lse) - target), 0).astype(dtype)
            d_scores = _by_index_key(d_scores, shared).sum(-1)
            d_activated = d_scores[:, :, None] * weights[..., None].astype(dtype)
            d_products = times_slope(d_activated, products, activation)
            d_weights = d_weights + (d_scores[:, :, None] * activate(products, activation)).sum(-1)
            d_q_block, d_k_block = head_products_transposed(d_products, q_index, k_block, dtype)
            return d_q + d_q_block, d_weights, add_to_chunk(d_k, d_k_block, first // shared)

        state = jnp.zeros_like(q_index, dtype), jnp.zeros_like(weights, dtype), d_k
        d_q, d_weights, d_k = lax.fori_loop(walk.low, walk.high, block_gradients, state)
        return d_k, (d_q, d_weights)

    chunks = (index.q, index.weights, q, lse, visible, score_lse, mass, d_kl)
    zeros = jnp.zeros_like(index.k, dtype)
    d_k, (d_q, d_weights) = scan_queries(step, zeros, chunks, _block_q(index.q, q, k.shape[1], shared))
    d_index = jax.tree.map(lambda gradient, x: gradient.astype(x.dtype), IndexHeads(d_q, d_k, d_weights), index)
    return d_index, no_gradient(visible), None, None, None


kl_over_visible.defvjp(_forward, _backward)
