"""The loss that teaches an indexer to choose blocks, for the selection from coarse to fine."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from dsa_jax.config import IndexerConfig
from pallas_kernels import IndexHeads, Visible, indexer_kl, pool_blocks


def coarse_kl(
    indexer: IndexerConfig,
    index: IndexHeads,
    visible: Visible,
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S G D"],
    lse: Float[Array, "B T H"],
    **settings: Any,
) -> Float[Array, "B T"]:
    """KL of the attention that falls on each block from the softmax over the scores of the blocks' pooled index keys.

    Over the blocks that a query sees as a whole, which are those that compete; 0 for a query that sees none. It is computed as
    the KL of single keys that share the pooled index key of their block: that adds how unevenly attention lies inside the
    blocks, a constant in the indexer's parameters, so the gradient is that of the blocks, and nothing of size T x S is held.

    Args:
        indexer: `coarse_block_size` keys per block, at multiples of it; `coarse_pooling` of their index keys.
        index: index heads of all keys.
        visible: ranges of the queries.
        q, k, lse: of dense attention, the target.
        settings: `softmax_scale` and the other options of `indexer_kl`.
    """
    size = indexer.coarse_block_size
    pooled = pool_blocks(index.k, size, indexer.coarse_pooling).astype(index.k.dtype)
    n_keys = pooled.shape[1] * size
    if not n_keys:
        return jnp.zeros(visible.start.shape, jnp.float32)
    first, end = -(-visible.start // size) * size, visible.end // size * size
    sees_some = end > first
    whole = Visible(jnp.where(sees_some, first, 0), jnp.where(sees_some, end, 0))
    return indexer_kl(index._replace(k=pooled), whole, q, k[:, :n_keys], lse, keys_per_index_key=size, **settings)
