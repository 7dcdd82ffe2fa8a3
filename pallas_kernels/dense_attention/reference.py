"""Definition of dense attention over visible ranges and of the oracle selection: plain jnp, H x T x S memory."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.common.numerics import accumulation_dtype, constant_lse, softmax_and_lse, values_of, visible_mask
from pallas_kernels.common.topk import canonical_topk
from pallas_kernels.types import Visible


def attention_logits(
    q: Float[Array, "B T H D"], k: Float[Array, "B S G D"], softmax_scale: float
) -> Float[Array, "B T G Hg S"]:
    """Scaled logits, heads split into key groups."""
    dtype = accumulation_dtype(q, k)
    q_grouped = q.reshape(*q.shape[:2], k.shape[2], q.shape[2] // k.shape[2], q.shape[3])
    return softmax_scale * jnp.einsum(
        "btghd,bsgd->btghs", q_grouped.astype(dtype), k.astype(dtype), precision=jax.lax.Precision.HIGHEST
    )


def dense_attention(
    q: Float[Array, "B T H Dk"],
    k: Float[Array, "B S G Dk"],
    v: Float[Array, "B S G Dv"] | None,
    visible: Visible,
    *,
    softmax_scale: float,
    d_v: int | None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
    """(out, lse) over the visible keys."""
    mask = visible_mask(visible, k.shape[1])
    # A key nobody sees and a query that sees nothing may hold NaN, which a mask alone would let into the gradients.
    seen, some = mask.any(1)[..., None, None], mask.any(2)[..., None, None]
    k, values = jnp.where(seen, k, 0), jnp.where(seen, values_of(k, v, d_v), 0)
    q = jnp.where(some, q, 0)
    probability, lse = softmax_and_lse(attention_logits(q, k, softmax_scale), mask[:, :, None, None, :])
    out = jnp.einsum("btghs,bsgd->btghd", probability, values.astype(probability.dtype), precision=jax.lax.Precision.HIGHEST)
    # Stops a cotangent that is not finite where there is nothing to learn.
    out = jnp.where(some, out.reshape(*q.shape[:3], values.shape[-1]), 0)
    return out.astype(q.dtype), lse.reshape(q.shape[:3])


def attention_topk(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S G D"],
    lse: Float[Array, "B T H"],
    visible: Visible,
    *,
    softmax_scale: float,
    topk: int,
) -> Int32[Array, "B T {topk}"]:
    """Canonical selection by head-summed probability."""
    logits = attention_logits(q, k, softmax_scale)
    lse = constant_lse(lse, logits.dtype).reshape(logits.shape[:-1])
    mass = jnp.exp(logits - lse[..., None]).sum((2, 3))
    return canonical_topk(mass, visible_mask(visible, k.shape[1]), topk)
