"""The mesh under which the model is traced, set by `with jax.set_mesh(mesh)` around the jitted call.

For operations that must know how they are sharded; everything else is left to the compiler.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec

from dsa_jax.config import AXES
from dsa_jax.parallel.mesh import BATCH_AXES

ROWS = PartitionSpec(BATCH_AXES, "context")
"""Sharding of an array [B, T, ...]: rows over the batch axes, positions over `context`."""


def axis_size(name: str) -> int:
    """Number of devices along the axis `name`; 1 without a mesh, or under a mesh without our axes."""
    shape = jax.sharding.get_abstract_mesh().shape
    return shape[name] if set(AXES) <= set(shape) else 1


def is_sharded() -> bool:
    """Whether there is a mesh with our axes and more than one device."""
    return any(axis_size(name) > 1 for name in AXES)


def splits_evenly(shape: tuple[int, ...]) -> bool:
    """Whether an array [B, T, ...] can be sharded by `ROWS`."""
    return shape[0] % math.prod(axis_size(name) for name in BATCH_AXES) == 0 and shape[1] % axis_size("context") == 0


def check_auto_axes(*trees: Any) -> None:
    """Check that sharding is left to the compiler: no array is sharded over Explicit axes of a mesh.

    Raises:
        ValueError: naming such axes, or the Explicit ones among our axes of the current mesh.
    """
    mesh = jax.sharding.get_abstract_mesh()
    explicit = {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit}
    if not explicit:
        return
    split_over = set().union(*(_axes_of(jax.typeof(x).sharding.spec) for x in jax.tree.leaves(trees)))
    wrong = explicit & (set(AXES) if is_sharded() else split_over)
    if wrong:
        raise ValueError(
            f"the mesh that is set has Explicit axes ({', '.join(sorted(wrong))}), over which the model or its input is split; "
            "expected Auto axes. Make it with jax.make_mesh(..., axis_types=(jax.sharding.AxisType.Auto,) * n_axes), or call "
            "the model inside jax.sharding.auto_axes."
        )


def _axes_of(spec: PartitionSpec) -> set[str]:
    return set().union(*((axis,) if isinstance(axis, str) else axis or () for axis in spec))


def per_device(function: Callable[..., Any], *, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`function` on each device's shards of the arguments; without a mesh, or on one device, `function` itself.

    It communicates with other devices by axis name; without a mesh `axis_size` is 1 and there is no communication.
    """
    if not is_sharded():
        return function
    # No check of varying axes: the interpreter of Pallas kernels does not track them.
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _over(reduce: Callable[[Any, str], Any]) -> Callable[[str, Any], Any]:
    return lambda axis, x: reduce(x, axis) if axis_size(axis) > 1 else x


# Reductions (axis, x) over the devices along `axis`; `x` itself where there is only one.
sum_over, mean_over, max_over, min_over = map(_over, (jax.lax.psum, jax.lax.pmean, jax.lax.pmax, jax.lax.pmin))


def axis_index(axis: str) -> Any:
    """Index of this device along `axis`; 0 where there is only one."""
    return jax.lax.axis_index(axis) if axis_size(axis) > 1 else 0


def axis_if_split(name: str) -> str | None:
    """`name` where the mesh has several devices along it, else None."""
    return name if axis_size(name) > 1 else None


def no_mesh() -> Any:
    """A context in which code is traced as if there were no mesh."""
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ()))
