"""Gradients of the index scores in Pallas for NVIDIA GPUs: from dL/dscore to the indexer's queries, head weights and keys."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int32

from pallas_kernels import tuning
from pallas_kernels.common import gpu_sums as sums_by_key
from pallas_kernels.common import gpu_tiles as tiling
from pallas_kernels.common.chunks import rows_per_chunk, scan_queries
from pallas_kernels.common.gpu_tiles import Problem, Refs
from pallas_kernels.tuning.tiles import SMALLEST_SIDE, Tiles
from pallas_kernels.types import IndexHeads, Visible

MOST_HEADS = 128
"""Index heads whose gradient one program holds."""


def index_gradient_tiles(problem: Problem, dtype: jnp.dtype) -> Tiles:
    """Block sizes for an H200: none spills registers when compiled for sm_90a; none has been timed.

    Raises:
        NotImplementedError: more heads than a program holds.
    """
    if problem.heads > MOST_HEADS:
        raise NotImplementedError(
            f"indexer_kl: pallas holds the gradient of at most {MOST_HEADS} index heads, not {problem.heads}. "
            "Pass implementation='xla'."
        )
    block_h = max(SMALLEST_SIDE, 1 << (problem.heads - 1).bit_length())
    return Tiles(block_h, 32 if dtype.itemsize == 2 else 16, 8)


def index_key_gradient_tiles(problem: Problem, dtype: jnp.dtype) -> Tiles:
    """As `index_gradient_tiles`, for programs that hold keys: in half precision 64 of them make every matmul a warpgroup's."""
    tiles = index_gradient_tiles(problem, dtype)
    is_small = dtype.itemsize == 2 and tiles.block_h <= 64 and tiling.padded_width(problem.key_columns) <= 128
    return dataclasses.replace(tiles, block_k=64, num_warps=4, num_stages=3) if is_small else tiles


def _products_and_gradient(
    keys: list[Array], q: list[Array], weights: Array, d_scores: Array, valid: Array, problem: Problem
) -> tuple[Array, Array]:
    """(d_products [keys, heads], gradient of the weights [heads]) of one query and a tile of keys."""
    products = tiling.sum_of_products(keys, q)
    d_scores, valid = d_scores[:, None], valid[:, None]
    d_weights = jnp.where(valid, d_scores * tiling.relu(products, problem), 0.0).sum(0)
    return jnp.where(valid & (products > 0.0), d_scores * weights[None], 0.0), d_weights


def _add_products(sums: Sequence[Array], a: Array, b: Sequence[Array], **transposed: bool) -> list[Array]:
    """sums + a @ b, by pieces."""
    return [x + tiling.multiply(a.astype(y.dtype), y, **transposed) for x, y in zip(sums, b, strict=True)]


def _zeros(rows: int, problem: Problem) -> list[Array]:
    return [jnp.zeros((rows, piece.size), jnp.float32) for piece in problem.key_columns]


