"""Matmul of rows sorted by group, each group with a kernel of its own.

`tiles` loops over row tiles; it is dropless and holds nothing beyond rows x dim. `ragged_dot` is XLA's, the choice on TPU. On
CPU it is one to two orders of magnitude slower than the matmuls it consists of. For GPUs XLA multiplies every row with every
group and masks: compiled for an H200 (jax 0.11.2), 65536 rows of 2048 in 64 groups take 17 GB of temporaries forward and 58 GB
with gradients, where `tiles` takes 0.5 and 0.8. How fast `tiles` is on a GPU has not been measured.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dsa_jax.model.kernels import Kernel, Place, pick, widened
from dsa_jax.model.precision import precision_of
from pallas_kernels import traced_platform, vary_alike
from pallas_kernels.quantize import QuantizedBlocks

IMPLEMENTATIONS = ("reference", "tiles", "ragged_dot")
# A CPU core is busy with few rows; a GPU's many are not.
_MOST_ROWS = {"cpu": 128, "gpu": 1024}


def grouped_matmul(
    x: Float[Array, "M I"],
    kernels: Float[Array, "G I O"] | QuantizedBlocks,
    group_sizes: Int[Array, " G"],
    *,
    first: Place | None = None,
    implementation: str | None = None,
) -> Float[Array, "M O"]:
    """out[m] = x[m] @ kernels[g], where row m belongs to group g: the first group_sizes[0] rows to group 0, and so on.

    Args:
        kernels: in fp8 blocks they are widened to the dtype of `x`, by "tiles" one group at a time.
        group_sizes: int32, may hold zeros, must sum to M or less; rows beyond the sum may come out as anything.
        first: of kernels in fp8 blocks that are a part of those the scales are of: row and column at which it begins.
        implementation: "tiles", "ragged_dot", "reference" (gathers a kernel per row), or None for the device's default.

    Returns:
        The dtype of `x`, accumulated in at least float32. Differentiable in `x` and `kernels`, unless these are in fp8.

    Raises:
        ValueError: for an unknown implementation.
        NotImplementedError: "ragged_dot" of kernels in fp8 blocks, all of which it would have to widen.
    """
    quantized = isinstance(kernels, QuantizedBlocks)
    x, kernels, group_sizes, first = vary_alike(x, kernels, group_sizes, first)
    if implementation is None:
        implementation = "tiles" if quantized or traced_platform() in _MOST_ROWS else "ragged_dot"
    if implementation == "reference":
        kernels = widened(kernels, x.dtype, first)
        group = jnp.repeat(jnp.arange(len(kernels)), group_sizes, total_repeat_length=len(x))
        return jnp.einsum("mi,mio->mo", x, kernels[group], precision=precision_of(x.dtype))
    if implementation == "ragged_dot":
        if isinstance(kernels, QuantizedBlocks):
            raise NotImplementedError("grouped_matmul: ragged_dot takes no kernels in fp8 blocks. Use tiles.")
        precision = precision_of(x.dtype)
        out = jax.lax.ragged_dot(x, kernels, group_sizes, precision=precision, preferred_element_type=_wide(x))
        return out.astype(x.dtype)
    if implementation == "tiles":
        return _tiles_forward(x, kernels, group_sizes, first) if quantized else _tiles(x, kernels, group_sizes)
    raise ValueError(f"grouped_matmul: implementation is {implementation!r}; expected one of {', '.join(IMPLEMENTATIONS)}.")


def _tile_rows(n_rows: int, n_groups: int) -> int:
    """Rows per tile: about the mean group, a multiple of 8 from 8 to what the platform can use."""
    return min(max(-(-n_rows // n_groups + 7) // 8 * 8, 8), _MOST_ROWS.get(traced_platform(), 128))


def _tile_plan(group_sizes: Array, tile: int) -> tuple[Array, Array, Array]:
    """Per group: first row, end row and the number of tiles before the end of the group."""
    ends = jnp.cumsum(group_sizes)
    return ends - group_sizes, ends, jnp.cumsum(-(-group_sizes // tile))


def _tile_at(i: Array, plan: tuple[Array, Array, Array], tile: int) -> tuple[Array, Array, Array]:
    """Group, first row and end row of the i-th tile."""
    starts, ends, tiles = plan
    group = jnp.searchsorted(tiles, i, side="right")
    before = jnp.where(group > 0, tiles[jnp.maximum(group - 1, 0)], 0)
    return group, starts[group] + (i - before) * tile, ends[group]


@functools.partial(jax.custom_vjp)
def _tiles(x: Array, kernels: Array, group_sizes: Array) -> Array:
    return _tiles_forward(x, kernels, group_sizes)


def _tiles_forward(x: Array, kernels: Kernel, group_sizes: Array, first: Place | None = None) -> Array:
    n_rows, tile = len(x), _tile_rows(len(x), len(group_sizes))
    width = jax.tree.leaves(kernels)[0].shape[-1]
    plan = _tile_plan(group_sizes, tile)
    padded = jnp.pad(x, ((0, tile), (0, 0)))

    def one(i: Array, out: Array) -> Array:
        group, row, _ = _tile_at(i, plan, tile)
        rows = jax.lax.dynamic_slice_in_dim(padded, row, tile)
        kernel = pick(kernels, group)
        product = _product(rows, widened(kernel, x.dtype, first)).astype(x.dtype)
        # Rows beyond the group's end are wrong here and overwritten by the next group's first tile.
        return jax.lax.dynamic_update_slice_in_dim(out, product, row, axis=0)

    out = jnp.zeros_like(x, shape=(n_rows + tile, width))
    return jax.lax.fori_loop(0, plan[2][-1], one, out)[:n_rows]


def _tiles_fwd(x: Array, kernels: Array, group_sizes: Array) -> tuple[Array, Any]:
    return _tiles_forward(x, kernels, group_sizes), (x, kernels, group_sizes)


def _tiles_bwd(saved: Any, cotangent: Array) -> tuple[Array, Array, np.ndarray]:
    x, kernels, group_sizes = saved
    d_x = _tiles_forward(cotangent.astype(x.dtype), jnp.swapaxes(kernels, 1, 2), group_sizes)
    tile = _tile_rows(len(x), len(kernels))
    plan = _tile_plan(group_sizes, tile)
    padded_x = jnp.pad(x, ((0, tile), (0, 0)))
    padded_d = jnp.pad(cotangent, ((0, tile), (0, 0)))

    def one(i: Array, d_kernels: Array) -> Array:
        group, row, end = _tile_at(i, plan, tile)
        inside = (row + jnp.arange(tile) < end)[:, None]
        rows = jnp.where(inside, jax.lax.dynamic_slice_in_dim(padded_x, row, tile), 0)
        d_rows = jnp.where(inside, jax.lax.dynamic_slice_in_dim(padded_d, row, tile), 0)
        return d_kernels.at[group].add(_product(rows.T, d_rows))

    d_kernels = jax.lax.fori_loop(0, plan[2][-1], one, jnp.zeros_like(kernels, _wide(x)))
    return d_x, d_kernels.astype(kernels.dtype), np.zeros(group_sizes.shape, jax.dtypes.float0)


def _product(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, preferred_element_type=_wide(a), precision=precision_of(a.dtype))


def _wide(x: Array) -> Any:
    return jnp.promote_types(x.dtype, jnp.float32)


_tiles.defvjp(_tiles_fwd, _tiles_bwd)
