"""Inside `jax.shard_map`, JAX records over which mesh axes a value may differ, and wants it to agree where values meet."""

from typing import Any

import jax
from jax import lax


def varying_axes(*trees: Any) -> frozenset[str]:
    """The mesh axes over which any of the arrays may differ; none outside `shard_map`, or where it checks nothing."""
    return frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(trees)))


def vary_over(axes: frozenset[str], tree: Any) -> Any:
    """The arrays as ones that may differ over `axes`, too; a gradient in them is then summed over what was added."""

    def cast(x: Any) -> Any:
        missing = tuple(sorted(axes - jax.typeof(x).manual_axis_type.varying))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, tree)


def vary_alike(*trees: Any) -> Any:
    """Arrays of any shapes and dtypes, or trees of them, as ones that may differ over the axes over which any of them may.

    For what a function with a gradient of its own takes inside `jax.shard_map`: rows that are split beside parameters that all
    devices share. Gradients in the latter are summed over the devices. Elsewhere the arrays come back as they are.

    Returns:
        A tuple with what was given, in its order.
    """
    return vary_over(varying_axes(trees), trees)


def varying_structs(structs: Any, arguments: Any) -> Any:
    """The `jax.ShapeDtypeStruct`s of what a kernel computes from `arguments`, which vary alike."""
    manual = jax.typeof(jax.tree.leaves(arguments)[0]).manual_axis_type
    return jax.tree.map(lambda x: x.update(manual_axis_type=manual), structs)
