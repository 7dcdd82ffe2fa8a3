"""Command-line programs: thin mains over `dsa_jax`."""
