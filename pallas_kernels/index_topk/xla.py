"""Index scores and selection by query chunks: memory linear in T and S, keys that no query of a chunk sees are not scored."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.common.activation import weighted_sum
from pallas_kernels.common.chunks import map_queries, rows_per_chunk, slice_chunk
from pallas_kernels.common.numerics import accumulation_dtype, head_products, widen_fp8
from pallas_kernels.common.selection import all_visible, select_in_blocks
from pallas_kernels.index_topk import reference

SCORE_BUDGET = 2**22  # numbers in one chunk's scores: batch x queries x keys
BLOCK_K = 1024
# Products of one block below which a block is made longer: few queries, as in decoding, take few long steps.
BLOCK_BUDGET = 2**17


def block_index_scores(
    q_index: Float[Array, "B C Hi Di"],
    k_index: Float[Array, "B Sb Di"],
    weights: Float[Array, "B C Hi"],
    activation: str = "relu",
    head_lse: Float[Array, "B C Hi"] | None = None,
) -> Float[Array, "B C Sb"]:
    """sum_h weights * activate(q . k) of one chunk against one block, unmasked."""
    dtype = accumulation_dtype(q_index, k_index, weights)
    return weighted_sum(head_products(q_index, k_index, dtype), weights, activation, head_lse)


def index_scores(
    q_index: Float[Array, "B T Hi Di"],
    k_index: Float[Array, "B S Di"],
    weights: Float[Array, "B T Hi"],
    visible_start: Int32[Array, "B T"],
    visible_end: Int32[Array, "B T"],
    *,
    k_scale: Float[Array, "B S"] | None = None,
    activation: str = "relu",
    head_lse: Float[Array, "B T Hi"] | None = None,
) -> Float[Array, "B T S"]:
    """The whole score matrix, one query chunk after the other so that no head's products outlive their chunk."""
    q_index, k_index = widen_fp8(q_index), widen_fp8(k_index)
    batch, _, heads, _ = q_index.shape
    if 0 in (q_index.size, k_index.shape[1]):
        return jnp.zeros((*q_index.shape[:2], k_index.shape[1]), accumulation_dtype(q_index, k_index, weights))
    block_q = rows_per_chunk(SCORE_BUDGET, batch * heads * k_index.shape[1])

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def step(chunk: tuple[Any, ...]) -> Array:
        q, w, head_lse, start, end = chunk
        return reference.index_scores(q, k_index, w, start, end, k_scale=k_scale, activation=activation, head_lse=head_lse)

    return map_queries(step, (q_index, weights, head_lse, visible_start, visible_end), block_q)


def index_topk(
    q_index: Float[Array, "B T Hi Di"],
    k_index: Float[Array, "B S Di"],
    weights: Float[Array, "B T Hi"],
    visible_start: Int32[Array, "B T"],
    visible_end: Int32[Array, "B T"],
    *,
    topk: int,
    k_scale: Float[Array, "B S"] | None = None,
    activation: str = "relu",
    head_lse: Float[Array, "B T Hi"] | None = None,
) -> Int32[Array, "B T {topk}"]:
    """Canonical selection; per chunk a score buffer of batch x queries x keys is all that is held."""
    q_index, k_index = widen_fp8(q_index), widen_fp8(k_index)
    n_keys = k_index.shape[1]
    if topk >= n_keys or q_index.size == 0:
        return all_visible(jnp.clip(visible_start, 0, n_keys), jnp.clip(visible_end, 0, n_keys), topk)
    batch, length, heads, _ = q_index.shape
    block_q = rows_per_chunk(SCORE_BUDGET, batch * n_keys)
    blocks = max(1, min(BLOCK_BUDGET // (batch * min(block_q, length) * heads), n_keys) // BLOCK_K)
    block_k = min(blocks * BLOCK_K, n_keys)

    def step(chunk: tuple[Any, ...]) -> Array:
        q, w, head_lse, start, end = chunk

        def block_scores(first: Array) -> Array:
            scores = block_index_scores(q, slice_chunk(k_index, first, block_k), w, activation, head_lse)
            return scores if k_scale is None else scores * slice_chunk(k_scale, first, block_k)[:, None].astype(scores.dtype)

        return select_in_blocks(
            block_scores,
            start,
            end,
            n_keys=n_keys,
            topk=topk,
            block_k=block_k,
            dtype=accumulation_dtype(q, k_index, w),
        )

    return map_queries(step, (q_index, weights, head_lse, visible_start, visible_end), block_q)
