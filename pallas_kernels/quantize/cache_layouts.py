"""Byte layouts of quantised cache rows: a latent with its rotated key, and plain vectors such as index keys.

A row is uint8 and little-endian, so that a pool of rows is one array whose parts stay together in memory:

    latent:  C e4m3 values | one float32 scale per 128 of them (the last tile may be partial) | R bfloat16 rotated channels
    vector:  D e4m3 values | one float32 scale

656 bytes for the 512 + 64 channels of DeepSeek-V3.2, 132 for its index keys of 128 channels.

Source: FlashMLA README, "FP8 KV cache"; DeepSeek-V3.2-Exp inference/model.py.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from pallas_kernels.common.checks import check_array, check_float, check_shape, check_vectors, checked, is_whole, shown
from pallas_kernels.quantize import reference

TILE = 128
"""Latent channels that share a scale."""


def latent_row_bytes(latent_dim: int, rope_dim: int) -> int:
    """Bytes of a packed latent row."""
    return latent_dim + 4 * -(-latent_dim // TILE) + 2 * rope_dim


def vector_row_bytes(dim: int) -> int:
    """Bytes of a packed vector."""
    return dim + 4


def _check_rows(op: str, rows: Any) -> None:
    check_array(op, rows=rows)
    if rows.dtype != jnp.uint8 or not rows.ndim:
        raise ValueError(f"{op}: rows has dtype {rows.dtype} and shape {list(rows.shape)}; expected uint8 [..., bytes].")


def _check_latent(latent, k_rope, **_):
    op = "pack_latent_fp8"
    check_vectors(op, latent=latent)
    check_float(op, k_rope=k_rope)
    check_shape(op, "k_rope", k_rope, (*latent.shape[:-1], None), "[... of latent, rotated channels]")


@checked(_check_latent)
def pack_latent_fp8(
    latent: Float[Array, "*N C"], k_rope: Float[Array, "*N R"], *, power_of_two_scales: bool = True
) -> UInt8[Array, "*N bytes"]:
    """One row of `latent_row_bytes(C, R)` per token; the rotated channels are only rounded to bfloat16.

    Args:
        latent: finite; each tile of 128 channels is scaled by its largest magnitude.
        k_rope: finite.
        power_of_two_scales: round scales up to a power of two (ue8m0); readers multiply by whatever is stored.

    Raises:
        ValueError: when they are no arrays of floats, or of other tokens.
    """
    tiles = _tiled(latent)
    scales = reference.fp8_scales(tiles, power_of_two=power_of_two_scales)
    values = reference.fp8_values(tiles, scales).reshape(*latent.shape[:-1], -1)[..., : latent.shape[-1]]
    return jnp.concatenate([_as_bytes(values), _as_bytes(scales), _as_bytes(k_rope.astype(jnp.bfloat16))], axis=-1)


def _check_latent_rows(rows, latent_dim):
    _check_rows("unpack_latent_fp8", rows)
    if not is_whole(latent_dim) or latent_dim < 1:
        raise ValueError(f"unpack_latent_fp8: latent_dim is {shown(latent_dim)}; expected a positive whole number.")


@checked(_check_latent_rows)
def unpack_latent_fp8(rows: UInt8[Array, "*N bytes"], latent_dim: int) -> tuple[Float[Array, "*N C"], Float[Array, "*N R"]]:
    """(latent, k_rope) of packed rows, float32.

    Raises:
        ValueError: when the rows are no uint8 array or too short for `latent_dim` channels, or what is left over is no
            bfloat16 array.
    """
    n_tiles = -(-latent_dim // TILE)
    rope_bytes = rows.shape[-1] - latent_dim - 4 * n_tiles
    if rope_bytes < 0 or rope_bytes % 2:
        raise ValueError(
            f"unpack_latent_fp8: rows have {rows.shape[-1]} bytes; expected {latent_row_bytes(latent_dim, 0)} plus two per "
            f"rotated channel for latent_dim {shown(latent_dim)}. Check model.attention.kv_lora_rank."
        )
    values = _tiled(_from_bytes(rows[..., :latent_dim], jnp.float8_e4m3fn).astype(jnp.float32))
    scales = _from_bytes(rows[..., latent_dim : latent_dim + 4 * n_tiles], jnp.float32)
    latent = (values * scales[..., None]).reshape(*rows.shape[:-1], n_tiles * TILE)[..., :latent_dim]
    return latent, _from_bytes(rows[..., latent_dim + 4 * n_tiles :], jnp.bfloat16).astype(jnp.float32)


def _check_vectors(x, **_):
    check_vectors("pack_vector_fp8", x=x)


@checked(_check_vectors)
def pack_vector_fp8(x: Float[Array, "*N D"], *, power_of_two_scales: bool = True) -> UInt8[Array, "*N bytes"]:
    """One row of `vector_row_bytes(D)` per vector, as `quantize_fp8` rounds it; `x` must be finite.

    Raises:
        ValueError: when `x` is no array of floats, or its vectors have no channel.
    """
    scales = reference.fp8_scales(x, power_of_two=power_of_two_scales)
    return jnp.concatenate([_as_bytes(reference.fp8_values(x, scales)), _as_bytes(scales[..., None])], axis=-1)


@checked(functools.partial(_check_rows, "unpack_vector_fp8"))
def unpack_vector_fp8(rows: UInt8[Array, "*N bytes"]) -> Float[Array, "*N D"]:
    """The vectors of packed rows, float32.

    Raises:
        ValueError: when the rows are no uint8 array, or a row has no room for a channel and a scale.
    """
    if rows.shape[-1] <= 4:
        raise ValueError(f"unpack_vector_fp8: rows have {rows.shape[-1]} bytes; expected more than the 4 of the scale.")
    values, scales = _from_bytes(rows[..., :-4], jnp.float8_e4m3fn), _from_bytes(rows[..., -4:], jnp.float32)
    return values.astype(jnp.float32) * scales


def _tiled(x: Float[Array, "*N C"]) -> Float[Array, "*N tiles D"]:
    """Tiles of 128 channels; zeros fill the last one."""
    padding = -x.shape[-1] % TILE
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, padding)])
    return padded.reshape(*x.shape[:-1], padded.shape[-1] // TILE, TILE)


def _as_bytes(x: Float[Array, "*N D"]) -> UInt8[Array, "*N bytes"]:
    octets = jax.lax.bitcast_convert_type(x, jnp.uint8)
    return octets if octets.ndim == x.ndim else octets.reshape(*x.shape[:-1], -1)


def _from_bytes(octets: UInt8[Array, "*N bytes"], dtype: jnp.dtype | type) -> Float[Array, "*N D"]:
    size = jnp.dtype(dtype).itemsize
    grouped = octets if size == 1 else octets.reshape(*octets.shape[:-1], octets.shape[-1] // size, size)
    return jax.lax.bitcast_convert_type(grouped, dtype)