def _selected_kernel(refs: Refs, *outputs: Any, problem: Problem, tiles: Tiles, is_atomic: bool) -> None:
    """One query: gradients of q and the weights over all its slots; those of the keys as they come, or one row per slot."""
    dq_ref, d_weights_ref, dk_ref = outputs[-3:]
    heads = tiling.head_block(problem, 0, 0, tiles.block_h)
    q, weights = tiling.load_heads(refs["q"], heads, problem.key_columns), tiling.load_per_head(refs["weights"], heads)
    first_slot = pl.program_id(0) * refs["indices"].shape[0]

    def body(i: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        d_weights, *dq = carry
        tile = tiling.load_keys(refs, problem, 0, i, tiles.block_k)
        d_scores = refs["d_scores"][pl.ds(i * tiles.block_k, tiles.block_k)]
        d_products, new = _products_and_gradient(tile.keys, q, weights, d_scores, tile.valid, problem)
        if is_atomic:
            rows = jnp.where(tile.valid, tile.rows, dk_ref.shape[0] - sums_by_key.SPARE_ROWS)
        else:
            rows = first_slot + i * tiles.block_k + jnp.arange(tiles.block_k, dtype=jnp.int32)
        for piece, dk in zip(problem.key_columns, _add_products(_zeros(tiles.block_k, problem), d_products, q), strict=True):
            sums_by_key.add_or_store(dk_ref, tiling.full_address(rows, piece), dk, is_atomic=is_atomic)
        return d_weights + new, *_add_products(dq, d_products, tile.keys, trans_a=True)

    start = jnp.zeros((tiles.block_h,), jnp.float32), *_zeros(tiles.block_h, problem)
    d_weights, *dq = lax.fori_loop(0, pl.cdiv(refs["length"][0], tiles.block_k), body, start)
    _store_query(dq_ref, d_weights_ref, heads, problem, dq, d_weights)


def _store_query(
    dq_ref: Any, d_weights_ref: Any, heads: tiling.HeadBlock, problem: Problem, dq: Sequence[Array], d_weights: Array
) -> None:
    for piece, x in zip(problem.key_columns, dq, strict=True):
        tiling.store_rows(dq_ref, heads.rows, piece, x, valid=heads.valid)
    plt.store(d_weights_ref.at[heads.rows], d_weights, mask=heads.valid)


def selected_gradients(
    index: IndexHeads,
    indices: Int32[Array, "T K"],
    d_scores: Float[Array, "T K"],
    *,
    problem: Problem,
    deterministic: bool,
    budget_bytes: int,
    tiles: Tiles | None = None,
) -> tuple[Float[Array, "T H D"], Float[Array, "S D"], Float[Array, "T H"]]:
    """(dq, dk, d_weights), dk in float32, of the scores of the keys that each query lists.

    Args:
        index: of one row, without a batch axis: q [T, H, D], k [S, D], weights [T, H].
        d_scores: dL/dscore of every slot; those of empty slots do not matter.
        deterministic: the same bits every run, at the cost of one write and one read of every slot's gradient,
            `budget_bytes` of them at a time. Otherwise they are added to memory in no fixed order.
    """
    q, k, weights = index
    if tiles is None:
        call = tiling.call_shape(problem, q.dtype, queries=q.shape[0], keys=k.shape[0], topk=indices.shape[1])
        tiles = tuning.choose_tiles("index_gradients_selected", call, index_gradient_tiles(problem, q.dtype))
    width = tiling.padded_width(problem.key_columns)

    def run(arrays: Sequence[Array], total: Array | None) -> tuple[Array, Array, Array, Array]:
        q, weights, indices, d_scores = arrays
        refs = tiling.common_inputs(q, k[:, None], None, indices, tiles)
        d_scores = jnp.pad(d_scores, ((0, 0), (0, refs["indices"].shape[1] - d_scores.shape[1])))
        refs = {**refs, "weights": weights, "d_scores": d_scores}
        rows = refs["indices"].size if total is None else total.shape[0]
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, weights)]
        shapes.append(jax.ShapeDtypeStruct((rows, width), jnp.float32))
        dq, d_weights, dk = tiling.call(
            functools.partial(_selected_kernel, problem=problem, tiles=tiles, is_atomic=total is not None),
            problem,
            tiles,
            (refs,) if total is None else (refs, total),
            grid=(q.shape[0],),
            in_specs=[tiling.specs(refs), *([] if total is None else [tiling.whole(total)])],
            out_specs=[*map(tiling.per_query, shapes[:2]), tiling.whole(shapes[2])],
            out_shape=shapes,
            input_output_aliases={} if total is None else {len(refs): 2},
            name="index_gradients_selected",
        )
        return dq, d_weights, dk, refs["indices"]

    arrays = q, weights, indices, d_scores
    if not deterministic:
        total = jnp.zeros_like(k, jnp.float32, (k.shape[0] + sums_by_key.SPARE_ROWS, width))
        dq, d_weights, total, _ = run(arrays, total)
        return dq, sums_by_key.unpad([total], k.shape[0], problem)[0][:, 0], d_weights

    def step(total: Array, chunk: Sequence[Array]) -> tuple[Array, tuple[Array, Array]]:
        dq, d_weights, parts, slots = run([x[0] for x in chunk], None)
        return sums_by_key.add_in_order([total], [parts], slots, problem)[0], (dq[None], d_weights[None])

    block_q = rows_per_chunk(budget_bytes, 4 * indices.shape[1] * width, smallest=1, largest=q.shape[0])
    zeros = jnp.zeros_like(k, jnp.float32, (k.shape[0], width))
    total, (dq, d_weights) = scan_queries(step, zeros, tuple(x[None] for x in arrays), block_q)
    return dq[0], sums_by_key.unpad([total], k.shape[0], problem)[0][:, 0], d_weights[0]


