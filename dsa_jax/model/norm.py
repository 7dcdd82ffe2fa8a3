"""Normalisation layers: computed and stored in float32, returned in the dtype of the activations."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float


def rms_norm(x: Float[Array, "*N D"], scale: Float[Array, " D"], eps: float) -> Float[Array, "*N D"]:
    """x / sqrt(mean(x**2) + eps) * scale over the last axis, in float32."""
    wide = x.astype(jnp.float32)
    return wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps) * scale.astype(jnp.float32)


def layer_norm(
    x: Float[Array, "*N D"], scale: Float[Array, " D"], bias: Float[Array, " D"], eps: float
) -> Float[Array, "*N D"]:
    """(x - mean(x)) / sqrt(var(x) + eps) * scale + bias over the last axis, in float32."""
    wide = x.astype(jnp.float32)
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    unit = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + eps)
    return unit * scale.astype(jnp.float32) + bias.astype(jnp.float32)


class RMSNorm(nn.Module):
    """`rms_norm` with a learned scale."""

    dim: int
    eps: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "*N D"]) -> Float[Array, "*N D"]:
        """Normalise the last axis."""
        scale = self.param("scale", nn.initializers.ones, (self.dim,), jnp.float32)
        return rms_norm(x, scale, self.eps).astype(self.dtype)


class LayerNorm(nn.Module):
    """`layer_norm` with a learned scale and bias."""

    dim: int
    eps: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "*N D"]) -> Float[Array, "*N D"]:
        """Normalise the last axis."""
        scale = self.param("scale", nn.initializers.ones, (self.dim,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.dim,), jnp.float32)
        return layer_norm(x, scale, bias, self.eps).astype(self.dtype)
