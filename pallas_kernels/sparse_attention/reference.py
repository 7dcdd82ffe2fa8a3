"""Definition of sparse attention, over keys and over packed fp8 rows: gather every query's keys, attend, in plain jnp."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, UInt8

from pallas_kernels.common.numerics import accumulation_dtype, softmax_and_lse, values_of
from pallas_kernels.quantize.cache_layouts import unpack_latent_fp8


def sparse_attention(
    q: Float[Array, "B T H Dk"],
    k: Float[Array, "B S G Dk"],
    v: Float[Array, "B S G Dv"] | None,
    topk_indices: Int32[Array, "B T K"],
    *,
    softmax_scale: float,
    d_v: int | None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
    """(out, lse) over the selected keys."""
    (batch, length, heads, _), (n_keys, groups) = q.shape, k.shape[1:3]
    dtype = accumulation_dtype(q, k)
    precision = jax.lax.Precision.HIGHEST
    if n_keys == 0:
        width = values_of(k, v, d_v).shape[-1]
        return jnp.zeros((batch, length, heads, width), q.dtype), jnp.full((batch, length, heads), -jnp.inf, dtype)
    valid = (topk_indices >= 0) & (topk_indices < n_keys)
    index = jnp.where(valid, topk_indices, 0)
    gathered = [x[jnp.arange(batch)[:, None, None], index] for x in (k, values_of(k, v, d_v))]
    k_sel, v_sel = (jnp.where(valid[..., None, None], x, 0).astype(dtype) for x in gathered)
    q_grouped = jnp.where(valid.any(-1)[..., None, None], q, 0).reshape(batch, length, groups, heads // groups, q.shape[-1])
    logits = softmax_scale * jnp.einsum("btghd,btkgd->btghk", q_grouped.astype(dtype), k_sel, precision=precision)
    probability, lse = softmax_and_lse(logits, valid[:, :, None, None, :])
    out = jnp.einsum("btghk,btkgd->btghd", probability, v_sel, precision=precision)
    return out.reshape(batch, length, heads, v_sel.shape[-1]).astype(q.dtype), lse.reshape(batch, length, heads)


def sparse_attention_fp8(
    q: Float[Array, "B T H Dk"],
    pool: UInt8[Array, "P bytes"],
    slots: Int32[Array, "B T K"],
    *,
    softmax_scale: float,
    latent_dim: int,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
    """(out, lse) over the selected rows, dequantised to float32."""
    (batch, length, heads, dim), topk = q.shape, slots.shape[2]
    keys = jnp.concatenate(unpack_latent_fp8(pool, latent_dim), -1)[None, :, None]
    arrays = q.reshape(1, batch * length, heads, dim), keys, None, slots.reshape(1, batch * length, topk)
    out, lse = sparse_attention(*arrays, softmax_scale=softmax_scale, d_v=latent_dim)
    return out.reshape(batch, length, heads, latent_dim), lse.reshape(q.shape[:3])
