"""Rotation and fp8 rounding against hand-written cases and numpy's own e4m3."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.quantize import dequantize, hadamard_transform, quantize_fp8, simulate_fp8
from pallas_kernels.quantize.reference import hadamard_matrix


def test_hadamard_of_four_by_hand():
    matrix = [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]
    np.testing.assert_array_equal(hadamard_matrix(4), matrix)
    np.testing.assert_allclose(hadamard_transform(jnp.array([[4.0, 0.0, 0.0, 2.0]])), [[3.0, 1.0, 1.0, 3.0]])


def test_hadamard_is_its_own_inverse_and_keeps_dot_products():
    q, k = jax.random.normal(jax.random.key(0), (2, 5, 128))
    np.testing.assert_allclose(hadamard_transform(hadamard_transform(q)), q, atol=1e-5)
    np.testing.assert_allclose(hadamard_transform(q) @ hadamard_transform(k).T, q @ k.T, atol=1e-4)
    with pytest.raises(ValueError, match="12 channels; expected a power of two"):
        hadamard_transform(jnp.ones((2, 12)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_gpu_is_told_not_to_round_the_rotation(dtype):
    text = jax.jit(hadamard_transform).lower(jnp.ones((3, 128), dtype)).as_text()
    assert "precision = [HIGHEST, HIGHEST]" in text and "DEFAULT" not in text


@pytest.mark.parametrize("power_of_two", [True, False])
def test_what_is_not_finite_shows(power_of_two):
    x = jnp.array([[1000.0, jnp.inf, 3.0], [1000.0, jnp.nan, 3.0], [1000.0, -jnp.inf, 0.0], [448.0, 1.0, 0.0]])
    values, scales = quantize_fp8(x, power_of_two_scales=power_of_two)
    np.testing.assert_array_equal(scales, [np.inf, np.nan, np.inf, 1.0])
    shown = np.asarray(values.astype(jnp.float32))
    assert np.isnan(shown[[0, 1, 1, 1, 2], [1, 0, 1, 2, 1]]).all() and not shown[[0, 2], [0, 0]].any()


def test_fp8_scales_by_hand():
    # 448 needs scale 1, just above it 2; the floor 1e-4 / 448 = 2.2e-7 rounds up to 2**-22.
    x = jnp.array([[448.0, 1.0], [449.0, 1.0], [0.0, 0.0], [3.5, -7.0]])
    assert quantize_fp8(x).scales.tolist() == [1.0, 2.0, 2.0**-22, 2.0**-6]
    exact = quantize_fp8(x, power_of_two_scales=False).scales
    np.testing.assert_allclose(exact, [1.0, 449 / 448, 1e-4 / 448, 7 / 448], rtol=1e-6)


def test_fp8_values_round_as_numpy_does():
    x = jax.random.normal(jax.random.key(1), (64, 128)) * jnp.exp(jax.random.normal(jax.random.key(2), (64, 1)) * 4)
    quantized = quantize_fp8(x)
    assert quantized.values.dtype == jnp.float8_e4m3fn and quantized.scales.shape == (64,)
    expected = (np.asarray(x) / np.asarray(quantized.scales)[:, None]).astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(np.asarray(quantized.values).astype(np.float32), expected.astype(np.float32))
    # e4m3 keeps three mantissa bits: at most 1/16 relative, or half the smallest step.
    error = np.abs(np.asarray(dequantize(quantized) - x))
    assert np.all(error <= np.maximum(np.abs(x) / 16, np.asarray(quantized.scales)[:, None] * 2.0**-10) * (1 + 1e-6))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_simulation_is_the_round_trip_with_a_straight_through_gradient(dtype):
    x = jax.random.normal(jax.random.key(3), (4, 16)).astype(dtype)
    value, pull = jax.vjp(simulate_fp8, x)
    np.testing.assert_array_equal(value, dequantize(quantize_fp8(x)).astype(dtype))
    assert value.dtype == dtype and bool((value != x).any())
    np.testing.assert_array_equal(pull(jnp.full_like(x, 3.0))[0], jnp.full_like(x, 3.0))
