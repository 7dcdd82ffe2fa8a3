"""One pre-norm transformer layer."""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from dsa_jax.model.attention.attend_cached import CachedAttentionOutput
from dsa_jax.model.attention.cache import LayerCache
from dsa_jax.model.norm import RMSNorm
from dsa_jax.model.outputs import AttentionRequest, LayerStatistics
from pallas_kernels import IndexHeads, Visible


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    `attention` is an `MLA` or a `GQA`, `mlp` an `MLP` or a `MoE`.
    """

    attention: nn.Module
    mlp: nn.Module
    hidden_dim: int
    norm_eps: float
    dtype: jnp.dtype

    def setup(self) -> None:
        """Create the norms; the two layers come as fields."""
        self.attention_norm = RMSNorm(self.hidden_dim, self.norm_eps, self.dtype)
        self.mlp_norm = RMSNorm(self.hidden_dim, self.norm_eps, self.dtype)

    def __call__(
        self,
        x: Float[Array, "B T E"],
        positions: Int[Array, "B T"],
        visible: Visible,
        previous_topk: Int[Array, "B T K"] | None,
        request: AttentionRequest,
        served_by: IndexHeads | None = None,
    ) -> tuple[Float[Array, "B T E"], LayerStatistics]:
        """The new residual stream and what the layer measured."""
        attended = self.attention(self.attention_norm(x), positions, visible, previous_topk, request, served_by)
        x = x + attended.out
        transformed = self.mlp(self.mlp_norm(x), visible.some)
        statistics = LayerStatistics(
            indexer_kl=attended.indexer_kl,
            coverage=attended.coverage,
            keys_per_query=attended.keys_per_query,
            topk_indices=attended.topk_indices,
            moe=transformed.statistics,
            index_heads=attended.index_heads,
            indexer_recall=attended.indexer_recall,
        )
        return x + transformed.out, statistics

    def extend(
        self,
        x: Float[Array, "B T E"],
        positions: Int[Array, "B T"],
        visible: Visible,
        previous_topk: Int[Array, "B T K"] | None,
        cache: LayerCache,
        request: AttentionRequest,
    ) -> CachedAttentionOutput:
        """The same over a cache that gets the new tokens; `out` is the new residual stream."""
        attended = self.attention.extend(self.attention_norm(x), positions, visible, previous_topk, cache, request)
        x = x + attended.out
        return attended._replace(out=x + self.mlp(self.mlp_norm(x), visible.some).out)
