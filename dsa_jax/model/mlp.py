"""The dense SwiGLU feed-forward layer."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from dsa_jax.config.model import PLAIN
from dsa_jax.model.linear import Linear
from dsa_jax.model.outputs import MoEStatistics


class FeedForwardOutput(NamedTuple):
    """What every feed-forward layer returns; `statistics` is None for a dense one."""

    out: Float[Array, "B T E"]
    statistics: MoEStatistics | None


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    hidden_dim: int
    mlp_dim: int
    init_std: float
    out_init_std: float
    dtype: jnp.dtype
    param_dtype: jnp.dtype
    weight_format: str = PLAIN

    def setup(self) -> None:
        """Create the three projections."""
        kind: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype, "weight_format": self.weight_format}
        self.gate = Linear(self.hidden_dim, self.mlp_dim, self.init_std, **kind)
        self.up = Linear(self.hidden_dim, self.mlp_dim, self.init_std, **kind)
        self.down = Linear(self.mlp_dim, self.hidden_dim, self.out_init_std, **kind)

    def __call__(self, x: Float[Array, "B T E"], valid: Bool[Array, "B T"]) -> FeedForwardOutput:
        """Apply to every position; `valid` is only there because a mixture of experts counts its tokens."""
        del valid
        return FeedForwardOutput(self.down(jax.nn.silu(self.gate(x)) * self.up(x)), None)
