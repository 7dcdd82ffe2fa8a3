"""A matrix product with a `[in, out]` kernel that other code may also read as a plain array."""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float


class Linear(nn.Module):
    """x @ kernel (+ bias); `kernel` and `bias` are attributes, so that MLA can absorb them."""

    in_dim: int
    out_dim: int
    init_std: float
    dtype: jnp.dtype
    param_dtype: jnp.dtype
    use_bias: bool = False

    def setup(self) -> None:
        """Create the parameters."""
        self.kernel = self.param("kernel", nn.initializers.normal(self.init_std), (self.in_dim, self.out_dim), self.param_dtype)
        if self.use_bias:
            self.bias = self.param("bias", nn.initializers.zeros, (self.out_dim,), self.param_dtype)

    def __call__(self, x: Float[Array, "*N I"]) -> Float[Array, "*N O"]:
        """Apply to the last axis, in `dtype`."""
        y = x.astype(self.dtype) @ self.kernel.astype(self.dtype)
        return y + self.bias.astype(self.dtype) if self.use_bias else y
