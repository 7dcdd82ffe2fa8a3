"""The benchmarked ops as functions of arrays, and inputs for them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from dsa_jax.costs.ops import OpShape
from pallas_kernels import (
    IndexHeads,
    Visible,
    dense_attention,
    index_scores,
    index_topk,
    indexer_kl,
    sparse_attention,
    sparse_attention_fp8,
)
from pallas_kernels.quantize import pack_latent_fp8

# "pallas_ordered" is pallas asked for the same gradients, bit by bit, every run.
_PLAIN = ("reference", "xla", "pallas")
IMPLEMENTATIONS: dict[str, tuple[str, ...]] = {
    "index_scores": (*_PLAIN, "mosaic"),
    "index_topk": (*_PLAIN, "triton", "mosaic"),
    "sparse_attention": _PLAIN,
    "sparse_attention_backward": (*_PLAIN, "pallas_ordered"),
    "decode": _PLAIN,
    "decode_fp8": _PLAIN,
    "dense_attention": ("reference", "xla"),
    "indexer_kl_selected": (*_PLAIN, "pallas_ordered"),
    "indexer_kl_visible": (*_PLAIN, "pallas_ordered"),
}

Arrays = dict[str, Array]


def make_inputs(op: str, shape: OpShape, seed: int = 0) -> Arrays:
    """Random arrays, made on the device, with logits of variance 1.

    Those of `index_topk` are small integers, whose scores are exact in any order. Keys and values of attention have a
    standard deviation of 0.1, which the absolute tolerance of its result belongs to.
    """
    s, dtype = shape, jnp.dtype(shape.dtype)
    keys = iter(jax.random.split(jax.random.key(seed), 12))

    def normal(*size: int, dtype: jnp.dtype = dtype) -> Array:
        if op == "index_topk":
            return jax.random.randint(next(keys), size, -2, 3).astype(dtype)
        return jax.random.normal(next(keys), size, jnp.float32 if dtype.itemsize == 1 else dtype).astype(dtype)

    arrays: Arrays = {}
    if op.startswith("index"):
        arrays["q_index"] = normal(s.batch, s.queries, s.index_heads, s.index_dim)
        arrays["k_index"] = normal(s.batch, s.keys, s.index_dim)
        weights = normal(s.batch, s.queries, s.index_heads, dtype=jnp.dtype(jnp.float32))
        arrays["weights"] = weights if op == "index_topk" else weights * (s.index_heads * s.index_dim) ** -0.5
        if dtype.itemsize == 1:
            arrays["k_scale"] = jnp.exp2(jax.random.randint(next(keys), (s.batch, s.keys), -3, 2).astype(jnp.float32))
    if op.startswith("index") or op == "dense_attention":
        arrays["visible_start"] = jnp.zeros((s.batch, s.queries), jnp.int32)
        arrays["visible_end"] = jnp.full((s.batch, s.queries), s.keys, jnp.int32)
    if op in ("index_scores", "index_topk"):
        return arrays
    arrays["q"] = normal(s.batch, s.queries, s.heads, s.dim) * 10
    if op == "decode_fp8":
        latent = normal(s.keys, s.width) / 10
        arrays["pool"] = pack_latent_fp8(latent, normal(s.keys, s.dim - s.width) / 10)
    else:
        arrays["k"] = normal(s.batch, s.keys, s.groups, s.dim) / 10
    if s.value_dim is not None and not op.startswith("index"):
        arrays["v"] = normal(s.batch, s.keys, s.groups, s.value_dim) / 10
    if op not in ("indexer_kl_visible", "dense_attention"):
        arrays["topk_indices"] = _selection(shape, next(keys))
    if op == "sparse_attention_backward":
        arrays["d_out"] = normal(s.batch, s.queries, s.heads, s.width)
        arrays["d_lse"] = normal(s.batch, s.queries, s.heads, dtype=jnp.dtype(jnp.float32))
    if op.startswith("index"):
        # Any lse gives a target: only the weight of each head in it depends on it.
        lse = normal(s.batch, s.queries, s.heads, dtype=jnp.dtype(jnp.float32))
        arrays["lse"] = lse + jnp.log(jnp.float32(s.topk if "topk_indices" in arrays else s.keys)) + 0.5
        arrays["d_kl"] = jax.random.uniform(next(keys), (s.batch, s.queries), minval=0.5)
    return arrays


def _selection(shape: OpShape, key: Array) -> Int32[Array, "B T K"]:
    """Distinct keys, ascending, -1 last."""
    count = min(shape.topk, shape.keys)
    if shape.selection == "local":
        chosen = jnp.broadcast_to(jnp.arange(shape.keys - count, shape.keys), (shape.batch, shape.queries, count))
    else:
        part = shape.keys // count
        offset = jax.random.randint(key, (shape.batch, shape.queries, count), 0, part)
        chosen = jnp.arange(count) * part + offset
    missing = ((0, 0), (0, 0), (0, shape.topk - count))
    return jnp.pad(chosen.astype(jnp.int32), missing, constant_values=-1)


def index_heads(arrays: Arrays) -> IndexHeads:
    """The indexer's arrays out of those of `make_inputs`."""
    return IndexHeads(arrays["q_index"], arrays["k_index"], arrays["weights"])


