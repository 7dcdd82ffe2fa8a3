"""Other libraries' kernels as our ops: arrays go over by dlpack, and results come back under our names and conventions.

An adapter takes an op's shape and arrays (`op_calls.make_inputs`) and prepares a call: layout, padding and planning are done
before, so that only the kernel is timed. A call that the kernel does not cover is a NotImplementedError.
"""

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dsa_jax.benchmarks.op_calls import Arrays
from dsa_jax.costs.ops import OpShape


class PeerCall(NamedTuple):
    """`run(*arguments)` is timed; `results` turns its return value into some or all of the op's results by name."""

    run: Callable[..., Any]
    arguments: tuple[Any, ...]
    results: Callable[[Any], Arrays]


class Peer(NamedTuple):
    """A library: its distribution, the modules of which the first that is there is used, and an adapter per op.

    `uses_torch`: its arrays are torch's, and its calls are timed by CUDA events; otherwise it is reached through JAX.
    """

    name: str
    distribution: str
    modules: tuple[str, ...]
    ops: Mapping[str, Callable[[Any, OpShape, Arrays], PeerCall]]
    uses_torch: bool = True

    def missing(self) -> str | None:
        """The requirement that is missing here; None when it can run."""
        if self.uses_torch and not _is_importable("torch"):
            return "torch"
        if not any(map(_is_importable, self.modules)):
            return " or ".join(self.modules)
        if self.uses_torch:
            return None if importlib.import_module("torch").cuda.is_available() else "a GPU that torch can use"
        return None if jax.default_backend() == "gpu" else "a GPU"

    def module(self) -> Any:
        """The library."""
        return importlib.import_module(next(filter(_is_importable, self.modules)))

    def label(self) -> str:
        """Name and version, as rows have it."""
        try:
            version = importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            version = getattr(self.module(), "__version__", "of unknown version")
        return f"peer:{self.name} {version}"


def _is_importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def to_torch(x: Array, dtype: str | None = None) -> Any:
    """The same memory as a tensor of torch; with `dtype` its bytes are taken for that of torch.

    fp8 goes over as bytes: not every version of both libraries hands it over by itself.
    """
    torch = importlib.import_module("torch")
    if x.dtype.itemsize == 1 and x.dtype != jnp.uint8:
        x, dtype = jax.lax.bitcast_convert_type(x, jnp.uint8), x.dtype.name
    tensor = torch.from_dlpack(jax.block_until_ready(x))
    return tensor if dtype is None else tensor.view(getattr(torch, dtype))


def from_torch(tensor: Any, shape: Sequence[int]) -> Array:
    """The elements of a tensor, which may be strided, as an array of `shape`."""
    torch = importlib.import_module("torch")
    torch.cuda.synchronize()
    return jnp.from_dlpack(torch.reshape(tensor, [-1])).reshape(shape)


def _need(condition: bool, what: str) -> None:
    if not condition:
        raise NotImplementedError(f"it needs {what}")


# Of FlashMLA: heads and selected keys come in whole blocks.
_HEADS, _SLOTS, _PAGE = 64, 128, 64


def _latent_call(shape: OpShape, arrays: Arrays, keys: int) -> tuple[Array, Array]:
    """(queries [T, H, 576], indices [T, K]) padded to whole blocks, indices outside the keys as -1."""
    is_deepseek = (shape.dim, shape.width, shape.groups, shape.value_dim) == (576, 512, 1, None)
    _need(shape.batch == 1, "one batch row")
    _need(is_deepseek, "keys of 512 + 64 channels whose first 512 are the values")
    _need(shape.dtype == "bfloat16", "bfloat16")
    q, indices = arrays["q"][0], arrays["topk_indices"][0]
    indices = jnp.where((indices >= 0) & (indices < keys), indices, -1)
    q = jnp.pad(q, ((0, 0), (0, -q.shape[1] % _HEADS), (0, 0)))
    return q, jnp.pad(indices, ((0, 0), (0, -indices.shape[1] % _SLOTS)), constant_values=-1)


def _attention_results(out: Array, lse: Array, heads: int) -> Arrays:
    """Without the heads that padding added; a query without keys has lse +inf there and -inf here."""
    lse = jnp.where(lse == jnp.inf, -jnp.inf, lse)
    return {"out": out[None, :, :heads], "lse": lse[None, :, :heads]}


def flash_mla_prefill(library: Any, shape: OpShape, arrays: Arrays) -> PeerCall:
    """`flash_mla_sparse_fwd`: lse is natural as of its commit 9241ae3; where it is not, the check says so."""
    keys = arrays["k"][0]
    q, indices = _latent_call(shape, arrays, keys.shape[0])
    given = to_torch(q), to_torch(keys), to_torch(indices[:, None])

    def run(q: Any, keys: Any, indices: Any) -> Any:
        return library.flash_mla_sparse_fwd(q, keys, indices, shape.dim**-0.5, 512)

    def results(returned: Any) -> Arrays:
        out, _, lse = returned
        return _attention_results(from_torch(out, (*q.shape[:2], 512)), from_torch(lse, q.shape[:2]), shape.heads)

    return PeerCall(run, given, results)


