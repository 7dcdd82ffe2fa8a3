"""The KV cache: pools of slots, contiguous or paged, in float or fp8.

The cache of a stack of layers is one array [n_layers, n_slots, ...] per entry of a token. Token p of row b lies
in slot `block_table[b, p // page_size] * page_size + p % page_size` of every layer. A contiguous cache has no table: each row
owns one page that holds all of it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from dsa_jax.config.checks import ConfigError
from pallas_kernels.quantize import (
    latent_row_bytes,
    pack_latent_fp8,
    pack_vector_fp8,
    unpack_latent_fp8,
    unpack_vector_fp8,
    vector_row_bytes,
)

CACHE_DTYPES = ("float32", "bfloat16", "fp8")
INDEX_KEYS = "index_keys"
"""Name of the entry that holds the keys of the lightning indexer."""


class CacheEntry(NamedTuple):
    """One array that a token leaves in a layer: a key, a value, a latent or an index key.

    Fields: `shape` of its elements; `latent_dim` None for vectors, which have one fp8 scale each, else the number of leading
    channels that form an MLA latent, the rest being its rotated channels.
    """

    shape: tuple[int, ...]
    latent_dim: int | None = None

    def storage(self, dtype: str) -> tuple[tuple[int, ...], Any]:
        """Shape and dtype in which a token's elements are stored.

        bfloat16 as its bits: XLA on CPU has no bfloat16 scatter and would widen a whole pool to write one token.
        """
        if dtype != "fp8":
            return self.shape, jnp.dtype("uint16" if dtype == "bfloat16" else dtype)
        if self.latent_dim is None:
            return (*self.shape[:-1], vector_row_bytes(self.shape[-1])), jnp.dtype("uint8")
        return (latent_row_bytes(self.latent_dim, self.shape[-1] - self.latent_dim),), jnp.dtype("uint8")

    def encode(self, x: Float[Array, "..."], dtype: str) -> Shaped[Array, "..."]:
        """Numbers [..., *shape] as they are kept."""
        if dtype == "bfloat16":
            return jax.lax.bitcast_convert_type(x.astype(dtype), jnp.uint16)
        if dtype != "fp8":
            return x.astype(dtype)
        if self.latent_dim is None:
            return pack_vector_fp8(x)
        return pack_latent_fp8(x[..., : self.latent_dim], x[..., self.latent_dim :])

    def decode(self, stored: Shaped[Array, "..."], dtype: str, out_dtype: Any) -> Float[Array, "..."]:
        """Inverse of `encode`, up to its rounding."""
        if dtype == "bfloat16":
            return jax.lax.bitcast_convert_type(stored, jnp.bfloat16).astype(out_dtype)
        if dtype != "fp8":
            return stored.astype(out_dtype)
        if self.latent_dim is None:
            return unpack_vector_fp8(stored).astype(out_dtype)
        return jnp.concatenate(unpack_latent_fp8(stored, self.latent_dim), axis=-1).astype(out_dtype)


@jax.tree_util.register_static
@dataclass(frozen=True)
class CacheLayout:
    """Storage of the entries; static, a pytree without leaves.

    Fields: `dtype` one of `CACHE_DTYPES`; `page_size` tokens per page; `entries` of a layer of each stack.
    """

    dtype: str
    page_size: int
    entries: tuple[tuple[str, tuple[tuple[str, CacheEntry], ...]], ...]

    def stack_entries(self, stack: str) -> dict[str, CacheEntry]:
        """The entries of one stack by name."""
        return dict(dict(self.entries)[stack])


class Cache(NamedTuple):
    """Everything that `Transformer.extend` needs of the past: a pytree, to be donated to the step that returns the next one.

    Fields:
        pools: of each stack, its entries [n_layers, n_slots, ...].
        block_table: pages of each row in order, -1 where it owns none; None for a contiguous cache.
        lengths: tokens held per row.
        layout: see there.
    """

    pools: dict[str, dict[str, Shaped[Array, "..."]]]
    block_table: Int[Array, "B P"] | None
    lengths: Int[Array, " B"]
    layout: CacheLayout

    @property
    def capacity(self) -> int:
        """Tokens that a row can hold, if it owns every page that its table has room for."""
        return self.layout.page_size * (1 if self.block_table is None else self.block_table.shape[1])

    @property
    def n_bytes(self) -> int:
        """Bytes of all pools."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.pools))


