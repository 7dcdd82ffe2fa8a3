"""Which keys a query attends to: a registry of selection rules.

A rule maps a `SelectionInputs` to canonical indices, int32 [B, T, topk], ascending by position, -1 after the last valid one.
Adding a rule is one function and one entry in `SELECTORS`; its name then works as `attention=` of the model. Attention to all
visible keys is the name "dense", which selects nothing and is not in the table; nor is "nsa", whose three branches are in
`nsa_attention`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsa_jax.config.implementations import Implementations
from pallas_kernels import ForcedKeys, IndexHeads, Visible, attention_topk, index_topk, index_topk_coarse_to_fine, pool_blocks

DENSE = "dense"
NSA = "nsa"


class Heads(NamedTuple):
    """Projected queries, keys and values of one attention layer; `v` None: values are the first d_v channels of the keys."""

    q: Float[Array, "B T H D"]
    k: Float[Array, "B S G D"]
    v: Float[Array, "B S G Dv"] | None
    d_v: int | None


class Budget(NamedTuple):
    """How many keys a rule may keep (`topk`) and, for rules that work by blocks, how many blocks it may look at.

    Those are `n_blocks` blocks of `block_size` keys each.

    Where the indexer chooses key by key ("sparse", "coarse_to_fine"), the `forced` keys are always among the topk.
    "coarse_to_fine" makes one key of a block as `pooling` says; the loss of choosing blocks this way enters the indexer's dense
    loss with weight `coarse_loss_weight`.
    """

    topk: int
    block_size: int
    n_blocks: int
    forced: ForcedKeys = ForcedKeys()
    pooling: str = "mean"
    coarse_loss_weight: float = 0.0


class SelectionInputs(NamedTuple):
    """Everything a rule may look at. `index_heads` is None without an indexer, `dense_lse` unless the rule asks for it.

    `activation` is that of the index scores.
    """

    budget: Budget
    visible: Visible
    heads: Heads
    softmax_scale: float
    index_heads: IndexHeads | None
    dense_lse: Float[Array, "B T H"] | None
    implementations: Implementations
    activation: str = "relu"

    @property
    def topk(self) -> int:
        """Keys per query."""
        return self.budget.topk


class Selector(NamedTuple):
    """A selection rule and what it needs.

    Fields: `select` the rule; `uses_indexer` whether it reads `index_heads` (sharing layers reuse the last result);
    `needs_dense_lse` whether a pass of dense attention must come first.
    """

    select: Callable[[SelectionInputs], Int[Array, "B T K"]]
    uses_indexer: bool = False
    needs_dense_lse: bool = False


def select_by_indexer(inputs: SelectionInputs) -> Int[Array, "B T K"]:
    """The topk keys of the highest index score; equal scores go to the lower position."""
    assert inputs.index_heads is not None
    return index_topk(
        inputs.index_heads,
        inputs.visible,
        topk=inputs.topk,
        forced=inputs.budget.forced,
        activation=inputs.activation,
        implementation=inputs.implementations.index_topk,
    )


def share_held(kept: Int[Array, "B T K"], wanted: Int[Array, "B T W"]) -> Float[Array, "B T"]:
    """Share of the keys in `wanted` that `kept` holds, too; both canonical. 1 for a query that wants none."""
    last = jnp.iinfo(jnp.int32).max
    ascending = jnp.where(kept >= 0, kept, last)
    place = jax.vmap(jax.vmap(jnp.searchsorted))(ascending, wanted)
    found = jnp.take_along_axis(ascending, jnp.minimum(place, kept.shape[-1] - 1), axis=-1) == wanted
    n_wanted = jnp.sum(wanted >= 0, axis=-1)
    return jnp.where(n_wanted > 0, jnp.sum(found, axis=-1) / jnp.maximum(n_wanted, 1), 1.0).astype(jnp.float32)


def select_coarse_to_fine(inputs: SelectionInputs) -> Int[Array, "B T K"]:
    """The topk keys of the highest index score among the best blocks; as `select_by_indexer` where these cover the context."""
    assert inputs.index_heads is not None
    return index_topk_coarse_to_fine(
        inputs.index_heads,
        inputs.visible,
        topk=inputs.topk,
        block_size=inputs.budget.block_size,
        n_blocks=inputs.budget.n_blocks,
        pooling=inputs.budget.pooling,
        forced=inputs.budget.forced,
        activation=inputs.activation,
        implementation=inputs.implementations.index_topk,
    )


def select_window(inputs: SelectionInputs) -> Int[Array, "B T K"]:
    """The last topk visible keys."""
    start, end = inputs.visible.start[..., None], inputs.visible.end[..., None]
    place = jnp.maximum(start, end - inputs.topk) + jnp.arange(inputs.topk, dtype=jnp.int32)
    return jnp.where(place < end, place, -1)


def select_oracle(inputs: SelectionInputs) -> Int[Array, "B T K"]:
    """The topk keys of the highest attention probability, summed over heads: an upper bound that costs dense attention."""
    assert inputs.dense_lse is not None
    return attention_topk(
        inputs.heads.q,
        inputs.heads.k,
        inputs.dense_lse,
        inputs.visible,
        softmax_scale=inputs.softmax_scale,
        topk=inputs.topk,
        implementation=inputs.implementations.attention_topk,
    )


def select_window_with_sink(inputs: SelectionInputs) -> Int[Array, "B T K"]:
    """The first `N_SINK` visible keys and the last ones, topk together (StreamingLLM, arXiv 2309.17453)."""
    start, end = inputs.visible.start[..., None], inputs.visible.end[..., None]
    n_sink = min(N_SINK, inputs.topk)
    rank = jnp.arange(inputs.topk, dtype=jnp.int32)
    place = start + rank + jnp.where(rank < n_sink, 0, jnp.maximum(end - start - inputs.topk, 0))
    return jnp.where(place < end, place, -1)


def select_random(inputs: SelectionInputs) -> Int[Array, "B T K"]:
    """One key drawn from each of topk equal stretches of the visible range: what a budget is worth without any choice.

    The same draw in every layer and call, by the end of the query's range; every visible key is about as likely.
    """
    start, n_visible = inputs.visible.start[..., None], (inputs.visible.end - inputs.visible.start)[..., None]
    rank = jnp.arange(inputs.topk, dtype=jnp.int32)
    # Whole stretches per key and the remainder spread over the first ones: products of large lengths would overflow.
    length, longer = n_visible // inputs.topk, n_visible % inputs.topk
    first = rank * length + jnp.minimum(rank, longer)
    width = length + (rank < longer)
    # By query rather than by call: over a cache a query is to get the keys that it gets in a whole row.
    draw_one = lambda end, width: jax.random.randint(jax.random.fold_in(jax.random.key(0), end), width.shape, 0, width)
    draw = jax.vmap(jax.vmap(draw_one))(inputs.visible.end, jnp.maximum(width, 1))
    return jnp.where(width > 0, start + first + draw, -1)


def select_blocks(inputs: SelectionInputs) -> Int[Array, "B T K"]:
    """Whole blocks of `budget.block_size` keys by the index score of their mean index key, the own block always, topk in all.

    Blocks lie at multiples of that size, or of topk where that is less. Only blocks that are visible as a whole compete:
    the mean of another would tell of keys that the query may not see. Of its own block a query attends to the visible part.
    """
    assert inputs.index_heads is not None
    index = inputs.index_heads
    size = min(inputs.budget.block_size, inputs.topk)
    start, end = inputs.visible.start, inputs.visible.end
    own = jnp.maximum(end - 1, 0) // size
    n_others = inputs.topk // size - 1
    chosen = own[..., None]
    if n_others:
        first = jnp.minimum(-(-start // size), own)
        others = index_topk(
            index._replace(k=pool_blocks(index.k, size).astype(index.k.dtype)),
            Visible(first, own),
            topk=n_others,
            activation=inputs.activation,
            implementation=inputs.implementations.index_topk,
        )
        chosen = jnp.concatenate([others, chosen], axis=-1)
    keys = (chosen[..., None] * size + jnp.arange(size, dtype=jnp.int32)).reshape(*chosen.shape[:2], -1)
    inside = (jnp.repeat(chosen, size, axis=-1) >= 0) & (keys >= start[..., None]) & (keys < end[..., None])
    ascending = jnp.sort(jnp.where(inside, keys, jnp.iinfo(jnp.int32).max), axis=-1)
    kept = jnp.where(ascending < end[..., None], ascending, -1)
    return jnp.pad(kept, ((0, 0), (0, 0), (0, inputs.topk - kept.shape[-1])), constant_values=-1)


N_SINK = 4

SELECTORS: dict[str, Selector] = {
    "sparse": Selector(select_by_indexer, uses_indexer=True),
    "coarse_to_fine": Selector(select_coarse_to_fine, uses_indexer=True),
    "window": Selector(select_window),
    "sink_window": Selector(select_window_with_sink),
    "random": Selector(select_random),
    "blocks": Selector(select_blocks, uses_indexer=True),
    "oracle": Selector(select_oracle, needs_dense_lse=True),
}


def attention_modes() -> tuple[str, ...]:
    """Every name that `attention=` accepts."""
    return (DENSE, *SELECTORS, NSA)
