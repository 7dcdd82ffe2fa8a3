"""Every GPU kernel at the shapes it is meant for: what `dsa_jax.benchmarks.aot` compiles and the lowering tests lower."""

import functools
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import IndexHeads, Visible
from pallas_kernels.index_topk import mosaic_gpu
from pallas_kernels.index_topk import pallas_gpu as index_topk
from pallas_kernels.index_topk import triton_gpu as selection_by_radix
from pallas_kernels.indexer_loss import pallas_gpu as indexer_loss
from pallas_kernels.quantize import latent_row_bytes
from pallas_kernels.sparse_attention import pallas_gpu as sparse_attention
from pallas_kernels.sparse_attention import pallas_gpu_fp8 as sparse_attention_fp8
from pallas_kernels.sparse_attention.pallas_gpu_tiles import Options

SCALE = 0.125


class AttentionShape(NamedTuple):
    """Sizes of one call; `value_dim` None means the values are given as the leading `d_v` channels of the keys."""

    batch: int
    queries: int
    keys: int
    heads: int
    groups: int
    dim: int
    value_dim: int | None
    d_v: int | None
    topk: int


DEEPSEEK_V32 = AttentionShape(1, 4096, 4096, 128, 1, 576, None, 512, 2048)
LLAMA3_8B = AttentionShape(1, 4096, 4096, 32, 8, 128, 128, None, 2048)


class KernelCase(NamedTuple):
    """A function of arrays or bundles of them, those it is compiled for, and the names of the kernels that must be in it.

    No array of the program, other than those given, may hold more than `most_numbers`.
    """

    name: str
    shape: str
    function: Callable[..., Any]
    arrays: tuple[Any, ...]
    kernels: tuple[str, ...]
    most_numbers: int


ATTENTION = {
    **{f"{heads} heads, 512+64": DEEPSEEK_V32._replace(heads=heads) for heads in (128, 64, 16, 8)},
    "32/8 heads, 128": LLAMA3_8B,
    "32/8 heads, 64": LLAMA3_8B._replace(dim=64, value_dim=64),
    "64/1 heads, 128": LLAMA3_8B._replace(heads=64, groups=1),
}


def cases() -> Iterator[KernelCase]:
    """All cases."""
    for name, shape in ATTENTION.items():
        yield from _sparse_attention(name, shape)
        yield from _decoding(name, shape)
        yield from _indexer_kl(name, shape)
    yield from _index_scores()


