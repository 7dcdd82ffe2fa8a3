"""Definition of the index scores and of the canonical selection: plain jnp, any float dtype, T x S memory and more."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.common.numerics import accumulation_dtype, activate, visible_mask, widen_fp8
from pallas_kernels.common.topk import canonical_topk
from pallas_kernels.types import IndexHeads, Visible


def index_scores(
    index: IndexHeads,
    visible: Visible,
    *,
    k_scale: Float[Array, "B S"] | None = None,
    activation: str = "relu",
) -> Float[Array, "B T S"]:
    """k_scale * sum_h weights * activate(q . k), -inf where invisible."""
    q, k, weights = widen_fp8(index.q), widen_fp8(index.k), index.weights
    mask = visible_mask(visible, k.shape[1])
    # A key nobody sees and a query that sees nothing may hold NaN, which a mask alone would let into the gradients.
    seen = mask.any(1)
    k = jnp.where(seen[..., None], k, 0)
    sees = mask.any(2)[..., None]
    q, weights = jnp.where(sees[..., None], q, 0), jnp.where(sees, weights, 0)
    dtype = accumulation_dtype(q, k, weights)
    products = jnp.einsum("bthd,bsd->bths", q.astype(dtype), k.astype(dtype), precision=jax.lax.Precision.HIGHEST)
    scores = (weights[..., None].astype(dtype) * activate(products, activation)).sum(2)
    if k_scale is not None:
        scores = scores * jnp.where(seen, k_scale, 0)[:, None].astype(dtype)
    return jnp.where(mask, scores, -jnp.inf)


def index_topk(
    index: IndexHeads,
    visible: Visible,
    *,
    topk: int,
    k_scale: Float[Array, "B S"] | None = None,
    **activation: Any,
) -> Int32[Array, "B T {topk}"]:
    """Canonical selection over the index scores; `activation` as in `index_scores`."""
    scores = index_scores(index, visible, k_scale=k_scale, **activation)
    return canonical_topk(scores, visible_mask(visible, index.k.shape[1]), topk)
