"""Attention layers: the kinds, the selection rules, the indexer, the cache."""
