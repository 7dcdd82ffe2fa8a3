"""Block selection by query chunks: the probabilities of one chunk are all that is held."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.block_topk.geometry import BlockGeometry
from pallas_kernels.common.chunks import map_queries, rows_per_chunk
from pallas_kernels.common.numerics import accumulation_dtype, constant_lse, dot, visible_mask
from pallas_kernels.common.topk import canonical, largest_ascending, rank_scores, with_forced
from pallas_kernels.dense_attention.xla import as_rows
from pallas_kernels.types import Visible

COMPRESSED_LOGIT_BUDGET = 2**20  # elements in one chunk of logits: batch x heads x queries x compressed keys


def block_topk(
    q: Float[Array, "B T H D"],
    k_compressed: Float[Array, "B N G D"],
    lse: Float[Array, "B T H"],
    visible: Visible,
    *,
    softmax_scale: float,
    n_keys: int,
    geometry: BlockGeometry,
) -> Int32[Array, "B T G K"]:
    """Selected blocks of each query and key group."""
    (batch, length, heads), (n_compressed, groups) = q.shape[:3], k_compressed.shape[1:3]
    n_blocks = geometry.n_blocks(n_keys)
    if 0 in (q.size, n_keys):
        return jnp.full((batch, length, groups, geometry.topk), -1, jnp.int32)
    dtype = accumulation_dtype(q, k_compressed)

    def step(chunk: tuple[Any, ...]) -> Array:
        q, lse, visible = chunk
        logits = softmax_scale * dot("bgrd,bngd->bgrn", as_rows(q, groups), k_compressed, dtype=dtype)
        probability = jnp.exp(logits - as_rows(constant_lse(lse, dtype)[..., None], groups))
        mass = probability.reshape(batch, groups, q.shape[1], heads // groups, n_compressed).sum(3)
        compressed_visible = visible_mask(geometry.compressed_range(visible), n_compressed)
        scores = block_scores(jnp.where(compressed_visible[:, None], mass, 0), geometry, n_blocks)

        def select(blocks: Visible, topk: int) -> Array:
            ranked = jnp.where(visible_mask(blocks, n_blocks)[:, None], rank_scores(scores), -jnp.inf)
            chosen = largest_ascending(ranked, min(topk, n_blocks))
            return jnp.moveaxis(canonical(chosen, n_blocks, topk), 1, 2)

        return with_forced(geometry.visible_blocks(visible), geometry.forced, n_blocks, select, geometry.topk)

    block_q = rows_per_chunk(COMPRESSED_LOGIT_BUDGET, batch * heads * max(n_compressed, 1), smallest=1)
    return map_queries(step, (q, lse, visible), block_q)


def block_scores(mass: Float[Array, "*batch N"], geometry: BlockGeometry, n_blocks: int) -> Float[Array, "*batch J"]:
    """Probability of the compressed keys, each counted once for every stride of it that lies in the block.

    Two sums over neighbours: stride u lies in the compressed keys u - n for n < compress_block / stride, block j holds the
    strides j * select_block / stride + m for m < select_block / stride. That is equation 9 of the paper, whose i and j count
    from 1.
    """
    per_key, per_block = (size // geometry.compress_stride for size in (geometry.compress_block, geometry.select_block))
    n_strides = n_blocks * per_block
    pads = [(0, 0)] * (mass.ndim - 1) + [(per_key - 1, n_strides - mass.shape[-1])]
    padded = jnp.pad(mass, pads)
    by_stride = sum((padded[..., n : n + n_strides] for n in range(1, per_key)), padded[..., :n_strides])
    return by_stride.reshape(*mass.shape[:-1], n_blocks, per_block).sum(-1)