def _bf16(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def _f32(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _i32(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def _attention_arrays(shape: AttentionShape) -> tuple[jax.ShapeDtypeStruct, ...]:
    queries = _bf16(shape.batch, shape.queries, shape.heads, shape.dim)
    keys = [_bf16(shape.batch, shape.keys, shape.groups, dim) for dim in (shape.dim, shape.value_dim) if dim is not None]
    return queries, *keys


def _sparse_attention(name: str, shape: AttentionShape) -> Iterator[KernelCase]:
    indices = _i32(shape.batch, shape.queries, shape.topk)

    def loss(indices: Any, *arrays: Any, deterministic: bool) -> Any:
        q, k, v = arrays if len(arrays) == 3 else (*arrays, None)
        call = functools.partial(sparse_attention.sparse_attention, softmax_scale=SCALE, d_v=shape.d_v, interpret=False)
        out, lse = call(q, k, v, indices, deterministic=deterministic)
        return out.astype(jnp.float32).sum() + lse.sum()

    for deterministic in (False, True):
        learned = tuple(range(1, 3 if shape.value_dim is None else 4))
        function = jax.grad(functools.partial(loss, deterministic=deterministic), learned)
        ends = ("contributions", "ordered_sum") if deterministic else ("forward", "d_query", "d_key")
        kernels = tuple(f"sparse_attention_{end}" for end in ends)
        arrays = indices, *_attention_arrays(shape)
        # Rows beyond the last key, and, when chunks of queries do not come out even, some queries.
        spare = 8 * shape.groups * shape.dim + max(x.size for x in arrays) // 8
        most = max(spare + max(x.size for x in arrays), Options.budget_bytes // 4)
        yield KernelCase("sparse_attention", name, function, arrays, kernels, most)


def _decoding(name: str, shape: AttentionShape) -> Iterator[KernelCase]:
    """Few queries, each shared by several programs, over a pool of keys that all sequences share."""
    rows, topk, row_bytes = 8 * 32768, 2048, latent_row_bytes(512, 64)
    for batch in (1, 32):
        keys = _attention_arrays(shape._replace(keys=rows))[1:]
        queries, slots = _bf16(1, batch, shape.heads, shape.dim), _i32(1, batch, topk)

        def attend(q: Any, slots: Any, k: Any, v: Any = None) -> Any:
            call = functools.partial(sparse_attention.sparse_attention, d_v=shape.d_v, interpret=False)
            return call(q, k, v, slots, softmax_scale=SCALE)

        def attend_fp8(q: Any, slots: Any, pool: Any) -> Any:
            call = functools.partial(sparse_attention_fp8.sparse_attention_fp8, latent_dim=512, interpret=False)
            return call(q, pool, slots, softmax_scale=SCALE)

        size = f"{name}, {batch} queries"
        kernels = ("sparse_attention_forward",), ("sparse_attention_fp8_forward",)
        yield KernelCase("decode", size, attend, (queries, slots, *keys), kernels[0], 0)
        if shape.value_dim is None:
            pool = jax.ShapeDtypeStruct((rows, row_bytes), jnp.uint8)
            yield KernelCase("decode_fp8", size, attend_fp8, (queries, slots, pool), kernels[1], 0)


def _indexer_kl(name: str, shape: AttentionShape) -> Iterator[KernelCase]:
    """Both stages, forward and backward, with the indexer of DeepSeek-V3.2."""
    rows, keys = (shape.batch, shape.queries), (shape.batch, shape.keys)
    arrays = (
        _bf16(*rows, 64, 128),
        _bf16(*keys, 128),
        _f32(*rows, 64),
        *_attention_arrays(shape)[:2],
        _f32(*rows, shape.heads),
        _i32(*rows),
        _i32(*rows),
    )

    def gradients(*arrays: Any, deterministic: bool) -> Any:
        def loss(*learned: Any) -> Any:
            call = functools.partial(indexer_loss.indexer_kl, softmax_scale=SCALE, interpret=False)
            index, visible = IndexHeads(*learned), Visible(*arrays[6:8])
            indices = arrays[8] if len(arrays) > 8 else None
            return call(index, visible, *arrays[3:6], topk_indices=indices, deterministic=deterministic).sum()

        return jax.value_and_grad(loss, (0, 1, 2))(*arrays[:3])

    most = max(*(x.size for x in arrays), indexer_loss.KLSettings.score_budget)
    # The indexer's kernels do not depend on the attention's shape: their ordered sums are compiled once.
    for deterministic in (False, True) if shape.heads == 128 else (False,):
        kernels: tuple[str, ...] = ("head_sums_selected_probability", "head_sums_selected_scores", "index_gradients_selected")
        kernels += ("sparse_attention_ordered_sum",) if deterministic else ()
        function = functools.partial(gradients, deterministic=deterministic)
        kind = "ordered, " if deterministic else ""
        selection = _i32(*rows, shape.topk)
        yield KernelCase("indexer_kl_selected", f"{kind}{name}", function, (*arrays, selection), kernels, most)
    kernels = tuple(f"head_sums_visible_{kind}" for kind in ("probability", "scores"))
    kernels += tuple(f"index_gradients_visible_{side}" for side in ("query", "key"))
    visible = functools.partial(gradients, deterministic=False)
    yield KernelCase("indexer_kl_visible", name, visible, arrays, kernels, most)


def _index_scores() -> Iterator[KernelCase]:
    for heads, batch, queries, keys in ((64, 1, 4096, 32768), (32, 1, 4096, 32768), (64, 32, 1, 131072)):
        for dtype in (jnp.bfloat16, jnp.float8_e4m3fn):
            q = jax.ShapeDtypeStruct((batch, queries, heads, 128), dtype)
            k = jax.ShapeDtypeStruct((batch, keys, 128), dtype)
            index = IndexHeads._make((q, k, _f32(batch, queries, heads)))
            visible = Visible._make((_i32(batch, queries), _i32(batch, queries)))
            arrays = index, visible, _f32(batch, keys)

            def scores(index: IndexHeads, visible: Visible, k_scale: Any) -> Any:
                return index_topk.index_scores(index, visible, k_scale=k_scale, interpret=False)

            def selection(index: IndexHeads, visible: Visible, k_scale: Any) -> Any:
                return index_topk.index_topk(index, visible, k_scale=k_scale, topk=2048, interpret=False)

            name = f"{jnp.dtype(dtype).name}, {heads} heads, 128, {batch} x {queries} queries, {keys} keys"
            kernels = ("head_sums_visible_scores",), ("head_sums_visible_ranked_scores",)
            if dtype == jnp.bfloat16 and importlib.util.find_spec("jax_triton") is not None:
                by_radix = functools.partial(selection_by_radix.index_topk, topk=2048, compute_capability=90, interpret=False)
                yield KernelCase("index_topk, radix", name, by_radix, arrays[:2], kernels[1], index_topk.KERNEL_SCORE_BUDGET)
            if jax.__version_info__ >= mosaic_gpu.LEAST_JAX:
                yield from _mosaic(name, arrays)
            yield KernelCase("index_scores", name, scores, arrays, kernels[0], batch * queries * keys)
            yield KernelCase("index_topk", name, selection, arrays, kernels[1], index_topk.KERNEL_SCORE_BUDGET)


def _mosaic(name: str, arrays: tuple[Any, ...]) -> Iterator[KernelCase]:
    """As the cases of the same arrays through Triton."""

    def scores(index: IndexHeads, visible: Visible, k_scale: Any) -> Any:
        return mosaic_gpu.index_scores(index, visible, k_scale=k_scale, interpret=False)

    def selection(index: IndexHeads, visible: Visible, k_scale: Any) -> Any:
        return mosaic_gpu.index_topk(index, visible, k_scale=k_scale, topk=2048, interpret=False)

    (batch, queries), keys = arrays[0].q.shape[:2], arrays[0].k.shape[1]
    most = batch * queries * keys
    yield KernelCase("index_scores, mosaic", name, scores, arrays, ("mosaic_scores",), most)
    yield KernelCase("index_topk, mosaic", name, selection, arrays, ("mosaic_ranked_scores",), index_topk.KERNEL_SCORE_BUDGET)