def _visible_query_kernel(refs: Refs, dq_ref: Any, d_weights_ref: Any, *, problem: Problem, tiles: Tiles) -> None:
    """One query: gradients of q and the weights over all keys it sees."""
    heads = tiling.head_block(problem, 0, 0, tiles.block_h)
    q, weights = tiling.load_heads(refs["q"], heads, problem.key_columns), tiling.load_per_head(refs["weights"], heads)
    low, high = refs["start"][0], refs["end"][0]

    def body(i: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        d_weights, *dq = carry
        position = i * tiles.block_k + jnp.arange(tiles.block_k, dtype=jnp.int32)
        valid = (position >= low) & (position < high)
        keys = [tiling.load_rows(refs["k"], position, piece, valid=valid) for piece in problem.key_columns]
        d_scores = plt.load(refs["d_scores"].at[position], mask=valid, other=0.0)
        d_products, new = _products_and_gradient(keys, q, weights, d_scores, valid, problem)
        return d_weights + new, *_add_products(dq, d_products, keys, trans_a=True)

    start = jnp.zeros((tiles.block_h,), jnp.float32), *_zeros(tiles.block_h, problem)
    d_weights, *dq = lax.fori_loop(lax.div(low, tiles.block_k), pl.cdiv(high, tiles.block_k), body, start)
    _store_query(dq_ref, d_weights_ref, heads, problem, dq, d_weights)


def _visible_key_kernel(refs: Refs, total_ref: Any, dk_ref: Any, *, problem: Problem, tiles: Tiles, n_queries: int) -> None:
    """One tile of keys: adds to their gradient what all queries give them, in the order of the queries."""
    first, n_keys = pl.program_id(1) * tiles.block_k, refs["k"].shape[0]
    position = first + jnp.arange(tiles.block_k, dtype=jnp.int32)
    exists = position < n_keys
    heads = tiling.head_block(problem, 0, 0, tiles.block_h)

    @pl.when((first < refs["high"][0]) & (first + tiles.block_k > refs["low"][0]))
    def _() -> None:
        keys = [tiling.load_rows(refs["k"], position, piece, valid=exists) for piece in problem.key_columns]

        def body(t: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
            valid = (position >= refs["start"][t]) & (position < refs["end"][t])
            rows = tiling.HeadBlock(t * problem.heads + heads.rows, heads.valid)
            q, weights = tiling.load_heads(refs["q"], rows, problem.key_columns), tiling.load_per_head(refs["weights"], rows)
            d_scores = plt.load(refs["d_scores"].at[jnp.full((tiles.block_k,), t, jnp.int32), position], mask=valid, other=0.0)
            d_products, _ = _products_and_gradient(keys, q, weights, d_scores, valid, problem)
            # A query that sees nothing may hold NaN, which no product with zero removes.
            sees = refs["start"][t] < refs["end"][t]
            return tuple(_add_products(sums, d_products, [jnp.where(sees, x, 0.0).astype(x.dtype) for x in q]))

        sums = lax.fori_loop(0, n_queries, body, tuple(_zeros(tiles.block_k, problem)))
        for piece, x in zip(problem.key_columns, sums, strict=True):
            before = tiling.load_rows(total_ref, position, piece, valid=exists)
            tiling.store_rows(dk_ref, position, piece, before + x, valid=exists)


def visible_gradients(
    total: Float[Array, "B S D"],
    index: IndexHeads,
    visible: Visible,
    d_scores: Float[Array, "B T S"],
    *,
    problem: Problem,
    tiles: Tiles | None = None,
) -> tuple[Float[Array, "B S D"], Float[Array, "B T H D"], Float[Array, "B T H"]]:
    """(total + dk, dq, d_weights) of the scores of a chunk of queries with the keys they see; the same bits every run.

    Args:
        total: float32.
        visible: bounds within [0, S].
    """
    (q, k, weights), (start, end) = index, visible
    (batch, n_queries), n_keys = q.shape[:2], k.shape[1]

    def chosen(side: str, default: Tiles) -> Tiles:
        if tiles is not None:
            return tiles
        call = tiling.call_shape(problem, q.dtype, queries=batch * n_queries, keys=n_keys)
        return tuning.choose_tiles(f"index_gradients_visible_{side}", call, default)

    by_query = {"q": q, "weights": weights, "start": start[..., None], "end": end[..., None], "d_scores": d_scores}
    one_query = {
        name: pl.BlockSpec((None, None, *x.shape[2:]), lambda b, t, rest=x.ndim - 2: (b, t) + (0,) * rest)
        for name, x in by_query.items()
    }
    outputs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, weights)]
    query_tiles = chosen("query", index_gradient_tiles(problem, q.dtype))
    dq, d_weights = tiling.call(
        functools.partial(_visible_query_kernel, problem=problem, tiles=query_tiles),
        problem,
        query_tiles,
        ({**by_query, "k": k},),
        grid=(batch, n_queries),
        in_specs=[{**one_query, "k": tiling.per_row(k)}],
        out_specs=[one_query["q"], one_query["weights"]],
        out_shape=outputs,
        name="index_gradients_visible_query",
    )
    refs = {
        "q": q.reshape(batch, n_queries * problem.heads, problem.dim),
        "weights": weights.reshape(batch, n_queries * problem.heads),
        "k": k,
        "start": start,
        "end": end,
        "d_scores": d_scores,
        "low": jnp.where(visible.some, start, n_keys).min(1, keepdims=True),
        "high": jnp.where(visible.some, end, 0).max(1, keepdims=True),
    }
    key_tiles = chosen("key", index_key_gradient_tiles(problem, q.dtype))
    dk = tiling.call(
        functools.partial(_visible_key_kernel, problem=problem, tiles=key_tiles, n_queries=n_queries),
        problem,
        key_tiles,
        (refs, total),
        grid=(batch, pl.cdiv(n_keys, key_tiles.block_k)),
        in_specs=[{name: tiling.per_row(x) for name, x in refs.items()}, tiling.per_row(total)],
        out_specs=tiling.per_row(total),
        out_shape=jax.ShapeDtypeStruct(total.shape, total.dtype),
        input_output_aliases={len(refs): 0},
        name="index_gradients_visible_key",
    )
    return dk, dq, d_weights
