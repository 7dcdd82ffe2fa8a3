"""Definition of the block selection: plain jnp and a matrix of overlaps, H x T x S / stride memory."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from pallas_kernels.block_topk.geometry import BlockGeometry
from pallas_kernels.common.numerics import constant_lse, visible_mask
from pallas_kernels.common.topk import canonical_topk, with_forced
from pallas_kernels.dense_attention.reference import attention_logits
from pallas_kernels.types import Visible


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
    logits = attention_logits(q, k_compressed, softmax_scale)
    lse = constant_lse(lse, logits.dtype).reshape(logits.shape[:-1])
    compressed_visible = visible_mask(geometry.compressed_range(visible), k_compressed.shape[1])
    probability = jnp.where(compressed_visible[:, :, None], jnp.exp(logits - lse[..., None]).sum(3), 0)
    overlaps = overlapping_steps(geometry, k_compressed.shape[1], geometry.n_blocks(n_keys))
    scores = jnp.einsum("btgn,nj->btgj", probability, overlaps, precision=jax.lax.Precision.HIGHEST)
    n_blocks = scores.shape[-1]

    def select(blocks: Visible, topk: int) -> Int32[Array, "B T G C"]:
        competes = visible_mask(blocks, n_blocks)
        return jax.vmap(lambda scores: canonical_topk(scores, competes, topk), in_axes=2, out_axes=2)(scores)

    return with_forced(geometry.visible_blocks(visible), geometry.forced, n_blocks, select, geometry.topk)


def overlapping_steps(geometry: BlockGeometry, n_compressed: int, n_blocks: int) -> Float[np.ndarray, "N J"]:
    """Strides of compressed key i that lie in selection block j."""
    place = np.arange(n_compressed)[:, None] + np.arange(geometry.compress_block // geometry.compress_stride)
    block = place * geometry.compress_stride // geometry.select_block
    return (block[:, :, None] == np.arange(n_blocks)).sum(1).astype(np.float32)
