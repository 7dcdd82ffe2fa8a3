"""Small numeric rules every implementation shares: accumulation dtype, visibility, value views."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.dtypes import float0
from jaxtyping import Array, Bool, Float

from pallas_kernels.types import Visible


def accumulation_dtype(*arrays: Array) -> jnp.dtype:
    """float32, or float64 when any of the arrays is float64."""
    return jnp.result_type(jnp.float32, *arrays)


def widen_fp8(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """fp8 as bfloat16, which holds every e4m3 number; Triton multiplies fp8 on Hopper only after such a conversion, too."""
    return x.astype(jnp.bfloat16) if x.dtype.itemsize == 1 else x


def visible_mask(visible: Visible, n_keys: int) -> Bool[Array, "B T {n_keys}"]:
    """True where key s lies in the visible range."""
    position = jnp.arange(n_keys, dtype=jnp.int32)
    return (position >= visible.start[..., None]) & (position < visible.end[..., None])


def clamped(visible: Visible, n_keys: int) -> Visible:
    """The range with bounds within [0, n_keys]."""
    return Visible(jnp.clip(visible.start, 0, n_keys), jnp.clip(visible.end, 0, n_keys))


def no_gradient(tree: Any) -> Any:
    """The cotangents of integer arrays in a custom backward."""
    return jax.tree.map(lambda x: np.zeros(x.shape, float0), tree)


def constant_lse(lse: Float[Array, "*shape"], dtype: jnp.dtype) -> Float[Array, "*shape"]:
    """lse as a divisor of probabilities: a head that saw nothing (-inf) contributes exp(logit - inf) = 0."""
    return jnp.where(lse == -jnp.inf, jnp.inf, lse).astype(dtype)


def values_of(k: Float[Array, "*batch D"], v: Float[Array, "*batch Dv"] | None, d_v: int | None) -> Float[Array, "*batch V"]:
    """The value rows: `v`, or the leading `d_v` channels of the keys (all of them when `d_v` is None)."""
    if v is not None:
        return v
    return k[..., : (k.shape[-1] if d_v is None else d_v)]


def add_leading(total: Float[Array, "*batch D"], x: Float[Array, "*batch V"]) -> Float[Array, "*batch D"]:
    """Adds `x` to the leading channels: the gradient of `values_of` where values are channels of the keys.

    No `.at[].add`, a scatter whose empty index makes XLA of jax 0.11.2 crash inside `shard_map`.
    """
    return total + jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, total.shape[-1] - x.shape[-1])])


def softmax_and_lse(
    logits: Float[Array, "*batch S"], valid: Bool[Array, "*#batch S"]
) -> tuple[Float[Array, "*batch S"], Float[Array, "*batch"]]:
    """Softmax and natural log-sum-exp over the valid entries of the last axis; none valid: zeros and -inf, gradients 0."""
    any_valid = valid.any(-1)
    logits = jnp.where(valid, logits, -jnp.inf)
    largest = jnp.where(any_valid, logits.max(-1, initial=-jnp.inf), 0)
    weights = jnp.where(valid, jnp.exp(jnp.where(valid, logits - jax.lax.stop_gradient(largest)[..., None], 0)), 0)
    total = jnp.where(any_valid, weights.sum(-1), 1)
    lse = jnp.where(any_valid, jnp.log(total) + jax.lax.stop_gradient(largest), -jnp.inf)
    return weights / total[..., None], lse


def with_sink(
    out: Float[Array, "B T H V"], lse: Float[Array, "B T H"], sink: Float[Array, " H"] | None
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
    """(out, lse) of the same attention with one more logit per head that has no value, in `out` and in `lse`.

    lse' = logaddexp(lse, sink), out' = out * exp(lse - lse'); out' 0 and lse' = sink where lse is -inf. Differentiable in all.
    """
    if sink is None:
        return out, lse
    sink = sink.astype(lse.dtype)
    some = lse > -jnp.inf
    joint = jnp.logaddexp(jnp.where(some, lse, 0), sink)
    share = jnp.exp(jnp.where(some, lse, 0) - joint)[..., None]
    # The second mask stops a cotangent that is not finite where there is nothing to learn.
    scaled = jnp.where(some[..., None], out.astype(share.dtype) * share, 0).astype(out.dtype)
    return scaled, jnp.where(some, joint, sink)


def dot(equation: str, *operands: Array, dtype: jnp.dtype) -> Array:
    """Einsum that accumulates in `dtype`; float32 operands are never rounded to tf32."""
    return jnp.einsum(equation, *operands, precision=jax.lax.Precision.HIGHEST, preferred_element_type=dtype)


def head_products(q: Float[Array, "B C H D"], k: Float[Array, "B Sb D"], dtype: jnp.dtype) -> Float[Array, "B C H Sb"]:
    """q . k for all heads, as one matmul per batch row: with two free axes XLA on CPU falls back to slow loops."""
    batch, length, heads, dim = q.shape
    rows = q.reshape(batch, length * heads, dim)
    return dot("brd,bsd->brs", rows, k, dtype=dtype).reshape(batch, length, heads, k.shape[1])


def head_products_transposed(
    d_products: Float[Array, "B C H Sb"], q: Float[Array, "B C H D"], k: Float[Array, "B Sb D"], dtype: jnp.dtype
) -> tuple[Float[Array, "B C H D"], Float[Array, "B Sb D"]]:
    """Gradients of `head_products` in q and k."""
    batch, length, heads, dim = q.shape
    d_rows = d_products.reshape(batch, length * heads, k.shape[1])
    d_q = dot("brs,bsd->brd", d_rows.astype(k.dtype), k, dtype=dtype).reshape(q.shape)
    return d_q, dot("brs,brd->bsd", d_rows.astype(q.dtype), q.reshape(batch, length * heads, dim), dtype=dtype)


def activate(products: Float[Array, "*batch S"], activation: str) -> Float[Array, "*batch S"]:
    """relu(products), or the products themselves."""
    return jax.nn.relu(products) if activation == "relu" else products


def times_slope(
    gradient: Float[Array, "*batch S"], products: Float[Array, "*batch S"], activation: str
) -> Float[Array, "*batch S"]:
    """The gradient in the products of one in `activate`; that of the ReLU is 0 at 0."""
    return jnp.where(products > 0, gradient, 0) if activation == "relu" else gradient


def weighted_sum(
    products: Float[Array, "B C H Sb"], weights: Float[Array, "B C H"], activation: str = "relu"
) -> Float[Array, "B C Sb"]:
    """sum_h weights[h] * activate(products[h]).

    One term per head rather than a reduction: fused with the matmul, the reduction runs 15 times slower on CPU.
    """
    total = jnp.zeros((*products.shape[:2], products.shape[3]), products.dtype)
    for head in range(products.shape[2]):
        term = activate(products[:, :, head], activation)
        total = total + weights[:, :, head, None].astype(products.dtype) * term
    return total


def sum_over_axis(x: Array, axis: str | None) -> Array:
    """Sum over the devices along a mesh axis, inside `shard_map`; `x` itself for None."""
    return x if axis is None else jax.lax.psum(x, axis)
