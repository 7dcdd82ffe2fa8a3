"""The kernel of the index scores in Mosaic GPU.

A program keeps a few queries, all heads of each, and walks over a part of the keys. Keys are the rows of every matmul and
(query, head) pairs its columns, so that the sum over heads stays in registers. One warpgroup copies keys, the others each take
`rows` of every step: while one weighs and adds up, the tensor cores work for another.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu
from jaxtyping import Array, Float, Int32

from pallas_kernels.common.chunks import pad_queries
from pallas_kernels.common.index_scores import Kind, finish, hidden_value
from pallas_kernels.common.mesh import vary_over, varying_axes
from pallas_kernels.tuning.tiles import PROCESSORS, WGMMA_COLUMNS, WarpgroupTiles

# Some of its names came after the oldest jax we support: what is read from it is not checked by type.
plgpu: Any = mosaic_gpu

COPYING_REGISTERS = 40
PROGRAMS = 4 * PROCESSORS


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static half of a call; a matmul takes `group` queries, a program `tiles_per_program` of the `n_tiles` of keys."""

    tiles: WarpgroupTiles
    group: int
    heads: int
    dim: int
    dtype: jnp.dtype
    n_keys: int
    n_tiles: int
    tiles_per_program: int
    kind: Kind

    @property
    def transforms(self) -> tuple[Any, ...]:
        """Layout of keys and queries in shared memory that wgmma wants."""
        swizzle = plgpu.find_swizzle(8 * self.dim * self.dtype.itemsize)
        return plgpu.TilingTransform((8, swizzle // self.dtype.itemsize)), plgpu.SwizzleTransform(swizzle)


def plan_of(q: Array, n_keys: int, tiles: WarpgroupTiles, kind: Kind) -> Plan:
    """The keys are cut so that few queries, as in decoding, keep every processor busy, too."""
    batch, n_queries, heads, dim = q.shape
    columns = max(1, WGMMA_COLUMNS // heads)
    group = min(tiles.block_q, 1 << (columns.bit_length() - 1))
    n_tiles = pl.cdiv(n_keys, tiles.block_k)
    parts = max(1, PROGRAMS // (batch * pl.cdiv(n_queries, tiles.block_q)))
    return Plan(tiles, group, heads, dim, q.dtype, n_keys, n_tiles, pl.cdiv(n_tiles, parts), kind)


def _seen_tiles(ranges: Sequence[tuple[Array, Array]], first: Array, last: Array, plan: Plan) -> tuple[Array, Array]:
    """Those of the tiles [first, last) that hold a key which some query sees."""
    low, high = jnp.int32(plan.n_keys), jnp.int32(0)
    for start, end in ranges:
        is_empty = start >= end
        low = jnp.minimum(low, jnp.where(is_empty, plan.n_keys, start))
        high = jnp.maximum(high, jnp.where(is_empty, 0, end))
    size = plan.tiles.block_k
    low = jnp.clip(low // size, first, last)
    return low, jnp.clip((high + size - 1) // size, low, last)


def _kernel(
    q_ref: Any,  # [B x T / group, group x H, D]: one axis less than a copy can have
    k_ref: Any,  # [B, S, D]
    weights_ref: Any,  # [B, T, H]
    start_ref: Any,  # [B, T]
    end_ref: Any,  # [B, T]
    scale_ref: Any,  # [B, P]
    out_ref: Any,  # [B, T, P]
    q_smem: Any,  # [block_q / group, group x H, D]
    weights_smem: Any,  # [block_q, H]
    has_arrived: Any,
    *,
    plan: Plan,
) -> None:
    tiles, rows, heads = plan.tiles, plan.tiles.rows, plan.heads
    batch, query_block, part = (lax.axis_index(name) for name in ("batch", "queries", "part"))
    warpgroup = lax.axis_index("warpgroup")
    first_query, groups = query_block * tiles.block_q, tiles.block_q // plan.group
    first = part * plan.tiles_per_program
    last = jnp.minimum(first + plan.tiles_per_program, plan.n_tiles)
    ranges = [(start_ref[batch, first_query + i], end_ref[batch, first_query + i]) for i in range(tiles.block_q)]
    low, high = _seen_tiles(ranges, first, last, plan)
    per_row = plgpu.Layout.WGMMA.reduce(1)

    def first_key(tile: Array) -> Array:
        return tile * tiles.block_k + warpgroup * rows

    def store(query: int, tile: Array, value: Array) -> None:
        out_ref[batch, first_query + query, pl.ds(first_key(tile), rows)] = value

    @pl.when(warpgroup == 0)
    def _() -> None:
        block = batch * (out_ref.shape[1] // tiles.block_q) + query_block
        plgpu.copy_gmem_to_smem(q_ref.at[pl.ds(block * groups, groups)], q_smem, has_arrived)
        plgpu.copy_gmem_to_smem(weights_ref.at[batch, pl.ds(first_query, tiles.block_q)], weights_smem, has_arrived)

    @pl.when(warpgroup < tiles.num_warpgroups)
    def _() -> None:
        @pl.loop(first, last)
        def _(tile: Array) -> None:
            @pl.when((tile < low) | (tile >= high))
            def _() -> None:
                nothing = plgpu.layout_cast(jnp.full((rows,), hidden_value(plan.kind), jnp.float32), per_row)
                for query in range(tiles.block_q):
                    store(query, tile, nothing)

        plgpu.barrier_wait(has_arrived)

    def step(indices: tuple[Array], k_smem: Any) -> None:
        tile = low + indices[0]
        keys = k_smem.at[pl.ds(warpgroup * rows, rows)]
        position = first_key(tile) + lax.broadcasted_iota(jnp.int32, (rows,), 0)
        scale = plgpu.load(scale_ref.at[batch, pl.ds(first_key(tile), rows)], layout=per_row, optimized=False)
        for number in range(groups):

            def multiply(sums_ref: Any, number: int = number) -> Array:
                plgpu.wgmma(sums_ref, keys, q_smem.at[number].T)
                return sums_ref[...]

            products = pl.run_scoped(multiply, plgpu.ACC((rows, plan.group * heads), jnp.float32))
            for column in range(plan.group):
                query = number * plan.group + column
                of_query = products[:, column * heads : (column + 1) * heads]
                weights = plgpu.load(weights_smem.at[query], layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)
                total = (jnp.maximum(of_query, 0.0) * lax.broadcast_in_dim(weights, (rows, heads), (1,))).sum(1) * scale
                start, end = ranges[query]
                is_visible = (position >= start) & (position < end)
                store(query, tile, jnp.where(is_visible, finish(plan.kind, total), hidden_value(plan.kind)))

    block = plgpu.BlockSpec((tiles.block_k, plan.dim), lambda i: (low + i, 0), transforms=plan.transforms)
    plgpu.emit_pipeline_warp_specialized(
        step,
        grid=(high - low,),
        in_specs=[block],
        memory_registers=COPYING_REGISTERS,
        max_concurrent_steps=tiles.num_stages,
        num_compute_wgs=tiles.num_warpgroups,
        wg_axis="warpgroup",
    )(k_ref.at[batch])


def head_sums(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S D"],
    weights: Float[Array, "B T H"],
    start: Int32[Array, "B T"],
    end: Int32[Array, "B T"],
    k_scale: Float[Array, "B S"],
    *,
    kind: Kind,
    tiles: WarpgroupTiles,
    interpret: bool,
) -> Float[Array, "B T P"]:
    """k_scale * sum_h weights * relu(q . k) for the keys in [start, end) of every query, T x S elements.

    Args:
        start, end: within [0, S].

    Returns:
        float32; P is S rounded up to whole steps of keys; -inf outside the range and beyond S.
    """
    (batch, n_queries), n_keys = q.shape[:2], k.shape[1]
    # TMA cuts keys into the tiles of shared memory, which are eight high; the rest of a step it fills with zeros.
    k = jnp.pad(k, ((0, 0), (0, -n_keys % 8), (0, 0))) if n_keys % 8 else k
    plan = plan_of(q, n_keys, tiles, kind)
    blocks = pl.cdiv(n_queries, tiles.block_q)
    length, width = blocks * tiles.block_q, plan.n_tiles * tiles.block_k
    if length > n_queries:
        q, weights, start, end = pad_queries((q, weights, start, end), length)
    columns = plan.group * plan.heads
    call = plgpu.kernel(
        functools.partial(_kernel, plan=plan),
        out_type=jax.ShapeDtypeStruct((batch, length, width), jnp.float32),
        scratch_types={
            "q_smem": plgpu.SMEM((tiles.block_q // plan.group, columns, plan.dim), q.dtype, transforms=plan.transforms),
            "weights_smem": plgpu.SMEM((tiles.block_q, plan.heads), jnp.float32),
            "has_arrived": plgpu.Barrier(num_arrivals=2),
        },
        grid=(batch, blocks, pl.cdiv(plan.n_tiles, plan.tiles_per_program)),
        grid_names=("batch", "queries", "part"),
        num_threads=tiles.num_warpgroups + 1,
        thread_name="warpgroup",
        # Threads read nothing that they write: only copies and products need barriers, and those have their own.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        kernel_name=f"mosaic_{kind}",
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )
    scale = jnp.pad(k_scale, ((0, 0), (0, width - n_keys)))
    out = call(q.reshape(batch * length // plan.group, columns, plan.dim), k, weights, start, end, scale)
    return vary_over(varying_axes(q), out[:, :n_queries])
