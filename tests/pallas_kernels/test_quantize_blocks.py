"""fp8 in blocks: by hand, against numpy's own e4m3 block by block, and awkward shapes."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.quantize import QuantizedBlocks, dequantize_blocks, quantize_blocks, quantize_fp8
from pallas_kernels.quantize.blocks import ACTIVATION_BLOCK, WEIGHT_BLOCK


def random(*shape, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) * np.exp(3 * rng.standard_normal(shape))).astype(np.float32)


def by_loops(x, block, power_of_two):
    """(values, scales) of one matrix, block by block, in numpy."""
    grid = [-(-size // step) for size, step in zip(x.shape, block, strict=True)]
    values, scales = np.zeros(x.shape, ml_dtypes.float8_e4m3fn), np.zeros(grid, np.float32)
    for i, j in np.ndindex(*grid):
        where = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
        scale = np.maximum(np.abs(x[where]).max(), np.float32(1e-4)) * np.float32(1 / 448)
        if power_of_two:
            scale = np.float32(2.0) ** np.ceil(np.log2(np.float64(scale)))
        values[where] = np.clip(x[where] / np.float32(scale), -448, 448).astype(ml_dtypes.float8_e4m3fn)
        scales[i, j] = scale
    return values, scales


def bits(x):
    return np.asarray(x).view(np.uint8 if np.asarray(x).dtype.itemsize == 1 else np.uint32)


@pytest.mark.parametrize("power_of_two", [True, False], ids=["ue8m0", "float32"])
@pytest.mark.parametrize("block", [WEIGHT_BLOCK, ACTIVATION_BLOCK], ids=["weights", "activations"])
@pytest.mark.parametrize("shape", [(1, 1), (160, 192), (576, 130)])
def test_every_bit_is_that_of_numpy(shape, block, power_of_two):
    x = random(*shape)
    quantized = quantize_blocks(jnp.asarray(x), block, power_of_two_scales=power_of_two)
    values, scales = by_loops(x, block, power_of_two)
    np.testing.assert_array_equal(bits(quantized.scales), bits(scales))
    np.testing.assert_array_equal(bits(quantized.values), bits(values))
    spread = np.repeat(np.repeat(scales, block[0], 0)[: shape[0]], block[1], 1)[:, : shape[1]]
    np.testing.assert_array_equal(dequantize_blocks(quantized, block), values.astype(np.float32) * spread)


def test_by_hand():
    x = jnp.asarray([[448.0, 1.0, 3.5], [2.0, 0.0, -7.0], [0.0, 0.0, 900.0]])
    values, scales = quantize_blocks(x, (2, 2))
    assert scales.tolist() == [[1.0, 2.0**-6], [2.0**-22, 4.0]]
    assert values.astype(jnp.float32).tolist() == [[448.0, 1.0, 224.0], [2.0, 0.0, -448.0], [0.0, 0.0, 224.0]]
    # 900 / 4 = 225 rounds to 224: e4m3 numbers are 16 apart there.
    assert dequantize_blocks(QuantizedBlocks(values, scales), (2, 2))[2, 2] == 896.0


def test_rows_of_128_channels_are_the_vectors_of_quantize_fp8():
    x = jnp.asarray(random(3, 7, 128))
    blocks, vectors = quantize_blocks(x, ACTIVATION_BLOCK), quantize_fp8(x)
    np.testing.assert_array_equal(blocks.scales[..., 0], vectors.scales)
    np.testing.assert_array_equal(bits(blocks.values), bits(vectors.values))


def test_leading_axes_and_empty_matrices():
    x = jnp.asarray(random(2, 3, 130, 20))
    stacked, single = quantize_blocks(x), quantize_blocks(x[1, 2])
    np.testing.assert_array_equal(bits(stacked.values[1, 2]), bits(single.values))
    np.testing.assert_array_equal(stacked.scales[1, 2], single.scales)
    empty = quantize_blocks(jnp.zeros((0, 130)))
    assert empty.values.shape == (0, 130) and empty.scales.shape == (0, 2)
    assert dequantize_blocks(empty).shape == (0, 130)


def test_power_of_two_blocks_survive_a_second_round_trip():
    x = dequantize_blocks(quantize_blocks(jnp.asarray(random(160, 192))))
    np.testing.assert_array_equal(dequantize_blocks(quantize_blocks(x)), x)


def test_errors():
    quantized = quantize_blocks(jnp.ones((160, 192)))
    with pytest.raises(ValueError, match=r"scales has shape \[2, 2\]; expected \[3, 3\], one per block of 64 x 64"):
        dequantize_blocks(quantized, (64, 64))
    with pytest.raises(ValueError, match=r"block is \(0, 128\)"):
        quantize_blocks(jnp.ones((2, 2)), (0, 128))
