"""Sums over heads of a function of q . k, in Pallas for NVIDIA GPUs (through Triton).

Index scores are one such sum, `weights * relu(q . k)`; the attention probability of a key summed over heads, the indexer's
target, is the other, `exp(scale * q . k - lse)`. Keys are the rows of every matmul and heads its columns, so that the sum over
heads stays in registers. Keys come as a contiguous block that a program keeps while it walks over queries, or by index.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int32

from pallas_kernels import tuning
from pallas_kernels.common import gpu_tiles as tiling
from pallas_kernels.common.gpu_tiles import LOG2_E, Problem, Refs
from pallas_kernels.common.numerics import clamped, widen_fp8
from pallas_kernels.common.topk import rank_scores
from pallas_kernels.tuning.kernels import SHARED_BYTES
from pallas_kernels.tuning.tiles import SMALLEST_SIDE, QueryTiles, Tiles
from pallas_kernels.types import Visible

Kind = Literal["scores", "ranked_scores", "probability"]
"""`ranked_scores`: as the selection compares them, see `topk.rank_scores`."""


def index_problem(q_index: Array, interpret: bool) -> Problem:
    """Geometry of the indexer: one group whose heads share a key."""
    heads, dim = q_index.shape[-2:]
    return Problem(heads, 1, dim, dim, is_shared=True, softmax_scale=1.0, interpret=interpret)


def attention_problem(q: Array, k: Array, softmax_scale: float, interpret: bool) -> Problem:
    """Geometry of the attention whose probabilities are summed."""
    return Problem(
        q.shape[-2], k.shape[-2], q.shape[-1], q.shape[-1], is_shared=True, softmax_scale=softmax_scale, interpret=interpret
    )


def head_sum_tiles(problem: Problem, dtype: jnp.dtype) -> QueryTiles:
    """Block sizes for an H200: none spills registers when compiled for sm_90a; none has been timed."""
    block_h = max(SMALLEST_SIDE, min(64, pl.next_power_of_2(problem.heads_per_group)))
    row_bytes = tiling.padded_width(problem.key_columns) * dtype.itemsize
    if row_bytes > 512:
        block_k = 32 if dtype.itemsize == 4 else 64
        # Two blocks of heads are there at a time.
        fits = (block_k + 2 * block_h) * row_bytes + tiling.OTHER_BYTES <= SHARED_BYTES
        return QueryTiles(block_h if fits and dtype.itemsize == 2 else min(block_h, 32), block_k, 8)
    return QueryTiles(block_h, 32 if dtype.itemsize == 4 else 128, 8)


def hidden_value(kind: Kind) -> float:
    """Sum of a key outside a query's range."""
    return 0.0 if kind == "probability" else -jnp.inf


def _terms(kind: Kind, keys: list[Array], q: list[Array], coefficient: Array, problem: Problem) -> Array:
    """Terms of every head for every key [keys, heads]; coefficient [heads]."""
    if kind == "probability":
        logits = tiling.sum_of_products(keys, q, problem.softmax_scale * LOG2_E)
        return jnp.exp2(logits - coefficient[None] * LOG2_E)
    return tiling.relu(tiling.sum_of_products(keys, q), problem) * coefficient[None]


def _sum_of_heads(
    refs: Refs, keys: list[Array], problem: Problem, tiles: Tiles, kind: Kind, group: Array | int, first_row: Array | int
) -> Array:
    """[keys] in float32: the terms of all heads of a group, whose queries start at row `first_row` of refs["q"]."""

    def body(number: Array, total: Array) -> Array:
        heads = tiling.head_block(problem, group, number, tiles.block_h)
        rows = tiling.HeadBlock(first_row + heads.rows, heads.valid)
        q = [widen_fp8(x) for x in tiling.load_heads(refs["q"], rows, problem.key_columns)]
        terms = _terms(kind, keys, q, tiling.load_per_head(refs["coefficient"], rows), problem)
        return total + (terms if heads.valid is None else jnp.where(heads.valid[None], terms, 0.0)).sum(1)

    return lax.fori_loop(0, problem.head_blocks(tiles), body, jnp.zeros((tiles.block_k,), jnp.float32))


def finish(kind: Kind, total: Array) -> Array:
    """The sum of a visible key as `kind` wants it."""
    return rank_scores(total) if kind == "ranked_scores" else total


def _visible_kernel(
    refs: Refs, out_ref: Any, *, problem: Problem, tiles: QueryTiles, kind: Kind, n_queries: int, n_keys: int
) -> None:
    first_query, first_key = pl.program_id(1) * tiles.block_q, pl.program_id(2) * tiles.block_k
    count = jnp.minimum(tiles.block_q, n_queries - first_query)
    position = first_key + jnp.arange(tiles.block_k, dtype=jnp.int32)

    def store(t: Array, value: Array) -> None:
        plt.store(out_ref.at[jnp.full((tiles.block_k,), t, jnp.int32), position], value)

    # The longest range of a block of queries; the grid's last block repeats its last query.
    queries = jnp.minimum(first_query + jnp.arange(tiles.block_q, dtype=jnp.int32), n_queries - 1)
    start, end = plt.load(refs["start"].at[queries]), plt.load(refs["end"].at[queries])
    low, high = jnp.where(start < end, start, n_keys).min(), jnp.where(start < end, end, 0).max()
    is_seen = (first_key < high) & (first_key + tiles.block_k > low)

    @pl.when(is_seen)
    def _() -> None:
        exists = position < n_keys
        scale = plt.load(refs["k_scale"].at[position], mask=exists, other=0) if "k_scale" in refs else None

        def over_queries(group: Array | int, previous: Callable[[Array], Array] | None) -> None:
            read = functools.partial(tiling.load_rows, refs["k"], position, offset=group * problem.dim, valid=exists)
            keys = [widen_fp8(read(piece)) for piece in problem.key_columns]

            @tiling.each(count)
            def _(i: Array) -> None:
                t = first_query + i
                total = _sum_of_heads(refs, keys, problem, tiles, kind, group, t * problem.heads)
                total = total if scale is None else total * scale
                total = total if previous is None else total + previous(t)
                visible = (position >= refs["start"][t]) & (position < refs["end"][t])
                store(t, jnp.where(visible, finish(kind, total), hidden_value(kind)))

        over_queries(0, None)
        if problem.groups > 1:

            @tiling.each(problem.groups - 1)
            def _(i: Array) -> None:
                # A further group adds to what this program has written; the interpreter knows no barriers.
                if not problem.interpret:
                    plt.debug_barrier()
                over_queries(i + 1, lambda t: plt.load(out_ref.at[jnp.full((tiles.block_k,), t, jnp.int32), position]))

    @pl.when(~is_seen)
    def _() -> None:
        nothing = jnp.full((tiles.block_k,), hidden_value(kind), jnp.float32)
        tiling.each(count)(lambda i: store(first_query + i, nothing))


