"""These tests spend their time compiling, so they compile without optimisation."""

from tests.dsa_jax.model.conftest import compile_quickly

__all__ = ["compile_quickly"]
