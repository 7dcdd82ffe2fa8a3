"""Context parallelism: the positions of each device, and the all-gather of keys.

The cost of a causal query is proportional to its position, so device c of n holds chunks c and 2n - 1 - c of 2n: equal work for
all. Between `to_balanced` and `from_balanced` arrays are in that storage order; keys are all-gathered along `context` and
reordered to natural order first, so that visible ranges and selected indices mean positions as everywhere else.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from dsa_jax.parallel.ambient import ROWS, axis_size, is_sharded
from dsa_jax.parallel.mesh import BATCH_AXES

AXIS = "context"
HEADS = PartitionSpec(BATCH_AXES, AXIS, "tensor")
"""Sharding of an array [B, T, H, D]."""


def balanced_order(length: int, n_devices: int) -> np.ndarray:
    """Positions in storage order: entry i is the position stored at i.

    Raises:
        ValueError: when `length` is not a multiple of 2 * n_devices.
    """
    if length % (2 * n_devices):
        raise ValueError(
            f"a sequence of {length} tokens cannot be split over parallel.context={n_devices}; expected a multiple of "
            f"{2 * n_devices}. Pad it, or change the sequence length."
        )
    chunks = np.arange(length).reshape(2 * n_devices, -1)
    return np.concatenate([np.concatenate([chunks[c], chunks[-1 - c]]) for c in range(n_devices)])


def check_rows(shape: tuple[int, ...]) -> None:
    """Check that [B, T] tokens split evenly over the mesh.

    Raises:
        ValueError: naming the number of rows or positions, and its divisor.
    """
    n_parts = math.prod(axis_size(name) for name in BATCH_AXES)
    if shape[0] % n_parts:
        raise ValueError(
            f"a batch of {shape[0]} rows cannot be split over {n_parts} devices ({', '.join(BATCH_AXES)}); expected a multiple "
            "of that. Change the batch size or the mesh."
        )
    if axis_size(AXIS) > 1:
        balanced_order(shape[1], axis_size(AXIS))


def to_balanced(x: Any) -> Any:
    """[B, T, ...] from natural to storage order; `x` itself without context parallelism."""
    n_devices = axis_size(AXIS)
    return x if n_devices == 1 else jnp.take(x, balanced_order(x.shape[1], n_devices), axis=1)


def from_balanced(x: Any, axis: int = 1) -> Any:
    """The reverse of `to_balanced`, with positions along `axis`."""
    n_devices = axis_size(AXIS)
    return x if n_devices == 1 else jnp.take(x, np.argsort(balanced_order(x.shape[axis], n_devices)), axis=axis)


def gather_keys(x: Any) -> Any:
    """All-gather keys [b, S / n, ...] to [b, S, ...] in natural order; called inside `shard_map`."""
    return x if axis_size(AXIS) == 1 else from_balanced(jax.lax.all_gather(x, AXIS, axis=1, tiled=True))


def gather_heads(x: Any) -> Any:
    """All-gather heads [b, t, H / n, ...] to [b, t, H, ...]; called inside `shard_map`."""
    return x if axis_size("tensor") == 1 else jax.lax.all_gather(x, "tensor", axis=2, tiled=True)


def key_spec(keys: Any) -> PartitionSpec:
    """Sharding of keys or values [B, S, G, D]: over `tensor` by key head, unless one head serves all queries."""
    return HEADS if keys.shape[2] > 1 else ROWS


def constrain(x: Any, spec: PartitionSpec = ROWS) -> Any:
    """Constrain `x` to `spec`; without a mesh, `x` itself."""
    return jax.lax.with_sharding_constraint(x, spec) if is_sharded() else x
