"""Putting parameters, optimizer state and batches where the rules say."""

import contextlib
import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsa_jax.config import ParallelConfig
from dsa_jax.parallel.ambient import ROWS, is_sharded
from dsa_jax.parallel.mesh import make_mesh
from dsa_jax.parallel.rules import parameter_spec

_PARAMETER = re.compile(r"(?:^|/)((?:(?:dense|moe)_layers\w*|embed|lm_head|final_norm)/.*)")


def on_mesh(config: ParallelConfig) -> contextlib.AbstractContextManager[Any]:
    """A context in which jitted code runs on the mesh of `config`; it does nothing where that is one device.

    Raises:
        ConfigError: when there are not as many devices.
    """
    if all(size == 1 for size in config.sizes().values()):
        return contextlib.nullcontext()
    return jax.set_mesh(make_mesh(config))


def current_mesh() -> Mesh | None:
    """The mesh of the surrounding `on_mesh`; None on one device."""
    return jax.sharding.get_mesh() if is_sharded() else None


def leaf_spec(path: str, leaf: Any) -> PartitionSpec:
    """Split of a leaf of a parameter tree, or of an optimizer's state that mirrors one: like the parameter its path ends with.

    Everything else (counters, what an optimizer keeps in another shape) is the same on all devices.
    """
    found = _PARAMETER.search(path)
    spec = parameter_spec(found[1]) if found else PartitionSpec()
    return spec if len(spec) <= len(leaf.shape) else PartitionSpec()


def specs_of(tree: Any) -> Any:
    """`leaf_spec` of every leaf, in the structure of `tree`; leaves may be abstract."""
    return jax.tree_util.tree_map_with_path(lambda keys, leaf: leaf_spec(_joined(keys), leaf), tree)


def shardings_of(tree: Any, mesh: Mesh) -> Any:
    """`specs_of` on `mesh`."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs_of(tree))


def place(tree: Any) -> Any:
    """Parameters or training state on the current mesh, split by the rules; `tree` itself on one device."""
    mesh = current_mesh()
    return tree if mesh is None else jax.device_put(tree, shardings_of(tree, mesh))


def with_shardings(abstract: Any) -> Any:
    """Abstract leaves with the sharding that `place` would give them, for a checkpoint to be restored into."""
    mesh = current_mesh()
    if mesh is None:
        return abstract
    typed = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    return jax.tree.map(typed, abstract, shardings_of(abstract, mesh))


def hold(tree: Any) -> Any:
    """Inside jit: results that stay split by the rules from step to step."""
    return jax.lax.with_sharding_constraint(tree, specs_of(tree)) if is_sharded() else tree


def place_batch(batch: Any) -> Any:
    """A batch of [B, T] arrays on the current mesh; `batch` itself on one device."""
    mesh = current_mesh()
    return batch if mesh is None else jax.device_put(batch, NamedSharding(mesh, ROWS))


def _joined(keys: tuple[Any, ...]) -> str:
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in keys)
