"""Bytes of abstract arrays, whole and on one device."""

import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import PartitionSpec

from dsa_jax.parallel.placement import specs_of
from dsa_jax.parallel.rules import parameter_spec
from dsa_jax.params import parameter_paths


def array_bytes(leaf: Any) -> int:
    """Bytes of a whole array, which may be abstract."""
    return math.prod(leaf.shape) * leaf.dtype.itemsize


def shard_bytes(leaf: Any, spec: PartitionSpec, sizes: Mapping[str, int]) -> int:
    """Bytes of `leaf` on each device of a mesh with axes of `sizes`; an axis that does not divide is padded up."""
    shape = list(leaf.shape)
    for dim, axes in enumerate(spec):
        for axis in (axes,) if isinstance(axes, str) else axes or ():
            shape[dim] = -(-shape[dim] // sizes[axis])
    return math.prod(shape) * leaf.dtype.itemsize


def bytes_per_device(tree: Any, sizes: Mapping[str, int]) -> int:
    """Bytes that parameters, or optimizer state that mirrors them, take on each device under the sharding rules."""
    shards = jax.tree.map(lambda leaf, spec: shard_bytes(leaf, spec, sizes), tree, specs_of(tree))
    return sum(jax.tree.leaves(shards))


def sharding_table(params: Mapping[str, Any], sizes: Mapping[str, int]) -> list[dict[str, Any]]:
    """One row per parameter, as JSON values: `path`, `shape`, `dtype`, `spec` (axis names or None), `bytes` per device."""
    rows = []
    for path, leaf in parameter_paths(params).items():
        spec = parameter_spec(path)
        shown = [axis if axis is not None and sizes[axis] > 1 else None for axis in spec]
        rows.append(
            {
                "path": path,
                "shape": list(leaf.shape),
                "dtype": leaf.dtype.name,
                "spec": shown + [None] * (len(leaf.shape) - len(shown)),
                "bytes": shard_bytes(leaf, spec, sizes),
            }
        )
    return rows
