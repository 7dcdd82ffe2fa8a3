"""Attention of each query over its own selected keys."""
