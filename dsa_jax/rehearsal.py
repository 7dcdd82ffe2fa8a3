"""A step traced without computing: what it cannot do is found before a run begins, and the trace serves when it computes."""

import os
from collections.abc import Callable, Iterator
from math import prod
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from dsa_jax.config import ConfigError
from dsa_jax.data import Batch
from dsa_jax.parallel.ambient import ROWS
from dsa_jax.parallel.placement import current_mesh
from dsa_jax.run.manifest import first_line

_IN_MEMORY = {
    "dot_general", "ragged_dot", "ragged_dot_general", "top_k", "sort", "gather", "scatter", "scatter-add", "scan", "while",
    "dynamic_update_slice", "cumsum", "pallas_call",
}  # fmt: skip
"""Operations whose results the compiler does not fuse away: they take the memory that their shapes say."""


def rehearse(what: str, step: Callable[..., Any], *arguments: Any) -> None:
    """Trace a jitted `step` for abstract `arguments`; nothing is computed, compiled or allocated.

    Args:
        what: the step in words, for the error.
        step: jitted; a later call with arguments of these shapes reuses the trace.
        arguments: pytrees of arrays or `jax.ShapeDtypeStruct`.

    Raises:
        ConfigError: where an op refuses the step, such as one whose implementation is not installed, or where a single array
            of it is larger than the memory of all devices.
    """
    try:
        jaxpr = jax.make_jaxpr(step)(*arguments)
    except (ValueError, NotImplementedError, ImportError, OverflowError) as error:
        raise ConfigError(f"{what} cannot be computed: {first_line(error)}") from error
    memory = memory_bytes()
    n_bytes, shape = max(_arrays(jaxpr.jaxpr), default=(0, ()))
    if n_bytes > memory:
        raise ConfigError(
            f"{what} cannot be computed: an array {list(shape)} has {n_bytes / 1e9:.1f} GB, and the devices have "
            f"{memory / 1e9:.1f} GB. Lower the batch size, the length or model.attention.indexer.topk."
        )


def abstract_batch(n_rows: int, seq_len: int) -> Batch:
    """The shapes of a batch, as `place_batch` shards it."""
    mesh = current_mesh()
    sharding = None if mesh is None else NamedSharding(mesh, ROWS)
    typed: Callable[[Any], Any] = lambda dtype: jax.ShapeDtypeStruct((n_rows, seq_len), dtype, sharding=sharding)
    return Batch(*(typed(dtype) for dtype in (np.int32, np.int32, np.bool_, np.int32)))


def memory_bytes() -> int:
    """The memory of all devices together; that of the host where its processors are the devices."""
    device = jax.local_devices()[0]
    stated = None if device.platform == "cpu" else (device.memory_stats() or {}).get("bytes_limit")
    return stated * jax.device_count() if stated else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _arrays(jaxpr: Any) -> Iterator[tuple[int, tuple[int, ...]]]:
    """(bytes, shape) of the results that lie in memory, at every depth."""
    for equation in jaxpr.eqns:
        for value in equation.params.values():
            for part in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(part, "jaxpr", part)
                if hasattr(inner, "eqns"):
                    yield from _arrays(inner)
        if equation.primitive.name in _IN_MEMORY:
            for result in equation.outvars:
                shape = getattr(result.aval, "shape", ())
                yield prod(shape) * getattr(getattr(result.aval, "dtype", None), "itemsize", 0), shape
