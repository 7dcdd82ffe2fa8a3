"""Multi-head latent attention in both its forms, with an optional lightning indexer.

Dense attention expands the latent to one key and value per head (MHA form). Attention to a selection absorbs the expansion
into the query and the output, so that all heads read one latent per key (MQA form). Both compute the same function.

Source: DeepSeek-V2 (arXiv 2405.04434) section 2.1; DeepSeek-V3.2-Exp inference/model.py, class MLA.
"""

from typing import NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from dsa_jax.config import AttentionConfig, LayerSpec, ModelConfig
from dsa_jax.config import attention as kinds
from dsa_jax.costs.kinds import mla_costs
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
from dsa_jax.model.kernels import widened
from dsa_jax.model.linear import linear
from dsa_jax.model.norm import RMSNorm
from dsa_jax.model.outputs import AttentionRequest, LayerContext
from dsa_jax.model.precision import precision_of
from dsa_jax.model.rope import Rope, rotary_magnitude, rotate, softmax_scale_factor
from pallas_kernels import IndexHeads

LATENT = "latent"
"""Name of the cache entry that holds [latent | rotated key]."""
_COLUMNS, _ROWS = ("fsdp", "tensor"), ("tensor", "fsdp")
PARAMETERS = (
    Parameter("wq/kernel", _COLUMNS, "self_attn.q_proj.weight"),
    Parameter("wq_a/kernel", ("fsdp", None), "self_attn.q_a_proj.weight"),
    Parameter("q_norm/scale", (), "self_attn.q_a_layernorm.weight"),
    Parameter("wq_b/kernel", _COLUMNS, "self_attn.q_b_proj.weight"),
    Parameter("wkv_a/kernel", ("fsdp", None), "self_attn.kv_a_proj_with_mqa.weight"),
    Parameter("kv_norm/scale", (), "self_attn.kv_a_layernorm.weight"),
    Parameter("wkv_b/kernel", _COLUMNS, "self_attn.kv_b_proj.weight"),
    Parameter("wo/kernel", _ROWS, "self_attn.o_proj.weight"),
)


class Latents(NamedTuple):
    """The projections of one layer; `q_input` is what the queries and the indexer's are made from."""

    q_input: Float[Array, "B T Q"]
    q_nope: Float[Array, "B T H N"]
    q_rope: Float[Array, "B T H R"]
    latent: Float[Array, "B T C"]
    k_rope: Float[Array, "B T 1 R"]


