"""The canonical selection over chunks of queries, for any score that can be computed per key block."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from pallas_kernels.common.chunks import key_walk, map_queries
from pallas_kernels.common.numerics import rank_scores
from pallas_kernels.common.threshold import COUNT_GROUPS, largest_by_threshold
from pallas_kernels.types import Visible

THRESHOLD_WIDTH = 1024  # rows at least this long are selected by threshold, shorter ones by `lax.top_k`
THRESHOLD_BUDGET = 2**19  # numbers searched together; they are read some twenty times and should stay in cache

BlockScores = Callable[[Array], Array]  # position of the first key -> scores [B, C, block_k]


def canonical(indices: Int32[Array, "*batch K"], absent: int, topk: int) -> Int32[Array, "*batch {topk}"]:
    """Pads an ascending list, in which `absent` marks the missing ones at its end, with -1 to `topk`."""
    indices = jnp.where(indices < absent, indices, -1)
    pads = [(0, 0)] * (indices.ndim - 1) + [(0, topk - indices.shape[-1])]
    return jnp.pad(indices, pads, constant_values=-1)


def all_visible(visible: Visible, topk: int) -> Int32[Array, "B C {topk}"]:
    """The selection of queries that see at most `topk` keys: all of them; bounds within the keys, or `start` may overflow."""
    position = visible.start[..., None] + jnp.arange(topk, dtype=jnp.int32)
    return jnp.where(position < visible.end[..., None], position, -1)


def largest_ascending(ranked: Float[Array, "*batch W"], topk: int) -> Int32[Array, "*batch {topk}"]:
    """Positions of the `topk` largest entries above -inf, ascending, W where there are fewer; ties to the lower position."""
    width = ranked.shape[-1]
    if width >= THRESHOLD_WIDTH and width % COUNT_GROUPS == 0 and ranked.dtype == jnp.float32:
        rows = ranked.reshape(1, -1, width)
        per_pass = max(8, THRESHOLD_BUDGET // width)
        found = map_queries(lambda x: largest_by_threshold(x[0], topk)[None], rows, per_pass)
        return found.reshape(*ranked.shape[:-1], topk)
    values, positions = lax.top_k(ranked, topk)
    # The barrier keeps the values alive: with them unused XLA on CPU may turn the top_k into a full sort. One on both results
    # makes XLA's top-k decomposer abort in programs for several devices.
    return jnp.sort(jnp.where(lax.optimization_barrier(values) > -jnp.inf, positions, width), axis=-1)


def select_in_blocks(
    block_scores: BlockScores,
    visible: Visible,
    *,
    n_keys: int,
    topk: int,
    block_k: int,
    dtype: jnp.dtype,
) -> Int32[Array, "B C {topk}"]:
    """The canonical selection of one chunk: scores only the blocks somebody sees, then selects over as few keys as hold them.

    A chunk none of whose queries sees more than `topk` keys needs no scores at all.
    """
    walk = key_walk(visible, n_keys, block_k)
    needed = (walk.visible.end - walk.visible.start).max() > topk
    high = jnp.where(needed, walk.high, walk.low)
    base = walk.first_key(walk.low)
    n_blocks = -(-n_keys // walk.block_k)
    widths = _bucket_widths(n_blocks, walk.block_k)

    def score(number: Array, buffer: Array) -> Array:
        first = walk.first_key(number)
        # The overlap of the last block included: scoring a key twice writes the same number twice.
        ranked = jnp.where(walk.in_range(first), rank_scores(block_scores(first)), -jnp.inf)
        return lax.dynamic_update_slice_in_dim(buffer, ranked.astype(dtype), first - base, axis=2)

    buffer = jnp.full_like(visible.start, -jnp.inf, dtype, (*visible.start.shape, widths[-1]))
    buffer = lax.fori_loop(walk.low, high, score, buffer)

    def select(width: int) -> Callable[[Array], Array]:
        def branch(buffer: Array) -> Array:
            position = largest_ascending(buffer[..., :width], min(topk, width))
            return canonical(jnp.where(position < width, position + base, n_keys), n_keys, topk)

        return branch

    # Scores of the last block end at n_keys, so what was written spans at most (high - low) blocks.
    bucket = jnp.searchsorted(jnp.asarray(widths), (high - walk.low) * walk.block_k)
    branches = [lambda _: all_visible(walk.visible, topk), *[select(width) for width in widths]]
    return lax.switch(jnp.where(needed, bucket + 1, 0), branches, buffer)


def _bucket_widths(n_blocks: int, block_k: int) -> list[int]:
    """Numbers of keys a selection may run over; more buckets waste less work and compile longer."""
    total = n_blocks * block_k
    count = 1 if total <= 1024 else 4
    return sorted({min(-(-n_blocks * i // count), n_blocks) * block_k for i in range(1, count + 1)})
