"""The mesh that the model is being traced under: `with jax.set_mesh(mesh)` around the jitted call sets it.

Model code asks here where an operation has to know that it is spread out; everything else is left to the compiler.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec

from dsa_jax.config import AXES
from dsa_jax.parallel.mesh import BATCH_AXES

ROWS = PartitionSpec(BATCH_AXES, "context")
"""Split of an array [B, T, ...]: rows over the batch axes, positions over `context`."""


def axis_size(name: str) -> int:
    """Devices along the axis `name`; 1 without a mesh, or under one of other axes than ours."""
    shape = jax.sharding.get_abstract_mesh().shape
    return shape[name] if set(AXES) <= set(shape) else 1


def is_sharded() -> bool:
    """Whether there is a mesh of ours with more than one device."""
    return any(axis_size(name) > 1 for name in AXES)


def splits_evenly(shape: tuple[int, ...]) -> bool:
    """Whether an array [B, T, ...] can be split as `ROWS` says."""
    return shape[0] % math.prod(axis_size(name) for name in BATCH_AXES) == 0 and shape[1] % axis_size("context") == 0


def check_auto_axes(*trees: Any) -> None:
    """Make sure that how arrays are split is left to the compiler: they are not split over Explicit axes of a mesh.

    Raises:
        ValueError: naming such axes, or those of a mesh of ours that is set with Explicit axes.
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
    """`function` on each device's own part of the arguments; without a mesh, or on one device, `function` itself.

    What it needs from other devices it fetches through the axis names; under no mesh `axis_size` is 1 and it needs nothing.
    """
    if not is_sharded():
        return function
    # What varies over which axes is not checked: the interpreter of Pallas kernels does not know it.
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def sum_over(axis: str, x: Any) -> Any:
    """Sum over the devices along `axis`; `x` itself where there is only one."""
    return jax.lax.psum(x, axis) if axis_size(axis) > 1 else x


def mean_over(axis: str, x: Any) -> Any:
    """Mean over the devices along `axis`."""
    return jax.lax.pmean(x, axis) if axis_size(axis) > 1 else x


def max_over(axis: str, x: Any) -> Any:
    """Largest over the devices along `axis`."""
    return jax.lax.pmax(x, axis) if axis_size(axis) > 1 else x


def min_over(axis: str, x: Any) -> Any:
    """Smallest over the devices along `axis`."""
    return jax.lax.pmin(x, axis) if axis_size(axis) > 1 else x


def axis_index(axis: str) -> Any:
    """Place of this device along `axis`; 0 where there is only one."""
    return jax.lax.axis_index(axis) if axis_size(axis) > 1 else 0


def axis_if_split(name: str) -> str | None:
    """`name` where the mesh has several devices along it, else None."""
    return name if axis_size(name) > 1 else None


def no_mesh() -> Any:
    """A context in which code is traced as if there were no mesh."""
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ()))
