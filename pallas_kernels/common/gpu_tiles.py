"""Toolkit of the Pallas kernels: rows gathered by index, channels cut into powers of two, matmuls, and the call itself."""

import dataclasses
import functools
import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array

from pallas_kernels import tuning
from pallas_kernels.common.dispatch import traced_platform
from pallas_kernels.common.mesh import varying_structs
from pallas_kernels.tuning.tiles import SMALLEST_SIDE, RowTiles, Tiles

# More pieces than this would cost more instructions per key than they save.
MOST_PIECES = 4
LOG2_E = math.log2(math.e)
# Shared memory that is left to weights and partial sums when it is decided how much is gathered ahead.
OTHER_BYTES = 8192
HALF_AND_SINGLE = ("bfloat16", "float16", "float32")

Refs = dict[str, Any]


class Columns(NamedTuple):
    """Channels [start, start + width), held as `size` (a power of two) columns; `place` counts columns of earlier pieces."""

    start: int
    width: int
    size: int
    place: int


@dataclasses.dataclass(frozen=True)
class Problem:
    """The static half of a call: sizes, scale, and how the channels are cut.

    `is_shared`: the values lead the keys; `piece`: they are cut at its multiples, too.
    """

    heads: int
    groups: int
    dim: int
    width: int
    is_shared: bool
    softmax_scale: float
    interpret: bool
    piece: int | None = None

    @property
    def heads_per_group(self) -> int:
        """Heads that read the same keys."""
        return self.heads // self.groups

    @property
    def key_columns(self) -> tuple[Columns, ...]:
        """Pieces of a key; where it holds the value, the value's pieces come first."""
        return cut_columns(*self._value_bounds, self.dim) if self.is_shared else cut_columns(0, self.dim)

    @property
    def value_columns(self) -> tuple[Columns, ...]:
        """Pieces of a value."""
        return cut_columns(*self._value_bounds)

    @property
    def _value_bounds(self) -> tuple[int, ...]:
        return (*range(0, self.width, self.piece or self.width), self.width)

    def head_blocks(self, tiles: Tiles) -> int:
        """Blocks of heads in a group."""
        return pl.cdiv(self.heads_per_group, tiles.block_h)


def cut_columns(*bounds: int) -> tuple[Columns, ...]:
    """Cuts the channels between consecutive bounds into powers of two, largest first; a short rest is filled up to 16."""
    pieces: list[Columns] = []
    place = 0
    for start, stop in itertools.pairwise(bounds):
        while start < stop:
            size = max(SMALLEST_SIDE, 1 << ((stop - start).bit_length() - 1))
            width = min(size, stop - start)
            pieces.append(Columns(start, width, size, place))
            start, place = start + width, place + size
    if len(pieces) > max(MOST_PIECES, len(bounds) - 1):
        raise NotImplementedError(
            f"pallas cuts channels into powers of two, and {bounds[-1]} channels need {len(pieces)} pieces; "
            f"at most {MOST_PIECES} are supported. Pass implementation='xla'."
        )
    return tuple(pieces)


def padded_width(columns: Sequence[Columns]) -> int:
    """Columns of all pieces together."""
    return sum(piece.size for piece in columns)


def call_shape(problem: Problem, dtype: jnp.dtype, *, queries: int, keys: int, topk: int = 0) -> tuning.Shape:
    """Shape for the tuning table; `queries` of all batch rows, `keys` of one."""
    channels = {"dim": problem.dim, "width": problem.width, "shared": problem.is_shared}
    sizes = {"groups": problem.groups, "queries": queries, "keys": keys, "topk": topk}
    return {"dtype": dtype.name, "heads": problem.heads_per_group, **channels, **sizes}


def _address(rows: Array, piece: Columns, offset: Array | int) -> tuple[tuple[Array, Array], Array | None]:
    # Both index arrays in full: the interpreter does not mix arrays and slices.
    shape = (rows.shape[0], piece.size)
    column = jnp.broadcast_to(jnp.arange(piece.size, dtype=jnp.int32)[None], shape)
    exists = None if piece.width == piece.size else column < piece.width
    return (jnp.broadcast_to(rows[:, None], shape), column + (offset + piece.start)), exists


def _both(valid: Array | None, exists: Array | None, size: int) -> Array | None:
    if valid is None:
        return exists
    rows = jnp.broadcast_to(valid[:, None], (valid.shape[0], size))
    return rows if exists is None else rows & exists


def load_rows(ref: Any, rows: Array, piece: Columns, *, offset: Array | int = 0, valid: Array | None) -> Array:
    """[rows, piece.size] out of a matrix; zeros where a row is not valid or the channel does not exist."""
    index, exists = _address(rows, piece, offset)
    mask = _both(valid, exists, piece.size)
    return plt.load(ref.at[index], mask=mask, other=None if mask is None else 0.0)


