"""What the ops share: argument checks, dispatch, chunking, numerics, meshes, the tie rule, GPU tiles."""
