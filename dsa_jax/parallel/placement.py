"""Placement of parameters, optimizer state and batches on the mesh, by the sharding rules."""

import contextlib
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsa_jax.config import ConfigError, ParallelConfig
from dsa_jax.parallel.ambient import ROWS, is_sharded
from dsa_jax.parallel.mesh import make_mesh
from dsa_jax.parallel.rules import parameter_spec

_PARAMETER = re.compile(r"(?:^|/)((?:(?:dense|moe)_layers\w*|embed|lm_head|final_norm)/.*)")


def on_mesh(config: ParallelConfig) -> contextlib.AbstractContextManager[Any]:
    """A context in which jitted code runs on the mesh of `config`; it does nothing where that is one device.

    Raises:
        ConfigError: when there are not as many devices, or several processes and no mesh to join them.
    """
    if all(size == 1 for size in config.sizes().values()):
        if jax.process_count() > 1:
            raise ConfigError(
                f"parallel ({config.preset}) needs one device, but there are {jax.process_count()} processes with "
                f"{jax.device_count()} devices. Set parallel.preset, such as fsdp{jax.device_count()}, or run one process."
            )
        return contextlib.nullcontext()
    return jax.set_mesh(make_mesh(config))


def current_mesh() -> Mesh | None:
    """The mesh of the surrounding `on_mesh`; None on one device."""
    return jax.sharding.get_mesh() if is_sharded() else None


def leaf_spec(path: str, leaf: Any) -> PartitionSpec:
    """Sharding of a leaf of a parameter tree, or of an optimizer's state that mirrors one: that of the parameter in its path.

    Everything else (counters, optimizer state of other shapes) is replicated.
    """
    found = _PARAMETER.search(path)
    spec = parameter_spec(found[1]) if found else PartitionSpec()
    return spec if len(spec) <= len(leaf.shape) else PartitionSpec()


def specs_of(tree: Any) -> Any:
    """`leaf_spec` of every leaf, in the structure of `tree`; leaves may be abstract."""
    joined = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    return jax.tree_util.tree_map_with_path(lambda keys, leaf: leaf_spec(joined(keys), leaf), tree)


def shardings_of(tree: Any, mesh: Mesh) -> Any:
    """`specs_of` on `mesh`."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs_of(tree))


def place(tree: Any) -> Any:
    """Parameters or training state sharded over the current mesh by the rules; `tree` itself on one device."""
    mesh = current_mesh()
    return tree if mesh is None else jax.tree.map(shard, tree, shardings_of(tree, mesh))


def placement_on(mesh: Mesh) -> Callable[[str], NamedSharding]:
    """From a parameter's path to its sharding by the rules, over the axes that `mesh` has."""
    on = lambda axis: axis if axis in mesh.axis_names else None
    return lambda path: NamedSharding(mesh, PartitionSpec(*map(on, parameter_spec(path))))


def shard(value: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    """`value`, which every process holds whole or which is on a mesh already, with `sharding`.

    With several processes each transfers only the shards of its own devices; the values must be the same in all.
    """
    on_mesh_already = isinstance(value, jax.Array) and not value.is_fully_addressable
    if sharding.is_fully_addressable or on_mesh_already:
        return jax.device_put(value, sharding)
    whole = np.asarray(value)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def with_shardings(abstract: Any) -> Any:
    """Abstract leaves with the sharding of `place`, for restoring a checkpoint."""
    mesh = current_mesh()
    if mesh is None:
        return abstract
    typed = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    return jax.tree.map(typed, abstract, shardings_of(abstract, mesh))


def hold(tree: Any) -> Any:
    """Inside jit: constrain results to the sharding of the rules."""
    return jax.lax.with_sharding_constraint(tree, specs_of(tree)) if is_sharded() else tree


def replicate(tree: Any) -> Any:
    """Inside jit: replicate results, so that every process can read them."""
    return jax.lax.with_sharding_constraint(tree, PartitionSpec()) if is_sharded() else tree


def place_batch(batch: Any) -> Any:
    """A batch of [B, T] arrays sharded over the current mesh; `batch` itself on one device.

    Every process makes the whole batch, a function of the seed and the step, and keeps the rows of its own devices: no row is
    lost or repeated, however many processes there are.
    """
    mesh = current_mesh()
    if mesh is None:
        return batch
    return jax.tree.map(lambda rows: shard(rows, NamedSharding(mesh, ROWS)), batch)
