"""How an indexer learns to choose blocks, for the selection from coarse to fine."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from dsa_jax.model.attention.selection import Heads
from pallas_kernels import IndexHeads, Visible, indexer_kl, pool_blocks


def coarse_kl(
    index: IndexHeads,
    visible: Visible,
    heads: Heads,
    lse: Float[Array, "B T H"],
    *,
    block_size: int,
    pooling: str,
    **settings: Any,
) -> Float[Array, "B T"]:
    """KL of the attention that falls on each block from the softmax over the scores of the blocks' pooled index keys.

    Over the blocks that a query sees as a whole, which are those that compete; 0 for a query that sees none. It is computed as
    the KL of single keys that share the pooled index key of their block: that adds how unevenly attention lies inside the
    blocks, a constant in the indexer's parameters, so the gradient is that of the blocks, and nothing of size T x S is held.

    Args:
        index: index heads of all keys.
        visible: of the queries.
        heads: of dense attention, the target.
        lse: of dense attention.
        block_size: keys per block; blocks lie at multiples of it.
        pooling: how a block's index keys become one, see `pool_blocks`.
        settings: `softmax_scale` and what else `indexer_kl` takes.
    """
    pooled = pool_blocks(index.k, block_size, pooling).astype(index.k.dtype)
    n_keys = pooled.shape[1] * block_size
    if not n_keys:
        return jnp.zeros(visible.start.shape, jnp.float32)
    first = -(-visible.start // block_size) * block_size
    end = visible.end // block_size * block_size
    sees_some = end > first
    whole = Visible(jnp.where(sees_some, first, 0), jnp.where(sees_some, end, 0))
    keys = heads.k[:, :n_keys]
    return indexer_kl(index._replace(k=pooled), whole, heads.q, keys, lse, keys_per_index_key=block_size, **settings)
