"""What the indexer makes of a product q . k before it weighs it: the ReLU of the source, or a variant to compare it with.

A softmax takes its normaliser as an argument, the log-sum-exp of a head's products over the visible keys. With that, every
score is a function of its own products alone, and what walks over blocks or over a selection need not know of other keys.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.common.numerics import constant_lse

ACTIVATIONS = ("relu", "none", "softmax")


def check_activation(op: str, activation: str, **scaled: Array | None) -> None:
    """Raises ValueError for an unknown activation, and for a softmax of arrays in `scaled` that lack their scales."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation is {activation!r}; expected one of {', '.join(ACTIVATIONS)}.")
    if activation == "softmax":
        for name, array in scaled.items():
            if array is not None and (name == "k_scale" or array.dtype.itemsize == 1):
                raise ValueError(
                    f"{op}: {name} is given with activation 'softmax', which does not commute with the scales of fp8 keys and "
                    "queries. Multiply them by their scales first."
                )


def activate(
    products: Float[Array, "*batch S"], head_lse: Float[Array, "*batch"] | None, activation: str
) -> Float[Array, "*batch S"]:
    """relu(products), the products themselves, or exp(products - head_lse)."""
    if activation == "relu":
        return jax.nn.relu(products)
    if activation == "none":
        return products
    assert head_lse is not None
    relative = products - constant_lse(head_lse, products.dtype)[..., None]
    # At most 0 up to rounding for a visible key; an invisible one may overflow, and inf * 0 would enter the gradients.
    return jnp.exp(jnp.where(relative > 1, 0, relative))


def times_slope(
    gradient: Float[Array, "*batch S"],
    products: Float[Array, "*batch S"],
    head_lse: Float[Array, "*batch"] | None,
    activation: str,
) -> Float[Array, "*batch S"]:
    """The gradient in the products, for a constant `head_lse`, of one in `activate`; that of the ReLU is 0 at 0."""
    if activation == "relu":
        return jnp.where(products > 0, gradient, 0)
    return gradient if activation == "none" else gradient * activate(products, head_lse, activation)


def head_lse_gradient(
    d_weights: Float[Array, "*batch"], weights: Float[Array, "*batch"], activation: str
) -> Float[Array, "*batch"] | None:
    """The gradient in `head_lse`: - weights * sum_s d_score * exp(products - head_lse), where that sum is `d_weights`."""
    return -weights.astype(d_weights.dtype) * d_weights if activation == "softmax" else None


def weighted_sum(
    products: Float[Array, "B C H Sb"],
    weights: Float[Array, "B C H"],
    activation: str = "relu",
    head_lse: Float[Array, "B C H"] | None = None,
) -> Float[Array, "B C Sb"]:
    """sum_h weights[h] * activate(products[h]).

    One term per head rather than a reduction: fused with the matrix product, the reduction runs 15 times slower on CPU.
    """
    total = jnp.zeros((*products.shape[:2], products.shape[3]), products.dtype)
    for head in range(products.shape[2]):
        term = activate(products[:, :, head], None if head_lse is None else head_lse[:, :, head], activation)
        total = total + weights[:, :, head, None].astype(products.dtype) * term
    return total
