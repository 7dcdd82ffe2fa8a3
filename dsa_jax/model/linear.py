"""A matmul with a `[in, out]` kernel that other code may also read."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from dsa_jax.config import ModelConfig
from dsa_jax.config.model import PLAIN
from dsa_jax.model.kernels import make_kernel, widened
from dsa_jax.model.precision import precision_of


class Linear(nn.Module):
    """x @ kernel (+ bias); `kernel` and `bias` are attributes, so that MLA can absorb them."""

    in_dim: int
    out_dim: int
    init_std: float
    dtype: jnp.dtype
    param_dtype: jnp.dtype
    use_bias: bool = False
    weight_format: str = PLAIN

    def setup(self) -> None:
        """Create the parameters."""
        shape = self.in_dim, self.out_dim
        self.kernel = make_kernel(self, shape, self.init_std, self.param_dtype, self.weight_format)
        if self.use_bias:
            self.bias = self.param("bias", nn.initializers.zeros, (self.out_dim,), self.param_dtype)

    def __call__(self, x: Float[Array, "*N I"]) -> Float[Array, "*N O"]:
        """Apply to the last axis, in `dtype`."""
        y = jnp.matmul(x.astype(self.dtype), widened(self.kernel, self.dtype), precision=precision_of(self.dtype))
        return y + self.bias.astype(self.dtype) if self.use_bias else y


def linear(config: ModelConfig, in_dim: int, out_dim: int, *, into_residual: bool = False, **options: Any) -> Linear:
    """A `Linear` with the dtypes, the weight format and the initial standard deviation of the model.

    Args:
        config: of the model.
        in_dim, out_dim: channels.
        into_residual: whether it adds to the residual stream: it then starts smaller.
        options: fields of `Linear` that differ.
    """
    settings: dict[str, Any] = {
        "init_std": residual_std(config) if into_residual else config.initializer_range,
        "dtype": jnp.dtype(config.dtype),
        "param_dtype": jnp.dtype(config.param_dtype),
        "weight_format": config.weight_format,
    }
    return Linear(in_dim, out_dim, **(settings | options))


def residual_std(config: ModelConfig) -> float:
    """Initial standard deviation of kernels that add to the residual stream: its variance must not grow with depth."""
    return config.initializer_range * (2 * config.n_layers) ** -0.5
