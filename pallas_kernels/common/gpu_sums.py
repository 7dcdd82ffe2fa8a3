"""Sums of rows by key on a GPU: by atomic addition, or in a fixed order with the same bits every run."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array

from pallas_kernels import tuning
from pallas_kernels.common import gpu_tiles as tiling
from pallas_kernels.common.gpu_tiles import Columns, Problem
from pallas_kernels.tuning.tiles import RowTiles

# Rows after the last key: the first takes what absent keys would get.
SPARE_ROWS = 8


def add_or_store(ref: Any, address: tuple[Array, Array], x: Array, *, is_atomic: bool) -> None:
    """Adds `x` to memory atomically, in no fixed order, or writes it."""
    if is_atomic:
        plt.atomic_add(ref, address, x)
    else:
        plt.store(ref.at[address], x)


def with_columns(problem: Problem, refs: Any) -> list[tuple[Any, tuple[Columns, ...]]]:
    """Every gradient array with the pieces its rows are laid out by."""
    return list(zip(refs, (problem.key_columns, problem.value_columns), strict=False))


def unpad(totals: Sequence[Array], n_keys: int, problem: Problem) -> tuple[Array, Array | None]:
    """(dk, dv) [keys, groups, channels] out of rows laid out by pieces."""
    parts = []
    for total, columns in with_columns(problem, totals):
        by_group = total[:n_keys].reshape(n_keys, problem.groups, -1)
        pieces = [by_group[..., piece.place : piece.place + piece.width] for piece in columns]
        parts.append(pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, -1))
    return parts[0], None if problem.is_shared else parts[1]


def _ordered_sum_kernel(
    order_ref: Any,
    starts_ref: Any,
    parts_ref: Any,
    total_ref: Any,
    out_ref: Any,
    *,
    columns: tuple[Columns, ...],
    block_rows: int,
) -> None:
    """out[key] = total[key] + its contributions in sorted order, `block_rows` at a time."""
    key = pl.program_id(0)
    start, end = starts_ref[key], starts_ref[key + 1]
    offset = pl.program_id(1) * tiling.padded_width(columns)

    @pl.when(start < end)
    def _() -> None:
        for piece in columns:

            def body(i: Array, total: Array, piece: Columns = piece) -> Array:
                slot = start + i * block_rows + jnp.arange(block_rows, dtype=jnp.int32)
                valid = slot < end
                rows = plt.load(order_ref.at[jnp.where(valid, slot, start)])
                address = tiling.full_address(rows, piece, offset)
                mask = jnp.broadcast_to(valid[:, None], address[0].shape)
                return total + plt.load(parts_ref.at[address], mask=mask, other=0).sum(0)

            place = offset + piece.place + jnp.arange(piece.size, dtype=jnp.int32)
            address = jnp.full((piece.size,), key, jnp.int32), place
            total = lax.fori_loop(0, pl.cdiv(end - start, block_rows), body, plt.load(total_ref.at[address]))
            plt.store(out_ref.at[address], total)


def _add_in_order(
    total: Array, parts: Array, order: Array, starts: Array, columns: tuple[Columns, ...], problem: Problem
) -> Array:
    arguments = (order, starts, parts, total)
    sizes = {"groups": problem.groups, "keys": starts.shape[0] - 1, "slots": parts.shape[0]}
    width = sum(piece.width for piece in columns)
    tiles = tuning.choose_tiles("sparse_attention_ordered_sum", {"width": width, **sizes}, RowTiles())
    return tiling.call(
        functools.partial(_ordered_sum_kernel, columns=columns, block_rows=tiles.block_rows),
        problem,
        tiles,
        arguments,
        grid=(starts.shape[0] - 1, problem.groups),
        in_specs=[tiling.whole(x) for x in arguments],
        out_specs=tiling.whole(total),
        out_shape=jax.ShapeDtypeStruct(total.shape, total.dtype),
        input_output_aliases={3: 0},
        name="sparse_attention_ordered_sum",
    )


def add_in_order(totals: Sequence[Array], parts: Sequence[Array], indices: Array, problem: Problem) -> tuple[Array, ...]:
    """Adds to every key the rows of `parts`, one per slot of `indices` [T, K], that its slots hold: sorted, so always alike."""
    n_keys, keys = totals[0].shape[0], indices.reshape(-1)
    keys, order = lax.sort(
        (jnp.where(keys < 0, n_keys, keys), jnp.arange(keys.shape[0], dtype=jnp.int32)), num_keys=1, is_stable=True
    )
    starts = jnp.searchsorted(keys, jnp.arange(n_keys + 1, dtype=jnp.int32)).astype(jnp.int32)
    return tuple(
        _add_in_order(total, part, order, starts, columns, problem)
        for (total, columns), part in zip(with_columns(problem, totals), parts, strict=True)
    )
