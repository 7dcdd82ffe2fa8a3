"""Keys that a selection takes whatever their scores: the first and the last ones that a query sees."""

import jax.numpy as jnp
from jaxtyping import Array, Int32

from pallas_kernels.common.numerics import clamped
from pallas_kernels.common.selection import canonical
from pallas_kernels.types import ForcedKeys, Visible


def scored_range(visible: Visible, forced: ForcedKeys, n_keys: int) -> Visible:
    """The keys that compete by score: those between the forced ones of the visible range, clamped to [0, n_keys]."""
    start, end = clamped(visible, n_keys)
    first = jnp.minimum(start + forced.first, end)
    return Visible(first, jnp.maximum(end - forced.last, first))


def with_forced(
    chosen: Int32[Array, "B T C"], scored: Visible, visible: Visible, forced: ForcedKeys, n_keys: int
) -> Int32[Array, "B T K"]:
    """The canonical selection of the forced keys and of those `chosen` in the `scored` range; K counts all of them."""

    def run(start: Array, end: Array, count: int) -> Array:
        position = start[..., None] + jnp.arange(count, dtype=jnp.int32)
        return jnp.where(position < end[..., None], position, n_keys)

    visible = clamped(visible, n_keys)
    first, last = run(visible.start, scored.start, forced.first), run(scored.end, visible.end, forced.last)
    joined = jnp.concatenate([first, jnp.where(chosen >= 0, chosen, n_keys), last], axis=-1)
    return canonical(jnp.sort(joined, axis=-1), n_keys, joined.shape[-1])
