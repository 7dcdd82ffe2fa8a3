"""The mesh axis that splits each axis of a parameter: a table of path patterns; attention layers have theirs in their kind.

Tensor parallelism splits columns on the way in (heads, MLP width) and rows on the way out, so that one sum over `tensor` per
block suffices. The indexer, the latents and the norms are the same on every tensor rank, so that the selection is computed
once and equal everywhere. `fsdp` splits whatever is large along an axis that `tensor` leaves free.
"""

import re
from collections.abc import Mapping
from typing import Any

from jax.sharding import PartitionSpec

from dsa_jax.config import ConfigError
from dsa_jax.model.attention.kinds import attention_parameter
from dsa_jax.params import is_block_scales_path, parameter_paths

# First match wins. Specs are those of one layer; a stack's leading layer axis is never split.
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"embed/embedding", ("tensor", "fsdp")),
    (r"lm_head/kernel", ("fsdp", "tensor")),
    (r".*/experts/(gate|up)/kernel", ("expert", "fsdp", "tensor")),
    (r".*/experts/down/kernel", ("expert", "tensor", "fsdp")),
    # Scales are one 4096th of the bytes they are for. Whole, they serve any split of the kernel, also one that cuts blocks.
    (r".*/experts/(gate|up|down)/block_scales", ("expert",)),
    (r".*/block_scales", ()),
    (r".*/(gate|up)/kernel", ("fsdp", "tensor")),
    (r".*/down/kernel", ("tensor", "fsdp")),
    (r".*(scale|bias|score_bias|router/kernel)", ()),
)
_STACK = re.compile(r"(dense|moe)_layers")


def parameter_spec(path: str) -> PartitionSpec:
    """How the parameter at `path` is split.

    Raises:
        ValueError: for a path that no rule matches: a new parameter must say how it is split.
    """
    axes = _axes(path)
    return PartitionSpec(*((None, *axes) if _STACK.match(path) and axes else axes))


def _axes(path: str) -> tuple[str | None, ...]:
    """Mesh axis of each axis of one layer's array."""
    if row := None if is_block_scales_path(path) else attention_parameter(path):
        return row.split
    for pattern, axes in RULES:
        if re.fullmatch(pattern, path):
            return axes
    raise ValueError(f"no sharding rule matches {path!r}. Add one to dsa_jax/parallel/rules.py.")


def check_divisible(params: Mapping[str, Any], sizes: Mapping[str, int]) -> None:
    """Make sure that every split axis has a multiple of its number of devices. Leaves may be abstract.

    Args:
        params: of a model.
        sizes: devices along each axis of the mesh; an axis that is not there splits nothing.

    Raises:
        ConfigError: naming the first parameter that does not fit, its axis, and both numbers.
    """
    for path, leaf in parameter_paths(params).items():
        for dim, axis in enumerate(parameter_spec(path)):
            if axis is not None and leaf.shape[dim] % sizes.get(axis, 1):
                raise ConfigError(
                    f"parallel.{axis} is {sizes[axis]}, which does not divide axis {dim} of {path} with shape "
                    f"{tuple(leaf.shape)}. Use a {axis} size that divides {leaf.shape[dim]}."
                )
