"""DeepSeek mixture of experts: routed experts without dropped tokens, plus shared ones."""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from dsa_jax.config import ModelConfig
from dsa_jax.model.kernels import make_kernel
from dsa_jax.model.linear import residual_std
from dsa_jax.model.mlp import MLP, FeedForwardOutput
from dsa_jax.model.moe.experts import ExpertKernels, routed_sum
from dsa_jax.model.moe.router import Router, expert_load, route
from pallas_kernels.quantize import QuantizedBlocks


class ExpertLinear(nn.Module):
    """One kernel per expert, [n_experts, in, out]."""

    config: ModelConfig
    in_dim: int
    out_dim: int
    init_std: float

    def setup(self) -> None:
        """Create the kernels."""
        shape = (self.config.moe.n_routed_experts, self.in_dim, self.out_dim)
        dtype = jnp.dtype(self.config.param_dtype)
        self.kernel = make_kernel(self, shape, self.init_std, dtype, self.config.weight_format)


class Experts(nn.Module):
    """The weights of every routed expert; `routed_sum` applies them."""

    config: ModelConfig

    def setup(self) -> None:
        """Create the three projections."""
        hidden, expert = self.config.hidden_dim, self.config.moe.expert_dim
        self.gate = ExpertLinear(self.config, hidden, expert, self.config.initializer_range)
        self.up = ExpertLinear(self.config, hidden, expert, self.config.initializer_range)
        self.down = ExpertLinear(self.config, expert, hidden, residual_std(self.config))

    def __call__(self) -> ExpertKernels:
        """The kernels in the dtype of the matmuls, or as they are in fp8, which the matmuls widen tile by tile."""
        kernels = (linear.kernel for linear in (self.gate, self.up, self.down))
        dtype = jnp.dtype(self.config.dtype)
        return ExpertKernels(*(k if isinstance(k, QuantizedBlocks) else k.astype(dtype) for k in kernels))


class MoE(nn.Module):
    """routed_scale-weighted sum of the chosen experts, plus the shared ones as one wide MLP."""

    config: ModelConfig

    def setup(self) -> None:
        """Create router and experts."""
        moe = self.config.moe
        self.router = Router(self.config)
        self.experts = Experts(self.config)
        if moe.n_shared_experts:
            self.shared = MLP(self.config, moe.n_shared_experts * moe.expert_dim)

    def __call__(self, x: Float[Array, "B T E"], valid: Bool[Array, "B T"]) -> FeedForwardOutput:
        """Apply to every position; only valid ones count towards the statistics."""
        routing = route(*self.router(x), self.config.moe)
        dtype = jnp.dtype(self.config.dtype)
        out = routed_sum(x.astype(dtype), routing.experts, routing.weights, self.experts()).astype(dtype)
        if self.config.moe.n_shared_experts:
            out = out + self.shared(x, valid).out
        return FeedForwardOutput(out, expert_load(routing, valid))

    def touch(self, x: Float[Array, "B T E"]) -> None:
        """Use every parameter."""
        self.router(x)
        self.experts()
        if self.config.moe.n_shared_experts:
            self.shared.touch(x)
