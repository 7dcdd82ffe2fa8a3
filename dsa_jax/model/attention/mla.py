"""Multi-head latent attention in both its forms, with an optional lightning indexer.

Dense attention expands the latent to one key and value per head (MHA form). Attention to a selection absorbs the expansion
into the query and the output, so that all heads read one latent per key (MQA form). Both compute the same function.

Source: DeepSeek-V2 (arXiv 2405.04434) section 2.1; DeepSeek-V3.2-Exp inference/model.py, class MLA.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from dsa_jax.config.implementations import Implementations
from dsa_jax.config.model import PLAIN
from dsa_jax.model.attention.attend import AttentionOutput, AttentionParts, attend, needs_dense_heads, needs_indexer
from dsa_jax.model.attention.attend_cached import CachedAttentionOutput, attend_cached
from dsa_jax.model.attention.cache import INDEX_KEYS, CacheEntry, LayerCache
from dsa_jax.model.attention.indexer import Indexer
from dsa_jax.model.attention.selection import DENSE, Budget, Heads
from dsa_jax.model.kernels import widened
from dsa_jax.model.linear import Linear
from dsa_jax.model.norm import RMSNorm
from dsa_jax.model.outputs import AttentionRequest
from dsa_jax.model.precision import precision_of
from dsa_jax.model.rope import Rope, rotary_magnitude, rotate, softmax_scale_factor
from pallas_kernels import IndexHeads, Visible

LATENT = "latent"
"""Name of the cache entry that holds [latent | rotated key]."""


class _Parts(NamedTuple):
    """The projections of one layer; `q_input` is what the queries and the indexer's are made from."""

    q_input: Float[Array, "B T Q"]
    q_nope: Float[Array, "B T H N"]
    q_rope: Float[Array, "B T H R"]
    latent: Float[Array, "B T C"]
    k_rope: Float[Array, "B T 1 R"]


