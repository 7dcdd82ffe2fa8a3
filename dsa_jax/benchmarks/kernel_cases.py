"""Every GPU kernel at the shapes it is meant for: compiled by `dsa_jax.benchmarks.aot`, lowered by the tests."""

import functools
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsa_jax.benchmarks.op_calls import Arrays, index_heads, make_call, make_inputs, visible
from dsa_jax.benchmarks.op_shapes import PREFILL, SHAPES
from dsa_jax.costs.ops import OpShape
from pallas_kernels.index_topk import mosaic_gpu
from pallas_kernels.index_topk import pallas_gpu as index_topk
from pallas_kernels.index_topk import triton_gpu as selection_by_radix
from pallas_kernels.indexer_loss import pallas_gpu as indexer_loss
from pallas_kernels.sparse_attention.pallas_gpu_tiles import Options


class KernelCase(NamedTuple):
    """A function of arrays by name, those it is compiled for, and the names of the kernels that must be in it.

    Apart from its arguments, no array of the program may have more than `most_elements`.
    """

    name: str
    shape: str
    function: Callable[[Arrays], Any]
    arrays: Arrays
    kernels: tuple[str, ...]
    most_elements: int


def cases() -> Iterator[KernelCase]:
    """All cases: attention over 4096 keys, and scores of as many as in the benchmarks."""
    for shape in (*PREFILL.values(), PREFILL["32_heads_8_groups"]._replace(heads=64, groups=1)):
        is_latent = shape.value_dim is None
        channels = f"{shape.width}+{shape.dim - shape.width}" if is_latent else shape.dim
        name = f"{shape.heads}{'' if is_latent else f'/{shape.groups}'} heads, {channels}"
        for kind in (_sparse_attention, _decoding, _indexer_kl):
            yield from kind(name, shape._replace(keys=4096))
    prefill, decode = (SHAPES["index_scores"][name] for name in ("prefill_32k", "decode_128k"))
    for shape in (prefill, prefill._replace(index_heads=32), decode):
        for dtype in ("bfloat16", "float8_e4m3fn"):
            yield from _index_scores(shape._replace(dtype=dtype))


def _arrays(op: str, shape: OpShape) -> Any:
    return jax.eval_shape(lambda: make_inputs(op, shape))


def _call(op: str, shape: OpShape, implementation: str = "pallas") -> Callable[[Arrays], Any]:
    call = make_call(op, shape, implementation)
    return lambda arrays: call(**arrays)


def _sparse_attention(name: str, shape: OpShape) -> Iterator[KernelCase]:
    """Forward and backward."""
    arrays = _arrays("sparse_attention", shape)

    def gradients(arrays: Arrays, implementation: str) -> Any:
        attend, indices = _call("sparse_attention", shape, implementation), arrays["topk_indices"]
        learned = {name: x for name, x in arrays.items() if name != "topk_indices"}
        results = lambda learned: attend({"topk_indices": indices, **learned}).values()
        return jax.grad(lambda learned: sum(x.astype(jnp.float32).sum() for x in results(learned)))(learned)

    largest = max(x.size for x in arrays.values())
    # Rows beyond the last key, and, when chunks of queries do not come out even, some queries.
    spare = 8 * shape.groups * shape.dim + largest // 8
    most = max(spare + largest, Options.budget_bytes // 4)
    for implementation, ends in (
        ("pallas", ("forward", "d_query", "d_key")),
        ("pallas_ordered", ("contributions", "ordered_sum")),
    ):
        kernels = tuple(f"sparse_attention_{end}" for end in ends)
        function = functools.partial(gradients, implementation=implementation)
        yield KernelCase("sparse_attention", name, function, arrays, kernels, most)


def _decoding(name: str, shape: OpShape) -> Iterator[KernelCase]:
    """Few queries, each shared by several programs, over a pool of keys that all sequences share."""
    for queries in (1, 32):
        kernels = {"decode": "sparse_attention_forward"}
        if shape.value_dim is None:
            kernels["decode_fp8"] = "sparse_attention_fp8_forward"
        sizes = shape._replace(queries=queries, keys=8 * 32768)
        for op, kernel in kernels.items():
            yield KernelCase(op, f"{name}, {queries} queries", _call(op, sizes), _arrays(op, sizes), (kernel,), 0)


def _indexer_kl(name: str, shape: OpShape) -> Iterator[KernelCase]:
    """Both stages, forward and backward, with the indexer of DeepSeek-V3.2."""
    of_selected = "head_sums_selected_probability", "head_sums_selected_scores", "index_gradients_selected"
    of_visible = tuple(f"head_sums_visible_{kind}" for kind in ("probability", "scores"))
    of_visible += tuple(f"index_gradients_visible_{side}" for side in ("query", "key"))
    kinds = [("indexer_kl_selected", "pallas", of_selected), ("indexer_kl_visible", "pallas", of_visible)]
    if shape.heads == 128:  # the indexer's kernels do not depend on the attention's shape: their ordered sums are compiled once
        kinds.insert(1, ("indexer_kl_selected", "pallas_ordered", (*of_selected, "sparse_attention_ordered_sum")))
    for op, implementation, kernels in kinds:
        arrays = _arrays(op, shape)
        sizes = [x.size for name, x in arrays.items() if name != "topk_indices"]
        prefix = "ordered, " if implementation == "pallas_ordered" else ""
        most = max(*sizes, indexer_loss.KLSettings.score_budget)
        yield KernelCase(op, f"{prefix}{name}", _call(op, shape, implementation), arrays, kernels, most)


def _index_scores(shape: OpShape) -> Iterator[KernelCase]:
    """Scores and selection, by Triton and by Mosaic; bfloat16 keys get a scale, too."""
    batch, queries, keys, budget = shape.batch, shape.queries, shape.keys, index_topk.KERNEL_SCORE_BUDGET
    scale = jax.ShapeDtypeStruct((batch, keys), jnp.float32)
    arrays = {**_arrays("index_scores", shape), "k_scale": scale}
    sizes = f"{batch} x {queries} queries, {keys} keys"
    name = f"{shape.dtype}, {shape.index_heads} heads, {shape.index_dim}, {sizes}"
    if shape.dtype == "bfloat16" and importlib.util.find_spec("jax_triton") is not None:
        yield KernelCase("index_topk, radix", name, _by_radix, arrays, ("head_sums_visible_ranked_scores",), budget)
    ways = {"pallas": "head_sums_visible"} | ({"mosaic": "mosaic"} if jax.__version_info__ >= mosaic_gpu.LEAST_JAX else {})
    for implementation, prefix in ways.items():
        suffix = ", mosaic" if implementation == "mosaic" else ""
        for op, kernel, most in (("index_scores", "scores", batch * queries * keys), ("index_topk", "ranked_scores", budget)):
            call = _call(op, shape, implementation)
            yield KernelCase(f"{op}{suffix}", name, call, arrays, (f"{prefix}_{kernel}",), most)


def _by_radix(arrays: Arrays) -> Any:
    # Not through the op, which would ask the device for its compute capability.
    options: dict[str, Any] = {"topk": 2048, "compute_capability": 90, "interpret": False}
    return selection_by_radix.index_topk(index_heads(arrays), visible(arrays), **options)
