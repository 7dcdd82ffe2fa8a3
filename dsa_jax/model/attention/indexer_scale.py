"""The initial scale of an indexer that is attached to a trained model."""

from collections.abc import Collection, Mapping
from typing import Any

import jax.numpy as jnp

_HEAD_WEIGHTS, _QUERIES, _LATENT = "indexer/weights_proj/kernel", "indexer/wq_b/kernel", "wq_a/kernel"


def divided_by_gain(parameters: Mapping[str, Any], new: Collection[str]) -> dict[str, Any]:
    """`parameters` by path, with new indexers divided by the root mean square of their layer's input-norm gain.

    An indexer reads the hidden state after that norm. In a trained model its rms is that of the gain, and index scores grow
    with its square: between layers of one model the temperature of the initial softmax differs by orders of magnitude.
    Head weights are divided by it and, unless they come from a query latent that has a norm of its own (MLA), queries, too;
    index keys have a LayerNorm.

    Args:
        parameters: every leaf, stacked over layers [L, in, out]; norm gains [L, E].
        new: paths of those that were just initialised; others are left as they are.
    """
    scaled = dict(parameters)
    for path in new:
        layers, _, rest = path.partition("/attention/")
        has_latent = f"{layers}/attention/{_LATENT}" in parameters
        if rest == _HEAD_WEIGHTS or (rest == _QUERIES and not has_latent):
            gain, kernel = parameters[f"{layers}/attention_norm/scale"], parameters[path]
            rms = jnp.sqrt(jnp.mean(jnp.square(gain.astype(jnp.float32)), axis=-1))
            rms = jnp.where(rms > 0, rms, 1.0).reshape(*rms.shape, *(1,) * (kernel.ndim - rms.ndim))
            scaled[path] = (kernel.astype(jnp.float32) / rms).astype(kernel.dtype)
    return scaled
