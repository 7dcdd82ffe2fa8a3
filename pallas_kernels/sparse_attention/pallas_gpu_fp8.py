"""Sparse attention in Pallas over a pool of packed fp8 rows, dequantised as they are gathered."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int32, UInt8

from pallas_kernels import tuning
from pallas_kernels.common import gpu_tiles as tiling
from pallas_kernels.common.gpu_tiles import Columns, KeyTile, Problem, Refs, Tiles
from pallas_kernels.quantize.cache_layouts import TILE
from pallas_kernels.sparse_attention import pallas_gpu
from pallas_kernels.sparse_attention.pallas_gpu_tiles import default_splits
from pallas_kernels.tuning.kernels import SHARED_BYTES
from pallas_kernels.tuning.tiles import SMALLEST_SIDE, SplitTiles


def sparse_attention_fp8(
    q: Float[Array, "B T H Dk"],
    pool: UInt8[Array, "P bytes"],
    slots: Int32[Array, "B T K"],
    *,
    softmax_scale: float,
    latent_dim: int,
    tiles: Tiles | None = None,
    splits: int | None = None,
    interpret: bool | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
    """(out, lse); keys are dequantised to the dtype of q, matmuls accumulate in float32.

    Args:
        tiles, splits: block sizes and programs per query; None takes the table's or
            `fp8_forward_tiles`, and `pallas_gpu_tiles.default_splits`.
        interpret: run the kernel without a GPU; None does so on CPU.

    Raises:
        NotImplementedError: a dtype, device or number of channels that the kernel does not cover.
    """
    op = "sparse_attention_fp8"
    tiling.check_dtypes(op, "q", q)
    interpret = tiling.is_interpreted(op) if interpret is None else interpret
    if latent_dim % 4 or pool.shape[1] % 4:
        raise NotImplementedError(
            f"{op}: pallas reads scales as whole words; it needs latent_dim ({latent_dim}) and the bytes of a row "
            f"({pool.shape[1]}) to be multiples of 4. Pass implementation='xla'."
        )
    if 0 in (q.size, *pool.shape, slots.shape[2]):
        return jnp.zeros((*q.shape[:3], latent_dim), q.dtype), jnp.full(q.shape[:3], -jnp.inf, jnp.float32)
    batch, length, heads, dim = q.shape
    problem = Problem(
        heads, 1, dim, latent_dim, is_shared=True, softmax_scale=float(softmax_scale), interpret=interpret, piece=TILE
    )
    if tiles is None:
        shape = tiling.call_shape(problem, q.dtype, queries=batch * length, keys=pool.shape[0], topk=slots.shape[2])
        tiles = tuning.choose_tiles("sparse_attention_fp8_forward", shape, fp8_forward_tiles(problem, q.dtype))
    splits = default_splits(problem, tiles, batch * length, slots.shape[2]) if splits is None else splits
    slots = jnp.where((slots >= 0) & (slots < pool.shape[0]), slots, -1).reshape(batch * length, slots.shape[2])
    out, lse = pallas_gpu.forward(
        q.reshape(batch * length, heads, dim),
        _views(pool),
        slots,
        problem,
        tiles,
        splits,
        load=functools.partial(_load_keys, dtype=q.dtype),
        name="sparse_attention_fp8_forward",
    )
    return out.reshape(batch, length, heads, latent_dim), lse.reshape(batch, length, heads)


def fp8_forward_tiles(problem: Problem, dtype: jnp.dtype) -> SplitTiles:
    """Block sizes for an H200: none spills registers when compiled for sm_90a; none has been timed."""
    most = max(SMALLEST_SIDE, min(64, 1 << (problem.heads - 1).bit_length()))
    block_h, block_k = (most, 32) if dtype.itemsize == 2 else (16, 16)
    row_bytes = tiling.padded_width(problem.key_columns) * dtype.itemsize

    # Queries, two tiles of keys, and one as it is read; with few heads nothing of that is in shared memory.
    while block_h > SMALLEST_SIDE and (block_h + 2.5 * block_k) * row_bytes + tiling.OTHER_BYTES > SHARED_BYTES:
        block_h //= 2
    return SplitTiles(block_h, block_k)


def _views(pool: UInt8[Array, "P bytes"]) -> dict[str, Array]:
    """The pool as fp8, float32 and bfloat16 arrays; on a GPU the three are the same memory."""
    rows, size = pool.shape
    tiling.check_offsets("sparse_attention_fp8", "the pool", pool)

    def view(dtype: Any) -> Array:
        width = jnp.dtype(dtype).itemsize
        octets = pool if width == 1 else pool.reshape(rows, size // width, width)
        return jax.lax.bitcast_convert_type(octets, dtype)

    return {"values": view(jnp.float8_e4m3fn), "scales": view(jnp.float32), "rope": view(jnp.bfloat16)}


def _load_keys(refs: Refs, problem: Problem, group: Array | int, number: Array, block_k: int, *, dtype: jnp.dtype) -> KeyTile:
    """As `gpu_tiles.load_keys`; a piece of the latent lies within one tile of channels that share a scale."""
    rows, valid = tiling.load_slots(refs, number, block_k)
    n_values = len(problem.value_columns)
    n_tiles = -(-problem.width // TILE)

    def latent(piece: Columns) -> Array:
        values = tiling.load_rows(refs["values"], rows, piece, valid=valid).astype(jnp.float32)
        place = jnp.full((block_k,), problem.width // 4 + piece.start // TILE, jnp.int32)
        scale = plt.load(refs["scales"].at[rows, place], mask=valid, other=0.0)
        return (values * scale[:, None]).astype(dtype)

    def rope(piece: Columns) -> Array:
        start = (problem.width + 4 * n_tiles) // 2 + piece.start - problem.width
        return tiling.load_rows(refs["rope"], rows, piece._replace(start=start), valid=valid).astype(dtype)

    keys = [latent(x) for x in problem.key_columns[:n_values]] + [rope(x) for x in problem.key_columns[n_values:]]
    return KeyTile(keys, keys[:n_values], rows, valid)
