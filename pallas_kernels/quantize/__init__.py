"""Hadamard rotation and fp8 quantisation of the indexer's queries and keys."""

from pallas_kernels.quantize.api import QuantizedVectors, dequantize, hadamard_transform, quantize_fp8, simulate_fp8

__all__ = ["QuantizedVectors", "dequantize", "hadamard_transform", "quantize_fp8", "simulate_fp8"]
