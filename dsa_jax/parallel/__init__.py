"""One model on many devices: mesh, sharding rules by parameter path, placement, context parallelism."""
