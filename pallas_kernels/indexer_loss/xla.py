"""The indexer's KL by query chunks with a hand-written backward: probabilities and scores exist per chunk and block only."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.common.numerics import accumulation_dtype, clamped
from pallas_kernels.indexer_loss.xla_selected import kl_over_selected
from pallas_kernels.indexer_loss.xla_visible import kl_over_visible
from pallas_kernels.sparse_attention.xla import join_batch, join_batch_indices
from pallas_kernels.types import IndexHeads, Visible


def indexer_kl(
    index: IndexHeads,
    visible: Visible,
    q: Float[Array, "B T H Dk"],
    k: Float[Array, "B S G Dk"],
    lse: Float[Array, "B T H"],
    *,
    softmax_scale: float,
    topk_indices: Int32[Array, "B T K"] | None,
    head_axis: str | None = None,
    activation: str = "relu",
    keys_per_index_key: int = 1,
) -> Float[Array, "B T"]:
    """KL over the visible keys, or over the selected visible keys."""
    if 0 in (q.size, k.shape[1]):
        return jnp.zeros(q.shape[:2], accumulation_dtype(*index))
    static = float(softmax_scale), head_axis, activation
    if topk_indices is None:
        return kl_over_visible(index, visible, q, k, lse, *static, keys_per_index_key)
    n_keys = k.shape[1]
    first = n_keys * jnp.arange(k.shape[0], dtype=jnp.int32)[:, None]
    visible = jax.tree.map(lambda bound: bound + first, clamped(visible, n_keys))
    arrays = jax.tree.map(join_batch, (index, visible, q, k, lse))
    kl = kl_over_selected(*arrays, join_batch_indices(topk_indices, n_keys), *static)
    return kl.reshape(q.shape[:2])
