"""Activation of the indexer's dot products q . k before the heads are weighed: ReLU as published, or none."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

ACTIVATIONS = ("relu", "none")


def check_activation(op: str, activation: Any) -> None:
    """Raises ValueError for an unknown activation."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation is {activation!r}; expected one of {', '.join(ACTIVATIONS)}.")


def activation_option(
    op: str,
    activation: str,
    run: Callable[..., Any],
    portable: tuple[Callable[..., Any], ...],
    implementation: str | None,
) -> dict[str, str]:
    """Keyword argument that gives `run` the activation; none for the ReLU, which every implementation has.

    Raises:
        NotImplementedError: when `run` is not one of those in `portable` and the activation is another.
    """
    if activation == "relu":
        return {}
    if run not in portable:
        raise NotImplementedError(
            f"{op}: implementation {implementation!r} has activation 'relu' only; got activation={activation!r}. Pass "
            "implementation='xla' or 'reference' (attention.implementation in a config)."
        )
    return {"activation": activation}


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
