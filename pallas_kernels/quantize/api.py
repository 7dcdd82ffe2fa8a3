"""Rotation and fp8 quantisation of vectors, as the lightning indexer uses them on its queries and keys.

These are elementwise or one small matmul, so plain jnp is the only implementation.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.common.checks import check_vectors, checked
from pallas_kernels.quantize import reference


class QuantizedVectors(NamedTuple):
    """fp8 vectors: x is approximately values * scales, one scale per vector (the last axis)."""

    values: Float[Array, "*N D"]
    scales: Float[Array, "*N"]


def _check_rotation(x):
    check_vectors("hadamard_transform", x=x)
    dim = x.shape[-1]
    if dim & (dim - 1):
        raise ValueError(f"hadamard_transform: the last axis has {dim} channels; expected a power of two. Pad it or skip it.")


@checked(_check_rotation)
def hadamard_transform(x: Float[Array, "*N D"]) -> Float[Array, "*N D"]:
    """Multiply the last axis by the orthonormal Hadamard matrix: spreads outliers and keeps every dot product.

    Its own inverse. Accumulated in at least float32, returned in the dtype of `x`.

    Raises:
        ValueError: when D is not a power of two, or `x` is no array of floats.
    """
    return reference.hadamard_transform(x)


def _check_vectors(x, **_):
    check_vectors("quantize_fp8", x=x)


@checked(_check_vectors)
def quantize_fp8(x: Float[Array, "*N D"], *, power_of_two_scales: bool = True) -> QuantizedVectors:
    """Quantise each vector to e4m3 with one float32 scale.

    scale = max(max|x|, 1e-4) / 448, rounded up to a power of two by default (ue8m0); values = round(clamp(x / scale)). A vector
    that holds inf or NaN gets it as its scale.

    Raises:
        ValueError: when `x` is no array of floats, or its vectors have no channel.

    Source: DeepSeek-V3.2-Exp inference/kernel.py, act_quant, for vectors of 128 channels.
    """
    scales = reference.fp8_scales(x, power_of_two=power_of_two_scales)
    return QuantizedVectors(reference.fp8_values(x, scales), scales)


def dequantize(quantized: QuantizedVectors) -> Float[Array, "*N D"]:
    """values * scales, float32."""
    return quantized.values.astype(jnp.float32) * quantized.scales[..., None]


@checked(lambda x: check_vectors("simulate_fp8", x=x))
def simulate_fp8(x: Float[Array, "*N D"]) -> Float[Array, "*N D"]:
    """`x` after a round trip through `quantize_fp8`, in its own dtype; the gradient passes straight through.

    Raises:
        ValueError: when `x` is no array of floats, or its vectors have no channel.
    """
    return _round_trip(x)


@jax.custom_jvp
def _round_trip(x: Float[Array, "*N D"]) -> Float[Array, "*N D"]:
    return dequantize(quantize_fp8(x)).astype(x.dtype)


@_round_trip.defjvp
def _round_trip_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return _round_trip(*primals), tangents[0]
