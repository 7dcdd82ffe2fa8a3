"""Walking over query chunks and key blocks, so that an op touches only keys that some query of the chunk can see."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool

from pallas_kernels.common.numerics import clamped
from pallas_kernels.types import Visible


class KeyBlock(NamedTuple):
    """One block of consecutive keys.

    The last block of a length that is no multiple of the block size starts early and overlaps the one before, which spares
    padding the keys; `visible` leaves out what the earlier block covered.
    """

    first: Array  # position of the first key, scalar int32
    visible: Bool[Array, "B C Sb"]


class KeyWalk(NamedTuple):
    """The key blocks [low, high) a chunk of queries has to visit."""

    low: Array
    high: Array
    visible: Visible  # bounds within the keys
    n_keys: int
    block_k: int

    def first_key(self, number: Array) -> Array:
        """Position of the first key of a block."""
        return jnp.minimum(number * self.block_k, self.n_keys - self.block_k)

    def in_range(self, first: Array) -> Bool[Array, "B C Sb"]:
        """True for those of the `block_k` keys from `first` on that a query sees."""
        position = first + jnp.arange(self.block_k, dtype=jnp.int32)
        return (position >= self.visible.start[..., None]) & (position < self.visible.end[..., None])

    def block(self, number: Array) -> KeyBlock:
        """Block `number` with what each query may see of it."""
        first = self.first_key(number)
        position = first + jnp.arange(self.block_k, dtype=jnp.int32)
        return KeyBlock(first, self.in_range(first) & (position >= number * self.block_k))


def key_walk(visible: Visible, n_keys: int, block_k: int) -> KeyWalk:
    """The blocks that hold a key that some query sees; `n_keys` must be positive."""
    block_k = min(block_k, n_keys)
    visible = clamped(visible, n_keys)
    high = (jnp.where(visible.some, visible.end, 0).max() + block_k - 1) // block_k
    low = jnp.minimum(jnp.where(visible.some, visible.start, n_keys).min() // block_k, high)
    return KeyWalk(low, high, visible, n_keys, block_k)


def slice_chunk(array: Array, first: Array, size: int) -> Array:
    """array[:, first : first + size]."""
    return lax.dynamic_slice_in_dim(array, first, size, axis=1)


def add_to_chunk(array: Array, update: Array, first: Array) -> Array:
    """Adds `update` to array[:, first : first + size]."""
    return lax.dynamic_update_slice_in_dim(array, slice_chunk(array, first, update.shape[1]) + update, first, axis=1)


def query_chunks(length: int, block_q: int) -> tuple[int, int]:
    """(number of chunks, queries per chunk) that cover `length` queries with the least padding."""
    count = max(1, -(-length // max(1, block_q)))
    return count, -(-length // count)


def pad_queries(arrays: Any, length: int) -> Any:
    """Pads axis 1 of every array to `length`: integers with -1 (the query sees and selects nothing), others with 0."""

    def pad(x: Array) -> Array:
        widths = [(0, 0), (0, length - x.shape[1])] + [(0, 0)] * (x.ndim - 2)
        return jnp.pad(x, widths, constant_values=-1 if jnp.issubdtype(x.dtype, jnp.integer) else 0)

    return jax.tree.map(pad, arrays)


def map_queries(step: Callable[[Any], Any], arrays: Any, block_q: int, *, per_step: int = 1) -> Any:
    """Applies `step` to chunks of `block_q` queries (axis 1 of every array) and joins the results.

    Groups of `per_step` chunks go one after the other; XLA may run the chunks of a group side by side.
    """

    def group(carry: tuple[()], chunk: Any) -> tuple[tuple[()], Any]:
        length = jax.tree.leaves(chunk)[0].shape[1]
        cuts = [(first, min(first + block_q, length)) for first in range(0, length, block_q)] or [(0, 0)]
        parts = [step(jax.tree.map(lambda x, cut=cut: x[:, slice(*cut)], chunk)) for cut in cuts]
        return carry, jax.tree.map(lambda *pieces: jnp.concatenate(pieces, axis=1), *parts)

    return scan_queries(group, (), arrays, block_q * per_step)[1]


def scan_queries(step: Callable[[Any, Any], tuple[Any, Any]], carry: Any, arrays: Any, block_q: int) -> tuple[Any, Any]:
    """`lax.scan` of `step(carry, chunk)` over chunks of queries: (carry, results joined along axis 1).

    A backward pass through it recomputes the chunks.
    """
    length = jax.tree.leaves(arrays)[0].shape[1]
    count, size = query_chunks(length, block_q)
    if count == 1:
        return step(carry, arrays)
    padded = pad_queries(arrays, count * size)

    # Even where nothing is differentiated: in a scan over layers, JAX takes whatever depends on no data out of the layer, and
    # would hold a copy of it for every chunk, which is several arrays of T x S elements in a selection.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def body(carry: Any, number: Array) -> tuple[Any, Any]:
        return step(carry, jax.tree.map(lambda x: slice_chunk(x, number * size, size), padded))

    carry, stacked = lax.scan(body, carry, jnp.arange(count, dtype=jnp.int32))

    def join(x: Array) -> Array:
        joined = jnp.moveaxis(x, 0, 1)
        return joined.reshape(x.shape[1], count * size, *x.shape[3:])[:, :length]

    return carry, jax.tree.map(join, stacked)


def rows_per_chunk(budget: int, per_query: int, smallest: int = 8, largest: int = 256) -> int:
    """Queries per chunk so that `per_query` elements for each stay within `budget`, within the given limits."""
    return max(smallest, min(largest, budget // max(1, per_query)))
