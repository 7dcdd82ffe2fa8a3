"""The indexer's KL in Pallas for NVIDIA GPUs: kernels compute scores, target and gradients, XLA what lies between them.

Over the selected keys everything between the kernels is T x topk elements, once. Over the visible keys it is a chunk of queries
x S elements at a time, computed again in the backward.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.special import xlogy
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.common import gpu_tiles as tiling
from pallas_kernels.common import index_scores as _head_sums
from pallas_kernels.common.chunks import map_queries, rows_per_chunk, scan_queries
from pallas_kernels.common.numerics import clamped, constant_lse, no_gradient, softmax_and_lse, sum_over_axis, visible_mask
from pallas_kernels.indexer_loss import pallas_gpu_gradients as gradients
from pallas_kernels.indexer_loss.xla_selected import set_members
from pallas_kernels.sparse_attention.xla import join_batch, join_batch_indices
from pallas_kernels.tuning.tiles import QueryTiles, Tiles
from pallas_kernels.types import IndexHeads, Visible


@dataclasses.dataclass(frozen=True)
class KLSettings:
    """The static half of a call; None takes the block sizes of the tuning table, or else the default ones.

    `head_axis` is a mesh axis that the attention's heads are split over; `score_budget` is the number of scores of one chunk,
    batch x queries x keys, over the visible keys; `deterministic` and `budget_bytes` as in
    `pallas_gpu_gradients.selected_gradients`.
    """

    softmax_scale: float
    interpret: bool
    head_axis: str | None = None
    keys_per_index_key: int = 1
    deterministic: bool = False
    score_budget: int = 2**26
    budget_bytes: int = 2**28
    sum_tiles: QueryTiles | None = None
    gradient_tiles: Tiles | None = None


def indexer_kl(
    index: IndexHeads,
    visible: Visible,
    q: Float[Array, "B T H Dk"],
    k: Float[Array, "B S G Dk"],
    lse: Float[Array, "B T H"],
    *,
    softmax_scale: float,
    topk_indices: Int32[Array, "B T K"] | None,
    head_axis: str | None = None,
    keys_per_index_key: int = 1,
    deterministic: bool = False,
    interpret: bool | None = None,
    **settings: Any,
) -> Float[Array, "B T"]:
    """KL over the visible keys, or over the selected visible keys.

    Args:
        interpret: run the kernels without a GPU; None does so on CPU.
        settings: other fields of `KLSettings`.

    Raises:
        NotImplementedError: a dtype, device, or number of heads or channels that the kernels do not cover.
    """
    tiling.check_dtypes("indexer_kl", "index.q and index.k", index.q, index.k)
    tiling.check_dtypes("indexer_kl", "q and k", q, k)
    tiling.check_dtypes("indexer_kl", "index.weights and lse", index.weights, lse, allowed=("float32",))
    interpret = tiling.is_interpreted("indexer_kl") if interpret is None else interpret
    static = KLSettings(float(softmax_scale), interpret, head_axis, keys_per_index_key, deterministic, **settings)
    n_keys = k.shape[1]
    if 0 in (q.size, n_keys) or (topk_indices is not None and topk_indices.shape[2] == 0):
        return jnp.zeros(q.shape[:2], jnp.float32)
    visible = clamped(visible, n_keys)
    lse = constant_lse(lse, jnp.dtype(jnp.float32))
    if topk_indices is None:
        return _kl_over_visible(index, visible, q, k, lse, static)
    first = n_keys * jnp.arange(k.shape[0], dtype=jnp.int32)[:, None]
    places = join_batch_indices(topk_indices, n_keys)
    joined = jax.tree.map(lambda bound: join_batch(bound + first), visible)
    _, places = set_members(places, joined, n_keys * k.shape[0])
    arrays = jax.tree.map(lambda x: join_batch(x)[0], (index, q, k, lse))
    return _kl_over_selected(*arrays, places[0], static).reshape(q.shape[:2])


def _kl_and_gradient(
    scores: Float[Array, "*N S"], mass: Float[Array, "*N S"], members: Bool[Array, "*N S"]
) -> tuple[Float[Array, "*N"], Float[Array, "*N S"]]:
    """(KL, its gradient in the scores) of the target `mass`, not yet normalised, over the members of each set."""
    mass = jnp.where(members, mass, 0)
    total = mass.sum(-1, keepdims=True)
    target = jnp.where(total > 0, mass / jnp.where(total > 0, total, 1), 0)
    softmax, score_lse = softmax_and_lse(scores, members)
    cross = jnp.where(target > 0, target * (scores - score_lse[..., None]), 0)
    return (xlogy(target, target) - cross).sum(-1), jnp.where(members & (total > 0), softmax - target, 0)


def _times(d_kl: Array, d_scores: Array) -> Array:
    """d_scores weighed by the cotangent of each query; one with nothing to learn may have any."""
    return jnp.where(d_scores == 0, 0, d_scores * d_kl[..., None])


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _kl_over_selected(index: IndexHeads, q: Array, k: Array, lse: Array, indices: Array, static: KLSettings) -> Array:
    return _selected_forward(index, q, k, lse, indices, static)[0]


def _selected_forward(
    index: IndexHeads, q: Array, k: Array, lse: Array, indices: Array, static: KLSettings
) -> tuple[Array, tuple[Any, ...]]:
    sums = functools.partial(_head_sums.head_sums_selected, indices=indices, tiles=static.sum_tiles)
    attention = _head_sums.attention_problem(q, k, static.softmax_scale, static.interpret)
    problem = _head_sums.index_problem(index.q, static.interpret)
    mass = sum_over_axis(sums(q, k, lse, kind="probability", problem=attention), static.head_axis)
    scores = sums(index.q, index.k[:, None], index.weights, kind="scores", problem=problem)
    kl, d_scores = _kl_and_gradient(scores, mass, indices >= 0)
    return kl, (index, indices, d_scores)


def _selected_backward(static: KLSettings, residuals: tuple[Any, ...], d_kl: Array) -> tuple[Any, ...]:
    index, indices, d_scores = residuals
    d_q, d_k, d_weights = gradients.selected_gradients(
        index,
        indices,
        _times(d_kl, d_scores),
        problem=_head_sums.index_problem(index.q, static.interpret),
        deterministic=static.deterministic,
        budget_bytes=static.budget_bytes,
        tiles=static.gradient_tiles,
    )
    return IndexHeads(d_q, d_k.astype(index.k.dtype), d_weights), None, None, None, no_gradient(indices)


_kl_over_selected.defvjp(_selected_forward, _selected_backward)


def _visible_chunk(chunk: tuple[Any, ...], k_index: Array, k: Array, static: KLSettings) -> tuple[Array, Array]:
    """(KL, its gradient in the scores) of one chunk of queries."""
    q_index, weights, q, lse, visible = chunk
    n_keys = k.shape[1]
    sums = functools.partial(_head_sums.head_sums_visible, visible=visible, tiles=static.sum_tiles)
    attention = _head_sums.attention_problem(q, k, static.softmax_scale, static.interpret)
    index = _head_sums.index_problem(q_index, static.interpret)
    mass = sum_over_axis(sums(q, k, lse, kind="probability", problem=attention)[..., :n_keys], static.head_axis)
    scores = sums(q_index, k_index[:, :, None], weights, kind="scores", problem=index)[..., :n_keys]
    return _kl_and_gradient(scores, mass, visible_mask(visible, n_keys))


def _block_q(q: Array, k: Array, static: KLSettings) -> int:
    return rows_per_chunk(static.score_budget, k.shape[0] * k.shape[1], smallest=1, largest=q.shape[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _kl_over_visible(index: IndexHeads, visible: Visible, q: Array, k: Array, lse: Array, static: KLSettings) -> Array:
    k_index = jnp.repeat(index.k, static.keys_per_index_key, axis=1)
    step = lambda chunk: _visible_chunk(chunk, k_index, k, static)[0]
    return map_queries(step, (index.q, index.weights, q, lse, visible), _block_q(q, k, static))


def _visible_forward(*arguments: Any) -> tuple[Array, tuple[Any, ...]]:
    return _kl_over_visible(*arguments), arguments[:-1]


def _visible_backward(static: KLSettings, residuals: tuple[Any, ...], d_kl: Array) -> tuple[Any, ...]:
    index, visible, q, k, lse = residuals
    k_index = jnp.repeat(index.k, static.keys_per_index_key, axis=1)
    problem = _head_sums.index_problem(index.q, static.interpret)

    def step(total: Array, chunk: tuple[Any, ...]) -> tuple[Array, tuple[Array, Array]]:
        q_index, weights, _, _, visible, d_kl = chunk
        visible = clamped(visible, k.shape[1])  # padding is -1
        d_scores = _times(d_kl, _visible_chunk(chunk[:-1], k_index, k, static)[1])
        total, d_q, d_weights = gradients.visible_gradients(
            total, IndexHeads(q_index, k_index, weights), visible, d_scores, problem=problem, tiles=static.gradient_tiles
        )
        return total, (d_q, d_weights)

    chunks = (index.q, index.weights, q, lse, visible, d_kl)
    zeros = jnp.zeros_like(k_index, jnp.float32)
    d_k, (d_q, d_weights) = scan_queries(step, zeros, chunks, _block_q(q, k, static))
    # Summed before it is rounded: what the copies of an index key get cancels for the most part.
    d_k = d_k.reshape(*index.k.shape[:2], static.keys_per_index_key, -1).sum(2)
    return IndexHeads(d_q, d_k.astype(k_index.dtype), d_weights), no_gradient(visible), None, None, None


_kl_over_visible.defvjp(_visible_forward, _visible_backward)
