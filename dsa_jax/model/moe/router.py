"""Choosing experts: scores, bias-corrected group-limited selection, load statistics. All in float32.

Source: DeepSeek-V3 (arXiv 2412.19437) section 2.1.2; DeepSeek-V3.2-Exp inference/model.py, class Gate.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from dsa_jax.config import ModelConfig, MoEConfig
from dsa_jax.model.outputs import MoEStatistics


class Routing(NamedTuple):
    """Where the tokens go: `experts` int32 of each token, their gate `weights`, and all `scores`."""

    weights: Float[Array, "*N K"]
    experts: Int[Array, "*N K"]
    scores: Float[Array, "*N X"]


class Router(nn.Module):
    """The gate of a mixture of experts; kernel and bias are float32 always."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "*N E"]) -> tuple[Float[Array, "*N X"], Float[Array, " X"] | None]:
        """Logits of every expert and the selection bias."""
        n_experts, init = self.config.moe.n_routed_experts, nn.initializers.normal(self.config.initializer_range)
        kernel = self.param("kernel", init, (self.config.hidden_dim, n_experts), jnp.float32)
        logits = jnp.matmul(x.astype(jnp.float32), kernel, precision=jax.lax.Precision.HIGHEST)
        if not self.config.moe.use_score_bias:
            return logits, None
        return logits, self.param("score_bias", nn.initializers.zeros, (n_experts,), jnp.float32)


def route(logits: Float[Array, "*N X"], score_bias: Float[Array, " X"] | None, moe: MoEConfig) -> Routing:
    """Pick experts by biased score and weigh them by unbiased score.

    Only the `topk_groups` best groups of experts are eligible; a group counts as its best score ("max") or the sum of its best
    two ("top2_sum"). Equal scores go to the lower expert. The bias has no gradient.
    """
    scores = jax.nn.sigmoid(logits) if moe.scoring == "sigmoid" else jax.nn.softmax(logits, axis=-1)
    ranking = jax.lax.stop_gradient(scores if score_bias is None else scores + score_bias)
    if moe.topk_groups < moe.n_groups:
        grouped = ranking.reshape(*ranking.shape[:-1], moe.n_groups, -1)
        best = jax.lax.top_k(grouped, min(2 if moe.group_score == "top2_sum" else 1, grouped.shape[-1]))[0].sum(axis=-1)
        kept = jax.lax.top_k(best, moe.topk_groups)[1]
        open_group = jnp.any(kept[..., None] == jnp.arange(moe.n_groups), axis=-2)
        ranking = jnp.where(open_group[..., None], grouped, -jnp.inf).reshape(ranking.shape)
    experts = jax.lax.top_k(ranking, moe.n_experts_per_token)[1]
    weights = jnp.take_along_axis(scores, experts, axis=-1)
    if moe.normalize_weights:
        weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20)
    return Routing(weights * moe.routed_scale, experts, scores)


def expert_load(routing: Routing, valid: Bool[Array, "B T"]) -> MoEStatistics:
    """Tokens per expert and the sequence-wise balance loss, over valid tokens.

    Per row with n valid tokens: sum over experts of f * P, where f is n_experts / (n_experts_per_token * n) times the number of
    tokens sent to the expert, and P the mean of its score normalised over experts (DeepSeek-V3 equations 17 to 20, with the
    experts actually chosen). Mean over the rows that have a valid token; gradient flows through P. 1 when balanced.
    """
    batch, length = valid.shape
    n_experts, per_token = routing.scores.shape[-1], routing.experts.shape[-1]
    valid_f = valid.astype(jnp.float32)
    rows = jnp.broadcast_to(jnp.arange(batch)[:, None, None], (batch, length, per_token))
    counts = jnp.zeros((batch, n_experts), jnp.float32).at[rows, routing.experts].add(valid_f[:, :, None])
    shares = routing.scores / (routing.scores.sum(axis=-1, keepdims=True) + 1e-20)
    n_valid = jnp.maximum(valid_f.sum(axis=1, keepdims=True), 1.0)
    mean_share = jnp.einsum("btx,bt->bx", shares, valid_f, precision=jax.lax.Precision.HIGHEST) / n_valid
    loss = jnp.sum(counts * n_experts / (per_token * n_valid) * mean_share, axis=-1)
    n_rows = jnp.maximum(jnp.sum(valid.any(axis=1)), 1).astype(jnp.float32)
    return MoEStatistics(counts.sum(axis=0), jnp.sum(loss) / n_rows)


def updated_score_bias(bias: Float[Array, "*L X"], expert_counts: Float[Array, "*L X"], rate: float) -> Float[Array, "*L X"]:
    """Loss-free balancing: raise the bias of experts below the mean load by `rate`, lower that of those above."""
    mean = jnp.mean(expert_counts, axis=-1, keepdims=True)
    return bias + rate * jnp.sign(mean - expert_counts)
