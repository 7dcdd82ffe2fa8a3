"""The dense SwiGLU feed-forward layer."""

from typing import NamedTuple

import jax
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from dsa_jax.config import ModelConfig
from dsa_jax.model.linear import linear
from dsa_jax.model.outputs import MoEStatistics


class FeedForwardOutput(NamedTuple):
    """Result of every feed-forward layer; `statistics` is None for a dense one."""

    out: Float[Array, "B T E"]
    statistics: MoEStatistics | None


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)), `mlp_dim` wide."""

    config: ModelConfig
    mlp_dim: int

    def setup(self) -> None:
        """Create the three projections."""
        self.gate = linear(self.config, self.config.hidden_dim, self.mlp_dim)
        self.up = linear(self.config, self.config.hidden_dim, self.mlp_dim)
        self.down = linear(self.config, self.mlp_dim, self.config.hidden_dim, into_residual=True)

    def __call__(self, x: Float[Array, "B T E"], valid: Bool[Array, "B T"]) -> FeedForwardOutput:
        """Apply to every position; `valid` is only there because a mixture of experts counts its tokens."""
        del valid
        return FeedForwardOutput(self.down(jax.nn.silu(self.gate(x)) * self.up(x)), None)

    def touch(self, x: Float[Array, "B T E"]) -> None:
        """Use every parameter."""
        self.down(self.gate(x) * self.up(x))
