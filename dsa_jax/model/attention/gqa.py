"""Grouped-query attention with an optional lightning indexer, whose one selection serves all key-value groups."""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from dsa_jax.config import AttentionConfig, LayerSpec, ModelConfig
from dsa_jax.config import attention as kinds
from dsa_jax.costs.kinds import gqa_costs
from dsa_jax.model.attention.attend import Attention, CachedKeys, attend, attend_cached, needs_dense_heads, needs_indexer
from dsa_jax.model.attention.base import (
    AttentionKind,
    AttentionOutput,
    AttentionParts,
    CachedAttentionOutput,
    Heads,
    Parameter,
)
from dsa_jax.model.attention.cache import INDEX_KEYS, CacheEntry, LayerCache
from dsa_jax.model.attention.indexer import Indexer
from dsa_jax.model.linear import linear
from dsa_jax.model.norm import RMSNorm
from dsa_jax.model.outputs import AttentionRequest, LayerContext
from dsa_jax.model.rope import Rope, rotary_magnitude, rotate
from pallas_kernels import IndexHeads

KEYS, VALUES = "keys", "values"
"""Names of the cache entries."""
_COLUMNS, _ROWS = ("fsdp", "tensor"), ("tensor", "fsdp")
PARAMETERS = (
    Parameter("wq/kernel", _COLUMNS, "self_attn.q_proj.weight"),
    Parameter("wq/bias", ("tensor",), "self_attn.q_proj.bias"),
    Parameter("wk/kernel", _COLUMNS, "self_attn.k_proj.weight"),
    Parameter("wk/bias", ("tensor",), "self_attn.k_proj.bias"),
    Parameter("wv/kernel", _COLUMNS, "self_attn.v_proj.weight"),
    Parameter("wv/bias", ("tensor",), "self_attn.v_proj.bias"),
    Parameter("wo/kernel", _ROWS, "self_attn.o_proj.weight"),
    Parameter("wo/bias", (), "self_attn.o_proj.bias"),
    Parameter("q_norm/scale", (), "self_attn.q_norm.weight"),
    Parameter("k_norm/scale", (), "self_attn.k_norm.weight"),
)


class GQA(nn.Module):
    """n_heads queries over n_kv_heads keys and values."""

    config: ModelConfig
    layer: LayerSpec

    def setup(self) -> None:
        """Create the projections."""
        config, attention = self.config, self.config.attention
        q_dim, kv_dim = attention.n_heads * attention.head_dim, attention.n_kv_heads * attention.head_dim
        self.wq = linear(config, config.hidden_dim, q_dim, use_bias=attention.use_bias)
        self.wk = linear(config, config.hidden_dim, kv_dim, use_bias=attention.use_bias)
        self.wv = linear(config, config.hidden_dim, kv_dim, use_bias=attention.use_bias)
        self.wo = linear(config, q_dim, config.hidden_dim, into_residual=True, use_bias=attention.use_out_bias)
        if attention.qk_norm:
            self.q_norm = RMSNorm(attention.head_dim, config.norm_eps, jnp.dtype(config.dtype))
            self.k_norm = RMSNorm(attention.head_dim, config.norm_eps, jnp.dtype(config.dtype))
        if self.layer.has_indexer:
            self.indexer = Indexer(config, config.hidden_dim)

    def __call__(self, x: Float[Array, "B T E"], context: LayerContext, request: AttentionRequest) -> AttentionOutput:
        """Attend; `x` is normed."""
        heads = self.heads(x, context.positions)
        has_index = self.layer.has_indexer or context.served_by is not None
        dense = heads if needs_dense_heads(request, has_index=has_index) else None
        index = self.index_heads(x, context.positions) if needs_indexer(request) else None
        result = attend(self.call(request), dense, heads, index, context)
        return result._replace(out=self.project_out(result.out))

    def extend(
        self, x: Float[Array, "B T E"], context: LayerContext, cache: LayerCache, request: AttentionRequest
    ) -> CachedAttentionOutput:
        """Write the tokens of `x` to the cache and attend to it."""
        heads, index = self.heads(x, context.positions), None
        assert heads.v is not None
        cache = cache.write(KEYS, heads.k).write(VALUES, heads.v)
        if self.layer.has_indexer and INDEX_KEYS in cache.pools:
            index = self.indexer(x, x, context.positions)
            cache = cache.write(INDEX_KEYS, index.k)
        result = attend_cached(self.call(request), heads.q, index, context, cache, CachedKeys(KEYS, VALUES))
        return result._replace(out=self.project_out(result.out))

    def parts(self, x: Float[Array, "B T E"], positions: Int[Array, "B T"]) -> AttentionParts:
        """Heads and index heads of the normed `x`."""
        return AttentionParts(self.heads(x, positions), self.index_heads(x, positions), self.softmax_scale)

    def touch(self, x: Float[Array, "B T E"], positions: Int[Array, "B T"]) -> None:
        """Use every parameter."""
        self.project_out(self.parts(x, positions).heads.q)

    @property
    def softmax_scale(self) -> float:
        """Inverse root of the head dimension."""
        return self.config.attention.head_dim**-0.5

    def call(self, request: AttentionRequest) -> Attention:
        """The static part of a call."""
        return Attention(self.config.attention, self.softmax_scale, request)

    def index_heads(self, x: Float[Array, "B T E"], positions: Int[Array, "B T"]) -> IndexHeads | None:
        """Those of the layer's own indexer; None without one."""
        return self.indexer(x, x, positions) if self.layer.has_indexer else None

    def heads(self, x: Float[Array, "B T E"], positions: Int[Array, "B T"]) -> Heads:
        """Rotated queries and keys, and values."""
        attention, rows = self.config.attention, x.shape[:2]
        q = self.wq(x).reshape(*rows, attention.n_heads, attention.head_dim)
        k = self.wk(x).reshape(*rows, attention.n_kv_heads, attention.head_dim)
        v = self.wv(x).reshape(*rows, attention.n_kv_heads, attention.head_dim)
        if attention.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        rope = rope_of(attention)
        turn = lambda heads: rotate(heads, positions, rope, magnitude=rotary_magnitude(rope))
        return Heads(turn(q), turn(k), v, None)

    def project_out(self, out: Float[Array, "B T H D"]) -> Float[Array, "B T E"]:
        """From heads to the hidden state."""
        return self.wo(out.reshape(*out.shape[:2], out.shape[2] * out.shape[3]))


def rope_of(attention: AttentionConfig) -> Rope:
    """The rotary embedding of queries and keys."""
    return Rope(attention.head_dim, attention.rope_layout, attention.rope)


def cache_entries(attention: AttentionConfig) -> dict[str, CacheEntry]:
    """Keys and values of every group."""
    return dict.fromkeys((KEYS, VALUES), CacheEntry((attention.n_kv_heads, attention.head_dim)))


def split_heads(attention: AttentionConfig) -> dict[str, int]:
    """Query heads, and key heads unless one serves all queries."""
    heads = {"n_heads": attention.n_heads}
    return heads | {"n_kv_heads": attention.n_kv_heads} if attention.n_kv_heads > 1 else heads


GQA_KIND = AttentionKind(kinds.GQA, GQA, PARAMETERS, cache_entries, gqa_costs, split_heads)