def visible(arrays: Arrays) -> Visible:
    """The visible ranges out of the arrays of `make_inputs`."""
    return Visible(arrays["visible_start"], arrays["visible_end"])


def make_call(op: str, shape: OpShape, implementation: str) -> Callable[..., dict[str, Array]]:
    """A function of the arrays of `make_inputs`, by name, that returns the op's results by name."""
    run: dict[str, Any] = {"implementation": implementation.removesuffix("_ordered")}
    scaled: dict[str, Any] = {"softmax_scale": shape.dim**-0.5, **run}
    ordered: dict[str, Any] = {"deterministic": True} if implementation.endswith("_ordered") else {}

    def scores(k_scale: Array | None = None, **arrays: Array) -> dict[str, Array]:
        return {"scores": index_scores(index_heads(arrays), visible(arrays), k_scale=k_scale, **run)}

    def selection(k_scale: Array | None = None, **arrays: Array) -> dict[str, Array]:
        return {"selection": index_topk(index_heads(arrays), visible(arrays), topk=shape.topk, k_scale=k_scale, **run)}

    def attend(q: Array, k: Array, topk_indices: Array, v: Array | None = None) -> dict[str, Array]:
        return sparse_attention(q, k, v, topk_indices, d_v=shape.d_v, **scaled, **ordered)._asdict()

    def attend_to_all(q: Array, k: Array, v: Array | None = None, **arrays: Array) -> dict[str, Array]:
        return dense_attention(q, k, v, visible(arrays), d_v=shape.d_v, **scaled)._asdict()

    def attend_fp8(q: Array, pool: Array, topk_indices: Array) -> dict[str, Array]:
        return sparse_attention_fp8(q, pool, topk_indices, latent_dim=shape.width, **scaled)._asdict()

    def backward(d_out: Array, d_lse: Array, topk_indices: Array, **learned: Array) -> dict[str, Array]:
        _, pull = jax.vjp(lambda learned: attend(topk_indices=topk_indices, **learned), learned)
        (gradients,) = pull({"out": d_out, "lse": d_lse})
        return {f"d_{name}": x for name, x in gradients.items()}

    def divergence(d_kl: Array, q: Array, k: Array, lse: Array, **arrays: Array) -> dict[str, Array]:
        learned: dict[str, Any] = {name: arrays.pop(name) for name in ("q_index", "k_index", "weights")}

        def kl(learned: dict[str, Any]) -> Array:
            indices = arrays.get("topk_indices")
            return indexer_kl(index_heads(learned), visible(arrays), q, k, lse, topk_indices=indices, **scaled, **ordered)

        value, pull = jax.vjp(kl, learned)
        (gradients,) = pull(d_kl)
        return {"kl": value, **{f"d_{name}": x for name, x in gradients.items()}}

    calls: dict[str, Callable[..., dict[str, Array]]] = {
        "index_scores": scores,
        "index_topk": selection,
        "sparse_attention": attend,
        "sparse_attention_backward": backward,
        "decode": attend,
        "decode_fp8": attend_fp8,
        "dense_attention": attend_to_all,
        "indexer_kl_selected": divergence,
        "indexer_kl_visible": divergence,
    }
    return calls[op]


def timed_call(op: str, shape: OpShape, implementation: str, arrays: Arrays) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The timed function and its arguments: the whole call, but of `sparse_attention_backward` the backward pass alone."""
    if op != "sparse_attention_backward":
        call = make_call(op, shape, implementation)
        return lambda given: call(**given), (arrays,)
    learned = {name: arrays[name] for name in ("q", "k", "v") if name in arrays}
    attend = make_call("sparse_attention", shape, implementation)

    def forward(learned: Arrays, topk_indices: Array) -> Any:
        return jax.vjp(lambda learned: attend(topk_indices=topk_indices, **learned), learned)[1]

    pull = jax.jit(forward)(learned, arrays["topk_indices"])
    return lambda given, pull: pull(given), ({"out": arrays["d_out"], "lse": arrays["d_lse"]}, pull)