def head_sums_visible(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S G D"],
    coefficient: Float[Array, "B T H"],
    visible: Visible,
    *,
    kind: Kind,
    problem: Problem,
    k_scale: Float[Array, "B S"] | None = None,
    tiles: QueryTiles | None = None,
) -> Float[Array, "B T P"]:
    """Sums over heads for the visible keys of every query, T x S elements: call it on chunks of queries.

    Args:
        coefficient: float32; the weight of a head (scores) or its log-sum-exp, +inf where it is -inf (probability).
        k_scale: float32, multiplies the sum of a key.

    Returns:
        float32; P is S rounded up to whole blocks of keys; -inf (probability: 0) outside the range and beyond S.
    """
    (batch, n_queries), n_keys = q.shape[:2], k.shape[1]
    name = f"head_sums_visible_{kind}"
    if tiles is None:
        call = tiling.call_shape(problem, k.dtype, queries=batch * n_queries, keys=n_keys)
        tiles = tuning.choose_tiles(name, call, head_sum_tiles(problem, widen_fp8(k[:0]).dtype))
    refs = {
        "q": q.reshape(batch, n_queries * problem.heads, problem.dim),
        "k": k.reshape(batch, n_keys, problem.groups * problem.dim),
        "coefficient": coefficient.reshape(batch, n_queries * problem.heads),
        **clamped(visible, n_keys)._asdict(),
    }
    refs = refs if k_scale is None else {**refs, "k_scale": k_scale}
    blocks = pl.cdiv(n_keys, tiles.block_k)
    shape = jax.ShapeDtypeStruct((batch, n_queries, blocks * tiles.block_k), jnp.float32)
    return tiling.call(
        functools.partial(_visible_kernel, problem=problem, tiles=tiles, kind=kind, n_queries=n_queries, n_keys=n_keys),
        problem,
        tiles,
        (refs,),
        grid=(batch, pl.cdiv(n_queries, tiles.block_q), blocks),
        in_specs=[{name: tiling.per_row(x) for name, x in refs.items()}],
        out_specs=tiling.per_row(shape),
        out_shape=shape,
        name=name,
    )


def _selected_kernel(refs: Refs, out_ref: Any, *, problem: Problem, tiles: Tiles, kind: Kind) -> None:
    number = pl.program_id(1)
    slots = pl.ds(number * tiles.block_k, tiles.block_k)
    is_used = number * tiles.block_k < refs["length"][0]

    @pl.when(is_used)
    def _() -> None:
        def body(group: Array | int, total: Array) -> Array:
            keys = tiling.load_keys(refs, problem, group, number, tiles.block_k).keys
            return total + _sum_of_heads(refs, keys, problem, tiles, kind, group, 0)

        total = lax.fori_loop(0, problem.groups, body, jnp.zeros((tiles.block_k,), jnp.float32))
        out_ref[slots] = jnp.where(refs["indices"][slots] >= 0, finish(kind, total), hidden_value(kind))

    @pl.when(~is_used)
    def _() -> None:
        out_ref[slots] = jnp.full((tiles.block_k,), hidden_value(kind), jnp.float32)


def head_sums_selected(
    q: Float[Array, "T H D"],
    k: Float[Array, "S G D"],
    coefficient: Float[Array, "T H"],
    indices: Int32[Array, "T K"],
    *,
    kind: Kind,
    problem: Problem,
    tiles: Tiles | None = None,
) -> Float[Array, "T {indices.shape[1]}"]:
    """Sums over heads for the keys that a query lists; -inf (probability: 0) where the index is negative.

    Args:
        coefficient: as in `head_sums_visible`.
        indices: below S.
    """
    name = f"head_sums_selected_{kind}"
    if tiles is None:
        call = tiling.call_shape(problem, k.dtype, queries=q.shape[0], keys=k.shape[0], topk=indices.shape[1])
        default = head_sum_tiles(problem, k.dtype)
        tiles = tuning.choose_tiles(name, call, Tiles(default.block_h, default.block_k, default.num_warps, default.num_stages))
    refs = {**tiling.common_inputs(q, k, None, indices, tiles), "coefficient": coefficient}
    shape = jax.ShapeDtypeStruct(refs["indices"].shape, jnp.float32)
    out = tiling.call(
        functools.partial(_selected_kernel, problem=problem, tiles=tiles, kind=kind),
        problem,
        tiles,
        (refs,),
        grid=(q.shape[0], shape.shape[1] // tiles.block_k),
        in_specs=[tiling.specs(refs)],
        out_specs=tiling.per_query(shape),
        out_shape=shape,
        name=name,
    )
    return out[:, : indices.shape[1]]
