"""One pre-norm transformer layer."""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from dsa_jax.config import LayerSpec, ModelConfig
from dsa_jax.config.attention import WINDOW
from dsa_jax.config.model import MOE
from dsa_jax.config.selections import DENSE
from dsa_jax.model.attention.attend import measures_indexer_recall
from dsa_jax.model.attention.base import AttentionOutput, CachedAttentionOutput
from dsa_jax.model.attention.cache import LayerCache
from dsa_jax.model.attention.kinds import attention_kind
from dsa_jax.model.mlp import MLP
from dsa_jax.model.moe.moe import MoE
from dsa_jax.model.norm import RMSNorm
from dsa_jax.model.outputs import AttentionRequest, LayerContext, LayerStatistics
from pallas_kernels import Visible


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    config: ModelConfig
    layer: LayerSpec

    def setup(self) -> None:
        """Create the norms and the two layers."""
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        self.attention = attention_kind(self.layer.kind).build(config, self.layer)
        self.mlp = MoE(config) if self.layer.mlp == MOE else MLP(config, config.mlp_dim)
        self.attention_norm = RMSNorm(config.hidden_dim, config.norm_eps, dtype)
        self.mlp_norm = RMSNorm(config.hidden_dim, config.norm_eps, dtype)

    def __call__(
        self, x: Float[Array, "B T E"], context: LayerContext, request: AttentionRequest
    ) -> tuple[Float[Array, "B T E"], LayerStatistics]:
        """The new residual stream and the layer's measurements."""
        own_context, own_request = self.for_role(context, request)
        attended = self.attention(self.attention_norm(x), own_context, own_request)
        if own_request != request:
            attended = self._with_absent(attended, context, request)
        x = x + attended.out
        transformed = self.mlp(self.mlp_norm(x), context.visible.some)
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

    def touch(self, x: Float[Array, "B T E"], positions: Int[Array, "B T"]) -> None:
        """Use every parameter, for `init`: far less to trace than a layer that attends."""
        self.attention.touch(self.attention_norm(x), positions)
        self.mlp.touch(self.mlp_norm(x))

    def extend(
        self, x: Float[Array, "B T E"], context: LayerContext, cache: LayerCache, request: AttentionRequest
    ) -> CachedAttentionOutput:
        """The same over a cache that gets the new tokens; `out` is the new residual stream."""
        own_context, own_request = self.for_role(context, request)
        attended = self.attention.extend(self.attention_norm(x), own_context, cache, own_request)
        if own_request.has_topk_indices != request.has_topk_indices:
            attended = attended._replace(topk_indices=self._no_selection(context, cache.capacity))
        x = x + attended.out
        return attended._replace(out=x + self.mlp(self.mlp_norm(x), context.visible.some).out)

    def for_role(self, context: LayerContext, request: AttentionRequest) -> tuple[LayerContext, AttentionRequest]:
        """Context and request of a layer that attends densely, or to a window, whatever the model is asked."""
        if self.layer.role not in (DENSE, WINDOW):
            return context, request
        if self.layer.role == WINDOW:
            start, end = context.visible
            context = context._replace(visible=Visible(jnp.maximum(start, end - self.config.attention.window), end))
        return context, AttentionRequest(DENSE, coverage=request.coverage)

    def _with_absent(self, attended: AttentionOutput, context: LayerContext, request: AttentionRequest) -> AttentionOutput:
        """The measurements that other layers make and this one does not: no loss, no selection, no recall of one."""
        return attended._replace(
            indexer_kl=None if request.indexer_loss is None else jnp.zeros((), jnp.float32),
            topk_indices=self._no_selection(context, context.visible.start.shape[1]) if request.has_topk_indices else None,
            indexer_recall=jnp.full((), jnp.nan, jnp.float32) if measures_indexer_recall(request) else None,
        )

    def _no_selection(self, context: LayerContext, n_keys: int) -> Array:
        n_slots = min(self.config.attention.indexer.topk, n_keys)
        return jnp.full((*context.visible.start.shape, n_slots), -1, jnp.int32)
