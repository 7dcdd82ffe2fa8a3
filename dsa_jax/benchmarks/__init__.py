"""Timings of ops and layers, one dict per measurement."""