class MLA(nn.Module):
    """Latent attention; channels of a query or key are [not rotated | rotated], `q_lora_rank` 0 means no query latent."""

    config: ModelConfig
    layer: LayerSpec

    def setup(self) -> None:
        """Create the projections."""
        config, attention = self.config, self.config.attention
        hidden, dtype, rope_dim = config.hidden_dim, jnp.dtype(config.dtype), attention.qk_rope_head_dim
        q_dim = attention.n_heads * (attention.qk_nope_head_dim + rope_dim)
        if attention.q_lora_rank:
            self.wq_a = linear(config, hidden, attention.q_lora_rank)
            self.q_norm = RMSNorm(attention.q_lora_rank, attention.latent_norm_eps, dtype)
            self.wq_b = linear(config, attention.q_lora_rank, q_dim)
        else:
            self.wq = linear(config, hidden, q_dim)
        self.wkv_a = linear(config, hidden, attention.kv_lora_rank + rope_dim)
        self.kv_norm = RMSNorm(attention.kv_lora_rank, attention.latent_norm_eps, dtype)
        kv_dim = attention.n_heads * (attention.qk_nope_head_dim + attention.v_head_dim)
        self.wkv_b = linear(config, attention.kv_lora_rank, kv_dim)
        self.wo = linear(config, attention.n_heads * attention.v_head_dim, hidden, into_residual=True)
        if self.layer.has_indexer:
            self.indexer = Indexer(config, attention.q_lora_rank or hidden)

    def __call__(self, x: Float[Array, "B T E"], context: LayerContext, request: AttentionRequest) -> AttentionOutput:
        """Attend; `x` is normed."""
        latents = self.project(x, context.positions)
        has_index = self.layer.has_indexer or context.served_by is not None
        result = attend(
            self.call(request),
            self.mha_heads(latents) if needs_dense_heads(request, has_index=has_index) else None,
            self.mqa_heads(latents) if request.selects else None,
            self.index_heads(x, latents, context.positions) if needs_indexer(request) else None,
            context,
        )
        return result._replace(out=self.project_out(self.expand_values(result.out) if request.selects else result.out))

    def extend(
        self, x: Float[Array, "B T E"], context: LayerContext, cache: LayerCache, request: AttentionRequest
    ) -> CachedAttentionOutput:
        """Write the tokens of `x` to the cache and attend to it, absorbed whether dense or not."""
        latents, index = self.project(x, context.positions), None
        heads = self.mqa_heads(latents)
        cache = cache.write(LATENT, heads.k[:, :, 0, :])
        if INDEX_KEYS in cache.pools and (index := self.index_heads(x, latents, context.positions)) is not None:
            cache = cache.write(INDEX_KEYS, index.k)
        names = CachedKeys(LATENT, d_v=self.config.attention.kv_lora_rank)
        result = attend_cached(self.call(request), heads.q, index, context, cache, names)
        return result._replace(out=self.project_out(self.expand_values(result.out)))

    def parts(self, x: Float[Array, "B T E"], positions: Int[Array, "B T"]) -> AttentionParts:
        """Heads, expanded, and index heads of the normed `x`."""
        latents = self.project(x, positions)
        return AttentionParts(self.mha_heads(latents), self.index_heads(x, latents, positions), self.softmax_scale)

    def touch(self, x: Float[Array, "B T E"], positions: Int[Array, "B T"]) -> None:
        """Use every parameter."""
        values = self.parts(x, positions).heads.v
        assert values is not None
        self.project_out(values)

    @property
    def softmax_scale(self) -> float:
        """Inverse root of the query dimension, times YaRN's squared temperature."""
        attention = self.config.attention
        factor = softmax_scale_factor(rope_of(attention))
        return (attention.qk_nope_head_dim + attention.qk_rope_head_dim) ** -0.5 * factor

    def call(self, request: AttentionRequest) -> Attention:
        """The static part of a call."""
        return Attention(self.config.attention, self.softmax_scale, request)

    def index_heads(self, x: Float[Array, "B T E"], latents: Latents, positions: Int[Array, "B T"]) -> IndexHeads | None:
        """Those of the layer's own indexer; None without one."""
        return self.indexer(x, latents.q_input, positions) if self.layer.has_indexer else None

    def project(self, x: Float[Array, "B T E"], positions: Int[Array, "B T"]) -> Latents:
        """Queries, and the latent of keys and values."""
        attention = self.config.attention
        rope, nope_dim = rope_of(attention), attention.qk_nope_head_dim
        turn = lambda heads: rotate(heads, positions, rope, magnitude=rotary_magnitude(rope))
        q_input = self.q_norm(self.wq_a(x)) if attention.q_lora_rank else x
        q = self.wq_b(q_input) if attention.q_lora_rank else self.wq(x)
        q = q.reshape(*x.shape[:2], attention.n_heads, nope_dim + rope.dim)
        latent_and_rope = self.wkv_a(x)
        latent = self.kv_norm(latent_and_rope[..., : attention.kv_lora_rank])
        k_rope = turn(latent_and_rope[:, :, None, attention.kv_lora_rank :])
        return Latents(q_input, q[..., :nope_dim], turn(q[..., nope_dim:]), latent, k_rope)

    def expand_values(self, out: Float[Array, "B T H C"]) -> Float[Array, "B T H V"]:
        """Values of each head from its mean latent."""
        return jnp.einsum("bthc,chv->bthv", out, self.expansion[1], precision=precision_of(out.dtype))

    def project_out(self, out: Float[Array, "B T H V"]) -> Float[Array, "B T E"]:
        """From heads to the hidden state."""
        return self.wo(out.reshape(*out.shape[:2], out.shape[2] * out.shape[3]))

    @property
    def expansion(self) -> tuple[Float[Array, "C H N"], Float[Array, "C H V"]]:
        """The two halves of wkv_b: latent to keys, latent to values."""
        attention = self.config.attention
        kernel = widened(self.wkv_b.kernel, jnp.dtype(self.config.dtype))
        kernel = kernel.reshape(attention.kv_lora_rank, attention.n_heads, -1)
        return kernel[..., : attention.qk_nope_head_dim], kernel[..., attention.qk_nope_head_dim :]

    def mha_heads(self, latents: Latents) -> Heads:
        """One key and value per head."""
        to_keys, to_values = self.expansion
        precision = precision_of(latents.latent.dtype)
        k_nope = jnp.einsum("bsc,chn->bshn", latents.latent, to_keys, precision=precision)
        k_rope = jnp.broadcast_to(latents.k_rope, (*k_nope.shape[:3], latents.k_rope.shape[-1]))
        q = jnp.concatenate([latents.q_nope, latents.q_rope], axis=-1)
        k = jnp.concatenate([k_nope, k_rope], axis=-1)
        return Heads(q, k, jnp.einsum("bsc,chv->bshv", latents.latent, to_values, precision=precision), None)

    def mqa_heads(self, latents: Latents) -> Heads:
        """Absorbed: one key [latent | rotated] for all heads, whose first kv_lora_rank channels are the value."""
        precision = precision_of(latents.q_nope.dtype)
        absorbed = jnp.einsum("bthn,chn->bthc", latents.q_nope, self.expansion[0], precision=precision)
        q = jnp.concatenate([absorbed, latents.q_rope], axis=-1)
        k = jnp.concatenate([latents.latent[:, :, None, :], latents.k_rope], axis=-1)
        return Heads(q, k, None, self.config.attention.kv_lora_rank)


def rope_of(attention: AttentionConfig) -> Rope:
    """The rotary embedding of the rotated channels."""
    return Rope(attention.qk_rope_head_dim, attention.rope_layout, attention.rope)


def cache_entries(attention: AttentionConfig) -> dict[str, CacheEntry]:
    """One latent with its rotated key for all heads."""
    dim = attention.kv_lora_rank + attention.qk_rope_head_dim
    return {LATENT: CacheEntry((dim,), latent_dim=attention.kv_lora_rank)}


MLA_KIND = AttentionKind(kinds.MLA, MLA, PARAMETERS, cache_entries, mla_costs, lambda attention: {"n_heads": attention.n_heads})