class MLA(nn.Module):
    """Latent attention; channels of a query or key are [not rotated | rotated], `q_lora_rank` 0 means no query latent."""

    hidden_dim: int
    n_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    v_head_dim: int
    rope: Rope
    latent_norm_eps: float
    budget: Budget
    indexer: Indexer | None
    activation: str
    implementations: Implementations
    init_std: float
    out_init_std: float
    dtype: jnp.dtype
    param_dtype: jnp.dtype
    weight_format: str = PLAIN

    def setup(self) -> None:
        """Create the projections."""
        kind: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype, "weight_format": self.weight_format}
        q_dim = self.n_heads * (self.qk_nope_head_dim + self.rope.dim)
        if self.q_lora_rank:
            self.wq_a = Linear(self.hidden_dim, self.q_lora_rank, self.init_std, **kind)
            self.q_norm = RMSNorm(self.q_lora_rank, self.latent_norm_eps, self.dtype)
            self.wq_b = Linear(self.q_lora_rank, q_dim, self.init_std, **kind)
        else:
            self.wq = Linear(self.hidden_dim, q_dim, self.init_std, **kind)
        self.wkv_a = Linear(self.hidden_dim, self.kv_lora_rank + self.rope.dim, self.init_std, **kind)
        self.kv_norm = RMSNorm(self.kv_lora_rank, self.latent_norm_eps, self.dtype)
        kv_dim = self.n_heads * (self.qk_nope_head_dim + self.v_head_dim)
        self.wkv_b = Linear(self.kv_lora_rank, kv_dim, self.init_std, **kind)
        self.wo = Linear(self.n_heads * self.v_head_dim, self.hidden_dim, self.out_init_std, **kind)

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
        parts = self._project(x, positions)
        heads = parts.q_nope, parts.q_rope, parts.latent, parts.k_rope
        selects = request.attention != DENSE
        wants_all = needs_dense_heads(request, has_indexer=self.indexer is not None or served_by is not None)
        result = attend(
            self.mha_heads(*heads) if wants_all else None,
            self.mqa_heads(*heads) if selects else None,
            self.indexer(x, parts.q_input, positions) if self.indexer is not None and needs_indexer(request) else None,
            previous_topk,
            served_by,
            request=request,
            budget=self.budget,
            softmax_scale=self.softmax_scale,
            visible=visible,
            activation=self.activation,
            implementations=self.implementations,
        )
        return result._replace(out=self._project_out(self._expand_values(result.out) if selects else result.out))

    def parts(self, x: Float[Array, "B T E"], positions: Int[Array, "B T"]) -> AttentionParts:
        """What it would attend with, expanded per head; `x` is normed."""
        parts = self._project(x, positions)
        index = None if self.indexer is None else self.indexer(x, parts.q_input, positions)
        heads = self.mha_heads(parts.q_nope, parts.q_rope, parts.latent, parts.k_rope)
        return AttentionParts(heads, index, self.softmax_scale)

    def extend(
        self,
        x: Float[Array, "B T E"],
        positions: Int[Array, "B T"],
        visible: Visible,
        previous_topk: Int[Array, "B T K"] | None,
        cache: LayerCache,
        request: AttentionRequest,
    ) -> CachedAttentionOutput:
        """Write the tokens of `x` to the cache and attend to it, absorbed whether dense or not."""
        parts = self._project(x, positions)
        heads = self.mqa_heads(parts.q_nope, parts.q_rope, parts.latent, parts.k_rope)
        cache = cache.write(LATENT, heads.k[:, :, 0, :])
        index = None
        if self.indexer is not None and INDEX_KEYS in cache.pools:
            index = self.indexer(x, parts.q_input, positions)
            cache = cache.write(INDEX_KEYS, index.k)
        result = attend_cached(
            heads.q,
            index,
            previous_topk,
            cache,
            attention=request.attention,
            keys=LATENT,
            values=None,
            d_v=self.kv_lora_rank,
            budget=self.budget,
            softmax_scale=self.softmax_scale,
            visible=visible,
            activation=self.activation,
            implementations=self.implementations,
        )
        return result._replace(out=self._project_out(self._expand_values(result.out)))

    @property
    def cache_entries(self) -> dict[str, CacheEntry]:
        """What a token leaves in the cache of this layer."""
        entries = {LATENT: CacheEntry((self.kv_lora_rank + self.rope.dim,), latent_dim=self.kv_lora_rank)}
        return entries if self.indexer is None else entries | {INDEX_KEYS: CacheEntry((self.indexer.head_dim,))}

    def _project(self, x: Float[Array, "B T E"], positions: Int[Array, "B T"]) -> _Parts:
        batch, length = x.shape[:2]
        q_input = self.q_norm(self.wq_a(x)) if self.q_lora_rank else x
        q = self.wq_b(q_input) if self.q_lora_rank else self.wq(x)
        q = q.reshape(batch, length, self.n_heads, self.qk_nope_head_dim + self.rope.dim)
        magnitude = rotary_magnitude(self.rope)
        q_nope = q[..., : self.qk_nope_head_dim]
        q_rope = rotate(q[..., self.qk_nope_head_dim :], positions, self.rope, magnitude=magnitude)
        latent_and_rope = self.wkv_a(x)
        latent = self.kv_norm(latent_and_rope[..., : self.kv_lora_rank])
        k_rope = rotate(latent_and_rope[:, :, None, self.kv_lora_rank :], positions, self.rope, magnitude=magnitude)
        return _Parts(q_input, q_nope, q_rope, latent, k_rope)

    def _expand_values(self, out: Float[Array, "B T H C"]) -> Float[Array, "B T H V"]:
        return jnp.einsum("bthc,chv->bthv", out, self.expansion[1], precision=precision_of(out.dtype))

    def _project_out(self, out: Float[Array, "B T H V"]) -> Float[Array, "B T E"]:
        return self.wo(out.reshape(*out.shape[:2], self.n_heads * self.v_head_dim))

    @property
    def softmax_scale(self) -> float:
        """Inverse root of the query dimension, times YaRN's squared temperature."""
        return (self.qk_nope_head_dim + self.rope.dim) ** -0.5 * softmax_scale_factor(self.rope)

    @property
    def expansion(self) -> tuple[Float[Array, "C H N"], Float[Array, "C H V"]]:
        """The two halves of wkv_b: latent to keys, latent to values."""
        kernel = widened(self.wkv_b.kernel, self.dtype)
        kernel = kernel.reshape(self.kv_lora_rank, self.n_heads, self.qk_nope_head_dim + self.v_head_dim)
        return kernel[..., : self.qk_nope_head_dim], kernel[..., self.qk_nope_head_dim :]

    def mha_heads(
        self,
        q_nope: Float[Array, "B T H N"],
        q_rope: Float[Array, "B T H R"],
        latent: Float[Array, "B T C"],
        k_rope: Float[Array, "B T 1 R"],
    ) -> Heads:
        """One key and value per head."""
        to_keys, to_values = self.expansion
        precision = precision_of(latent.dtype)
        k_nope = jnp.einsum("bsc,chn->bshn", latent, to_keys, precision=precision)
        k_rope = jnp.broadcast_to(k_rope, (*k_nope.shape[:3], self.rope.dim))
        q = jnp.concatenate([q_nope, q_rope], axis=-1)
        k = jnp.concatenate([k_nope, k_rope], axis=-1)
        return Heads(q, k, jnp.einsum("bsc,chv->bshv", latent, to_values, precision=precision), None)

    def mqa_heads(
        self,
        q_nope: Float[Array, "B T H N"],
        q_rope: Float[Array, "B T H R"],
        latent: Float[Array, "B T C"],
        k_rope: Float[Array, "B T 1 R"],
    ) -> Heads:
        """Absorbed: one key [latent | rotated] for all heads, whose first kv_lora_rank channels are the value."""
        absorbed = jnp.einsum("bthn,chn->bthc", q_nope, self.expansion[0], precision=precision_of(q_nope.dtype))
        q = jnp.concatenate([absorbed, q_rope], axis=-1)
        k = jnp.concatenate([latent[:, :, None, :], k_rope], axis=-1)
        return Heads(q, k, None, self.kv_lora_rank)
