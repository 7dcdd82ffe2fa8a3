"""Gradients of Pallas sparse attention: q per block of heads; k and v per tile of selected keys, summed over all heads.

A key's gradient is the sum over every query that selected it. It goes to memory once per (query, key), after all heads of the
group are summed: by atomic addition, or in a fixed order through sorted contributions.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array

from pallas_kernels.common import gpu_sums as sums_by_key
from pallas_kernels.common import gpu_tiles as tiling
from pallas_kernels.common.chunks import rows_per_chunk, scan_queries
from pallas_kernels.common.gpu_tiles import LOG2_E, Problem, Refs, Tiles


class Saved(NamedTuple):
    """Per query: what the gradient needs. `delta` is d_out . out - d_lse."""

    q: Array
    d_out: Array
    lse: Array
    delta: Array
    indices: Array


def _gradient_inputs(arrays: Saved, k: Array, v: Array | None, tiles: Tiles) -> dict[str, Array]:
    refs = tiling.common_inputs(arrays.q, k, v, arrays.indices, tiles)
    return {**refs, "d_out": arrays.d_out, "lse": arrays.lse, "delta": arrays.delta}


def _query_kernel(refs: Refs, dq_ref: Any, *, problem: Problem, tiles: Tiles) -> None:
    blocks = problem.head_blocks(tiles)
    group, number = lax.div(pl.program_id(1), blocks), lax.rem(pl.program_id(1), blocks)
    heads = tiling.head_block(problem, group, number, tiles.block_h)
    q = tiling.load_heads(refs["q"], heads, problem.key_columns)
    d_out = tiling.load_heads(refs["d_out"], heads, problem.value_columns)
    lse, delta = tiling.load_per_head(refs["lse"], heads), tiling.load_per_head(refs["delta"], heads)

    def body(i: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        tile = tiling.load_keys(refs, problem, group, i, tiles.block_k)
        logits = tiling.sum_of_products(q, tile.keys, problem.softmax_scale * LOG2_E)
        probability = jnp.exp2(logits - lse[:, None] * LOG2_E)
        d_probability = tiling.sum_of_products(d_out, tile.values)
        d_logits = probability * (d_probability - delta[:, None]) * problem.softmax_scale
        d_logits = jnp.where(tile.valid[None], d_logits, 0.0).astype(q[0].dtype)
        return tuple(x + tiling.multiply(d_logits, key) for x, key in zip(sums, tile.keys, strict=True))

    start = tuple(jnp.zeros((tiles.block_h, piece.size), jnp.float32) for piece in problem.key_columns)
    sums = lax.fori_loop(0, pl.cdiv(refs["length"][0], tiles.block_k), body, start)
    for piece, x in zip(problem.key_columns, sums, strict=True):
        tiling.store_rows(dq_ref, heads.rows, piece, x, valid=heads.valid)


def query_gradient(arrays: Saved, k: Array, v: Array | None, problem: Problem, tiles: Tiles) -> Array:
    """Gradient of q."""
    refs = _gradient_inputs(arrays, k, v, tiles)
    return tiling.call(
        functools.partial(_query_kernel, problem=problem, tiles=tiles),
        problem,
        tiles,
        (refs,),
        grid=(arrays.q.shape[0], problem.groups * problem.head_blocks(tiles)),
        in_specs=[tiling.specs(refs)],
        out_specs=tiling.per_query(arrays.q),
        out_shape=jax.ShapeDtypeStruct(arrays.q.shape, arrays.q.dtype),
        name="sparse_attention_d_query",
    )


def _tile_gradients(
    refs: Refs, problem: Problem, tiles: Tiles, group: Array, number: Array
) -> tuple[tiling.KeyTile, list[Array], list[Array]]:
    """(tile, gradients of its keys, of its values) of key tile `number`, summed over the heads of the group.

    Where values lead the keys, their gradient is in the keys' and the last list is empty.
    """
    tile = tiling.load_keys(refs, problem, group, number, tiles.block_k)
    n_keys = len(problem.key_columns)

    def body(number: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        heads = tiling.head_block(problem, group, number, tiles.block_h)
        q = tiling.load_heads(refs["q"], heads, problem.key_columns)
        d_out = tiling.load_heads(refs["d_out"], heads, problem.value_columns)
        lse, delta = tiling.load_per_head(refs["lse"], heads), tiling.load_per_head(refs["delta"], heads)
        logits = tiling.sum_of_products(q, tile.keys) * (problem.softmax_scale * LOG2_E)
        probability = jnp.where(tile.valid[None], jnp.exp2(logits - lse[:, None] * LOG2_E), 0.0)
        d_probability = tiling.sum_of_products(d_out, tile.values)
        d_logits = (probability * (d_probability - delta[:, None]) * problem.softmax_scale).astype(q[0].dtype)
        probability = probability.astype(d_out[0].dtype)
        # The left side is transposed, not the logits: with keys as rows, 32 of them spill registers at 576 channels.
        dk = [x + tiling.multiply(d_logits, y, trans_a=True) for x, y in zip(sums[:n_keys], q, strict=True)]
        dv = dk if problem.is_shared else sums[n_keys:]
        dv = [x + tiling.multiply(probability, y, trans_a=True) for x, y in zip(dv, d_out, strict=False)]
        return (*dv, *dk[len(dv) :]) if problem.is_shared else (*dk, *dv)

    columns = problem.key_columns + (() if problem.is_shared else problem.value_columns)
    start = tuple(jnp.zeros((tiles.block_k, piece.size), jnp.float32) for piece in columns)
    sums = lax.fori_loop(0, problem.head_blocks(tiles), body, start)
    return tile, list(sums[:n_keys]), list(sums[n_keys:])


def _key_kernel(refs: Refs, *outputs: Any, problem: Problem, tiles: Tiles, is_atomic: bool) -> None:
    """One tile of keys: adds its gradients to the totals, or writes them as one row per slot."""
    outputs = outputs[-1:] if problem.is_shared else outputs[-2:]
    group, number = pl.program_id(1), pl.program_id(2)
    first_row = (pl.program_id(0) * pl.num_programs(2) + number) * tiles.block_k

    @pl.when(number * tiles.block_k < refs["length"][0])
    def _() -> None:
        tile, *gradients = _tile_gradients(refs, problem, tiles, group, number)
        if is_atomic:
            rows = jnp.where(tile.valid, tile.rows, outputs[0].shape[0] - sums_by_key.SPARE_ROWS)
        else:
            rows = first_row + jnp.arange(tiles.block_k, dtype=jnp.int32)
        for (ref, columns), sums in zip(sums_by_key.with_columns(problem, outputs), gradients, strict=False):
            for piece, x in zip(columns, sums, strict=True):
                address = tiling.full_address(rows, piece, group * tiling.padded_width(columns))
                sums_by_key.add_or_store(ref, address, x, is_atomic=is_atomic)


def _widths(problem: Problem) -> list[int]:
    """Channels of a row of each gradient array, all groups."""
    columns = [problem.key_columns] if problem.is_shared else [problem.key_columns, problem.value_columns]
    return [problem.groups * tiling.padded_width(pieces) for pieces in columns]


def key_gradients_atomic(
    arrays: Saved, k: Array, v: Array | None, problem: Problem, tiles: Tiles
) -> tuple[Array, Array | None]:
    """(dk, dv) in float32 by atomic addition: the order of the sums, and so their last bits, differ from run to run."""
    refs = _gradient_inputs(arrays, k, v, tiles)
    zeros = [jnp.zeros_like(k, jnp.float32, (k.shape[0] + sums_by_key.SPARE_ROWS, width)) for width in _widths(problem)]
    totals = tiling.call(
        functools.partial(_key_kernel, problem=problem, tiles=tiles, is_atomic=True),
        problem,
        tiles,
        (refs, *zeros),
        grid=(arrays.q.shape[0], problem.groups, refs["indices"].shape[1] // tiles.block_k),
        in_specs=[tiling.specs(refs), *map(tiling.whole, zeros)],
        out_specs=[tiling.whole(x) for x in zeros],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in zeros],
        input_output_aliases={len(refs) + i: i for i in range(len(zeros))},
        name="sparse_attention_d_key",
    )
    return sums_by_key.unpad(totals, k.shape[0], problem)


def key_gradients_in_order(
    arrays: Saved, k: Array, v: Array | None, problem: Problem, tiles: Tiles, budget_bytes: int
) -> tuple[Array, Array | None]:
    """(dk, dv) in float32, with the same bits in every run.

    Chunks of queries write what each selected key gets from them; sorted by key, each key's contributions are added up by one
    program. A chunk holds `budget_bytes` of contributions.
    """
    widths, n_keys = _widths(problem), k.shape[0]
    slots = pl.cdiv(arrays.indices.shape[1], tiles.block_k) * tiles.block_k

    def step(totals: tuple[Array, ...], chunk: Saved) -> tuple[tuple[Array, ...], tuple[()]]:
        chunk = jax.tree.map(lambda x: x[0], chunk)
        refs = _gradient_inputs(chunk, k, v, tiles)
        size = chunk.q.shape[0]
        shapes = [jax.ShapeDtypeStruct((size * slots, width), jnp.float32) for width in widths]
        parts = tiling.call(
            functools.partial(_key_kernel, problem=problem, tiles=tiles, is_atomic=False),
            problem,
            tiles,
            (refs,),
            grid=(size, problem.groups, slots // tiles.block_k),
            in_specs=[tiling.specs(refs)],
            out_specs=[tiling.whole(x) for x in shapes],
            out_shape=shapes,
            name="sparse_attention_contributions",
        )
        return sums_by_key.add_in_order(totals, parts, refs["indices"], problem), ()

    per_query = 4 * slots * sum(widths)
    block_q = rows_per_chunk(budget_bytes, per_query, smallest=1, largest=arrays.q.shape[0])
    zeros = tuple(jnp.zeros_like(k, jnp.float32, (n_keys, width)) for width in widths)
    totals, _ = scan_queries(step, zeros, jax.tree.map(lambda x: x[None], arrays), block_q)
    return sums_by_key.unpad(totals, n_keys, problem)
