"""Rows to the devices that own their experts, and back. No row is dropped.

Every device sends the rows of its tokens sorted by expert, hence by owner; owner r receives those of sender s in slot [s]. The
buffers are as long as the worst case, all rows to one owner; `model.experts` sends long sequences in pieces. `ragged` sends
only the rows there are, `padded` whole slots; both deliver the same. XLA has no ragged exchange on CPU.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsa_jax.parallel.ambient import axis_size
from pallas_kernels import traced_platform

AXIS = "expert"
IMPLEMENTATIONS = ("ragged", "padded")


class Received(NamedTuple):
    """Rows at their owner, and how many came from each sender for each of its experts."""

    rows: Float[Array, "S M E"]
    counts: Int[Array, "S X"]


def to_owners(rows: Float[Array, "M E"], counts: Int[Array, " X"], *, implementation: str | None = None) -> Received:
    """Send `rows`, sorted by expert with `counts` rows per expert, to the owners along the axis `expert`.

    Device r owns experts r * X / S to (r + 1) * X / S. Called inside `shard_map`.

    Returns:
        rows [S, M, E], of sender s the first `counts[s].sum()` are real, sorted by expert, the rest zero.

    Raises:
        ValueError: for an unknown implementation.
    """
    implementation, n_owners = _chosen(implementation), axis_size(AXIS)
    by_owner = counts.reshape(n_owners, -1)
    received = jax.lax.all_to_all(by_owner, AXIS, 0, 0, tiled=True)
    slots = jnp.zeros((n_owners, *rows.shape), rows.dtype)
    if implementation == "padded":
        owner, place = _addresses(by_owner.sum(axis=1), len(rows))
        slots = slots.at[owner, place].set(rows, unique_indices=True)
        return Received(jax.lax.all_to_all(slots, AXIS, 0, 0, tiled=True), received)
    sent = by_owner.sum(axis=1)
    mine = jnp.full(n_owners, jax.lax.axis_index(AXIS) * len(rows), jnp.int32)
    flat = _ragged(rows, slots.reshape(-1, rows.shape[-1]), _starts(sent), sent, mine, received.sum(axis=1))
    return Received(flat.reshape(slots.shape), received)


def to_senders(
    rows: Float[Array, "S M E"], counts: Int[Array, " X"], received: Int[Array, "S Y"], *, implementation: str | None = None
) -> Float[Array, "M E"]:
    """The reverse of `to_owners`: rows computed at the owners, back in the order in which they were sent.

    Args:
        rows: in the places of `Received.rows`; those beyond the real ones may hold anything.
        counts: as given to `to_owners`.
        received: `Received.counts`.
        implementation: as in `to_owners`.
    """
    n_owners, n_rows = rows.shape[:2]
    sent = counts.reshape(n_owners, -1).sum(axis=1)
    if _chosen(implementation) == "padded":
        owner, place = _addresses(sent, n_rows)
        return jax.lax.all_to_all(rows, AXIS, 0, 0, tiled=True).at[owner, place].get(unique_indices=True)
    slot_starts = jnp.arange(n_owners, dtype=jnp.int32) * n_rows
    # Where this owner's rows begin in each sender's own order.
    starts = jax.lax.all_to_all(_starts(sent)[:, None], AXIS, 0, 0, tiled=True)[:, 0]
    empty = jnp.zeros((n_rows, rows.shape[-1]), rows.dtype)
    return _ragged(rows.reshape(-1, rows.shape[-1]), empty, slot_starts, received.sum(axis=1), starts, sent)


def _ragged(rows: Array, out: Array, starts: Array, sizes: Array, out_starts: Array, out_sizes: Array) -> Array:
    return jax.lax.ragged_all_to_all(rows, out, starts, sizes, out_starts, out_sizes, axis_name=AXIS)


def _chosen(implementation: str | None) -> str:
    implementation = implementation or ("padded" if traced_platform() == "cpu" else "ragged")
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation is {implementation!r}; expected one of {', '.join(IMPLEMENTATIONS)}.")
    return implementation


def _starts(sizes: Int[Array, " S"]) -> Int[Array, " S"]:
    return (jnp.cumsum(sizes) - sizes).astype(jnp.int32)


def _addresses(sizes: Int[Array, " S"], n_rows: int) -> tuple[Int[Array, " M"], Int[Array, " M"]]:
    """Owner of every sent row, and its place in that owner's slot."""
    row = jnp.arange(n_rows)
    owner = jnp.searchsorted(jnp.cumsum(sizes), row, side="right")
    return owner, row - _starts(sizes)[owner]
