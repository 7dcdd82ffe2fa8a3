"""The canonical selection: exact top-k, indices ascending by position, -1 after the last valid one.

The tie rule, which every implementation keeps to the bit: equal scores go to the lower position, with -0.0 equal to 0.0. A NaN
or -inf score of a visible key counts as the lowest finite number, so that such keys are taken last, but before nothing.
`rank_scores` is the order of the scores and `canonical_topk` the definition; `largest_ascending` is what runs.

Long rows are selected by bisection on the threshold: counting passes instead of sorting, and bit words to compact. On CPU this
takes a third of the time of `lax.top_k` with a sort of the positions (rows of 16384, k = 512), because every pass is a
vectorised compare-and-count. Floats are compared as integers of the same order; the bisection starts from the largest value and
from a bound that k values are known to reach, and stops a row as soon as exactly k values lie above its threshold.
"""

from collections.abc import Callable
from typing import TypeVar

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32, UInt32

from pallas_kernels.common.chunks import key_walk, map_queries
from pallas_kernels.common.numerics import clamped
from pallas_kernels.types import ForcedKeys, Visible

THRESHOLD_WIDTH = 1024  # rows at least this long are selected by threshold, shorter ones by `lax.top_k`
THRESHOLD_BUDGET = 2**19  # elements searched together; they are read some twenty times and should stay in cache
WORD = 32
COUNT_GROUPS = 64  # partial counts stay below 128, so that a pass can add them in eight bits

R = TypeVar("R")
BlockScores = Callable[[Array], Array]  # position of the first key -> scores [B, C, block_k]


