"""Hadamard rotation and fp8 quantisation: of the indexer's queries and keys, of blocks of a matrix, of cache rows."""

from pallas_kernels.quantize.api import QuantizedVectors, dequantize, hadamard_transform, quantize_fp8, simulate_fp8
from pallas_kernels.quantize.blocks import QuantizedBlocks, dequantize_blocks, dequantize_part, quantize_blocks
from pallas_kernels.quantize.cache_layouts import (
    latent_row_bytes,
    pack_latent_fp8,
    pack_vector_fp8,
    unpack_latent_fp8,
    unpack_vector_fp8,
    vector_row_bytes,
)

__all__ = [
    "QuantizedBlocks",
    "QuantizedVectors",
    "dequantize",
    "dequantize_blocks",
    "dequantize_part",
    "hadamard_transform",
    "latent_row_bytes",
    "pack_latent_fp8",
    "pack_vector_fp8",
    "quantize_blocks",
    "quantize_fp8",
    "simulate_fp8",
    "unpack_latent_fp8",
    "unpack_vector_fp8",
    "vector_row_bytes",
]
