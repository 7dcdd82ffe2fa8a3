"""Definition of the block selection: plain jnp and a matrix of overlaps, H x T x S / stride memory."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from pallas_kernels.block_topk.geometry import BlockGeometry
from pallas_kernels.common.numerics import constant_lse, visible_mask
from pallas_kernels.dense_attention.reference import attention_logits
from pallas_kernels.index_topk.reference import canonical_topk
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
    block = jnp.arange(scores.shape[-1], dtype=jnp.int32)
    start, end = visible.start[:, :, None, None], visible.end[:, :, None, None]
    first, own = start // geometry.select_block, (end - 1) // geometry.select_block
    forced = (block < first + geometry.n_initial) | (block > own - geometry.n_local)
    competes = jnp.broadcast_to((block >= first) & (block <= own) & (start < end), scores.shape)
    ranked = jnp.where(forced, jnp.inf, scores)
    select = jax.vmap(lambda ranked, competes: canonical_topk(ranked, competes, geometry.topk), in_axes=2, out_axes=2)
    return select(ranked, competes)


def overlapping_steps(geometry: BlockGeometry, n_compressed: int, n_blocks: int) -> Float[np.ndarray, "N J"]:
    """How many strides of compressed key i lie in selection block j."""
    place = np.arange(n_compressed)[:, None] + np.arange(geometry.compress_block // geometry.compress_stride)
    block = place * geometry.compress_stride // geometry.select_block
    return (block[:, :, None] == np.arange(n_blocks)).sum(1).astype(np.float32)
