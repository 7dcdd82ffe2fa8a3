"""On a mesh with Explicit axes, as `jax.make_mesh` makes unless told otherwise, an array's type says how it is split."""

import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, PartitionSpec

P = ParamSpec("P")
R = TypeVar("R")


def split_like(name: str, n_axes: int) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator of an op whose results share their leading axes with its argument `name`.

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
            given = signature.bind(*args, **kwargs).arguments
            arrays = {key: value for key, value in given.items() if isinstance(value, jax.Array | np.ndarray) and value.ndim}
            others = {key: value for key, value in given.items() if key not in arrays}
            split = PartitionSpec(*jax.typeof(arrays[name]).sharding.spec[:n_axes])
            run = lambda arrays: function(**arrays, **others)  # type: ignore[call-arg]
            return jax.sharding.auto_axes(run, axes=explicit, out_sharding=split)(arrays)

        return call

    return decorate