def store_rows(ref: Any, rows: Array, piece: Columns, value: Array, *, valid: Array | None) -> None:
    """Writes the valid rows and existing channels of `value` into a matrix."""
    index, exists = _address(rows, piece, 0)
    plt.store(ref.at[index], value.astype(ref.dtype), mask=_both(valid, exists, piece.size))


def full_address(rows: Array, piece: Columns, offset: Array | int = 0) -> tuple[Array, Array]:
    """Index arrays of all `piece.size` columns of a matrix that is laid out by pieces."""
    return _address(rows, Columns(piece.place, piece.size, piece.size, piece.place), offset)[0]


class KeyTile(NamedTuple):
    """Gathered keys and values, by pieces, and where they came from."""

    keys: list[Array]
    values: list[Array]
    rows: Array
    valid: Array


def load_slots(refs: Refs, number: Array, block_k: int) -> tuple[Array, Array]:
    """(rows, valid) that slots [number * block_k, ...) select; row 0 where the slot is empty."""
    selected = refs["indices"][pl.ds(number * block_k, block_k)]
    valid = selected >= 0
    return jnp.where(valid, selected, 0), valid


def load_keys(refs: Refs, problem: Problem, group: Array | int, number: Array, block_k: int) -> KeyTile:
    """Gathers the keys of a tile of slots; an empty slot reads nothing and gets zeros."""
    rows, valid = load_slots(refs, number, block_k)
    read = functools.partial(load_rows, rows=rows, valid=valid)
    keys = [read(refs["k"], piece=piece, offset=group * problem.dim) for piece in problem.key_columns]
    if problem.is_shared:
        return KeyTile(keys, keys[: len(problem.value_columns)], rows, valid)
    values = [read(refs["v"], piece=piece, offset=group * problem.width) for piece in problem.value_columns]
    return KeyTile(keys, values, rows, valid)


LoadKeys = Callable[[Refs, Problem, Array | int, Array, int], KeyTile]
"""`load_keys`, or another function that reads the keys of a tile."""


class HeadBlock(NamedTuple):
    """Heads one program works on: rows of q, and which of them exist (None: all)."""

    rows: Array
    valid: Array | None


def head_block(problem: Problem, group: Array | int, number: Array | int, block_h: int) -> HeadBlock:
    """Block `number` of the heads of `group`."""
    within = number * block_h + jnp.arange(block_h, dtype=jnp.int32)
    is_full = problem.heads_per_group % block_h == 0
    rows = group * problem.heads_per_group + within
    return HeadBlock(rows, None if is_full else within < problem.heads_per_group)


def load_heads(ref: Any, heads: HeadBlock, columns: Sequence[Columns]) -> list[Array]:
    """Rows of q or d_out, by pieces."""
    return [load_rows(ref, heads.rows, piece, valid=heads.valid) for piece in columns]


def load_per_head(ref: Any, heads: HeadBlock) -> Array:
    """One number per head."""
    return plt.load(ref.at[heads.rows], mask=heads.valid, other=None if heads.valid is None else 0)


def multiply(a: Array, b: Array, *, trans_a: bool = False, trans_b: bool = False) -> Array:
    """a @ b, either side transposed, in float32; float32 operands are not rounded to tf32."""
    return plt.dot(a, b, trans_a=trans_a, trans_b=trans_b, precision=jax.lax.Precision.HIGHEST)


def sum_of_products(a: Sequence[Array], b: Sequence[Array], scale: float = 1.0) -> Array:
    """scale * a @ b.T over all pieces.

    Each matmul is scaled by itself: otherwise Triton starts one from the sum of those before, and computes a matmul that feeds
    another in every warpgroup anew.
    """
    products = [multiply(x, y, trans_b=True) for x, y in zip(a, b, strict=True)]
    return functools.reduce(jnp.add, products if scale == 1.0 else [x * scale for x in products])


def relu(x: Array, problem: Problem) -> Array:
    """max(x, 0) in float32, NaN where x is: Triton's own maximum takes the number of a number and NaN."""
    if problem.interpret:
        return jnp.maximum(x, 0.0)
    shape = jax.ShapeDtypeStruct(x.shape, jnp.float32)
    asm = "max.NaN.f32 $0, $1, 0f00000000;"
    (y,) = plt.elementwise_inline_asm(asm, args=[x], constraints="=f,f", pack=1, result_shape_dtypes=[shape])
    return y


def each(count: Array | int) -> Callable[[Callable[[Array], None]], None]:
    """Decorator that runs a function of the step, for its effects, `count` times."""

    def run(function: Callable[[Array], None]) -> None:
        def body(i: Array, carry: tuple[()]) -> tuple[()]:
            function(i)
            return carry

        lax.fori_loop(0, count, body, ())

    return run


