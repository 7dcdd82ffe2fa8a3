"""Definition of the indexer's KL: whole score and probability tensors, plain jnp, autodiff."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.common.numerics import accumulation_dtype, constant_lse, sum_over_axis, visible_mask
from pallas_kernels.dense_attention.reference import attention_logits
from pallas_kernels.index_topk.reference import index_scores
from pallas_kernels.types import IndexHeads, Visible


def selected_mask(topk_indices: Int32[Array, "B T K"], n_keys: int) -> Bool[Array, "B T {n_keys}"]:
    """True where a key is listed; indices outside [0, n_keys) are dropped."""
    batch, length, _ = topk_indices.shape
    rows = jnp.arange(batch)[:, None, None], jnp.arange(length)[None, :, None]
    index = jnp.where(topk_indices >= 0, topk_indices, n_keys)
    return jnp.zeros((batch, length, n_keys), bool).at[(*rows, index)].set(True, mode="drop")


def indexer_kl(
    index: IndexHeads,
    visible: Visible,
    q: Float[Array, "B T H Dk"],
    k: Float[Array, "B S G Dk"],
    lse: Float[Array, "B T H"],
    *,
    softmax_scale: float,
    topk_indices: Int32[Array, "B T K"] | None,
    head_axis: str | None = None,
    activation: str = "relu",
    keys_per_index_key: int = 1,
) -> Float[Array, "B T"]:
    """sum_s p (log p - log_softmax(score)) over the set."""
    n_keys, (q_index, k_index, weights) = k.shape[1], index
    if keys_per_index_key > 1:
        # Widened first, so that the gradient is rounded once, after the sum over the copies.
        k_index = jnp.repeat(k_index.astype(accumulation_dtype(q_index, k_index, weights)), keys_per_index_key, axis=1)
    members = visible_mask(visible, n_keys)
    if topk_indices is not None:
        members = members & selected_mask(topk_indices, n_keys)
    some = members.any(-1, keepdims=True)
    # Keys and queries outside every set may hold NaN, which a mask alone would let into the gradients.
    key_used = members.any(1)[..., None]
    q_index, k_index = jnp.where(some[..., None], q_index, 0), jnp.where(key_used, k_index, 0)
    index = IndexHeads(q_index, k_index, jnp.where(some, weights, 0))

    logits = attention_logits(q, k, softmax_scale)
    log_p = logits - constant_lse(lse, logits.dtype).reshape(logits.shape[:-1])[..., None]
    log_p = jnp.where(members[:, :, None, None], log_p, -jnp.inf)
    p = sum_over_axis(jnp.exp(jax.lax.stop_gradient(log_p)).sum((2, 3)), head_axis)
    total = p.sum(-1, keepdims=True)
    p = jnp.where(total > 0, p / jnp.where(total > 0, total, 1), 0)

    scores = index_scores(index, visible, activation=activation)
    scores = jnp.where(members, scores, -jnp.inf)
    log_q = jax.nn.log_softmax(jnp.where(some, scores, 0), axis=-1)
    per_key = jnp.where(p > 0, p * (jnp.log(jnp.where(p > 0, p, 1)) - jnp.where(p > 0, log_q, 0)), 0)
    return per_key.sum(-1)
