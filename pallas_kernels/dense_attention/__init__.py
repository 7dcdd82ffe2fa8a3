"""Attention over a contiguous range of keys per query, and the top-k keys by its probability mass."""
