"""Named shapes of dense attention: those of sparse attention, so that the two are compared on the same ones."""

from pallas_kernels.sparse_attention.shapes import CPU_LAYER, DEEPSEEK_V32, LLAMA3_8B, TEST_SHAPES, AttentionShape

__all__ = ["CPU_LAYER", "DEEPSEEK_V32", "LLAMA3_8B", "TEST_SHAPES", "AttentionShape"]
