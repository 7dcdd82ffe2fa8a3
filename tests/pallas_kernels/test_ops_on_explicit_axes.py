"""The ops on arrays of a mesh with Explicit axes, which is what `jax.make_mesh` makes unless told otherwise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    BlockGeometry,
    IndexHeads,
    Visible,
    attention_topk,
    block_topk,
    dense_attention,
    index_scores,
    index_topk,
    index_topk_coarse_to_fine,
    indexer_kl,
    sparse_attention,
    sparse_attention_fp8,
)
from pallas_kernels.quantize import pack_latent_fp8

B, T, HEADS, GROUPS, DIM, TOPK = 2, 8, 4, 2, 8, 4
P = jax.P
SCALE = {"softmax_scale": 0.3}


@pytest.fixture(scope="module")
def arrays():
    """What the ops take, by name; S is T."""
    rng = np.random.default_rng(0)
    shapes = {
        "q_index": (B, T, HEADS, DIM),
        "k_index": (B, T, DIM),
        "weights": (B, T, HEADS),
        "q": (B, T, HEADS, DIM),
        "k": (B, T, GROUPS, DIM),
        "v": (B, T, GROUPS, DIM),
        "latent_q": (B, T, HEADS, 144),
    }
    made = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    visible = Visible(jnp.zeros((B, T), jnp.int32), jnp.broadcast_to(jnp.arange(1, T + 1, dtype=jnp.int32), (B, T)))
    index = IndexHeads(*(made.pop(name) for name in ("q_index", "k_index", "weights")))
    made |= {"index": index, "visible": visible, "topk_indices": index_topk(index, visible, topk=TOPK)}
    made["lse"] = dense_attention(made["q"], made["k"], None, visible, **SCALE).lse
    made["pool"] = pack_latent_fp8(*jnp.split(jnp.asarray(rng.normal(size=(T, 144)), jnp.float32), [128], axis=1))
    return made


SPARSE = ("q", "k", "v", "topk_indices")
OPS = {
    "index_scores": (index_scores, ("index", "visible"), {}),
    "index_topk": (index_topk, ("index", "visible"), {"topk": TOPK}),
    "index_topk_coarse_to_fine": (
        index_topk_coarse_to_fine,
        ("index", "visible"),
        {"topk": TOPK, "block_size": 2, "n_blocks": 3},
    ),
    "sparse_attention": (sparse_attention, SPARSE, SCALE),
    "sparse_attention pallas": (sparse_attention, SPARSE, SCALE | {"implementation": "pallas"}),
    "sparse_attention_fp8": (sparse_attention_fp8, ("latent_q", "pool", "topk_indices"), SCALE | {"latent_dim": 128}),
    "dense_attention": (dense_attention, ("q", "k", "v", "visible"), SCALE),
    "attention_topk": (attention_topk, ("q", "k", "lse", "visible"), SCALE | {"topk": TOPK}),
    "block_topk": (
        block_topk,
        ("q", "k", "lse", "visible"),
        SCALE | {"n_keys": T, "geometry": BlockGeometry(1, 1, 1, TOPK, 0, 0)},
    ),
    "indexer_kl": (indexer_kl, ("index", "visible", "q", "k", "lse"), SCALE),
    "indexer_kl selected": (
        lambda *x, **options: indexer_kl(*x[:-1], topk_indices=x[-1], **options),
        ("index", "visible", "q", "k", "lse", "topk_indices"),
        SCALE,
    ),
}
SPLITS = {
    "unsplit": lambda x: P(),
    "positions": lambda x: P(None, "data"),
    "rows and heads": lambda x: P("data", None, "tensor") if x.ndim == 4 else P("data"),
}


def spread(arrays, split):
    """The arrays on the mesh that is set, each split as `SPLITS` says."""
    mesh = jax.sharding.get_mesh()
    return jax.tree.map(lambda x: jax.device_put(x, jax.NamedSharding(mesh, SPLITS[split](x))), arrays)


def explicit_mesh():
    return jax.set_mesh(jax.make_mesh((2, 2), ("data", "tensor"), devices=jax.devices()[:4]))


def called(name, arrays):
    """(the op on the arrays that it takes by position, these arrays)."""
    op, names, options = OPS[name]
    return lambda *args: op(*args, **options), [arrays[key] for key in names]


def loss(outputs):
    finite = [jnp.where(jnp.isfinite(x), x, 0) for x in jax.tree.leaves(outputs)]
    return sum(jnp.sum(jnp.sin(x), dtype=jnp.float32) for x in finite)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", OPS)
def test_results_are_those_of_one_device_and_split_like_the_queries(name, split, arrays):
    op, args = called(name, arrays)
    expected = jax.tree.leaves(op(*args))
    with explicit_mesh():
        op, args = called(name, spread(arrays, split))
        # Step by step, every operation is compiled for itself, which takes long.
        results = jax.tree.leaves((op if name in ("index_topk", "dense_attention") else jax.jit(op))(*args))
    for result, value in zip(results, expected, strict=True):
        np.testing.assert_allclose(result, value, rtol=1e-5, atol=1e-5)
        n_axes = 3 if "attention" in name and name != "attention_topk" else 2
        assert (*result.sharding.spec,)[:n_axes] == (*jax.tree.leaves(args)[0].sharding.spec, None, None, None)[:n_axes]


@pytest.mark.parametrize("split", ["positions", "rows and heads"])
@pytest.mark.parametrize(
    "name",
    ["index_scores", "sparse_attention", "sparse_attention pallas", "dense_attention", "indexer_kl", "indexer_kl selected"],
)
def test_gradients_are_those_of_one_device(name, split, arrays):
    op, args = called(name, arrays)
    learned = tuple(i for i, name in enumerate(OPS[name][1][:3]) if name != "visible")
    expected = jax.grad(lambda *x: loss(op(*x)), learned)(*args)
    with explicit_mesh():
        op, args = called(name, spread(arrays, split))
        gradients = jax.jit(jax.grad(lambda *x: loss(op(*x)), learned))(*args)
    arguments = [args[i] for i in learned]
    for gradient, value, argument in zip(*map(jax.tree.leaves, (gradients, expected, arguments)), strict=True):
        np.testing.assert_allclose(gradient, value, rtol=1e-4, atol=1e-5)
        assert gradient.sharding.is_equivalent_to(argument.sharding, gradient.ndim)
