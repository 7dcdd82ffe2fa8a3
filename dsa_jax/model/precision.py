"""Matmul precision."""

import jax
import jax.numpy as jnp


def precision_of(dtype: jnp.dtype | type) -> jax.lax.Precision | None:
    """Of matmuls in `dtype`: float32 is not rounded to tf32, the default of a GPU; half precision is left to the compiler.

    Selections and routes that hang on a rounding would otherwise differ from those of a CPU, and of transformers.
    """
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype).itemsize > 2 else None
