"""On a mesh with Explicit axes, as `jax.make_mesh` makes unless told otherwise, an array's type says how it is split."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
import numpy as np
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
