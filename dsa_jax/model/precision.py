"""What float32 means in a matrix product."""

import jax
import jax.numpy as jnp


def precision_of(dtype: jnp.dtype | type) -> jax.lax.Precision | None:
    """For products of `dtype`: float32 is not rounded to tf32, as a GPU would unasked; half precision is left to the compiler.

    Selections and routes that hang on a rounding would otherwise differ from those of a CPU, and of transformers.
    """
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype).itemsize > 2 else None
