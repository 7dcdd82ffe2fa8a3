"""Sparse attention in Pallas for NVIDIA GPUs (through Triton): keys are gathered by index straight into the kernel.

Two query-parallel kernels (forward, gradient of q) hold a block of heads and walk over the selected keys; a third (gradient of
k and v, in `pallas_gpu_backward`) holds a tile of selected keys and walks over the heads. On CPU the kernels are interpreted.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.dtypes import float0
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int32

from pallas_kernels.common import gpu_tiles as tiling
from pallas_kernels.common.gpu_tiles import LOG2_E, Problem, Refs, Tiles
from pallas_kernels.common.numerics import values_of
from pallas_kernels.sparse_attention import pallas_gpu_backward as backward
from pallas_kernels.sparse_attention import pallas_gpu_tiles as block_sizes
from pallas_kernels.sparse_attention.pallas_gpu_tiles import Options
from pallas_kernels.sparse_attention.xla import join_batch, join_batch_indices
from pallas_kernels.tuning.tiles import WGMMA_ROWS


def sparse_attention(
    q: Float[Array, "B T H Dk"],
    k: Float[Array, "B S G Dk"],
    v: Float[Array, "B S G Dv"] | None,
    topk_indices: Int32[Array, "B T K"],
    *,
    softmax_scale: float,
    d_v: int | None,
    deterministic: bool = False,
    options: Options | None = None,
    interpret: bool | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
    """(out, lse); differentiable in q, k and v. Matmuls accumulate in float32.

    Args:
        deterministic: sets it in the options.
        options: block sizes and determinism; None takes `pallas_gpu_tiles.chosen_options`.
        interpret: run the kernels without a GPU; None does so on CPU.

    Raises:
        NotImplementedError: a dtype, device or number of channels that the kernels do not cover.
    """
    width = values_of(k, v, d_v).shape[-1]
    tiling.check_dtypes("sparse_attention", "q, k and v", q, k, v)
    interpret = tiling.is_interpreted("sparse_attention") if interpret is None else interpret
    if 0 in (q.size, width, k.shape[1], topk_indices.shape[2]):
        return jnp.zeros((*q.shape[:3], width), q.dtype), jnp.full(q.shape[:3], -jnp.inf, jnp.float32)
    problem = Problem(
        q.shape[2], k.shape[2], q.shape[3], width, is_shared=v is None, softmax_scale=float(softmax_scale), interpret=interpret
    )
    if options is None:
        sizes = {"queries": q.shape[0] * q.shape[1], "keys": k.shape[1], "topk": topk_indices.shape[2]}
        options = block_sizes.chosen_options(problem, q.dtype, **sizes)
    options = dataclasses.replace(options, deterministic=deterministic or options.deterministic)
    places = join_batch_indices(topk_indices, k.shape[1])[0]
    values = None if v is None else join_batch(v)[0]
    out, lse = _attend(join_batch(q)[0], join_batch(k)[0], values, places, problem, options)
    return out.reshape(*q.shape[:3], width), lse.reshape(q.shape[:3])


def _forward_kernel(
    refs: Refs, out_ref: Any, lse_ref: Any, *, problem: Problem, tiles: Tiles, load: tiling.LoadKeys = tiling.load_keys
) -> None:
    blocks = problem.head_blocks(tiles)
    group, number = lax.div(pl.program_id(1), blocks), lax.rem(pl.program_id(1), blocks)
    length = refs["length"][0]
    # A zero that the compiler cannot see: with one block of heads it would compute addresses before the loop, and spill.
    hidden_zero = jnp.minimum(length, 0)
    heads = tiling.head_block(problem, group, number + hidden_zero, tiles.block_h)
    q = tiling.load_heads(refs["q"], heads, problem.key_columns)

    def body(i: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        largest, total, *sums = carry
        tile = load(refs, problem, group, i, tiles.block_k)

        def weigh() -> tuple[Array, ...]:
            logits = tiling.sum_of_products(q, tile.keys, problem.softmax_scale * LOG2_E)
            logits = jnp.where(tile.valid[None], logits, -jnp.inf)
            new = jnp.maximum(largest, logits.max(-1))
            shift = jnp.where(new == -jnp.inf, 0.0, new)
            weights = jnp.exp2(logits - shift[:, None])
            return new, jnp.exp2(largest - shift), weights.sum(-1), weights.astype(tile.values[0].dtype)

        def skip() -> tuple[Array, ...]:
            nothing = jnp.full((tiles.block_h, tiles.block_k), hidden_zero, jnp.float32).astype(tile.values[0].dtype)
            return largest, jnp.ones_like(total), jnp.zeros_like(total), nothing

        # This branch is always taken: without it Triton replicates the first matmul across warpgroups instead of splitting it.
        # A constant zero to skip with would take shared memory.
        is_divided = tiles.num_warps > 4 and tiles.block_h >= WGMMA_ROWS
        new, decay, added, weights = lax.cond(i * tiles.block_k < length, weigh, skip) if is_divided else weigh()
        sums = [x * decay[:, None] + tiling.multiply(weights, value) for x, value in zip(sums, tile.values, strict=True)]
        return new, total * decay + added, *sums

    start = jnp.full((tiles.block_h,), -jnp.inf, jnp.float32), jnp.zeros((tiles.block_h,), jnp.float32)
    empty = [jnp.zeros((tiles.block_h, piece.size), jnp.float32) for piece in problem.value_columns]
    largest, total, *sums = lax.fori_loop(0, pl.cdiv(length, tiles.block_k), body, (*start, *empty))
    is_empty = total == 0.0  # not by the largest, which passes over NaN
    total = jnp.where(is_empty, 1.0, total)
    for piece, x in zip(problem.value_columns, sums, strict=True):
        tiling.store_rows(out_ref, heads.rows, piece, x / total[:, None], valid=heads.valid)
    lse = jnp.where(is_empty, -jnp.inf, largest / LOG2_E + jnp.log(total))
    plt.store(lse_ref.at[heads.rows], lse, mask=heads.valid)


def forward(
    q: Array,
    keys: Refs,
    indices: Array,
    problem: Problem,
    tiles: Tiles,
    splits: int,
    *,
    load: tiling.LoadKeys = tiling.load_keys,
    name: str = "sparse_attention_forward",
) -> tuple[Array, Array]:
    """(out, lse) of queries [T, H, D] over the keys in arrays that are handed to the kernel whole.

    With `splits` the selection of a query is shared by as many programs, whose results are joined by their lse.
    """
    length, topk = indices.shape
    per_split = pl.cdiv(pl.cdiv(topk, splits), tiles.block_k) * tiles.block_k
    indices = jnp.pad(indices, ((0, 0), (0, splits * per_split - topk)), constant_values=-1).reshape(-1, per_split)
    refs = {"q": q, **keys, **tiling.slot_inputs(indices, tiles)}
    outputs = [
        jax.ShapeDtypeStruct((length * splits, problem.heads, problem.width), q.dtype if splits == 1 else jnp.float32),
        jax.ShapeDtypeStruct((length * splits, problem.heads), jnp.float32),
    ]
    specs = {name: tiling.whole(x) if name in keys else tiling.per_query(x) for name, x in refs.items()}
    specs["q"] = pl.BlockSpec((None, *q.shape[1:]), lambda t, *_: (lax.div(t, splits), 0, 0))
    out, lse = tiling.call(
        functools.partial(_forward_kernel, problem=problem, tiles=tiles, load=load),
        problem,
        tiles,
        (refs,),
        grid=(length * splits, problem.groups * problem.head_blocks(tiles)),
        in_specs=[specs],
        out_specs=[tiling.per_query(x) for x in outputs],
        out_shape=outputs,
        name=name,
    )
    if splits == 1:
        return out, lse
    out, lse = (x.reshape(length, splits, *x.shape[1:]) for x in (out, lse))
    largest = lse.max(1)
    shift = jnp.where(largest == -jnp.inf, 0.0, largest)
    weights = jnp.exp(lse - shift[:, None])
    total = weights.sum(1)
    out = (weights[..., None] * out).sum(1) / jnp.where(total == 0, 1.0, total)[..., None]
    return out.astype(q.dtype), jnp.where(total == 0, -jnp.inf, shift + jnp.log(total))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(q: Array, k: Array, v: Array | None, indices: Array, problem: Problem, options: Options) -> tuple[Array, Array]:
    return forward(q, tiling.key_inputs(k, v), indices, problem, options.forward, options.splits)


def _attend_forward(
    q: Array, k: Array, v: Array | None, indices: Array, problem: Problem, options: Options
) -> tuple[tuple[Array, Array], tuple[Any, ...]]:
    out, lse = _attend(q, k, v, indices, problem, options)
    return (out, lse), (q, k, v, indices, out, lse)


def _attend_backward(
    problem: Problem, options: Options, residuals: tuple[Any, ...], cotangents: tuple[Array, Array]
) -> tuple[Any, ...]:
    q, k, v, indices, out, lse = residuals
    d_out, d_lse = cotangents
    # The gradient of a logit is p * (d_out . value - delta) * scale; the cotangent of lse adds p * d_lse.
    delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1) - d_lse
    arrays = backward.Saved(q, d_out.astype(q.dtype), lse, delta, indices)
    tiles = functools.partial(block_sizes.gradient_tiles, options, problem, q.dtype)
    sizes = {"queries": q.shape[0], "keys": k.shape[0], "topk": indices.shape[1]}
    dq = backward.query_gradient(arrays, k, v, problem, tiles("d_query", **sizes))
    if options.deterministic:
        dk, dv = backward.key_gradients_in_order(arrays, k, v, problem, tiles("d_key", **sizes), options.budget_bytes)
    else:
        dk, dv = backward.key_gradients_atomic(arrays, k, v, problem, tiles("d_key", **sizes))
    return dq, dk.astype(k.dtype), None if v is None or dv is None else dv.astype(v.dtype), np.zeros(indices.shape, float0)


_attend.defvjp(_attend_forward, _attend_backward)
