"""Shared by the ops: argument checks, dispatch, chunking, numerics, meshes, the tie rule, GPU tiles."""