def flash_mla_decode(library: Any, shape: OpShape, arrays: Arrays) -> PeerCall:
    """`flash_mla_with_kvcache` over pages of packed rows, one query a sequence; its plan is made by the first call."""
    pool = arrays["pool"]
    q, indices = _latent_call(shape, arrays, pool.shape[0])
    pages = jnp.pad(pool, ((0, -pool.shape[0] % _PAGE), (0, 0))).reshape(-1, _PAGE, 1, pool.shape[1])
    given = to_torch(q[:, None]), to_torch(pages, "float8_e4m3fn"), to_torch(indices[:, None])
    plan, _ = library.get_mla_metadata()

    def run(q: Any, pages: Any, indices: Any) -> Any:
        options = {"softmax_scale": shape.dim**-0.5, "is_fp8_kvcache": True, "indices": indices}
        return library.flash_mla_with_kvcache(q, pages, None, None, 512, plan, **options)

    def results(returned: Any) -> Arrays:
        out, lse = returned
        return _attention_results(from_torch(out, (*q.shape[:2], 512)), from_torch(lse, q.shape[:2]), shape.heads)

    return PeerCall(run, given, results)


def deep_gemm_logits(library: Any, shape: OpShape, arrays: Arrays) -> PeerCall:
    """`fp8_mqa_logits` of one sequence, with -inf outside of the ranges."""
    _need(shape.batch == 1, "one batch row; its paged kernel for several is not run here")
    _need(shape.dtype == "float8_e4m3fn", "e4m3")
    _need(shape.index_heads in (32, 64) and shape.index_dim in (32, 64, 128), "32 or 64 heads of 32, 64 or 128 channels")
    start, end = (jnp.clip(arrays[name][0], 0, shape.keys) for name in ("visible_start", "visible_end"))
    named = (arrays[name][0] for name in ("q_index", "k_index", "k_scale", "weights"))
    given = tuple(map(to_torch, (*named, start, end)))

    def run(q: Any, keys: Any, scales: Any, weights: Any, start: Any, end: Any) -> Any:
        return library.fp8_mqa_logits(q, (keys, scales), weights, start, end, clean_logits=True)

    return PeerCall(run, given, lambda returned: {"scores": from_torch(returned, (1, shape.queries, shape.keys))})


def _check_dense(shape: OpShape) -> None:
    _need(shape.dtype in ("bfloat16", "float16"), "bfloat16 or float16")
    _need(shape.value_dim is not None, "values apart from the keys")


def flash_attention(library: Any, shape: OpShape, arrays: Arrays) -> PeerCall:
    """`flash_attn_func`, of FlashAttention 3 (`flash_attn_interface`) or 2."""
    _check_dense(shape)
    given = tuple(to_torch(arrays[name]) for name in ("q", "k", "v"))

    def run(q: Any, k: Any, v: Any) -> Any:
        return library.flash_attn_func(q, k, v, softmax_scale=shape.dim**-0.5, causal=False)

    def results(returned: Any) -> Arrays:
        out = returned[0] if isinstance(returned, tuple) else returned
        return {"out": from_torch(out, (shape.batch, shape.queries, shape.heads, shape.width))}

    return PeerCall(run, given, results)


def cudnn_attention(library: Any, shape: OpShape, arrays: Arrays) -> PeerCall:
    """cuDNN's attention through `jax.nn.dot_product_attention`."""
    _check_dense(shape)

    def run(q: Array, k: Array, v: Array) -> Array:
        return library.dot_product_attention(q, k, v, scale=shape.dim**-0.5, implementation="cudnn")

    return PeerCall(run, tuple(arrays[name] for name in ("q", "k", "v")), lambda out: {"out": out})


PEERS = (
    Peer(
        "flash_mla",
        "flash_mla",
        ("flash_mla",),
        {"sparse_attention": flash_mla_prefill, "decode": flash_mla_prefill, "decode_fp8": flash_mla_decode},
    ),
    Peer("deep_gemm", "deep_gemm", ("deep_gemm",), {"index_scores": deep_gemm_logits}),
    Peer("flash_attn", "flash_attn", ("flash_attn_interface", "flash_attn"), {"dense_attention": flash_attention}),
    Peer("cudnn", "nvidia-cudnn-cu13", ("jax.nn",), {"dense_attention": cudnn_attention}, uses_torch=False),
)
