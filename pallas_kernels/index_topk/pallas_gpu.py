"""Index scores in Pallas for NVIDIA GPUs, and the selection over the scores of one chunk of queries at a time."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from pallas_kernels.common import gpu_tiles as tiling
from pallas_kernels.common import index_scores as _head_sums
from pallas_kernels.common.chunks import map_queries, rows_per_chunk
from pallas_kernels.common.index_scores import Kind
from pallas_kernels.common.numerics import clamped, no_gradient
from pallas_kernels.common.topk import COUNT_GROUPS, all_visible, canonical, largest_by_threshold
from pallas_kernels.index_topk import xla
from pallas_kernels.tuning.tiles import AnyTiles, QueryTiles
from pallas_kernels.types import IndexHeads, Visible

KERNEL_SCORE_BUDGET = 2**26
"""Scores of one chunk: batch x queries x keys. A quarter of a GiB; the search reads them about as often again."""

Scores = Callable[..., Array]


def kernel_scores(
    index: IndexHeads,
    visible: Visible,
    k_scale: Array | None,
    kind: Kind,
    interpret: bool | None,
    tiles: QueryTiles | None,
) -> Array:
    """Scores of all queries against keys padded to whole blocks."""
    q, k, weights = index
    allowed = (*tiling.HALF_AND_SINGLE, "float8_e4m3fn")
    op = "index_scores" if kind == "scores" else "index_topk"
    tiling.check_dtypes(op, "index.q and index.k", q, k, allowed=allowed)
    tiling.check_dtypes(op, "index.weights (and k_scale)", weights, k_scale, allowed=("float32",))
    tiling.check_offsets(op, "index.k", k)
    interpret = tiling.is_interpreted(op) if interpret is None else interpret
    return _head_sums.head_sums_visible(
        q,
        k[:, :, None],
        weights,
        visible,
        kind=kind,
        problem=_head_sums.index_problem(q, interpret),
        k_scale=k_scale,
        tiles=tiles,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _differentiable_scores(
    index: IndexHeads,
    visible: Visible,
    k_scale: Array | None,
    scores: Scores,
    interpret: bool | None,
    tiles: AnyTiles | None,
) -> Array:
    return scores(index, visible, k_scale, "scores", interpret, tiles)[..., : index.k.shape[1]]


def _forward(*arguments: Any) -> tuple[Array, tuple[Any, ...]]:
    return _differentiable_scores(*arguments), arguments[:3]


def _backward(
    scores: Scores, interpret: bool | None, tiles: AnyTiles | None, residuals: tuple[Any, ...], d_scores: Array
) -> tuple[Any, ...]:
    index, visible, k_scale = residuals

    def by_xla(index: IndexHeads, k_scale: Array | None) -> Array:
        return xla.index_scores(index, visible, k_scale=k_scale)

    d_index, d_scale = jax.vjp(by_xla, index, k_scale)[1](d_scores)
    return d_index, no_gradient(visible), d_scale


_differentiable_scores.defvjp(_forward, _backward)


def index_scores(
    index: IndexHeads,
    visible: Visible,
    *,
    k_scale: Float[Array, "B S"] | None = None,
    scores: Scores = kernel_scores,
    interpret: bool | None = None,
    tiles: AnyTiles | None = None,
) -> Float[Array, "B T S"]:
    """The whole score matrix; its gradient is computed by XLA.

    Args:
        scores: computes them, as `kernel_scores` does.
        interpret: run the kernel without a GPU; None does so on CPU.
        tiles: block sizes; None takes those of the tuning table, or else `_head_sums.head_sum_tiles`.

    Raises:
        NotImplementedError: a dtype, device or number of channels that the kernel does not cover.
    """
    if 0 in (index.q.size, index.k.shape[1]):
        return jnp.zeros((*index.q.shape[:2], index.k.shape[1]), jnp.float32)
    return _differentiable_scores(index, visible, k_scale, scores, interpret, tiles)


def largest_by_counting(ranked: Float[Array, "B C W"], topk: int) -> Int32[Array, "B C {topk}"]:
    """Positions of the largest entries above -inf, ascending; the padded width or more where there are fewer."""
    batch, length, width = ranked.shape
    wanted = max(-(-width // COUNT_GROUPS), -(-topk // COUNT_GROUPS)) * COUNT_GROUPS
    padded = jnp.pad(ranked, ((0, 0), (0, 0), (0, wanted - width)), constant_values=-jnp.inf)
    return largest_by_threshold(padded.reshape(batch * length, wanted), topk).reshape(batch, length, topk)


def index_topk(
    index: IndexHeads,
    visible: Visible,
    *,
    topk: int,
    k_scale: Float[Array, "B S"] | None = None,
    score_budget: int = KERNEL_SCORE_BUDGET,
    largest: Callable[[Array, int], Array] = largest_by_counting,
    scores: Scores = kernel_scores,
    interpret: bool | None = None,
    tiles: AnyTiles | None = None,
) -> Int32[Array, "B T {topk}"]:
    """Canonical selection: a kernel scores a chunk of queries, XLA finds each row's threshold by counting.

    Args:
        score_budget: scores held at a time.
        largest: selects the positions of the largest scores of rows, as `largest_by_counting` does.
        scores, interpret, tiles: as in `index_scores`.
    """
    batch, n_keys = index.k.shape[:2]
    if topk >= n_keys or index.q.size == 0:
        return all_visible(clamped(visible, n_keys), topk)
    block_q = rows_per_chunk(score_budget, batch * n_keys, smallest=1, largest=index.q.shape[1])

    def step(chunk: tuple[Any, ...]) -> Array:
        q, weights, visible = chunk
        visible = clamped(visible, n_keys)

        def select(_: None) -> Array:
            ranked = scores(IndexHeads(q, index.k, weights), visible, k_scale, "ranked_scores", interpret, tiles)
            return canonical(largest(ranked, topk), n_keys, topk)

        return lax.cond((visible.end - visible.start).max() > topk, select, lambda _: all_visible(visible, topk), None)

    return map_queries(step, (index.q, index.weights, visible), block_q)
