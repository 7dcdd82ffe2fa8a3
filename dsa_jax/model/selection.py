"""Which keys a query attends to: a registry of selection rules.

A rule maps a `SelectionInputs` to canonical indices, int32 [B, T, topk], ascending by position, -1 after the last valid one.
Adding a rule is one function and one entry in `SELECTORS`; its name then works as `attention=` of the model. Attention to all
visible keys is the name "dense", which selects nothing and is not in the table.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsa_jax.model.visibility import Visibility
from pallas_kernels import attention_topk, index_topk

DENSE = "dense"


class IndexHeads(NamedTuple):
    """What the lightning indexer computes: score[t, s] = sum_h weights[t, h] * relu(q[t, h] . k[s])."""

    q: Float[Array, "B T Hi Di"]
    k: Float[Array, "B S Di"]
    weights: Float[Array, "B T Hi"]


class Heads(NamedTuple):
    """Projected queries, keys and values of one attention layer; `v` None: values are the first d_v channels of the keys."""

    q: Float[Array, "B T H D"]
    k: Float[Array, "B S G D"]
    v: Float[Array, "B S G Dv"] | None
    d_v: int | None


class SelectionInputs(NamedTuple):
    """Everything a rule may look at. `index_heads` is None without an indexer, `dense_lse` unless the rule asks for it."""

    topk: int
    visibility: Visibility
    heads: Heads
    softmax_scale: float
    index_heads: IndexHeads | None
    dense_lse: Float[Array, "B T H"] | None
    implementation: str | None


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
    q, k, weights = jax.lax.stop_gradient(inputs.index_heads)
    return index_topk(
        q,
        k,
        weights,
        topk=inputs.topk,
        visible_start=inputs.visibility.start,
        visible_end=inputs.visibility.end,
        implementation=inputs.implementation,
    )


def select_window(inputs: SelectionInputs) -> Int[Array, "B T K"]:
    """The last topk visible keys."""
    start, end = inputs.visibility.start[..., None], inputs.visibility.end[..., None]
    place = jnp.maximum(start, end - inputs.topk) + jnp.arange(inputs.topk, dtype=jnp.int32)
    return jnp.where(place < end, place, -1)


def select_oracle(inputs: SelectionInputs) -> Int[Array, "B T K"]:
    """The topk keys of the highest attention probability, summed over heads: an upper bound that costs dense attention."""
    assert inputs.dense_lse is not None
    q, k, lse = jax.lax.stop_gradient((inputs.heads.q, inputs.heads.k, inputs.dense_lse))
    return attention_topk(
        q,
        k,
        lse,
        softmax_scale=inputs.softmax_scale,
        topk=inputs.topk,
        visible_start=inputs.visibility.start,
        visible_end=inputs.visibility.end,
        implementation=inputs.implementation,
    )


SELECTORS: dict[str, Selector] = {
    "sparse": Selector(select_by_indexer, uses_indexer=True),
    "window": Selector(select_window),
    "oracle": Selector(select_oracle, needs_dense_lse=True),
}


def attention_modes() -> tuple[str, ...]:
    """Every name that `attention=` accepts."""
    return (DENSE, *SELECTORS)
