"""DeepSeek mixture of experts: routed experts without dropped tokens, plus shared ones.

Tokens are sorted by expert and multiplied group by group, so that nothing of size tokens x experts x dim is ever held.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from dsa_jax.model.grouped_matmul import grouped_matmul
from dsa_jax.model.mlp import MLP, FeedForwardOutput
from dsa_jax.model.router import Router, expert_load, route


class ExpertLinear(nn.Module):
    """One kernel per expert, [n_experts, in, out]."""

    n_experts: int
    in_dim: int
    out_dim: int
    init_std: float
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "M I"], group_sizes: Int[Array, " X"]) -> Float[Array, "M O"]:
        """Apply to rows sorted by expert."""
        shape = (self.n_experts, self.in_dim, self.out_dim)
        kernel = self.param("kernel", nn.initializers.normal(self.init_std), shape, self.param_dtype)
        return grouped_matmul(x.astype(self.dtype), kernel.astype(self.dtype), group_sizes)


class Experts(nn.Module):
    """The SwiGLU of every routed expert."""

    n_experts: int
    hidden_dim: int
    expert_dim: int
    init_std: float
    out_init_std: float
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    def setup(self) -> None:
        """Create the three projections."""
        kind: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.gate = ExpertLinear(self.n_experts, self.hidden_dim, self.expert_dim, self.init_std, **kind)
        self.up = ExpertLinear(self.n_experts, self.hidden_dim, self.expert_dim, self.init_std, **kind)
        self.down = ExpertLinear(self.n_experts, self.expert_dim, self.hidden_dim, self.out_init_std, **kind)

    def __call__(self, x: Float[Array, "M E"], group_sizes: Int[Array, " X"]) -> Float[Array, "M E"]:
        """Apply to rows sorted by expert."""
        return self.down(jax.nn.silu(self.gate(x, group_sizes)) * self.up(x, group_sizes), group_sizes)


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
        )

    def __call__(self, x: Float[Array, "B T E"], valid: Bool[Array, "B T"]) -> FeedForwardOutput:
        """Apply to every position; only valid ones count towards the statistics."""
        flat = x.reshape(-1, self.hidden_dim)
        routing = route(
            *self.router(flat),
            n_experts_per_token=self.n_experts_per_token,
            scoring=self.scoring,
            n_groups=self.n_groups,
            topk_groups=self.topk_groups,
            group_score=self.group_score,
            normalize_weights=self.normalize_weights,
            routed_scale=self.routed_scale,
        )
        assigned = routing.experts.reshape(-1)
        order = jnp.argsort(assigned, stable=True)
        group_sizes = jnp.zeros(self.n_experts, jnp.int32).at[assigned].add(1)
        # A copy per choice, then permutations of unique rows: no scatter with collisions, so the backward is deterministic.
        copies = jnp.repeat(flat, self.n_experts_per_token, axis=0)
        by_expert = copies.at[order].get(unique_indices=True)
        expert_out = self.experts(by_expert, group_sizes)
        back = jnp.zeros_like(order).at[order].set(jnp.arange(len(order), dtype=order.dtype), unique_indices=True)
        per_choice = expert_out.at[back].get(unique_indices=True).reshape(-1, self.n_experts_per_token, self.hidden_dim)
        routed = jnp.sum(per_choice.astype(jnp.float32) * routing.weights[..., None], axis=1)
        out = routed.astype(self.dtype).reshape(x.shape)
        if self.shared is not None:
            out = out + self.shared(x, valid).out
        return FeedForwardOutput(out, expert_load(routing, valid))
