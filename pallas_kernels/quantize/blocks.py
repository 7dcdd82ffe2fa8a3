"""fp8 quantisation with one scale per block of a matrix: weights in blocks of 128 x 128, activations in blocks of 1 x 128.

Elementwise but for the largest magnitude of a block, so plain jnp is the only implementation.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.common.checks import check_array, check_float, checked, is_whole, shown
from pallas_kernels.quantize import reference

WEIGHT_BLOCK = (128, 128)
ACTIVATION_BLOCK = (1, 128)


class QuantizedBlocks(NamedTuple):
    """x[i, j] is about values[i, j] * scales[i // block rows, j // block columns]; blocks at the edges may be partial."""

    values: Float[Array, "*N R C"]
    scales: Float[Array, "*N Rb Cb"]


def _check_matrices(x, **_):
    check_float("quantize_blocks", x=x)
    if x.ndim < 2:
        raise ValueError(f"quantize_blocks: x has shape {list(x.shape)}; expected [..., rows, columns].")


@checked(_check_matrices)
def quantize_blocks(
    x: Float[Array, "*N R C"], block: tuple[int, int] = WEIGHT_BLOCK, *, power_of_two_scales: bool = True
) -> QuantizedBlocks:
    """Quantise each block of the last two axes to e4m3 with one float32 scale.

    scale = max(max|x|, 1e-4) / 448, rounded up to a power of two by default (ue8m0); values = round(clamp(x / scale)), ties to
    even. What hangs over the edge of the matrix does not count.

    Args:
        x: finite.
        block: rows and columns of a block; `WEIGHT_BLOCK`, or `ACTIVATION_BLOCK` for [tokens, channels].

    Raises:
        ValueError: a block without rows or columns; an `x` that is no array of floats with two axes or more.

    Source: DeepSeek-V3 report, section 3.3.2; DeepSeek-V3.2-Exp inference/kernel.py, act_quant.
    """
    rows, columns = _checked("quantize_blocks", block)
    grid = [-(-size // step) for size, step in zip(x.shape[-2:], block, strict=True)]
    padding = [(0, 0)] * (x.ndim - 2) + [(0, n * step - size) for n, step, size in zip(grid, block, x.shape[-2:], strict=True)]
    magnitude = jnp.pad(jnp.abs(x.astype(jnp.float32)), padding)
    tiles = magnitude.reshape(*x.shape[:-2], grid[0], rows, grid[1], columns)
    scales = reference.scales_of(tiles.max((-3, -1), initial=0.0), power_of_two=power_of_two_scales)
    # A scale per element: the rule for vectors then applies to vectors of one channel.
    values = reference.fp8_values(x[..., None], _spread(scales, block, x.shape))[..., 0]
    return QuantizedBlocks(values, scales)


def dequantize_blocks(quantized: QuantizedBlocks, block: tuple[int, int] = WEIGHT_BLOCK) -> Float[Array, "*N R C"]:
    """values * scales, float32.

    Args:
        block: as given to `quantize_blocks`. The two shapes do not tell it: 160 x 192 in blocks of 128 has a 2 x 2 grid.

    Raises:
        ValueError: when the grid of scales does not fit the values and the block.
    """
    values, scales = quantized
    check_array("dequantize_blocks", values=values, scales=scales)
    rows, columns = _checked("dequantize_blocks", block)
    grid = (*values.shape[:-2], -(-values.shape[-2] // rows), -(-values.shape[-1] // columns))
    if scales.shape != grid:
        raise ValueError(
            f"dequantize_blocks: scales has shape {list(scales.shape)}; expected {list(grid)}, one per block of {rows} x "
            f"{columns} of values {list(values.shape)}. Pass the block that the values were quantised with."
        )
    return values.astype(jnp.float32) * _spread(scales, block, values.shape)


def dequantize_part(
    quantized: QuantizedBlocks, first: tuple[Int[Array, ""], Int[Array, ""]], block: tuple[int, int] = WEIGHT_BLOCK
) -> Float[Array, "*N R C"]:
    """values * scales, float32, where `values` are a part of the matrices whose scales are given: a device's share.

    Args:
        first: row and column of the whole at which the part begins; it may cut blocks. A part that reaches beyond the scales
            gives NaN there.
        block: as given to `quantize_blocks`.

    Raises:
        ValueError: a block without rows or columns.
    """
    rows, columns = _checked("dequantize_part", block)
    values, scales = quantized
    place = lambda axis, step: (first[axis] + jnp.arange(values.shape[axis - 2])) // step
    by_row = jnp.take(scales, place(0, rows), axis=-2)
    return values.astype(jnp.float32) * jnp.take(by_row, place(1, columns), axis=-1)


def _checked(op: str, block: tuple[int, int]) -> tuple[int, int]:
    if not isinstance(block, tuple | list) or len(block) != 2 or not all(map(is_whole, block)) or min(block) < 1:
        raise ValueError(f"{op}: block is {shown(block)}; expected rows and columns, at least one each, such as (128, 128).")
    return block


def _spread(scales: Float[Array, "*N Rb Cb"], block: tuple[int, int], shape: tuple[int, ...]) -> Float[Array, "*N R C"]:
    """Every element's scale."""
    by_row = jnp.repeat(scales, block[0], axis=-2)[..., : shape[-2], :]
    return jnp.repeat(by_row, block[1], axis=-1)[..., : shape[-1]]
