"""Rotary position embedding: frequencies with YaRN or Llama-3 scaling, and the two channel layouts."""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dsa_jax.config import RopeConfig

LAYOUTS = ("half_split", "interleaved")


class Rope(NamedTuple):
    """Rotary embedding of `dim` channels in a layout, with the frequencies and the scaling of `config`."""

    dim: int
    layout: str
    config: RopeConfig


def inverse_frequencies(rope: Rope) -> np.ndarray:
    """Radians per position of each channel pair, float32 [dim / 2].

    none:   theta ** (-2 i / dim).
    yarn:   pairs that turn more than beta_fast times within original_max_positions keep their frequency, pairs that turn fewer
            than beta_slow times are divided by factor, a linear ramp over the pair index lies between.
    llama3: the same idea by wavelength, with a ramp in original_max_positions / wavelength between low_freq_factor and
            high_freq_factor.

    Source: YaRN (arXiv 2309.00071) section 3.2; DeepSeek-V3.2-Exp inference/model.py; Llama 3.1 reference code.
    """
    plain = rope.config.theta ** (-np.arange(0, rope.dim, 2, dtype=np.float64) / rope.dim)
    if rope.config.scaling == "none":
        return plain.astype(np.float32)
    if rope.config.scaling == "yarn":
        low, high = yarn_ramp(rope)
        width = high - low or 1e-3  # negative, as published code has it, where both bounds are met in the wrong order
        stretched = np.clip((np.arange(rope.dim // 2) - low) / width, 0.0, 1.0)
    elif rope.config.scaling == "llama3":
        turns = rope.config.original_max_positions * plain / (2 * math.pi)
        width = rope.config.high_freq_factor - rope.config.low_freq_factor
        stretched = np.clip((rope.config.high_freq_factor - turns) / width, 0.0, 1.0)
    else:
        raise ValueError(f"rope scaling is {rope.config.scaling!r}; expected none, yarn or llama3.")
    return (plain * (1 - stretched) + plain / rope.config.factor * stretched).astype(np.float32)


def yarn_ramp(rope: Rope) -> tuple[int, int]:
    """First and last pair index of YaRN's ramp: `(10, 23)` for DeepSeek-V3.2."""
    config = rope.config

    def pair_turning(times: float) -> float:
        return rope.dim * math.log(config.original_max_positions / (times * 2 * math.pi)) / (2 * math.log(config.theta))

    return max(math.floor(pair_turning(config.beta_fast)), 0), min(math.ceil(pair_turning(config.beta_slow)), rope.dim - 1)


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's temperature: 0.1 * mscale * ln(factor) + 1, and 1 without extension."""
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0


def rotary_magnitude(rope: Rope) -> float:
    """Factor on cos and sin: YaRN's attention_factor, or else its mscale over mscale_all_dim; 1 for every other scaling."""
    if rope.config.scaling != "yarn":
        return 1.0
    if rope.config.attention_factor:
        return rope.config.attention_factor
    return yarn_mscale(rope.config.factor, rope.config.mscale) / yarn_mscale(rope.config.factor, rope.config.mscale_all_dim)


def softmax_scale_factor(rope: Rope) -> float:
    """Factor on the softmax scale of MLA: the square of YaRN's mscale_all_dim temperature, 1 where it is not set."""
    if rope.config.scaling != "yarn" or not rope.config.mscale_all_dim:
        return 1.0
    return yarn_mscale(rope.config.factor, rope.config.mscale_all_dim) ** 2


def rotate(
    x: Float[Array, "B T H D"], positions: Int[Array, "B T"], rope: Rope, *, magnitude: float = 1.0
) -> Float[Array, "B T H D"]:
    """Rotate all D = rope.dim channels of every head by the angle of its position.

    Pairs are (i, i + D/2) for half_split and (2i, 2i + 1) for interleaved. Computed in float32, returned in the dtype of `x`.
    """
    angles = positions[:, :, None, None].astype(jnp.float32) * inverse_frequencies(rope)
    cos, sin = jnp.cos(angles) * magnitude, jnp.sin(angles) * magnitude
    wide = x.astype(jnp.float32)
    if rope.layout == "half_split":
        a, b = jnp.split(wide, 2, axis=-1)
        turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    elif rope.layout == "interleaved":
        a, b = wide[..., 0::2], wide[..., 1::2]
        turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(x.shape)
    else:
        raise ValueError(f"rope layout is {rope.layout!r}; expected one of {', '.join(LAYOUTS)}.")
    return turned.astype(x.dtype)