def is_interpreted(op: str) -> bool:
    """Whether the kernels of `op` are interpreted here: on CPU; on an NVIDIA GPU they are compiled.

    Raises:
        NotImplementedError: on any other device.
    """
    platform = traced_platform()
    if platform not in ("cpu", "gpu"):
        raise NotImplementedError(
            f"{op}: pallas runs on NVIDIA GPUs, and interpreted on CPU; this is {platform!r}. Pass implementation='xla'."
        )
    return platform == "cpu"


def check_dtypes(
    op: str, names: str, *arrays: Array | None, allowed: Sequence[str] = HALF_AND_SINGLE, implementation: str = "pallas"
) -> None:
    """Raises NotImplementedError unless all arrays, called `names`, have one and the same of the allowed dtypes."""
    found = {x.dtype.name for x in arrays if x is not None}
    if len(found) != 1 or not found <= set(allowed):
        raise NotImplementedError(
            f"{op}: {implementation} got {', '.join(sorted(found))}; it needs {names} of one dtype out of "
            f"{', '.join(allowed)}. Cast them, or pass implementation='xla'."
        )


def check_offsets(op: str, name: str, array: Array) -> None:
    """Raises NotImplementedError for numbers of one byte of which the last have no offset in int32.

    Pallas takes 64-bit offsets from 2^32 bytes on, as if no number were smaller than two bytes.
    """
    if array.dtype.itemsize == 1 and 2**31 < array.size <= 2**32:
        raise NotImplementedError(
            f"{op}: pallas reads at most 2^31 numbers of one byte; {name} has {array.size}. Split it, or pass "
            "implementation='xla'."
        )


def call(
    kernel: Callable[..., None],
    problem: Problem,
    tiles: Tiles | RowTiles,
    arguments: tuple[Any, ...],
    *,
    out_shape: Any,
    **kwargs: Any,
) -> Any:
    """`pl.pallas_call` through Triton, or interpreted.

    Lowering happens when the program around it is compiled, so the one warning that it is deprecated is ignored by name.
    """
    if not problem.interpret:
        warnings.filterwarnings("ignore", message="The Pallas Triton backend is deprecated", category=DeprecationWarning)
    parameters = plt.CompilerParams(num_warps=tiles.num_warps, num_stages=tiles.num_stages)
    # The kernels count in int32, with which a Python integer does not mix where 64-bit types are enabled.
    with jax.enable_x64(False):
        return pl.pallas_call(
            kernel,
            out_shape=varying_structs(out_shape, arguments),
            compiler_params=parameters,
            interpret=problem.interpret,
            **kwargs,
        )(*arguments)


def whole(x: Array | jax.ShapeDtypeStruct) -> pl.BlockSpec:
    """The whole array, to be addressed by index."""
    return pl.BlockSpec(x.shape, lambda *_: (0,) * len(x.shape))


def per_query(x: Array | jax.ShapeDtypeStruct) -> pl.BlockSpec:
    """One query of [T, ...], T being the first axis of the grid."""
    return pl.BlockSpec((None, *x.shape[1:]), lambda t, *_: (t,) + (0,) * (len(x.shape) - 1))


def per_row(x: Array | jax.ShapeDtypeStruct) -> pl.BlockSpec:
    """One batch row of [B, ...], B being the first axis of the grid."""
    return pl.BlockSpec((None, *x.shape[1:]), lambda b, *_: (b,) + (0,) * (len(x.shape) - 1))


def key_inputs(k: Array, v: Array | None) -> dict[str, Array]:
    """Keys and values as matrices, which kernels get whole."""
    keys = {"k": k.reshape(k.shape[0], -1)}
    return keys if v is None else {**keys, "v": v.reshape(v.shape[0], -1)}


def slot_inputs(indices: Array, tiles: Tiles) -> dict[str, Array]:
    """The selection, padded to whole tiles; `length` counts slots up to the last valid one, so that padding costs nothing."""
    topk = indices.shape[1]
    length = jnp.where(indices >= 0, jnp.arange(1, topk + 1, dtype=jnp.int32), 0).max(1)
    indices = jnp.pad(indices, ((0, 0), (0, -topk % tiles.block_k)), constant_values=-1)
    return {"indices": indices, "length": length[:, None]}


def common_inputs(q: Array, k: Array, v: Array | None, indices: Array, tiles: Tiles) -> dict[str, Array]:
    """Inputs of every kernel that reads keys by index."""
    return {"q": q, **key_inputs(k, v), **slot_inputs(indices, tiles)}


def specs(refs: dict[str, Array]) -> dict[str, pl.BlockSpec]:
    """Keys and values whole, everything else one query at a time."""
    return {name: whole(x) if name in ("k", "v") else per_query(x) for name, x in refs.items()}
