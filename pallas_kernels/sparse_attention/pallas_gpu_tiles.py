"""Block sizes of the three kernels of sparse attention, and how many programs share a query."""

import dataclasses

import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import tuning
from pallas_kernels.common.gpu_tiles import OTHER_BYTES, Problem, call_shape, padded_width
from pallas_kernels.tuning.kernels import SHARED_BYTES
from pallas_kernels.tuning.tiles import PROCESSORS, SMALLEST_SIDE, SplitTiles, Tiles


@dataclasses.dataclass(frozen=True)
class Options:
    """Block sizes of the three kernels, and whether the gradients of keys and values have the same bits in every run.

    Those of a gradient that are None are chosen where it is computed.

    `deterministic` costs one write and one read of the gradient of every selected key, `budget_bytes` of them at a time.
    Otherwise they are added to memory as they come, in no fixed order. An interpreted kernel needs `deterministic` when a
    query lists a key twice: the interpreter's atomic addition keeps one of the two. `splits` programs share the selection of a
    query in the forward, see `default_splits`.
    """

    forward: Tiles
    d_query: Tiles | None = None
    d_key: Tiles | None = None
    deterministic: bool = False
    budget_bytes: int = 2**28
    splits: int = 1


def default_splits(problem: Problem, tiles: Tiles, queries: int, topk: int) -> int:
    """Programs that share the selection of one query: so many that few queries, as in decoding, keep every processor busy.

    At least 64 selected keys are left to each, and its partial result costs a write and a read. `SplitTiles` say how many
    programs keep a device busy; others take the processors of an H200.
    """
    processors = tiles.programs if isinstance(tiles, SplitTiles) else PROCESSORS
    programs = queries * problem.groups * problem.head_blocks(tiles)
    most = min(processors // max(1, programs), topk // max(64, tiles.block_k))
    return 1 << (max(1, most).bit_length() - 1)


def default_options(problem: Problem, dtype: jnp.dtype, *, queries: int, topk: int) -> Options:
    """Block sizes for an H200; deterministic where the kernels are interpreted.

    Compiled for sm_90a by jax 0.11.2, all fit its shared memory and none spills registers, except the gradients in float32
    with more than 256 channels, and of 1024. Chosen among those that compile; none has been timed. With five stages (three in
    the gradient of the keys) what the next step but one needs is on its way while one is worked on; where that does not fit,
    two stages.

    Raises:
        NotImplementedError: more channels than shared memory holds.
    """
    is_half = dtype.itemsize == 2
    keys, values = padded_width(problem.key_columns), padded_width(problem.value_columns)
    is_wide = max(keys, values) > (256 if is_half else 128)
    gathered = keys if problem.is_shared else keys + values
    most = max(SMALLEST_SIDE, pl.next_power_of_2(problem.heads_per_group))

    def tiles(block_h: int, block_k: int, num_warps: int) -> Tiles:
        return Tiles(min(most, block_h), block_k, num_warps)

    def deeper(tiles: Tiles, num_stages: int, numbers: int) -> Tiles:
        fits = numbers * dtype.itemsize + OTHER_BYTES <= SHARED_BYTES
        return dataclasses.replace(tiles, num_stages=num_stages) if fits else tiles

    def largest(per_head: int, *sizes: tuple[int, int]) -> Tiles:
        """The first of the sizes with which `per_head` numbers of each head and two tiles of keys fit."""
        for block_h, block_k in sizes:
            fitting = tiles(block_h, block_k, 8)
            numbers = fitting.block_h * per_head + 2 * block_k * gathered
            if numbers * dtype.itemsize + OTHER_BYTES <= SHARED_BYTES:
                return fitting
        raise NotImplementedError(
            f"sparse_attention: pallas has no room for {problem.dim} channels of {dtype} in shared memory. Pass "
            "implementation='xla'."
        )

    if is_wide and is_half:
        gradient = largest(keys + values, (32, 32), (16, 32), (16, 16))
        chosen = largest(keys, (64, 32), (32, 32), (32, 16), (16, 16)), gradient, gradient
    elif is_wide:
        chosen = tiles(16, 16, 8), tiles(16, 16, 8), tiles(16, 16, 8)
    elif is_half:
        chosen = tiles(64, 64, 4), tiles(64, 32, 4), tiles(32, 32, 4)
    else:
        chosen = tiles(32, 32, 4), tiles(16, 32, 4), tiles(16, 16, 4)
    forward, d_query, d_key = chosen
    if is_half:
        forward = deeper(forward, 5, forward.block_h * keys + 3 * forward.block_k * gathered)
    if is_half and is_wide:
        larger = dataclasses.replace(d_query, block_k=64)
        larger = deeper(larger, 5, larger.block_h * (keys + values) + 2 * larger.block_k * gathered)
        d_query = larger if larger.num_stages == 5 else d_query
        d_key = deeper(d_key, 3, 2 * d_key.block_k * gathered + 2 * d_key.block_h * (keys + values))
    split = SplitTiles(**dataclasses.asdict(forward))
    splits = default_splits(problem, split, queries, topk)
    return Options(split, d_query, d_key, deterministic=problem.interpret, splits=splits)


def chosen_options(problem: Problem, dtype: jnp.dtype, *, queries: int, keys: int, topk: int) -> Options:
    """`default_options`, with what the tuning table has for the forward; the gradients' tiles are left to `gradient_tiles`."""
    default = default_options(problem, dtype, queries=queries, topk=topk)
    shape = call_shape(problem, dtype, queries=queries, keys=keys, topk=topk)
    forward = tuning.choose_tiles("sparse_attention_forward", shape, default.forward)
    splits = default_splits(problem, forward, queries, topk)
    return Options(forward, deterministic=default.deterministic, splits=splits)


def gradient_tiles(options: Options, problem: Problem, dtype: jnp.dtype, side: str, **sizes: int) -> Tiles:
    """Tiles of the gradient's kernel of a `side`, "d_query" or "d_key": the options', else the table's, else the default."""
    given = getattr(options, side)
    if given is not None:
        return given
    default = getattr(default_options(problem, dtype, queries=1, topk=1), side)
    return tuning.choose_tiles(f"sparse_attention_{side}", call_shape(problem, dtype, **sizes), default)
