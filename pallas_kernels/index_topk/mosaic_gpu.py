"""Index scores with Hopper's own matmuls (wgmma) and copies (TMA), through Mosaic GPU: bf16, fp16 and e4m3 as it is."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import tuning
from pallas_kernels.common import gpu_tiles as tiling
from pallas_kernels.common.dispatch import traced_device_kind, traced_platform
from pallas_kernels.common.index_scores import Kind, index_problem
from pallas_kernels.common.numerics import clamped
from pallas_kernels.index_topk import pallas_gpu
from pallas_kernels.tuning.kernels import SHARED_BYTES
from pallas_kernels.tuning.tiles import WarpgroupTiles
from pallas_kernels.types import IndexHeads, Visible

HOPPER = ("H100", "H200", "H800", "H20", "GH200")
MOST_COLUMNS = 256
LEAST_JAX = (0, 11, 2)


def warpgroup_tiles(queries: int, heads: int, dim: int, itemsize: int) -> WarpgroupTiles:
    """Block sizes for an H200: none spills registers when compiled for sm_90a; none has been timed.

    A matmul of e4m3 should take about as long as weighing it, one of bfloat16 twice as long: four warpgroups share a step, or
    two, one multiplying while another weighs; with four, more than 64 weights for each would not fit in registers.
    As many queries as fit beside two stages of keys, up to 8, as each key is read once for all of them; then more stages.

    Raises:
        NotImplementedError: more heads and channels than shared memory holds.
    """
    shared = SHARED_BYTES - 4096
    tiles = WarpgroupTiles(num_warpgroups=4 if itemsize == 1 and heads <= 64 else 2)
    query, step = heads * (dim * itemsize + 4), tiles.block_k * dim * itemsize
    if query + step > shared:
        raise NotImplementedError(
            f"mosaic has no room for {heads} heads of {dim} channels of {itemsize} bytes and a step of keys in shared memory. "
            "Pass implementation='pallas'."
        )
    block_q = max(1, min(tiles.block_q, (shared - 2 * step) // query, queries))
    block_q = 1 << (block_q.bit_length() - 1)
    num_stages = max(1, min(4, (shared - block_q * query) // step))
    return dataclasses.replace(tiles, block_q=block_q, num_stages=num_stages)


def check_call(op: str, index: IndexHeads, k_scale: Array | None, interpret: bool | None) -> None:
    """Whether the kernel covers a call of `op`, here.

    Raises:
        NotImplementedError: an older jax; no Hopper GPU, unless `interpret` is given; dtypes and sizes that it lacks.
    """
    if jax.__version_info__ < LEAST_JAX:
        raise NotImplementedError(
            f"{op}: mosaic needs jax {'.'.join(map(str, LEAST_JAX))} or later, as Mosaic GPU changed; this is "
            f"{jax.__version__}. Update jax, or pass implementation='pallas'."
        )
    device = traced_device_kind() if traced_platform() == "gpu" else traced_platform()
    if interpret is None and not any(name in device for name in HOPPER):
        raise NotImplementedError(
            f"{op}: mosaic runs on GPUs of the Hopper generation; this is {device!r}. Pass implementation='pallas' or 'xla'."
        )
    check = functools.partial(tiling.check_dtypes, op, implementation="mosaic")
    check("index.q and index.k", index.q, index.k, allowed=("bfloat16", "float16", "float8_e4m3fn"))
    check("index.weights (and k_scale)", index.weights, k_scale, allowed=("float32",))
    (heads, dim), itemsize = index.q.shape[2:], index.q.dtype.itemsize
    if heads % 8 or heads > MOST_COLUMNS:
        raise NotImplementedError(
            f"{op}: mosaic needs a multiple of 8 heads and at most {MOST_COLUMNS}, which are the columns of its "
            f"products; got {heads}. Pass implementation='pallas'."
        )
    if dim * itemsize % 32:
        raise NotImplementedError(
            f"{op}: mosaic needs channels that fill a multiple of 32 bytes; got {dim} of {itemsize} bytes each. Pass "
            "implementation='pallas'."
        )


def mosaic_scores(
    index: IndexHeads,
    visible: Visible,
    k_scale: Array | None,
    kind: Kind,
    interpret: bool | None,
    tiles: WarpgroupTiles | None,
) -> Array:
    """As `pallas_gpu.kernel_scores`, of a call that `check_call` lets pass."""
    from pallas_kernels.index_topk import mosaic_kernels

    (batch, queries, heads, dim), n_keys = index.q.shape, index.k.shape[1]
    if tiles is None:
        problem = index_problem(index.q, bool(interpret))
        shape = tiling.call_shape(problem, index.q.dtype, queries=batch * queries, keys=n_keys)
        tiles = tuning.choose_tiles(f"mosaic_{kind}", shape, warpgroup_tiles(queries, heads, dim, index.q.dtype.itemsize))
    scale = jnp.ones(index.k.shape[:2], jnp.float32) if k_scale is None else k_scale
    visible = clamped(visible, n_keys)
    return mosaic_kernels.head_sums(*index, *visible, scale, kind=kind, tiles=tiles, interpret=bool(interpret))


def index_scores(
    index: IndexHeads,
    visible: Visible,
    *,
    k_scale: Float[Array, "B S"] | None = None,
    interpret: bool | None = None,
    tiles: WarpgroupTiles | None = None,
) -> Float[Array, "B T S"]:
    """The whole score matrix; its gradient is computed by XLA.

    e4m3 is multiplied as such. Hopper adds up products of e4m3 with fewer bits than float32 has: scores differ from those of
    other implementations by more than a rounding of float32, and keys whose scores are that near may be selected otherwise.

    Args:
        interpret: True runs the kernel without a GPU; it takes a thread of XLA for each warpgroup, and with too few, as on a
            machine with two cores, waits forever: the environment variable NPROC sets their number. False compiles it for
            the device that is traced for, None only if that is a Hopper GPU.
        tiles: block sizes; None takes those of the tuning table, or else `warpgroup_tiles`.

    Raises:
        NotImplementedError: a jax, device, dtype, number of heads or of channels that the kernel does not cover.
    """
    check_call("index_scores", index, k_scale, interpret)
    options: dict[str, Any] = {"k_scale": k_scale, "interpret": interpret, "tiles": tiles}
    return pallas_gpu.index_scores(index, visible, scores=mosaic_scores, **options)


def index_topk(
    index: IndexHeads,
    visible: Visible,
    *,
    topk: int,
    k_scale: Float[Array, "B S"] | None = None,
    interpret: bool | None = None,
    **options: Any,
) -> Int32[Array, "B T {topk}"]:
    """Canonical selection over these scores, as `pallas_gpu.index_topk`, which takes the same `options`."""
    check_call("index_topk", index, k_scale, interpret)
    options |= {"k_scale": k_scale, "interpret": interpret}
    return pallas_gpu.index_topk(index, visible, topk=topk, scores=mosaic_scores, **options)
