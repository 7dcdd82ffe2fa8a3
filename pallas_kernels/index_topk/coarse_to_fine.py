"""A cheaper selection: blocks of keys by one pooled index key each, then the indexer on the keys inside them."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from pallas_kernels.common import checks as _checks
from pallas_kernels.common.chunks import map_queries, rows_per_chunk
from pallas_kernels.common.mesh import split_like, vary_alike
from pallas_kernels.common.numerics import accumulation_dtype, clamped, dot, weighted_sum
from pallas_kernels.common.topk import largest_ascending, pad_slots, rank_scores, with_forced
from pallas_kernels.index_topk.api import check_topk_implementation, index_topk
from pallas_kernels.index_topk.block_pooling import check_pooling, pool_blocks
from pallas_kernels.types import NO_FORCED_KEYS, ForcedKeys, IndexHeads, Visible

CANDIDATE_BUDGET = 2**22
"""Elements of the candidates' index keys held at once: batch x queries x candidates x channels."""


def _check(index, visible, topk, block_size, n_blocks, pooling, forced, activation, implementation):
    op = "index_topk_coarse_to_fine"
    _checks.check_activation(op, activation)
    check_pooling(op, pooling)
    _checks.check_index(op, index)
    _checks.check_topk(op, topk)
    _checks.check_forced(op, topk, forced)
    _checks.check_visible(op, visible, *index.q.shape[:2])
    if not all(_checks.is_whole(size) and 0 < size <= _checks.INT32 for size in (block_size, n_blocks)):
        raise ValueError(
            f"{op}: block_size is {_checks.shown(block_size)} and n_blocks {_checks.shown(n_blocks)}; expected positive whole "
            "numbers below 2**31."
        )
    check_topk_implementation(op, implementation, activation)


@_checks.checked(_check)
@split_like("index", 2)
def index_topk_coarse_to_fine(
    index: IndexHeads,
    visible: Visible,
    *,
    topk: int,
    block_size: int,
    n_blocks: int,
    pooling: str = "mean",
    forced: ForcedKeys = NO_FORCED_KEYS,
    activation: str = "relu",
    implementation: str | None = None,
) -> Int32[Array, "B T {topk}"]:
    """The `topk` keys of the highest index score among `n_blocks` blocks of keys, plus the first and the last visible block.

    Blocks lie at multiples of `block_size`. Those that a query sees as a whole, its first and last one apart, compete by the
    index score of their pooled index key; the keys of the winners, of the first and of the last block are scored one by one.
    Per query that scores S / block_size pooled keys and (n_blocks + 2) * block_size keys instead of S keys. Where these cover
    every visible key, the result is that of `index_topk`.

    Args:
        topk: selected keys per query; more than the candidates hold are never selected.
        block_size: keys per block, 128 in the source.
        n_blocks: competing blocks that are kept, 64 in the source.
        pooling: how a block's keys become one, "mean" as in the source or "salient", see `block_pooling.pool_blocks`.
        forced: as in `index_topk`; the blocks are those of the keys between the forced ones.
        activation: as in `index_scores`.
        implementation: of `index_topk`, which ranks the blocks; the candidates are scored in XLA.

    Returns:
        int32, canonical as `index_topk`. No gradient.

    Raises:
        ValueError: shapes or dtypes that do not fit, sizes below 1, an unknown pooling, or a known start > end.
        NotImplementedError: what the implementation asked for does not cover.

    Source: HISA (arXiv 2603.28458) section 3.
    """
    n_keys = index.k.shape[1]
    rank: dict[str, Any] = {"activation": activation, "implementation": implementation}
    if any(forced):
        rank |= {"block_size": block_size, "n_blocks": n_blocks, "pooling": pooling}
        select = lambda visible, topk: index_topk_coarse_to_fine(index, visible, topk=topk, **rank)
        return with_forced(visible, forced, n_keys, select, topk)
    if (n_blocks + 2) * block_size >= n_keys:
        return index_topk(index, visible, topk=topk, **rank)
    (q_index, k_index, weights), visible = jax.lax.stop_gradient(vary_alike(index, visible))
    start, end = clamped(visible, n_keys)
    first, last = start // block_size, jnp.maximum(end - 1, 0) // block_size
    pooled = IndexHeads(q_index, pool_blocks(k_index, block_size, pooling).astype(k_index.dtype), weights)
    # Strictly between the first and the last, ascending, -1 after the last one.
    between = index_topk(pooled, Visible(jnp.minimum(first + 1, last), last), topk=n_blocks, **rank)
    chosen = jnp.concatenate([first[..., None], between, jnp.where(last > first, last, -1)[..., None]], axis=-1)
    n_candidates = chosen.shape[-1] * block_size

    def step(chunk: tuple[Array, ...]) -> Array:
        q, w, chosen, start, end = chunk
        keys = (chosen[..., None] * block_size + jnp.arange(block_size, dtype=jnp.int32)).reshape(*q.shape[:2], n_candidates)
        is_candidate = jnp.repeat(chosen >= 0, block_size, axis=-1) & (keys >= start[..., None]) & (keys < end[..., None])
        rows = jax.vmap(lambda x, i: x.at[i].get(mode="promise_in_bounds"))(k_index, jnp.where(is_candidate, keys, 0))
        rows = jnp.where(is_candidate[..., None], rows, 0)
        products = dot("bchd,bcnd->bchn", q, rows, dtype=accumulation_dtype(q, k_index))
        scores = jnp.where(is_candidate, rank_scores(weighted_sum(products, w, activation)), -jnp.inf)
        # Candidates are in ascending order, so the lower position wins ties here as everywhere.
        place = largest_ascending(scores, min(topk, n_candidates))
        found = jnp.take_along_axis(keys, jnp.minimum(place, n_candidates - 1), axis=-1)
        return jnp.where(place < n_candidates, found, -1)

    block_q = rows_per_chunk(CANDIDATE_BUDGET, len(q_index) * n_candidates * q_index.shape[-1], smallest=1)
    return pad_slots(map_queries(step, (q_index, weights, chosen, start, end), block_q), topk)
