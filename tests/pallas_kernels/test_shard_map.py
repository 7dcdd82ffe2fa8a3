"""Ops inside `jax.shard_map`, which by default checks over which mesh axes values vary, with split and with shared arrays."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, PartitionSpec, use_abstract_mesh
from lowering import TRITON_CALL
from ops_helpers import IMPLEMENTATIONS, assert_close, normal, ranges
from test_index_topk_mosaic import needs_mosaic

import pallas_kernels as pk
from pallas_kernels.quantize import pack_latent_fp8

T, H, D, HI, DI, K = 300, 4, 16, 8, 32, 7
SPLIT, SHARED = PartitionSpec("row"), PartitionSpec()
INDEX, ATTENTION = ("q_index", "k_index", "weights"), ("q", "k")


def inputs(dtype=jnp.float32):
    """(arrays with a row per device, arrays that both devices share)."""
    rng = np.random.default_rng(0)
    rows = {"q_index": normal(rng, 2, T, HI, DI).astype(dtype), "weights": normal(rng, 2, T, HI)}
    rows |= {"q": normal(rng, 2, T, H, D).astype(dtype), "lse": 3 + normal(rng, 2, T, H)}
    rows |= ranges("random", 2, T, T)._asdict() | {"indices": jnp.asarray(rng.integers(-1, T, (2, T, K)), jnp.int32)}
    rows["unique"] = jnp.asarray(np.argsort(rng.random((2, T, T)), -1)[..., :K], jnp.int32)
    return rows, {"k_index": normal(rng, 1, T, DI).astype(dtype), "k": normal(rng, 1, T, 1, D).astype(dtype)}


def visible(x):
    return pk.Visible(x["start"], x["end"])


def index(x):
    return pk.IndexHeads(*(x[name] for name in INDEX))


def selected(x, **options):
    return pk.sparse_attention(x["q"], x["k"], None, x["indices"], softmax_scale=0.3, **options)


def with_values(x, **options):
    v = x["k"][..., : D // 2]
    return pk.sparse_attention(x["q"], x["k"], v, x["indices"], softmax_scale=0.3, **options)


def divergence(x, *, of=None, **options):
    indices = None if of is None else x[of]
    return pk.indexer_kl(index(x), visible(x), x["q"], x["k"], x["lse"], softmax_scale=0.3, topk_indices=indices, **options)


def index_op(op, x, **options):
    return op(index(x), visible(x), **options)


def attention_op(op, x, *more, **options):
    return op(x["q"], x["k"], *more, visible(x), softmax_scale=0.3, **options)


OPS = {  # function of all arrays, and those it is differentiated in
    "index_scores": (functools.partial(index_op, pk.index_scores), INDEX),
    "index_topk": (functools.partial(index_op, pk.index_topk, topk=K), ()),
    "coarse_to_fine": (functools.partial(index_op, pk.index_topk_coarse_to_fine, topk=K, block_size=8, n_blocks=5), ()),
    "sparse_attention": (selected, ATTENTION),
    "sparse_attention with values": (with_values, ATTENTION),
    "dense_attention": (lambda x, **options: attention_op(pk.dense_attention, x, None, **options), ATTENTION),
    "attention_topk": (lambda x, **options: attention_op(pk.attention_topk, x, x["lse"], topk=K, **options), ()),
    "indexer_kl": (divergence, INDEX),
    "indexer_kl of selected": (functools.partial(divergence, of="unique"), INDEX),
}
PALLAS = (
    "index_topk",
    "coarse_to_fine",
    "sparse_attention",
    "sparse_attention with values",
    "indexer_kl",
    "indexer_kl of selected",
)


def results(function, learned, rows, shared):
    """(outputs, gradients of their sum in the arrays called `learned`); `function` takes rows and shared arrays."""

    def total(given):
        out = function(*({**x, **{name: given[name] for name in given if name in x}} for x in (rows, shared)))
        floats = [x for x in jax.tree.leaves(out) if x.dtype != jnp.int32]
        return sum((jnp.where(jnp.isfinite(x), x, 0).sum() for x in floats), jnp.zeros(())), out

    return jax.grad(total, has_aux=True)({name: (rows | shared)[name] for name in learned})


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", OPS)
def test_as_outside(name, implementation):
    op, learned = OPS[name]
    rows, shared = inputs()
    mesh = jax.make_mesh((2,), ("row",), axis_types=(AxisType.Auto,))
    each = functools.partial(op, implementation=implementation)

    def outside(rows, shared):
        return each(rows | {name: jnp.concatenate([x, x]) for name, x in shared.items()})

    inside = jax.shard_map(lambda rows, shared: each(rows | shared), mesh=mesh, in_specs=(SPLIT, SHARED), out_specs=SPLIT)
    run = jax.jit(results, static_argnums=(0, 1))
    got_gradients, got = run(inside, learned, rows, shared)
    gradients, expected = run(outside, learned, rows, shared)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert_close(a, b) if a.dtype != jnp.int32 else np.testing.assert_array_equal(a, b)
    for name in learned:
        assert np.abs(gradients[name]).max() > 0.01
        assert_close(got_gradients[name], gradients[name], what=name)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_fp8_rows_of_a_shared_pool_and_blocks(implementation):
    rng = np.random.default_rng(1)
    rows, _ = inputs()
    pool = pack_latent_fp8(normal(rng, 64, 128), normal(rng, 64, 64, dtype=jnp.bfloat16))
    q, slots = normal(rng, 2, T, H, 192), jnp.asarray(rng.integers(-1, 64, (2, T, K)), jnp.int32)
    geometry = pk.BlockGeometry(compress_block=8, compress_stride=4, select_block=16, topk=4, n_initial=1, n_local=1)
    k = normal(rng, 2, geometry.n_compressed(T), 1, D)

    def both(rows, q, slots, k, pool):
        options = {"geometry": geometry, "n_keys": T, "implementation": implementation}
        blocks = pk.block_topk(rows["q"], k, rows["lse"], visible(rows), softmax_scale=0.3, **options)
        fp8 = pk.sparse_attention_fp8(q, pool, slots, softmax_scale=0.1, latent_dim=128, implementation=implementation)
        return blocks, fp8

    mesh = jax.make_mesh((2,), ("row",), axis_types=(AxisType.Auto,))
    inside = jax.shard_map(both, mesh=mesh, in_specs=(SPLIT,) * 4 + (SHARED,), out_specs=SPLIT)
    (got, attended), (blocks, expected) = (jax.jit(f)(rows, q, slots, k, pool) for f in (inside, both))
    np.testing.assert_array_equal(got, blocks)
    for a, b in zip(attended, expected, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("of", [None, "unique"])
def test_heads_of_the_target_split_over_an_axis(of, implementation):
    rows, shared = inputs()
    mesh = jax.make_mesh((2, 2), ("row", "heads"), axis_types=(AxisType.Auto,) * 2)
    by_head = {"q": PartitionSpec("row", None, "heads"), "lse": PartitionSpec("row", None, "heads")}

    def each(rows, shared, **options):
        return divergence(rows | shared, of=of, implementation=implementation, **options)

    inside = jax.shard_map(
        functools.partial(each, head_axis="heads"),
        mesh=mesh,
        in_specs=({name: by_head.get(name, SPLIT) for name in rows}, SHARED),
        out_specs=SPLIT,  # the check passes only where the result is known not to vary over the heads
    )
    run = jax.jit(results, static_argnums=(0, 1))
    got_gradients, got = run(inside, INDEX, rows, shared)
    twice = lambda rows, shared: each(rows, {name: jnp.concatenate([x, x]) for name, x in shared.items()})
    gradients, expected = run(twice, INDEX, rows, shared)
    assert_close(got, expected)
    for name in INDEX:
        assert_close(got_gradients[name], gradients[name], what=name)


def lowered(op, learned, rows, shared):
    device = AbstractDevice("NVIDIA H200", 132, "cuda")
    mesh = AbstractMesh((2,), ("row",), axis_types=(AxisType.Auto,), abstract_device=device)
    inside = jax.shard_map(lambda rows, shared: op(rows | shared), mesh=mesh, in_specs=(SPLIT, SHARED), out_specs=SPLIT)
    with use_abstract_mesh(mesh):
        run = jax.jit(lambda rows, shared: results(inside, learned, rows, shared))
        return run.trace(rows, shared).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("name", PALLAS)
def test_pallas_lowers(name):
    """The interpreter of Pallas itself does not keep track of what varies, so there is nothing to run."""
    op, learned = OPS[name]
    text = lowered(functools.partial(op, implementation="pallas"), learned, *inputs(jnp.bfloat16))
    assert text.count(TRITON_CALL) >= (3 if learned else 1)


@needs_mosaic
@pytest.mark.parametrize("name", ["index_scores", "index_topk"])
def test_mosaic_lowers(name):
    op, learned = OPS[name]
    assert "mosaic_" in lowered(functools.partial(op, implementation="mosaic"), learned, *inputs(jnp.bfloat16))
