"""Arguments that travel together through every op: pytrees of arrays, and the counts of forced keys."""

from typing import NamedTuple

from jaxtyping import Array, Bool, Float, Int32


class Visible(NamedTuple):
    """Visible range of each query: query t of row b sees the keys at positions [start, end), none where start == end.

    The ops clamp bounds outside [0, S]. A known start > end is a ValueError; under `jit` it is an empty range.
    """

    start: Int32[Array, "B T"]
    end: Int32[Array, "B T"]

    @property
    def some(self) -> Bool[Array, "B T"]:
        """True for queries whose range holds a key, False for padding."""
        return self.start < self.end


class IndexHeads(NamedTuple):
    """Index queries, index keys and head weights of the lightning indexer.

    `score[t, s] = sum_h weights[t, h] * relu(q[t, h] . k[s])`. The weights are float32 and signed, with the static scales
    (`n_index_heads ** -0.5 * index_head_dim ** -0.5`) folded in.
    """

    q: Float[Array, "B T Hi Di"]
    k: Float[Array, "B S Di"]
    weights: Float[Array, "B T Hi"]


class ForcedKeys(NamedTuple):
    """Number of the first and of the last visible keys that a selection takes whatever their scores, within its topk."""

    first: int = 0
    last: int = 0


NO_FORCED_KEYS = ForcedKeys()
