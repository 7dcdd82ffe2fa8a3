"""Differentiating a scan over layers must not make an op hold anything of size T x S, not even constants."""

import jax
import jax.numpy as jnp
import pytest

import pallas_kernels as pk
from pallas_kernels import IndexHeads, Visible

LENGTH, TOPK = 2048, 16
END = jnp.arange(1, LENGTH + 1, dtype=jnp.int32)[None]
RANGE = {"visible": Visible(jnp.zeros_like(END), END), "implementation": "xla"}


def layer(op, x):
    """[1, T, 1, D] to the same shape, with `op` in it."""
    index = IndexHeads(x, x[:, :, 0], jnp.ones(x.shape[:3], jnp.float32))
    picked = pk.index_topk(index, topk=TOPK, **RANGE) if op == "index_topk" else jnp.zeros((1, LENGTH, TOPK), jnp.int32)
    if op == "attention_topk":
        picked = pk.attention_topk(x, x, jnp.zeros(x.shape[:3]), softmax_scale=1.0, topk=TOPK, **RANGE)
    if op == "dense_attention":
        return pk.dense_attention(x, x, x, softmax_scale=1.0, **RANGE).out
    if op.startswith("indexer_kl"):
        chosen = picked if op == "indexer_kl of selected" else None
        target = {"q": x, "k": x, "lse": jnp.zeros(x.shape[:3]), "softmax_scale": 1.0}
        return x + pk.indexer_kl(index, **target, topk_indices=chosen, **RANGE).sum()
    return pk.sparse_attention(x, x, x, picked, softmax_scale=1.0, implementation="xla").out


def largest_stacked(jaxpr):
    """Numbers in the largest array that any scan of the program, at any depth, returns."""
    sizes = [0]
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            sizes += [variable.aval.size for variable in equation.outvars]
        for value in equation.params.values():
            for part in value if isinstance(value, list | tuple) else [value]:
                inner = getattr(part, "jaxpr", part)
                if hasattr(inner, "eqns"):
                    sizes.append(largest_stacked(inner))
    return max(sizes)


@pytest.mark.parametrize(
    "op", ["index_topk", "attention_topk", "sparse_attention", "dense_attention", "indexer_kl of all", "indexer_kl of selected"]
)
def test_nothing_of_size_t_times_s_is_stacked(op):
    def model(x):
        return jax.lax.scan(lambda x, _: (layer(op, x), None), x, None, length=2)[0].sum()

    x = jax.ShapeDtypeStruct((1, LENGTH, 1, 16), jnp.float32)
    program = jax.make_jaxpr(jax.grad(model))(x)
    assert 0 < largest_stacked(program.jaxpr) <= 4 * LENGTH * TOPK
