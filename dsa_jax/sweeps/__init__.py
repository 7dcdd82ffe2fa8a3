"""Sweeps: the same retrofit with one thing changed at a time, over several seeds, as a table and a plot."""
