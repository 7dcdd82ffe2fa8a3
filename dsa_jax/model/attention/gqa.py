"""Grouped-query attention with an optional lightning indexer shared by all key-value groups, or native sparse attention."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from dsa_jax.config.implementations import Implementations
from dsa_jax.config.model import PLAIN
from dsa_jax.model.attention.attend import AttentionOutput, AttentionParts, attend, needs_dense_heads, needs_indexer
from dsa_jax.model.attention.attend_cached import CachedAttentionOutput, attend_cached
from dsa_jax.model.attention.cache import INDEX_KEYS, CacheEntry, LayerCache
from dsa_jax.model.attention.indexer import Indexer
from dsa_jax.model.attention.nsa import NSA, Branch
from dsa_jax.model.attention.nsa_attention import attend_natively
from dsa_jax.model.attention.selection import NSA as NSA_MODE
from dsa_jax.model.attention.selection import Budget, Heads
from dsa_jax.model.linear import Linear
from dsa_jax.model.norm import RMSNorm
from dsa_jax.model.outputs import AttentionRequest
from dsa_jax.model.rope import Rope, rotary_magnitude, rotate
from pallas_kernels import IndexHeads, Visible

KEYS, VALUES = "keys", "values"
"""Names of the cache entries."""


class GQA(nn.Module):
    """n_heads queries over n_kv_heads keys and values; one selection serves them all."""

    hidden_dim: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    rope: Rope
    qk_norm: bool
    qk_norm_eps: float
    use_bias: bool
    use_out_bias: bool
    budget: Budget
    indexer: Indexer | None
    activation: str
    nsa: NSA | None
    implementations: Implementations
    init_std: float
    out_init_std: float
    dtype: jnp.dtype
    param_dtype: jnp.dtype
    weight_format: str = PLAIN

    def setup(self) -> None:
        """Create the projections."""
        kind: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype, "weight_format": self.weight_format}
        kv_dim = self.n_kv_heads * self.head_dim
        self.wq = Linear(self.hidden_dim, self.n_heads * self.head_dim, self.init_std, use_bias=self.use_bias, **kind)
        self.wk = Linear(self.hidden_dim, kv_dim, self.init_std, use_bias=self.use_bias, **kind)
        self.wv = Linear(self.hidden_dim, kv_dim, self.init_std, use_bias=self.use_bias, **kind)
        out_dim = self.n_heads * self.head_dim
        self.wo = Linear(out_dim, self.hidden_dim, self.out_init_std, use_bias=self.use_out_bias, **kind)
        if self.qk_norm:
            self.q_norm = RMSNorm(self.head_dim, self.qk_norm_eps, self.dtype)
            self.k_norm = RMSNorm(self.head_dim, self.qk_norm_eps, self.dtype)

    def __call__(
        self,
        x: Float[Array, "B T E"],
        positions: Int[Array, "B T"],
        visible: Visible,
        previous_topk: Int[Array, "B T K"] | None,
        request: AttentionRequest,
        served_by: IndexHeads | None = None,
    ) -> AttentionOutput:
        """Attend; `x` is normed. For a layer that shares: `previous_topk` is the previous layer's selection, `served_by` the
        index heads that it came from where their loss is to be measured here, too.
        """
        heads = self._heads(x, positions)
        if self.nsa is not None and (request.attention == NSA_MODE or self.is_initializing()):
            natively = self._attend_natively(self.nsa, x, positions, heads, visible, request)
            if request.attention == NSA_MODE:
                return natively
        result = attend(
            heads if needs_dense_heads(request, has_indexer=self.indexer is not None or served_by is not None) else None,
            heads,
            self.indexer(x, x, positions) if self.indexer is not None and needs_indexer(request) else None,
            previous_topk,
            served_by,
            request=request,
            budget=self.budget,
            softmax_scale=self.head_dim**-0.5,
            visible=visible,
            activation=self.activation,
            implementations=self.implementations,
        )
        return result._replace(out=self._project_out(result.out))

    def parts(self, x: Float[Array, "B T E"], positions: Int[Array, "B T"]) -> AttentionParts:
        """What it would attend with; `x` is normed."""
        index = None if self.indexer is None else self.indexer(x, x, positions)
        return AttentionParts(self._heads(x, positions), index, self.head_dim**-0.5)

    def extend(
        self,
        x: Float[Array, "B T E"],
        positions: Int[Array, "B T"],
        visible: Visible,
        previous_topk: Int[Array, "B T K"] | None,
        cache: LayerCache,
        request: AttentionRequest,
    ) -> CachedAttentionOutput:
        """Write the tokens of `x` to the cache and attend to it."""
        heads = self._heads(x, positions)
        assert heads.v is not None
        cache = cache.write(KEYS, heads.k).write(VALUES, heads.v)
        index = None
        if self.indexer is not None and INDEX_KEYS in cache.pools:
            index = self.indexer(x, x, positions)
            cache = cache.write(INDEX_KEYS, index.k)
        result = attend_cached(
            heads.q,
            index,
            previous_topk,
            cache,
            attention=request.attention,
            keys=KEYS,
            values=VALUES,
            d_v=None,
            budget=self.budget,
            softmax_scale=self.head_dim**-0.5,
            visible=visible,
            activation=self.activation,
            implementations=self.implementations,
        )
        return result._replace(out=self._project_out(result.out))

    @property
    def cache_entries(self) -> dict[str, CacheEntry]:
        """What a token leaves in the cache of this layer."""
        heads = CacheEntry((self.n_kv_heads, self.head_dim))
        entries = {KEYS: heads, VALUES: heads}
        return entries if self.indexer is None else entries | {INDEX_KEYS: CacheEntry((self.indexer.head_dim,))}

    def _attend_natively(
        self,
        nsa: NSA,
        x: Float[Array, "B T E"],
        positions: Int[Array, "B T"],
        heads: Heads,
        visible: Visible,
        request: AttentionRequest,
    ) -> AttentionOutput:
        assert heads.v is not None
        result = attend_natively(
            heads.q,
            Branch(heads.k, heads.v),
            nsa(x, positions),
            geometry=nsa.geometry,
            window=nsa.window,
            wants_coverage=request.coverage,
            softmax_scale=self.head_dim**-0.5,
            visible=visible,
            implementations=self.implementations,
        )
        return result._replace(out=self._project_out(result.out))

    def _heads(self, x: Float[Array, "B T E"], positions: Int[Array, "B T"]) -> Heads:
        batch, length = x.shape[:2]
        q = self.wq(x).reshape(batch, length, self.n_heads, self.head_dim)
        k = self.wk(x).reshape(batch, length, self.n_kv_heads, self.head_dim)
        v = self.wv(x).reshape(batch, length, self.n_kv_heads, self.head_dim)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        magnitude = rotary_magnitude(self.rope)
        return Heads(
            rotate(q, positions, self.rope, magnitude=magnitude), rotate(k, positions, self.rope, magnitude=magnitude), v, None
        )

    def _project_out(self, out: Float[Array, "B T H D"]) -> Float[Array, "B T E"]:
        return self.wo(out.reshape(*out.shape[:2], self.n_heads * self.head_dim))
