"""The byte layouts of cache rows against bytes written by hand with struct."""

import struct

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.quantize import (
    latent_row_bytes,
    pack_latent_fp8,
    pack_vector_fp8,
    simulate_fp8,
    unpack_latent_fp8,
    unpack_vector_fp8,
    vector_row_bytes,
)

# e4m3: sign | 4 bits of exponent, bias 7 | 3 bits of mantissa.
ONE, MINUS_TWO, LARGEST, SMALLEST = 0x38, 0xC0, 0x7E, 0x01


def test_a_vector_by_hand():
    # The largest magnitude 448 needs scale 1, so every number is its own e4m3.
    row = np.frombuffer(bytes([ONE, MINUS_TWO, LARGEST, SMALLEST]) + struct.pack("<f", 1.0), np.uint8)
    np.testing.assert_array_equal(pack_vector_fp8(jnp.array([1.0, -2.0, 448.0, 2.0**-9])), row)
    np.testing.assert_array_equal(unpack_vector_fp8(jnp.asarray(row)), [1.0, -2.0, 448.0, 2.0**-9])
    other = np.frombuffer(bytes([ONE, MINUS_TWO]) + struct.pack("<f", 0.375), np.uint8)
    np.testing.assert_array_equal(unpack_vector_fp8(jnp.asarray(other)), [0.375, -0.75])


def test_a_latent_by_hand():
    # 130 channels are two tiles, the second of two channels; each has its own scale.
    latent = np.zeros(130, np.float32)
    latent[:2], latent[128:] = [448.0, 1.0], [-2 * 448.0, 2.0]
    expected = bytes([LARGEST, ONE]) + bytes(126) + bytes([LARGEST | 0x80, ONE])
    expected += struct.pack("<2f", 1.0, 2.0)
    expected += struct.pack("<2H", 0x3F80, 0xC020)  # bfloat16 1.0 and -2.5
    packed = pack_latent_fp8(jnp.asarray(latent), jnp.array([1.0, -2.5]))
    assert packed.tobytes() == expected and len(expected) == latent_row_bytes(130, 2)
    back, rope = unpack_latent_fp8(packed, 130)
    np.testing.assert_array_equal(back, latent)
    np.testing.assert_array_equal(rope, [1.0, -2.5])


def test_the_sizes_are_those_of_flashmla_and_deepgemm():
    assert latent_row_bytes(512, 64) == 656 and vector_row_bytes(128) == 132
    row = pack_latent_fp8(jnp.ones((2, 3, 512)), jnp.ones((2, 3, 64)))
    assert row.shape == (2, 3, 656) and row.dtype == jnp.uint8
    # values [0, 512), scales [512, 528), rotated channels [528, 656)
    np.testing.assert_array_equal(np.asarray(row[0, 0, 512:528]).view(np.float32), [2.0**-8] * 4)
    np.testing.assert_array_equal(np.asarray(row[0, 0, 528:]).view(ml_dtypes.bfloat16).astype(np.float32), np.ones(64))


@pytest.mark.parametrize("power_of_two", [True, False])
def test_round_trip_error(power_of_two):
    x = jax.random.normal(jax.random.key(0), (7, 200)) * jnp.exp(jax.random.normal(jax.random.key(1), (7, 1)) * 3)
    rope = jax.random.normal(jax.random.key(2), (7, 6))
    back, rope_back = unpack_latent_fp8(pack_latent_fp8(x, rope, power_of_two_scales=power_of_two), 200)
    np.testing.assert_array_equal(rope_back, rope.astype(jnp.bfloat16).astype(jnp.float32))
    for first, last in ((0, 128), (128, 200)):
        tile, got = x[:, first:last], back[:, first:last]
        # Three mantissa bits: 1/16 relative, or half the smallest step of the tile, whose scale is below amax / 224.
        step = jnp.max(jnp.abs(tile), -1, keepdims=True) / 224 * 2.0**-10
        assert bool(jnp.all(jnp.abs(got - tile) <= jnp.maximum(jnp.abs(tile) / 16, step) * (1 + 1e-5)))


def test_vectors_rounded_by_the_fp8_indexer_survive_exactly():
    x = simulate_fp8(jax.random.normal(jax.random.key(3), (500, 16)))
    np.testing.assert_array_equal(unpack_vector_fp8(pack_vector_fp8(x)), x)
    zero = unpack_vector_fp8(pack_vector_fp8(jnp.zeros((2, 8))))
    np.testing.assert_array_equal(zero, jnp.zeros((2, 8)))


def test_rows_of_another_length_are_refused():
    with pytest.raises(ValueError, match=r"rows have 656 bytes; expected 1056.*kv_lora_rank"):
        unpack_latent_fp8(jnp.zeros((2, 656), jnp.uint8), 1024)