def allocate_cache(
    stacks: Mapping[str, tuple[int, Mapping[str, CacheEntry]]],
    *,
    n_rows: int,
    capacity: int,
    dtype: str,
    page_size: int | None,
    n_pages: int | None,
    block_table: Int[Array, "B P"] | None,
) -> Cache:
    """An empty cache; `stacks` gives the number of layers and the entries of each stack. Arguments as in `init_cache`."""
    if dtype not in CACHE_DTYPES:
        raise ConfigError(f"the cache dtype is {dtype!r}; expected one of {', '.join(CACHE_DTYPES)}.")
    if n_rows < 1 or capacity < 1:
        raise ConfigError(f"a cache of {n_rows} rows of {capacity} tokens holds nothing; expected at least one of each.")
    if page_size is None:
        if n_pages is not None or block_table is not None:
            raise ConfigError("n_pages and block_table are for a paged cache; expected page_size with them. Pass page_size=64.")
        tokens_per_page, n_pages = capacity, n_rows
    else:
        if page_size < 1:
            raise ConfigError(f"page_size is {page_size}; expected at least 1, or None for a contiguous cache.")
        tokens_per_page, pages_per_row = page_size, -(-capacity // page_size)
        if n_pages is None:
            n_pages = n_rows * pages_per_row
        if block_table is None:
            if n_pages < n_rows * pages_per_row:
                raise ConfigError(
                    f"{n_pages} pages of {page_size} tokens are too few for {n_rows} rows of {capacity}; expected "
                    f"{n_rows * pages_per_row}, or a block_table that says which rows own fewer."
                )
            block_table = jnp.arange(n_rows * pages_per_row, dtype=jnp.int32).reshape(n_rows, pages_per_row)
        if block_table.shape != (n_rows, pages_per_row):
            raise ConfigError(
                f"block_table has shape {list(block_table.shape)}; expected {[n_rows, pages_per_row]}, one row of pages for "
                f"each of {n_rows} rows of {capacity} tokens."
            )
    pools = {
        name: {
            entry: jnp.zeros((n_layers, n_pages * tokens_per_page, *kind.storage(dtype)[0]), kind.storage(dtype)[1])
            for entry, kind in entries.items()
        }
        for name, (n_layers, entries) in stacks.items()
    }
    layout = CacheLayout(dtype, tokens_per_page, tuple((name, tuple(e.items())) for name, (_, e) in stacks.items()))
    return Cache(pools, block_table, jnp.zeros(n_rows, jnp.int32), layout)


class LayerCache(NamedTuple):
    """One layer's share of a stack's pools, as its attention sees it: write the new tokens, then read.

    Fields: `pools` of the whole stack; `layer` within it; `entries`, `dtype` and `page_size` as in `CacheLayout`; `block_table`
    as in `Cache`; `new_slots` where the new tokens go, n_slots (beyond the pool) for those that are not to be kept.
    """

    pools: dict[str, Shaped[Array, "..."]]
    layer: Int[Array, ""]
    entries: dict[str, CacheEntry]
    dtype: str
    page_size: int
    block_table: Int[Array, "B P"] | None
    new_slots: Int[Array, "B T"]

    @property
    def capacity(self) -> int:
        """Tokens that a row can hold."""
        return self.page_size * (1 if self.block_table is None else self.block_table.shape[1])

    def write(self, name: str, rows: Float[Array, "B T ..."]) -> "LayerCache":
        """The cache with the new tokens' `rows` in it."""
        stored = self.entries[name].encode(rows, self.dtype)
        pool = self.pools[name].at[self.layer, self.new_slots].set(stored, mode="drop")
        return self._replace(pools=self.pools | {name: pool})

    def read(self, name: str, out_dtype: Any) -> Float[Array, "B S ..."]:
        """Every position of every row, new tokens included; positions that hold no token are finite garbage."""
        pool = jax.lax.dynamic_index_in_dim(self.pools[name], self.layer, keepdims=False)
        pages = pool.reshape(-1, self.page_size, *pool.shape[1:])
        if self.block_table is not None:
            pages = pages.at[jnp.maximum(self.block_table, 0)].get(mode="clip")
        stored = pages.reshape(-1, self.capacity, *pool.shape[1:])
        return self.entries[name].decode(stored, self.dtype, out_dtype)

    def gather(self, name: str, positions: Int[Array, "B T K"], out_dtype: Any) -> Float[Array, "B T K ..."]:
        """Only the tokens at `positions` of their row; negative positions give finite garbage."""
        slots = token_slots(positions, positions >= 0, self.block_table, self.page_size, n_slots=0)
        stored = self.pools[name].at[self.layer, slots].get(mode="clip")
        return self.entries[name].decode(stored, self.dtype, out_dtype)


def token_slots(
    positions: Int[Array, "B ..."],
    valid: Bool[Array, "B ..."],
    block_table: Int[Array, "B P"] | None,
    page_size: int,
    *,
    n_slots: int,
) -> Int[Array, "B ..."]:
    """Slot of each position of each row; `n_slots` where it is not `valid` or lies in no page that the row owns."""
    n_rows = positions.shape[0]
    # A contiguous cache is one in which row b owns page b.
    table = jnp.arange(n_rows, dtype=jnp.int32)[:, None] if block_table is None else block_table
    page_number = positions // page_size
    known = valid & (page_number < table.shape[1])
    rows = jnp.arange(n_rows, dtype=jnp.int32).reshape(-1, *[1] * (positions.ndim - 1))
    page = table[rows, jnp.where(known, page_number, 0)]
    return jnp.where(known & (page >= 0), page * page_size + positions % page_size, n_slots)
