"""Visible ranges of keys from packed segments, and means over the queries that are not padding."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import Visible


def causal_visibility(segment_ids: Int[Array, "B T"]) -> Visible:
    """Causal attention within packed segments; a padding query sees an empty range.

    A segment is a run of equal non-zero ids; 0 is padding. An id that comes back after another one starts a new segment.
    """
    place = jnp.broadcast_to(jnp.arange(segment_ids.shape[1], dtype=jnp.int32), segment_ids.shape)
    valid = segment_ids != 0
    return Visible(start=jnp.where(valid, segment_starts(segment_ids), 0), end=jnp.where(valid, place + 1, 0))


def segment_starts(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Position of the first token of each token's run of equal ids, int32."""
    place = jnp.broadcast_to(jnp.arange(segment_ids.shape[1], dtype=jnp.int32), segment_ids.shape)
    first = jnp.concatenate([jnp.ones_like(segment_ids[:, :1], dtype=bool), segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1)
    return jax.lax.cummax(jnp.where(first, place, 0), axis=1)


def segment_positions(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Position of each token counted from the start of its segment, int32."""
    return jnp.arange(segment_ids.shape[1], dtype=jnp.int32) - segment_starts(segment_ids)


def mean_over_valid(values: Float[Array, "B T"], valid: Bool[Array, "B T"]) -> Float[Array, ""]:
    """Mean of `values` over valid queries in float32; 0 when there are none. Values at padding may be anything, even NaN."""
    kept = jnp.where(valid, values, 0.0).astype(jnp.float32)
    return jnp.sum(kept) / jnp.maximum(jnp.sum(valid), 1).astype(jnp.float32)