def rank_scores(scores: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Scores as the selection compares them: -0.0 is 0.0; NaN and -inf count as the lowest finite number.

    A visible key therefore always outranks an invisible one, which is marked -inf.
    """
    lowest = jnp.finfo(scores.dtype).min
    return jnp.where(scores == 0, 0, jnp.where(scores >= lowest, scores, lowest))


def canonical_topk(scores: Float[Array, "B T S"], visible: Bool[Array, "B T S"], topk: int) -> Int32[Array, "B T {topk}"]:
    """The topk highest visible scores by a stable full sort, then ascending by position, then -1."""
    n_keys = scores.shape[-1]
    ranked = jnp.where(visible, rank_scores(scores), -jnp.inf)
    order = jnp.argsort(ranked, axis=-1, stable=True, descending=True)[..., :topk].astype(jnp.int32)
    chosen = jnp.take_along_axis(visible, order, axis=-1)
    ascending = jnp.sort(jnp.where(chosen, order, n_keys), axis=-1)
    indices = jnp.where(ascending < n_keys, ascending, -1)
    return jnp.pad(indices, ((0, 0), (0, 0), (0, topk - indices.shape[-1])), constant_values=-1)


def canonical(indices: Int32[Array, "*batch K"], absent: int, topk: int) -> Int32[Array, "*batch {topk}"]:
    """Pads an ascending list, in which `absent` marks the missing ones at its end, with -1 to `topk`."""
    return pad_slots(jnp.where(indices < absent, indices, -1), topk)


def pad_slots(indices: Int32[Array, "*batch K"], topk: int) -> Int32[Array, "*batch {topk}"]:
    """A selection with -1 in the slots that it lacks."""
    pads = [(0, 0)] * (indices.ndim - 1) + [(0, topk - indices.shape[-1])]
    return jnp.pad(indices, pads, constant_values=-1)


def within_keys(select: Callable[[int], Int32[Array, "*batch C"]], n_keys: int, topk: int) -> Int32[Array, "*batch {topk}"]:
    """`select(topk)`, a canonical selection among `n_keys` keys, at the cost of no more slots than there are keys."""
    return pad_slots(select(min(topk, n_keys)), topk)


def over_filled_slots(run: Callable[[Int32[Array, "*batch K"]], R], indices: Int32[Array, "*batch K"], n_keys: int) -> R:
    """`run(indices)`, at the cost of `n_keys` slots where the slots beyond hold no index of a key, as padding does not."""
    if indices.shape[-1] <= n_keys:
        return run(indices)
    kept, beyond = indices[..., :n_keys], indices[..., n_keys:]
    # A list may be in any order and name a key twice, so what lies beyond has to be looked at.
    return lax.cond(((beyond >= 0) & (beyond < n_keys)).any(), lambda: run(indices), lambda: run(kept))


def all_visible(visible: Visible, topk: int) -> Int32[Array, "B C {topk}"]:
    """The selection of queries that see at most `topk` keys: all of them; bounds within the keys, or `start` may overflow."""
    position = visible.start[..., None] + jnp.arange(topk, dtype=jnp.int32)
    return jnp.where(position < visible.end[..., None], position, -1)


def largest_ascending(ranked: Float[Array, "*batch W"], topk: int) -> Int32[Array, "*batch {topk}"]:
    """Positions of the `topk` largest entries above -inf, ascending, W where there are fewer; ties to the lower position."""
    width = ranked.shape[-1]
    if topk and width >= THRESHOLD_WIDTH and width % COUNT_GROUPS == 0 and ranked.dtype == jnp.float32:
        rows = ranked.reshape(1, -1, width)
        per_pass = max(8, THRESHOLD_BUDGET // width)
        found = map_queries(lambda x: largest_by_threshold(x[0], topk)[None], rows, per_pass)
        return found.reshape(*ranked.shape[:-1], topk)
    values, positions = lax.top_k(ranked, topk)
    # The barrier keeps the values alive: with them unused XLA on CPU may turn the top_k into a full sort. One on both results
    # makes XLA's top-k decomposer abort in programs for several devices.
    return jnp.sort(jnp.where(lax.optimization_barrier(values) > -jnp.inf, positions, width), axis=-1)


def with_forced(
    visible: Visible,
    forced: ForcedKeys,
    n_keys: int,
    select: Callable[[Visible, int], Int32[Array, "*batch C"]],
    topk: int,
) -> Int32[Array, "*batch K"]:
    """The canonical selection of the forced keys and, in the visible range between them, of the best others.

    Args:
        select: from a range and a number of keys, 0 to `n_keys`, to a canonical selection.
        topk: slots of the result, at least one for each forced key; may exceed `n_keys`.
    """
    if not any(forced):
        return within_keys(lambda topk: select(visible, topk), n_keys, topk)
    visible, n_slots = clamped(visible, n_keys), min(topk, n_keys)
    forced = ForcedKeys(*(min(count, n_keys) for count in forced))
    first = jnp.minimum(visible.start + forced.first, visible.end)
    between = Visible(first, jnp.maximum(visible.end - forced.last, first))
    chosen = select(between, max(n_slots - sum(forced), 0))

    def run(start: Array, end: Array, count: int) -> Array:
        start, end = (bound.reshape(*bound.shape, *[1] * (chosen.ndim - bound.ndim)) for bound in (start, end))
        position = jnp.broadcast_to(start + jnp.arange(count, dtype=jnp.int32), (*chosen.shape[:-1], count))
        return jnp.where(position < end, position, n_keys)

    ends = run(visible.start, between.start, forced.first), run(between.end, visible.end, forced.last)
    joined = jnp.concatenate([ends[0], jnp.where(chosen >= 0, chosen, n_keys), ends[1]], axis=-1)
    return canonical(jnp.sort(joined, axis=-1)[..., :n_slots], n_keys, topk)


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


def largest_by_threshold(ranked: Float[Array, "R W"], topk: int) -> Int32[Array, "R {topk}"]:
    """Positions of the `topk` largest entries above -inf, ascending, W where there are fewer; ties to the lower position.

    Args:
        ranked: float32 without NaN and -0.0; W at least `topk` and a multiple of 64.
    """
    key = _ordered(ranked)
    threshold = _threshold(key, topk)
    above, equal = _pack(key > threshold[:, None]), _pack(key == threshold[:, None])
    missing = topk - lax.population_count(above).astype(jnp.int32).sum(-1)
    # At the bottom only invisible keys are equal to the threshold: none of them is taken.
    missing = jnp.where(threshold > _ordered(jnp.float32(-jnp.inf)), missing, 0)
    return _set_bits(above | _first_bits(equal, missing), topk, ranked.shape[-1])


def _ordered(x: Float[Array, "*shape"]) -> Int32[Array, "*shape"]:
    """Integers in the order of the floats."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)


def _threshold(key: Int32[Array, "R W"], topk: int) -> Int32[Array, " R"]:
    """A t with at most `topk` keys above it and at least `topk` at or above it, unless already above it are exactly `topk`."""
    rows, width = key.shape
    grouped = key.reshape(rows, COUNT_GROUPS, width // COUNT_GROUPS)

    def count_from(bound: Int32[Array, " R"]) -> Int32[Array, " R"]:
        partial = (grouped >= bound[:, None, None]).astype(jnp.int8).sum(1, dtype=jnp.int8)
        return partial.sum(-1, dtype=jnp.int32)

    def unfinished(state: tuple[Array, Array, Array]) -> Array:
        return ~state[2].all()

    def halve(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        low, high, done = state
        middle = (low & high) + ((low ^ high) >> 1)
        count = count_from(middle)
        exact = count == topk
        new_low = jnp.where(exact, middle - 1, jnp.where(count > topk, middle, low))
        new_high = jnp.where(count < topk, middle, high)
        low, high = jnp.where(done, low, new_low), jnp.where(done, high, new_high)
        return low, high, done | exact | (high - low == 1)

    # Each of topk groups holds a key at or above the smallest of their maxima.
    per_group = width // topk
    low = key[:, : per_group * topk].reshape(rows, per_group, topk).max(1).min(-1)
    high = key.max(-1) + 1
    return lax.while_loop(unfinished, halve, (low, high, high - low == 1))[0]


def _pack(mask: Bool[Array, "R W"]) -> UInt32[Array, "R N"]:
    """32 neighbours to a word, the lowest position in the lowest bit."""
    bits = jnp.uint32(1) << jnp.arange(WORD, dtype=jnp.uint32)
    return jnp.where(mask.reshape(mask.shape[0], -1, WORD), bits, jnp.uint32(0)).sum(-1, dtype=jnp.uint32)


def _first_bits(words: UInt32[Array, "R N"], count: Int32[Array, " R"]) -> UInt32[Array, "R N"]:
    """The words with only their `count` lowest set bits, by position, left."""
    before = jnp.cumsum(lax.population_count(words).astype(jnp.int32), -1) - lax.population_count(words).astype(jnp.int32)
    take = jnp.clip(count[:, None] - before, 0, WORD)
    # The word that is taken in part keeps its bits below the first one that is not.
    end = _nth_set_bit(words, take)
    mask = jnp.where(end >= WORD, jnp.uint32(0xFFFFFFFF), (jnp.uint32(1) << jnp.minimum(end, WORD - 1).astype(jnp.uint32)) - 1)
    return jnp.where(take > 0, words & mask, jnp.uint32(0))


def _set_bits(words: UInt32[Array, "R N"], topk: int, absent: int) -> Int32[Array, "R {topk}"]:
    """Positions of the set bits, ascending; `absent` after the last."""
    rows, n_words = words.shape
    upto = jnp.cumsum(lax.population_count(words).astype(jnp.int32), -1)
    slot = jnp.broadcast_to(jnp.arange(topk, dtype=jnp.int32), (rows, topk))
    word = jnp.zeros((rows, topk), jnp.int32)
    step = 1 << (n_words - 1).bit_length()
    while step:  # binary search for the first word with more than `slot` set bits up to it
        following = word + step
        reached = jnp.take_along_axis(upto, jnp.minimum(following, n_words) - 1, axis=-1, mode="promise_in_bounds")
        word = jnp.where((following <= n_words) & (reached <= slot), following, word)
        step //= 2
    inside = jnp.minimum(word, n_words - 1)
    before = jnp.where(inside > 0, jnp.take_along_axis(upto, jnp.maximum(inside - 1, 0), -1, mode="promise_in_bounds"), 0)
    bit = _nth_set_bit(jnp.take_along_axis(words, inside, -1, mode="promise_in_bounds"), slot - before)
    return jnp.where(word < n_words, inside * WORD + bit, absent)


def _nth_set_bit(words: UInt32[Array, "*shape"], n: Int32[Array, "*shape"]) -> Int32[Array, "*shape"]:
    """Position of the n-th (from 0) set bit; 32 or more where a word has no more than n set bits."""
    position = jnp.zeros(n.shape, jnp.int32)
    beyond = n >= lax.population_count(words).astype(jnp.int32)
    for width in (16, 8, 4, 2, 1):
        low = words & jnp.uint32((1 << width) - 1)
        count = lax.population_count(low).astype(jnp.int32)
        upper = n >= count
        words, n = jnp.where(upper, words >> width, low), jnp.where(upper, n - count, n)
        position = position + jnp.where(upper, width, 0)
    return jnp.where(beyond, WORD, position)
