"""Ops on a mesh: arrays split over Explicit axes, and arrays that differ between the devices inside `jax.shard_map`.

On a mesh with Explicit axes, as `jax.make_mesh` makes unless told otherwise, an array's type says how it is split. Inside
`jax.shard_map` it says over which mesh axes the array may differ, which has to agree where arrays meet.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
import numpy as np
from jax import lax
from jax.sharding import AxisType, PartitionSpec

P = ParamSpec("P")
R = TypeVar("R")


def split_like(name: str, n_axes: int) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator of an op whose results share their leading axes with its argument `name`, or with the first array in it.

    On a mesh with Explicit axes the op runs as on one with Auto axes, where the compiler chooses how intermediate arrays are
    split; the first `n_axes` axes of every result are split as those of the argument are, and the others are not.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            mesh = jax.sharding.get_abstract_mesh()
            kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
            explicit = tuple(axis for axis, kind in kinds if kind == AxisType.Explicit)
            if not explicit:
                return function(*args, **kwargs)
            given = dict(signature.bind(*args, **kwargs).arguments)
            leaves, tree = jax.tree.flatten(given)
            is_array = [isinstance(leaf, jax.Array | np.ndarray) and leaf.ndim > 0 for leaf in leaves]
            split = PartitionSpec(*jax.typeof(jax.tree.leaves(given[name])[0]).sharding.spec[:n_axes])

            def run(arrays: list[Any]) -> R:
                rest = iter(arrays)
                merged = [next(rest) if array else leaf for leaf, array in zip(leaves, is_array, strict=True)]
                return function(**jax.tree.unflatten(tree, merged))  # type: ignore[call-arg]

            arrays = [leaf for leaf, array in zip(leaves, is_array, strict=True) if array]
            return jax.sharding.auto_axes(run, axes=explicit, out_sharding=split)(arrays)

        return call

    return decorate


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
