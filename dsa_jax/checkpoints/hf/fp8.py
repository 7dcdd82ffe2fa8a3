"""fp8 (e4m3) weights with one scale per block, as DeepSeek-V3 and its successors publish them.

`NAME_scale_inv` beside `NAME` holds the multiplier of each block: value[i, j] = q[i, j] * scale[i // block_rows,
j // block_columns]. Edge blocks may be partial, so the block size is the config's and never the ratio of the two shapes:
160 x 192 in blocks of 128 has a 2 x 2 grid.
"""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from dsa_jax.checkpoints.hf import CheckpointError
from dsa_jax.checkpoints.hf.config_fields import Fields

SCALE_SUFFIX = "_scale_inv"
_DEFAULT_BLOCK = (128, 128)
_LARGEST_BLOCK = 2**16


def block_size(content: dict[str, Any], file: Path) -> tuple[int, int]:
    """Rows and columns of a block, from `quantization_config` of a config.json; 128 x 128 where it is silent.

    Raises:
        CheckpointError: for a quantisation that is not fp8 in blocks.
    """
    quantization = content.get("quantization_config")
    if quantization is None:
        return _DEFAULT_BLOCK
    stated = quantization if isinstance(quantization, dict) else {}
    fields = Fields(file, stated, {"weight_block_size": list(_DEFAULT_BLOCK)}, prefix="quantization_config.")
    if fields.text("quant_method") != "fp8":
        fields.fail("quant_method", "'fp8'. Use the checkpoint before quantisation")
    if fields.text("fmt", "e4m3") != "e4m3":
        fields.fail("fmt", "'e4m3'")
    block = fields.stated("weight_block_size")
    if not isinstance(block, list) or len(block) != 2 or not all(type(n) is int and 0 < n <= _LARGEST_BLOCK for n in block):
        fields.fail("weight_block_size", "two sizes such as [128, 128]. Scales per tensor or per channel are not read")
    return block[0], block[1]


def check_grid(
    name: str, shape: tuple[int, ...], grid: tuple[int, ...], block: tuple[int, int], files: tuple[Path, Path]
) -> None:
    """Require one scale per block, partial ones included.

    Raises:
        CheckpointError: naming both files, tensors and shapes.
    """
    expected = tuple(-(-size // step) for size, step in zip(shape[-2:], block, strict=True)) if len(shape) >= 2 else ()
    if not expected or grid != (*shape[:-2], *expected):
        raise CheckpointError(
            f"{files[1]}: {name}{SCALE_SUFFIX} has shape {list(grid)}; expected {[*shape[:-2], *expected]}, one scale per "
            f"block of {block[0]} x {block[1]} of {name} {list(shape)} in {files[0]}. Check the weight_block_size of "
            "quantization_config."
        )


def dequantize_on_host(
    quantized: Shaped[np.ndarray, "M N"], scales: Shaped[np.ndarray, "m n"], block: tuple[int, int], dtype: Any
) -> Shaped[np.ndarray, "M N"]:
    """The dequantised weight, computed in float32 and rounded once to `dtype`, one row of blocks at a time; it may not be
    finite."""
    out = np.empty(quantized.shape, dtype)
    column_scales = np.repeat(scales.astype(np.float32), block[1], axis=1)[:, : quantized.shape[1]]
    for i, scale in enumerate(column_scales):
        rows = slice(i * block[0], (i + 1) * block[0])
        with np.errstate(over="ignore", invalid="ignore"):
            out[rows] = quantized[rows].astype(np.float32) * scale
    return out
