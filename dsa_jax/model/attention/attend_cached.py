"""Attention of new tokens over a cache that already holds them: densely, or over a selection read row by row."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsa_jax.config.implementations import Implementations
from dsa_jax.model.attention.cache import INDEX_KEYS, LayerCache
from dsa_jax.model.attention.selection import DENSE, SELECTORS, Budget, Heads, SelectionInputs
from pallas_kernels import IndexHeads, Visible, dense_attention, sparse_attention


class CachedAttentionOutput(NamedTuple):
    """Output of one attention layer (or of its core), the selection that it used and the cache that it wrote to."""

    out: Float[Array, "..."]
    topk_indices: Int[Array, "B T K"] | None
    cache: LayerCache


def attend_cached(
    q: Float[Array, "B T H D"],
    index: IndexHeads | None,
    previous_topk: Int[Array, "B T K"] | None,
    cache: LayerCache,
    *,
    attention: str,
    keys: str,
    values: str | None,
    d_v: int | None,
    budget: Budget,
    softmax_scale: float,
    visible: Visible,
    activation: str,
    implementations: Implementations,
) -> CachedAttentionOutput:
    """What `attention.attend` computes for the same tokens, with keys and values from the cache.

    A selection is read row by row where that moves fewer rows than reading all of them: T * topk <= S.

    Args:
        q: queries of the new tokens, whose keys and values the cache already holds.
        index: this layer's indexer on the new tokens; its keys are read from the cache. None for a layer that has none or
            shares.
        previous_topk: selection of the previous layer, positions within the row, reused by a layer that shares.
        cache: with the new tokens written.
        attention: "dense" or a name in `SELECTORS`.
        keys, values: names of the cache entries; `values` None: the first `d_v` channels of the keys.
        visible: ranges of positions within the row.
        activation: of the index scores.
    """
    # All rows of the cache. XLA drops whatever of this the chosen mode does not use.
    heads = Heads(q, _as_heads(cache.read(keys, q.dtype)), None if values is None else cache.read(values, q.dtype), d_v)
    selector = None if attention == DENSE else SELECTORS[attention]
    everything = None
    if selector is None or selector.needs_dense_lse:
        settings: dict[str, Any] = {"softmax_scale": softmax_scale, "d_v": d_v}
        everything = dense_attention(
            heads.q, heads.k, heads.v, visible, **settings, implementation=implementations.dense_attention
        )
    if selector is None:
        assert everything is not None
        return CachedAttentionOutput(everything.out, None, cache)

    if selector.uses_indexer and index is None:
        assert previous_topk is not None
        indices = previous_topk
    else:
        if index is not None:
            index = index._replace(k=cache.read(INDEX_KEYS, index.q.dtype))
        lse = None if everything is None else everything.lse
        inputs = SelectionInputs(budget, visible, heads, softmax_scale, index, lse, implementations, activation)
        indices = selector.select(inputs)
    topk = indices.shape[-1]
    settings = {"softmax_scale": softmax_scale, "d_v": d_v, "implementation": implementations.sparse_attention}
    if q.shape[1] * topk > cache.capacity:
        out = sparse_attention(heads.q, heads.k, heads.v, indices, **settings).out
        return CachedAttentionOutput(out, indices, cache)

    def selected(name: str) -> Float[Array, "N K G D"]:
        return _as_heads(cache.gather(name, indices, q.dtype).reshape(-1, topk, *cache.entries[name].shape))

    # Every query becomes a row of its own, whose keys are the topk that were read for it.
    own_queries = q.reshape(-1, 1, *q.shape[2:])
    place = jnp.where(indices >= 0, jnp.arange(topk, dtype=jnp.int32), -1).reshape(-1, 1, topk)
    out = sparse_attention(own_queries, selected(keys), None if values is None else selected(values), place, **settings).out
    return CachedAttentionOutput(out.reshape(*q.shape[:3], -1), indices, cache)


def _as_heads(rows: Float[Array, "B S ..."]) -> Float[Array, "B S G D"]:
    """Keys of one head for all, as MLA keeps them, with their axis of heads."""
    return rows[:, :, None, :] if rows.ndim == 3 else rows
