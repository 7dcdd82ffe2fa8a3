"""The kernels that have block sizes: what tells one call of each from another, and which sizes are worth a try."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax.numpy as jnp

from pallas_kernels.tuning.tiles import (
    PROCESSORS,
    SMALLEST_SIDE,
    WGMMA_COLUMNS,
    WGMMA_ROWS,
    AnyTiles,
    QueryTiles,
    RowTiles,
    ScanTiles,
    SplitTiles,
    Tiles,
    WarpgroupTiles,
)

Shape = Mapping[str, int | str | bool]
"""Sizes of a call by name: `dtype`; `heads` that share a key; `dim` and `width`, channels of keys and values; whether the
values are `shared` with the keys; `groups`; `queries` (of all batch rows); `keys` (of one); `topk`; `slots`, rows to add up."""

# Of Hopper: bytes of shared memory and 32-bit registers that one program can have, per thread for the latter.
SHARED_BYTES = 232448
REGISTERS = 255


class KernelSpec(NamedTuple):
    """A kernel: its tiles; the parts of a `Shape` that a tuned entry must share with a call, and those it may be near to.

    `numbers(tiles, shape)` are the float32 sums that a program keeps, `loads` the elements of `dtype` that it reads in a step,
    `threads(tiles)` those that share the sums.
    """

    tiles: type[AnyTiles]
    exact: tuple[str, ...]
    sizes: tuple[str, ...]
    numbers: Callable[..., int] = lambda tiles, shape: 0
    loads: Callable[..., int] = lambda tiles, shape: 0
    holds_all_heads: bool = False
    threads: Callable[..., int] = lambda tiles: 32 * tiles.num_warps


def _columns(shape: Shape) -> int:
    """Channels that are gathered per key."""
    return _number(shape, "dim") + (0 if shape.get("shared", True) else _number(shape, "width"))


def _number(shape: Shape, name: str) -> int:
    return int(shape[name])


def _heads_and_keys(tiles: Tiles, shape: Shape) -> int:
    return tiles.block_h * _number(shape, "dim") + tiles.block_k * _columns(shape)


def _and_cotangents(tiles: Tiles, shape: Shape) -> int:
    return _heads_and_keys(tiles, shape) + tiles.block_h * _number(shape, "width")


_ATTENTION = ("dtype", "heads", "dim", "width", "shared")
_INDEXER = ("dtype", "heads", "dim")
_SELECTED = ("groups", "queries", "keys", "topk")
_VISIBLE = ("groups", "queries", "keys")
_FORWARD = KernelSpec(
    SplitTiles, _ATTENTION, _SELECTED, lambda tiles, shape: tiles.block_h * _number(shape, "width"), _heads_and_keys
)


def _head_sums(tiles: type[Tiles], sizes: tuple[str, ...]) -> KernelSpec:
    return KernelSpec(tiles, _INDEXER, sizes, lambda tiles, shape: tiles.block_h * tiles.block_k, _heads_and_keys)


def _index_gradients(sizes: tuple[str, ...], rows: Callable[[Tiles], int]) -> KernelSpec:
    numbers = lambda tiles, shape: rows(tiles) * _number(shape, "dim")
    return KernelSpec(Tiles, _INDEXER, sizes, numbers, _heads_and_keys, holds_all_heads=True)


def _warpgroup_scores(tiles: WarpgroupTiles, shape: Shape) -> int:
    """Queries that stay, and keys of all stages."""
    rows = tiles.block_q * _number(shape, "heads") + tiles.num_stages * tiles.block_k
    return rows * _number(shape, "dim")


_WARPGROUP_SCORES = KernelSpec(
    WarpgroupTiles,
    _INDEXER,
    _VISIBLE,
    lambda tiles, shape: tiles.block_k * max(WGMMA_COLUMNS, _number(shape, "heads")),
    _warpgroup_scores,
    threads=lambda tiles: 128 * tiles.num_warpgroups,
)


KERNELS: dict[str, KernelSpec] = {
    "sparse_attention_forward": _FORWARD,
    "sparse_attention_fp8_forward": _FORWARD,
    "sparse_attention_d_query": KernelSpec(
        Tiles, _ATTENTION, _SELECTED, lambda tiles, shape: tiles.block_h * _number(shape, "dim"), _and_cotangents
    ),
    # Also those of sparse_attention_contributions, which differs from it in where the sums go.
    "sparse_attention_d_key": KernelSpec(
        Tiles, _ATTENTION, _SELECTED, lambda tiles, shape: tiles.block_k * _columns(shape), _and_cotangents
    ),
    "sparse_attention_ordered_sum": KernelSpec(RowTiles, ("width",), ("groups", "keys", "slots")),
    **{f"head_sums_visible_{kind}": _head_sums(QueryTiles, _VISIBLE) for kind in ("scores", "ranked_scores", "probability")},
    **{f"head_sums_selected_{kind}": _head_sums(Tiles, _SELECTED) for kind in ("scores", "probability")},
    **{f"mosaic_{kind}": _WARPGROUP_SCORES for kind in ("scores", "ranked_scores")},
    "index_gradients_selected": _index_gradients(_SELECTED, lambda tiles: tiles.block_h + tiles.block_k),
    "index_gradients_visible_query": _index_gradients(_VISIBLE, lambda tiles: tiles.block_h),
    "index_gradients_visible_key": _index_gradients(_VISIBLE, lambda tiles: tiles.block_k),
    "radix_select": KernelSpec(ScanTiles, (), ("queries", "keys", "topk")),
}


def shape_of(kernel: str, shape: Shape) -> dict[str, int | str | bool]:
    """The parts of `shape` that matter to `kernel`, in the order in which the table writes them."""
    spec = KERNELS[kernel]
    return {name: shape[name] for name in (*spec.exact, *spec.sizes)}


def misfit(kernel: str, tiles: AnyTiles, shape: Shape) -> str | None:
    """Why `kernel` cannot run with `tiles` at `shape` on Hopper, as far as arithmetic tells; None where it may."""
    spec = KERNELS[kernel]
    if spec.holds_all_heads and isinstance(tiles, Tiles) and tiles.block_h < _number(shape, "heads"):
        return f"block_h is {tiles.block_h}; a program of this kernel holds all {shape['heads']} heads"
    per_thread = math.ceil(spec.numbers(tiles, shape) / spec.threads(tiles))
    if per_thread >= REGISTERS:
        return f"its sums take {per_thread} registers of a thread, which has {REGISTERS}"
    size = jnp.dtype(str(shape["dtype"])).itemsize if "dtype" in shape else 4
    if (wanted := spec.loads(tiles, shape) * size) > SHARED_BYTES:
        return f"one step reads {wanted} bytes, more than the {SHARED_BYTES} of shared memory"
    return None


def candidates(kernel: str, default: AnyTiles, shape: Shape, *, limit: int | None = None) -> list[AnyTiles]:
    """Tiles of `kernel` to try at `shape`: `default` first, then those that may fit, the nearest to it first.

    Powers of two, no block larger than its axis, and nothing that `misfit` rules out. The rest may still spill or
    not compile: it has to be tried.

    Args:
        limit: how many at most.
    """
    choices = {field.name: _values(field.name, shape) for field in dataclasses.fields(default)}
    found = [type(default)(**dict(zip(choices, values, strict=True))) for values in itertools.product(*choices.values())]
    found = [tiles for tiles in found if tiles != default and misfit(kernel, tiles, shape) is None]
    found.sort(key=lambda tiles: _distance(dataclasses.asdict(tiles), dataclasses.asdict(default)))
    return [default, *found][:limit]


def has_few_queries(shape: Shape) -> bool:
    """Whether programs may share a query: such a call writes partial results, in float32."""
    return _number(shape, "queries") * int(shape.get("groups", 1)) < 4 * PROCESSORS


def _values(name: str, shape: Shape) -> list[int]:
    """Values that are tried of a field."""
    if name == "num_warps":
        return [2, 4, 8]
    if name == "rows":
        return [WGMMA_ROWS, 2 * WGMMA_ROWS]
    if name == "num_warpgroups":
        return [1, 2, 3, 4]
    if name == "num_stages":
        return [1, 2, 3, 4, 5]
    if name == "programs":
        return [PROCESSORS, 2 * PROCESSORS, 4 * PROCESSORS] if has_few_queries(shape) else [PROCESSORS]
    smallest, largest, of = {
        "block_h": (SMALLEST_SIDE, 128, shape.get("heads", 1)),
        "block_k": (SMALLEST_SIDE, 256, shape.get("topk", shape.get("keys", 1))),
        "block_q": (8, 256, shape.get("queries", 1)),
        "block_rows": (SMALLEST_SIDE, 128, shape.get("slots", 1)),
        "block": (512, 16384, shape.get("keys", 1)),
    }[name]
    largest = max(smallest, min(largest, 1 << (int(of) - 1).bit_length()))
    return [1 << i for i in range(smallest.bit_length() - 1, largest.bit_length())]


def _distance(tiles: Mapping[str, int], default: Mapping[str, int]) -> float:
    return sum(abs(math.log2(size / default[name])) for name, size in tiles.items())
