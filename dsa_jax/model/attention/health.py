"""Health of a selection: how it is spread, how local, how much it repeats the layer before, and what is not finite."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dsa_jax.model.attention.selection import share_held
from dsa_jax.parallel.ambient import ROWS, per_device
from pallas_kernels import IndexHeads, Visible


class SelectionHealth(NamedTuple):
    """Measurements of one layer, float32; stacked over layers in a `ModelOutput`.

    All but the last are means over the queries that have a choice, which see more than topk keys; nan where there is none, and
    in a layer without a selection.

    Fields:
        entropy: of the distribution of selected positions over the keys of a row, over that of an even one: near 1 where
            all keys are read about equally often, low where the same few serve all queries.
        local_share: share of the selected keys that lie among the last topk visible ones.
        overlap: share of the selected keys that the layer before selected, too; nan in the first layer and after one without
            a selection.
        n_not_finite: number of valid queries whose hidden state after the layer, or whose index heads, hold a NaN or infinity.
    """

    entropy: Float[Array, "*L"]
    local_share: Float[Array, "*L"]
    overlap: Float[Array, "*L"]
    n_not_finite: Float[Array, "*L"]


class _PerQuery(NamedTuple):
    local_share: Float[Array, "B T"]
    overlap: Float[Array, "B T"]
    is_compared: Bool[Array, "B T"]


def selection_health(
    selected: Int[Array, "B T K"],
    neighbour: Int[Array, "B T K"],
    visible: Visible,
    hidden: Float[Array, "B T E"],
    index_heads: IndexHeads | None,
    *,
    topk: int,
) -> SelectionHealth:
    """The health of one layer's selection.

    Args:
        selected: of this layer, canonical; -1 throughout where it has none.
        neighbour: of the layer before, likewise.
        visible: keys that each query may see.
        hidden: after the layer.
        index_heads: of its own indexer, if it has one.
        topk: the budget.
    """
    spread = per_device(functools.partial(_per_query, topk), in_specs=(ROWS, ROWS, ROWS), out_specs=_PerQuery._make([ROWS] * 3))
    queries = spread(selected, neighbour, visible)
    choosing = (visible.end - visible.start > topk) & (selected[..., 0] >= 0)
    is_finite = jnp.isfinite(hidden).all(-1)
    for part in index_heads or ():
        is_finite &= jnp.isfinite(part).all(tuple(range(2, part.ndim)))
    return SelectionHealth(
        entropy=_relative_entropy(selected, choosing, visible),
        local_share=_mean(queries.local_share, choosing),
        overlap=_mean(queries.overlap, choosing & queries.is_compared),
        n_not_finite=jnp.sum(visible.some & ~is_finite).astype(jnp.float32),
    )


def n_choosing(visible: Visible, topk: int) -> Int[Array, ""]:
    """The number of queries that have a choice: the weight of a batch in a mean of its health over batches."""
    return jnp.sum(visible.end - visible.start > topk)


def _per_query(topk: int, selected: Int[Array, "B T K"], neighbour: Int[Array, "B T K"], visible: Visible) -> _PerQuery:
    n_selected = jnp.maximum(jnp.sum(selected >= 0, axis=-1), 1)
    is_local = (selected >= 0) & (selected >= visible.end[..., None] - topk)
    local_share = (jnp.sum(is_local, axis=-1) / n_selected).astype(jnp.float32)
    return _PerQuery(local_share, share_held(neighbour, selected), neighbour[..., 0] >= 0)


def _relative_entropy(selected: Int[Array, "B T K"], choosing: Bool[Array, "B T"], visible: Visible) -> Float[Array, ""]:
    """Entropy of the positions that the choosing queries of a row select, over that of all keys which these queries see."""
    n_rows, n_keys = choosing.shape
    rows = jnp.arange(n_rows)
    place = jnp.where(choosing[..., None] & (selected >= 0), selected, n_keys)
    counts = jnp.zeros((n_rows, n_keys), jnp.int32).at[rows[:, None, None], place].add(1, mode="drop")
    share = counts / jnp.maximum(counts.sum(-1, keepdims=True), 1)
    entropy = -jnp.sum(jnp.where(counts > 0, share * jnp.log(jnp.where(counts > 0, share, 1.0)), 0.0), axis=-1)
    change = jnp.zeros((n_rows, n_keys + 1), jnp.int32)
    change = change.at[rows[:, None], visible.start].add(choosing).at[rows[:, None], visible.end].add(-1 * choosing)
    n_seen = jnp.sum(jnp.cumsum(change, axis=-1) > 0, axis=-1)
    relative = entropy / jnp.log(jnp.maximum(n_seen, 2).astype(jnp.float32))
    return _mean(jnp.broadcast_to(relative[:, None], choosing.shape), choosing)


def _mean(values: Float[Array, "B T"], counted: Bool[Array, "B T"]) -> Float[Array, ""]:
    n = jnp.sum(counted)
    mean = jnp.sum(jnp.where(counted, values, 0.0)) / jnp.maximum(n, 1)
    return jnp.where(n > 0, jax.lax.stop_gradient(mean), jnp.nan).astype(jnp.float32)
