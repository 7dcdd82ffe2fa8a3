"""The definition of the rotation and of the fp8 format, in plain jnp."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

FP8_MAX = 448.0
"""Largest finite e4m3 number."""

SMALLEST_AMAX = 1e-4
"""Floor of a vector's largest magnitude, so that a zero vector has a scale."""


def hadamard_matrix(size: int) -> np.ndarray:
    """Sylvester's Hadamard matrix, entries +1 and -1; `size` is a power of two."""
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def hadamard_transform(x: Float[Array, "*N D"]) -> Float[Array, "*N D"]:
    """x @ H * D**-0.5, accumulated in at least float32."""
    dim = x.shape[-1]
    wide = jnp.promote_types(x.dtype, jnp.float32)
    matrix = jnp.asarray(hadamard_matrix(dim) * dim**-0.5, wide)
    # Without it a GPU would round both sides to tf32, and other keys would be selected there.
    return jnp.matmul(x.astype(wide), matrix, precision=jax.lax.Precision.HIGHEST).astype(x.dtype)


def fp8_scales(x: Float[Array, "*N D"], *, power_of_two: bool) -> Float[Array, "*N"]:
    """`scales_of` the largest magnitude of each vector."""
    return scales_of(jnp.max(jnp.abs(x.astype(jnp.float32)), axis=-1), power_of_two=power_of_two)


def scales_of(amax: Float[Array, "*N"], *, power_of_two: bool) -> Float[Array, "*N"]:
    """amax / 448, with amax at least 1e-4; `power_of_two` rounds it up to the next power of two (ue8m0). Inf and NaN stay.

    As the published kernel does, it multiplies by the rounded 1 / 448; XLA turns a division by 448 into that, too.
    """
    scales = jnp.maximum(amax, SMALLEST_AMAX) * np.float32(1 / FP8_MAX)
    if power_of_two:
        # frexp is exact where ceil(log2) would round: scales = fraction * 2**exponent with fraction in [0.5, 1).
        fraction, exponent = jnp.frexp(scales)
        power = jnp.ldexp(jnp.ones_like(scales), jnp.where(fraction == 0.5, exponent - 1, exponent))
        scales = jnp.where(jnp.isfinite(scales), power, scales)
    return scales


def fp8_values(x: Float[Array, "*N D"], scales: Float[Array, "*N"]) -> Float[Array, "*N D"]:
    """x / scale, clamped to the range of e4m3 and rounded to it."""
    scaled = x.astype(jnp.float32) / scales[..., None]
    return jnp.clip(scaled, -FP8_MAX, FP8_MAX).astype(jnp.float8_e4m3fn)
