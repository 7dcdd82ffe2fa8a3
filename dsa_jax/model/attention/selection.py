"""Which keys a query attends to: the functions behind the rows of `dsa_jax/config/selections.py`.

A rule maps a `Choice` to canonical indices, int32 [B, T, topk], ascending by position, -1 after the last valid one. `choose`
keeps as many of the slots as there are keys: what a budget allows beyond costs nothing.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsa_jax.config import AttentionConfig
from dsa_jax.config.implementations import Implementations, parse_implementations
from dsa_jax.config.selections import Selection, add_selection, remove_selection
from pallas_kernels import (
    ForcedKeys,
    IndexHeads,
    Visible,
    attention_topk,
    index_topk,
    index_topk_coarse_to_fine,
    pool_blocks,
)


class Target(NamedTuple):
    """Dense attention as the oracle ranks keys by it."""

    q: Float[Array, "B T H D"]
    k: Float[Array, "B S G D"]
    lse: Float[Array, "B T H"]
    softmax_scale: float


class Choice(NamedTuple):
    """Everything a rule may look at: `index_heads` is None without an indexer, `target` unless the rule needs it.

    `n_keys` bounds the positions of keys; None where nobody knows.
    """

    config: AttentionConfig
    visible: Visible
    index_heads: IndexHeads | None
    target: Target | None = None
    n_keys: int | None = None

    @property
    def topk(self) -> int:
        """Keys per query."""
        return self.config.indexer.topk

    @property
    def n_slots(self) -> int:
        """Of the `topk` slots of a selection, the leading ones that can be filled."""
        return self.topk if self.n_keys is None else min(self.topk, self.n_keys)

    @property
    def implementations(self) -> Implementations:
        """Of the ops."""
        return implementations_of(self.config)

    @property
    def forced(self) -> ForcedKeys:
        """First and last visible keys that are always among the topk."""
        return ForcedKeys(self.config.indexer.forced_sink, self.config.indexer.forced_local)


class Rule(NamedTuple):
    """The function of a selection, and whether a pass of dense attention must come first."""

    select: Callable[[Choice], Int[Array, "B T K"]]
    needs_target: bool = False


def implementations_of(config: AttentionConfig) -> Implementations:
    """The implementation of each op that the config names."""
    return parse_implementations("model.attention.implementation", config.implementation)


def select_by_indexer(choice: Choice) -> Int[Array, "B T K"]:
    """The topk keys of the highest index score; equal scores go to the lower position."""
    assert choice.index_heads is not None
    return index_topk(
        jax.lax.stop_gradient(choice.index_heads),
        choice.visible,
        topk=choice.topk,
        forced=choice.forced,
        activation=choice.config.indexer.activation,
        implementation=choice.implementations.index_topk,
    )


def share_held(kept: Int[Array, "B T K"], wanted: Int[Array, "B T W"]) -> Float[Array, "B T"]:
    """Share of the keys in `wanted` that `kept` holds, too; both canonical. 1 for a query that wants none."""
    last = jnp.iinfo(jnp.int32).max
    ascending = jnp.where(kept >= 0, kept, last)
    place = jax.vmap(jax.vmap(jnp.searchsorted))(ascending, wanted)
    found = jnp.take_along_axis(ascending, jnp.minimum(place, kept.shape[-1] - 1), axis=-1) == wanted
    n_wanted = jnp.sum(wanted >= 0, axis=-1)
    return jnp.where(n_wanted > 0, jnp.sum(found, axis=-1) / jnp.maximum(n_wanted, 1), 1.0).astype(jnp.float32)


def select_coarse_to_fine(choice: Choice) -> Int[Array, "B T K"]:
    """The topk keys of the highest index score among the best blocks; as `select_by_indexer` where these cover the context."""
    assert choice.index_heads is not None
    indexer = choice.config.indexer
    return index_topk_coarse_to_fine(
        choice.index_heads,
        choice.visible,
        topk=choice.topk,
        block_size=indexer.coarse_block_size,
        n_blocks=indexer.coarse_blocks,
        pooling=indexer.coarse_pooling,
        forced=choice.forced,
        activation=indexer.activation,
        implementation=choice.implementations.index_topk,
    )


def select_window(choice: Choice) -> Int[Array, "B T K"]:
    """The last topk visible keys."""
    start, end = choice.visible.start[..., None], choice.visible.end[..., None]
    place = jnp.maximum(start, end - choice.topk) + jnp.arange(choice.n_slots, dtype=jnp.int32)
    return all_slots(jnp.where(place < end, place, -1), choice.topk)


def select_oracle(choice: Choice) -> Int[Array, "B T K"]:
    """The topk keys of the highest attention probability, summed over heads: an upper bound that costs dense attention."""
    assert choice.target is not None
    q, k, lse, softmax_scale = choice.target
    q, k, lse = jax.lax.stop_gradient((q, k, lse))
    implementation = choice.implementations.attention_topk
    return attention_topk(
        q, k, lse, choice.visible, softmax_scale=softmax_scale, topk=choice.topk, implementation=implementation
    )


def select_window_with_sink(choice: Choice) -> Int[Array, "B T K"]:
    """The first `N_SINK` visible keys and the last ones, topk together (StreamingLLM, arXiv 2309.17453)."""
    start, end = choice.visible.start[..., None], choice.visible.end[..., None]
    n_sink = min(N_SINK, choice.topk)
    rank = jnp.arange(choice.n_slots, dtype=jnp.int32)
    place = start + rank + jnp.where(rank < n_sink, 0, jnp.maximum(end - start - choice.topk, 0))
    return all_slots(jnp.where(place < end, place, -1), choice.topk)


def select_random(choice: Choice) -> Int[Array, "B T K"]:
    """One key drawn from each of topk equal stretches of the visible range: what a budget is worth without any choice.

    The same draw in every layer and call, by the end of the query's range; every visible key is about as likely.
    """
    start, n_visible = choice.visible.start[..., None], (choice.visible.end - choice.visible.start)[..., None]
    # The stretches after the first n_keys are empty.
    rank = jnp.arange(choice.n_slots, dtype=jnp.int32)
    # Whole stretches per key and the remainder spread over the first ones: products of large lengths would overflow.
    length, longer = n_visible // choice.topk, n_visible % choice.topk
    first = rank * length + jnp.minimum(rank, longer)
    width = length + (rank < longer)
    # By query rather than by call: over a cache a query is to get the keys that it gets in a whole row.
    draw_one = lambda end, width: jax.random.randint(jax.random.fold_in(jax.random.key(0), end), width.shape, 0, width)
    draw = jax.vmap(jax.vmap(draw_one))(choice.visible.end, jnp.maximum(width, 1))
    return all_slots(jnp.where(width > 0, start + first + draw, -1), choice.topk)


def select_blocks(choice: Choice) -> Int[Array, "B T K"]:
    """Whole blocks of `coarse_block_size` keys by the index score of their mean index key, the own block always, topk in all.

    Blocks lie at multiples of that size, or of topk where that is less. Only blocks that are visible as a whole compete:
    the mean of another would tell of keys that the query may not see. Of its own block a query attends to the visible part.
    """
    assert choice.index_heads is not None
    index = jax.lax.stop_gradient(choice.index_heads)
    size = min(choice.config.indexer.coarse_block_size, choice.topk)
    start, end = choice.visible.start, choice.visible.end
    own = jnp.maximum(end - 1, 0) // size
    pooled = pool_blocks(index.k, size).astype(index.k.dtype)
    n_others = min(choice.topk // size - 1, pooled.shape[1])
    chosen = own[..., None]
    if n_others:
        first = jnp.minimum(-(-start // size), own)
        others = index_topk(
            index._replace(k=pooled),
            Visible(first, own),
            topk=n_others,
            activation=choice.config.indexer.activation,
            implementation=choice.implementations.index_topk,
        )
        chosen = jnp.concatenate([others, chosen], axis=-1)
    keys = (chosen[..., None] * size + jnp.arange(size, dtype=jnp.int32)).reshape(*chosen.shape[:2], -1)
    inside = (jnp.repeat(chosen, size, axis=-1) >= 0) & (keys >= start[..., None]) & (keys < end[..., None])
    ascending = jnp.sort(jnp.where(inside, keys, jnp.iinfo(jnp.int32).max), axis=-1)
    kept = jnp.where(ascending < end[..., None], ascending, -1)
    return all_slots(kept, choice.topk)


N_SINK = 4

_RULES: dict[str, Rule] = {
    "sparse": Rule(select_by_indexer),
    "coarse_to_fine": Rule(select_coarse_to_fine),
    "window": Rule(select_window),
    "sink_window": Rule(select_window_with_sink),
    "random": Rule(select_random),
    "blocks": Rule(select_blocks),
    "oracle": Rule(select_oracle, needs_target=True),
}


def choose(rule: Rule, choice: Choice) -> Int[Array, "B T K"]:
    """The keys that a rule selects, in the `n_slots` leading slots: a selection among fewer than topk keys fills no more."""
    return rule.select(choice)[..., : choice.n_slots]


def all_slots(indices: Int[Array, "*batch K"], topk: int) -> Int[Array, "*batch {topk}"]:
    """A canonical selection with all its `topk` slots, of which those that nobody filled hold -1."""
    widths = [(0, 0)] * (indices.ndim - 1) + [(0, topk - indices.shape[-1])]
    return jnp.pad(indices, widths, constant_values=-1)


def rule_of(attention: str) -> Rule:
    """The rule of an attention that selects keys."""
    return _RULES[attention]


def register_rule(row: Selection, rule: Rule) -> None:
    """Make a selection rule known everywhere: configs, models, evaluation, report and `--helpfull`.

    Raises:
        ConfigError: where its name or title is taken or empty, or it has no meaning to show.
    """
    add_selection(row)
    _RULES[row.name] = rule


def unregister_rule(name: str) -> None:
    """Forget a rule that `register_rule` made known."""
    remove_selection(name)
    del _RULES[name]
