"""Every GPU kernel at the shapes it is meant for: what `benchmarks.aot` compiles and the lowering tests lower."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.sparse_attention import pallas_gpu as sparse_attention
from pallas_kernels.sparse_attention.pallas_gpu_tiles import Problem, default_options
from pallas_kernels.sparse_attention.shapes import DEEPSEEK_V32, LLAMA3_8B, AttentionShape

SCALE = 0.125


class KernelCase(NamedTuple):
    """A function of arrays, the arrays it is compiled for, and the names of the kernels that must be in it."""

    name: str
    shape: str
    function: Callable[..., Any]
    arrays: tuple[jax.ShapeDtypeStruct, ...]
    kernels: tuple[str, ...]


ATTENTION = {
    **{f"{heads} heads, 512+64": DEEPSEEK_V32._replace(heads=heads) for heads in (128, 64, 16, 8)},
    "32/8 heads, 128": LLAMA3_8B,
    "32/8 heads, 64": LLAMA3_8B._replace(dim=64, value_dim=64),
}


def cases() -> Iterator[KernelCase]:
    """All cases."""
    for name, shape in ATTENTION.items():
        yield from _sparse_attention(name, shape)


def _bf16(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def _f32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _i32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def _attention_arrays(shape: AttentionShape) -> tuple[jax.ShapeDtypeStruct, ...]:
    queries = _bf16(shape.batch, shape.queries, shape.heads, shape.dim)
    keys = [_bf16(shape.batch, shape.keys, shape.groups, dim) for dim in (shape.dim, shape.value_dim) if dim is not None]
    return queries, *keys


def _sparse_attention(name: str, shape: AttentionShape) -> Iterator[KernelCase]:
    width = shape.value_dim or shape.d_v
    assert width is not None
    problem = Problem(shape.heads, shape.groups, shape.dim, width, shape.value_dim is None, SCALE, False)
    indices = _i32(shape.batch, shape.queries, shape.topk)

    def loss(indices: Any, *arrays: Any, options: Any) -> Any:
        q, k, v = arrays if len(arrays) == 3 else (*arrays, None)
        call = functools.partial(sparse_attention.sparse_attention, softmax_scale=SCALE, d_v=shape.d_v, interpret=False)
        out, lse = call(q, k, v, indices, options=options)
        return out.astype(jnp.float32).sum() + lse.sum()

    for deterministic in (False, True):
        options = dataclasses.replace(default_options(problem, jnp.dtype(jnp.bfloat16)), deterministic=deterministic)
        function = jax.grad(functools.partial(loss, options=options), tuple(range(1, 3 if shape.value_dim is None else 4)))
        ends = ("contributions", "ordered_sum") if deterministic else ("forward", "d_query", "d_key")
        kernels = tuple(f"sparse_attention_{end}" for end in ends)
        yield KernelCase("sparse_attention", name, function, (indices, *_attention_arrays(shape)), kernels)
