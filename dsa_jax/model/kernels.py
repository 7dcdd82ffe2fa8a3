"""The kernel of a matmul: a plain array, or e4m3 values with a scale per block, dequantised right beside the matmul.

Layers are scanned and experts multiplied tile by tile, so that one layer's matrix, or one expert's, is wide at a time.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from dsa_jax.config.model import FP8_BLOCKS
from dsa_jax.params import BLOCK_SCALES
from pallas_kernels import traced_platform
from pallas_kernels.quantize import QuantizedBlocks, dequantize_blocks, dequantize_part
from pallas_kernels.quantize.blocks import WEIGHT_BLOCK

Kernel = Float[Array, "*N I O"] | QuantizedBlocks
Place = tuple[Int[Array, ""], Int[Array, ""]]


def make_kernel(
    module: nn.Module, shape: tuple[int, ...], init_std: float, param_dtype: jnp.dtype, weight_format: str
) -> Kernel:
    """The parameter `kernel` of `module`, in `fp8_blocks` with its `block_scales`; drawn with standard deviation `init_std`."""
    if weight_format != FP8_BLOCKS:
        kernel: Array = module.param("kernel", nn.initializers.normal(init_std), shape, param_dtype)
        return kernel
    # One scale for all fresh blocks: a power of two under which eight standard deviations fit into e4m3's 448.
    scale = 2.0 ** math.ceil(math.log2((init_std or 1.0) * 8 / 448))
    draw: Any = lambda key, shape: (jax.random.normal(key, shape) * (init_std / scale)).astype(jnp.float8_e4m3fn)
    return QuantizedBlocks(
        module.param("kernel", draw, shape),
        module.param(BLOCK_SCALES, nn.initializers.constant(scale), scales_shape(shape), jnp.float32),
    )


def scales_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the scales of kernels of `shape`; blocks at the edges may be partial."""
    return (*shape[:-2], *(-(-size // step) for size, step in zip(shape[-2:], WEIGHT_BLOCK, strict=True)))


def widened(kernel: Kernel, dtype: Any, first: Place | None = None) -> Float[Array, "*N I O"]:
    """The values in `dtype`, each rounded once from float32.

    Args:
        first: where fp8 values that are a part begin, row and column of the matrices that the scales are of; None: whole.
    """
    if not isinstance(kernel, QuantizedBlocks):
        return kernel.astype(dtype)
    return (dequantize_blocks(kernel) if first is None else dequantize_part(kernel, first)).astype(dtype)


def widens_slices(tree: Any) -> bool:
    """Whether a loop over slices of `tree` would hold all of it wide: XLA for CPU widens e4m3 before it takes a slice."""
    return traced_platform() == "cpu" and any(leaf.dtype == jnp.float8_e4m3fn for leaf in jax.tree.leaves(tree))


def pick(tree: Any, i: Int[Array, ""]) -> Any:
    """Element `i` along the first axis of every leaf, in a loop over stacked layers or experts."""
    if widens_slices(tree):
        # Tied to `i`, the widening stays in the loop, where it fuses with the slice.
        tree, i = jax.lax.optimization_barrier((tree, i))
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, i, keepdims=False), tree)
