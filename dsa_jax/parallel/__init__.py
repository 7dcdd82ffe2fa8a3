"""Running one model on many devices: mesh, sharding rules by parameter path, expert exchange."""
