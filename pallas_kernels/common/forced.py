"""Keys that a selection takes whatever their scores: the first and the last ones that a query sees."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int32

from pallas_kernels.common.checks import is_whole
from pallas_kernels.common.selection import canonical


class ScoredRange(NamedTuple):
    """The keys of each query that are left to compete: those between its forced ones, at positions [start, end)."""

    start: Int32[Array, "B T"]
    end: Int32[Array, "B T"]


def check_forced(op: str, topk: int, forced_sink: Any, forced_local: Any) -> None:
    """Raises ValueError unless both counts are zero or more and leave room for a key that is chosen by its score."""
    are_whole = is_whole(forced_sink) and is_whole(forced_local)
    if not are_whole or min(forced_sink, forced_local) < 0 or 0 < forced_sink + forced_local >= topk:
        raise ValueError(
            f"{op}: forced_sink is {forced_sink} and forced_local {forced_local} with topk {topk}; expected counts of zero or "
            "more that leave at least one key to the scores. Check indexer.forced_sink and indexer.forced_local in the config."
        )


def scored_range(
    visible_start: Int32[Array, "B T"], visible_end: Int32[Array, "B T"], forced_sink: int, forced_local: int, n_keys: int
) -> ScoredRange:
    """What the forced keys leave of the visible range, which is clamped to [0, n_keys]."""
    start, end = jnp.clip(visible_start, 0, n_keys), jnp.clip(visible_end, 0, n_keys)
    first = jnp.minimum(start + forced_sink, end)
    return ScoredRange(first, jnp.maximum(end - forced_local, first))


def with_forced(
    chosen: Int32[Array, "B T C"],
    scored: ScoredRange,
    visible_start: Int32[Array, "B T"],
    visible_end: Int32[Array, "B T"],
    forced_sink: int,
    forced_local: int,
    n_keys: int,
) -> Int32[Array, "B T K"]:
    """The canonical selection of the forced keys and of those `chosen` in the `scored` range; K counts all of them."""

    def run(start: Array, end: Array, count: int) -> Array:
        position = start[..., None] + jnp.arange(count, dtype=jnp.int32)
        return jnp.where(position < end[..., None], position, n_keys)

    sink = run(jnp.clip(visible_start, 0, n_keys), scored.start, forced_sink)
    local = run(scored.end, jnp.clip(visible_end, 0, n_keys), forced_local)
    joined = jnp.concatenate([sink, jnp.where(chosen >= 0, chosen, n_keys), local], axis=-1)
    return canonical(jnp.sort(joined, axis=-1), n_keys, joined.shape[-1])
