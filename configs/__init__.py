"""Recipes: one file each, whose `get_config()` returns a `dsa_jax.config.Config`."""
