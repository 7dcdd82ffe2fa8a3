"""Generation: prefill, decode, sampling."""

from dsa_jax.generation.api import GenerateOutput, Timings, generate
from dsa_jax.generation.pages import OutOfPagesError, PageAllocator, make_block_table

__all__ = ["GenerateOutput", "OutOfPagesError", "PageAllocator", "Timings", "generate", "make_block_table"]
