"""Index scores and selection by query chunks: memory linear in T and S, keys that no query of a chunk sees are not scored."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.common.chunks import map_queries, rows_per_chunk, slice_chunk
from pallas_kernels.common.numerics import accumulation_dtype, clamped, head_products, weighted_sum, widen_fp8
from pallas_kernels.common.topk import all_visible, select_in_blocks
from pallas_kernels.index_topk import reference
from pallas_kernels.types import IndexHeads, Visible

SCORE_BUDGET = 2**22  # elements in one chunk's scores: batch x queries x keys
SCORE_BLOCK_K = 1024
# Dot products of one block below which a block is made longer: few queries, as in decoding, take few long steps.
BLOCK_BUDGET = 2**17


def block_index_scores(
    q: Float[Array, "B C Hi Di"],
    k: Float[Array, "B Sb Di"],
    weights: Float[Array, "B C Hi"],
    activation: str = "relu",
) -> Float[Array, "B C Sb"]:
    """sum_h weights * activate(q . k) of one chunk against one block, unmasked."""
    return weighted_sum(head_products(q, k, accumulation_dtype(q, k, weights)), weights, activation)


def index_scores(
    index: IndexHeads,
    visible: Visible,
    *,
    k_scale: Float[Array, "B S"] | None = None,
    activation: str = "relu",
) -> Float[Array, "B T S"]:
    """The whole score matrix, one query chunk after the other so that no head's products outlive their chunk."""
    q, k, weights = index = index._replace(q=widen_fp8(index.q), k=widen_fp8(index.k))
    if 0 in (q.size, k.shape[1]):
        return jnp.zeros((*q.shape[:2], k.shape[1]), accumulation_dtype(*index))
    block_q = rows_per_chunk(SCORE_BUDGET, q.shape[0] * q.shape[2] * k.shape[1])

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def step(chunk: tuple[Any, ...]) -> Array:
        q, weights, visible = chunk
        return reference.index_scores(IndexHeads(q, k, weights), visible, k_scale=k_scale, activation=activation)

    return map_queries(step, (q, weights, visible), block_q)


def index_topk(
    index: IndexHeads,
    visible: Visible,
    *,
    topk: int,
    k_scale: Float[Array, "B S"] | None = None,
    activation: str = "relu",
) -> Int32[Array, "B T {topk}"]:
    """Canonical selection; per chunk a score buffer of batch x queries x keys is all that is held."""
    q, k, weights = widen_fp8(index.q), widen_fp8(index.k), index.weights
    n_keys = k.shape[1]
    if topk >= n_keys or q.size == 0:
        return all_visible(clamped(visible, n_keys), topk)
    batch, length, heads, _ = q.shape
    block_q = rows_per_chunk(SCORE_BUDGET, batch * n_keys)
    blocks = max(1, min(BLOCK_BUDGET // (batch * min(block_q, length) * heads), n_keys) // SCORE_BLOCK_K)
    block_k = min(blocks * SCORE_BLOCK_K, n_keys)

    def step(chunk: tuple[Any, ...]) -> Array:
        q, weights, visible = chunk

        def block_scores(first: Array) -> Array:
            scores = block_index_scores(q, slice_chunk(k, first, block_k), weights, activation)
            return scores if k_scale is None else scores * slice_chunk(k_scale, first, block_k)[:, None].astype(scores.dtype)

        dtype = accumulation_dtype(q, k, weights)
        return select_in_blocks(block_scores, visible, n_keys=n_keys, topk=topk, block_k=block_k, dtype=dtype)

    return map_queries(step, (q, weights, visible), block_q)
