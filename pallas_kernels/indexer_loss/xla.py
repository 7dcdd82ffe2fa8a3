"""The indexer's KL by query chunks with a hand-written backward: probabilities and scores exist per chunk and block only."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.common.numerics import accumulation_dtype
from pallas_kernels.indexer_loss.xla_selected import kl_over_selected
from pallas_kernels.indexer_loss.xla_visible import kl_over_visible
from pallas_kernels.sparse_attention.xla import join_batch, join_batch_indices


def indexer_kl(
    q_index: Float[Array, "B T Hi Di"],
    k_index: Float[Array, "B N Di"],
    weights: Float[Array, "B T Hi"],
    q: Float[Array, "B T H Dk"],
    k: Float[Array, "B S G Dk"],
    lse: Float[Array, "B T H"],
    visible_start: Int32[Array, "B T"],
    visible_end: Int32[Array, "B T"],
    *,
    softmax_scale: float,
    topk_indices: Int32[Array, "B T K"] | None,
    head_axis: str | None = None,
    activation: str = "relu",
    head_lse: Float[Array, "B T Hi"] | None = None,
    keys_per_index_key: int = 1,
) -> Float[Array, "B T"]:
    """KL over the visible keys, or over the selected visible keys."""
    if 0 in (q.size, k.shape[1]):
        return jnp.zeros(q.shape[:2], accumulation_dtype(q_index, k_index, weights))
    arrays = (q_index, k_index, weights, head_lse, q, k, lse)
    static = float(softmax_scale), head_axis, activation
    if topk_indices is None:
        return kl_over_visible(*arrays, visible_start, visible_end, *static, keys_per_index_key)
    n_keys = k.shape[1]
    first = n_keys * jnp.arange(k.shape[0], dtype=jnp.int32)[:, None]
    ranges = [jnp.clip(bound, 0, n_keys) + first for bound in (visible_start, visible_end)]
    places = join_batch_indices(topk_indices, n_keys)
    kl = kl_over_selected(*jax.tree.map(join_batch, (*arrays, *ranges)), places, *static)
    return kl.reshape(q.shape[:2])
