"""DeepSeek mixture of experts: routed experts without dropped tokens, plus shared ones."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from dsa_jax.config.model import PLAIN
from dsa_jax.model.kernels import make_kernel
from dsa_jax.model.mlp import MLP, FeedForwardOutput
from dsa_jax.model.moe.experts import ExpertKernels, routed_sum
from dsa_jax.model.moe.router import Router, expert_load, route
from pallas_kernels.quantize import QuantizedBlocks


class ExpertLinear(nn.Module):
    """One kernel per expert, [n_experts, in, out]."""

    n_experts: int
    in_dim: int
    out_dim: int
    init_std: float
    param_dtype: jnp.dtype
    weight_format: str = PLAIN

    def setup(self) -> None:
        """Create the kernels."""
        shape = (self.n_experts, self.in_dim, self.out_dim)
        self.kernel = make_kernel(self, shape, self.init_std, self.param_dtype, self.weight_format)


class Experts(nn.Module):
    """The weights of every routed expert; `routed_sum` applies them."""

    n_experts: int
    hidden_dim: int
    expert_dim: int
    init_std: float
    out_init_std: float
    dtype: jnp.dtype
    param_dtype: jnp.dtype
    weight_format: str = PLAIN

    def setup(self) -> None:
        """Create the three projections."""
        kind: dict[str, Any] = {"param_dtype": self.param_dtype, "weight_format": self.weight_format}
        self.gate = ExpertLinear(self.n_experts, self.hidden_dim, self.expert_dim, self.init_std, **kind)
        self.up = ExpertLinear(self.n_experts, self.hidden_dim, self.expert_dim, self.init_std, **kind)
        self.down = ExpertLinear(self.n_experts, self.expert_dim, self.hidden_dim, self.out_init_std, **kind)

    def __call__(self) -> ExpertKernels:
        """The kernels in the dtype of the products, or as they are in fp8, which the products widen tile by tile."""
        kernels = (linear.kernel for linear in (self.gate, self.up, self.down))
        return ExpertKernels(*(k if isinstance(k, QuantizedBlocks) else k.astype(self.dtype) for k in kernels))


class MoE(nn.Module):
    """routed_scale-weighted sum of the chosen experts, plus the shared one (`shared` is one wide MLP or None)."""

    hidden_dim: int
    expert_dim: int
    n_experts: int
    n_experts_per_token: int
    scoring: str
    n_groups: int
    topk_groups: int
    group_score: str
    normalize_weights: bool
    routed_scale: float
    use_score_bias: bool
    shared: MLP | None
    init_std: float
    out_init_std: float
    dtype: jnp.dtype
    param_dtype: jnp.dtype
    weight_format: str = PLAIN

    def setup(self) -> None:
        """Create router and experts."""
        self.router = Router(self.hidden_dim, self.n_experts, self.init_std, self.use_score_bias)
        self.experts = Experts(
            self.n_experts,
            self.hidden_dim,
            self.expert_dim,
            self.init_std,
            self.out_init_std,
            self.dtype,
            self.param_dtype,
            self.weight_format,
        )

    def __call__(self, x: Float[Array, "B T E"], valid: Bool[Array, "B T"]) -> FeedForwardOutput:
        """Apply to every position; only valid ones count towards the statistics."""
        routing = route(
            *self.router(x),
            n_experts_per_token=self.n_experts_per_token,
            scoring=self.scoring,
            n_groups=self.n_groups,
            topk_groups=self.topk_groups,
            group_score=self.group_score,
            normalize_weights=self.normalize_weights,
            routed_scale=self.routed_scale,
        )
        routed = routed_sum(x.astype(self.dtype), routing.experts, routing.weights, self.experts())
        out = routed.astype(self.dtype)
        if self.shared is not None:
            out = out + self.shared(x, valid).out
        return FeedForwardOutput(out, expert_load(routing, valid))
