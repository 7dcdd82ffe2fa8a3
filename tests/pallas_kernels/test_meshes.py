"""Ops on a mesh: inside `jax.shard_map`, which checks over which axes values vary, and on arrays split over Explicit axes."""

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

H, G, D, HI, DI, K, ROWS = 4, 2, 16, 8, 32, 7, 64
GEOMETRY = pk.BlockGeometry(compress_block=2, compress_stride=1, select_block=2, topk=4, n_initial=1, n_local=1)
SPLIT, SHARED = PartitionSpec("row"), PartitionSpec()
INDEX, ATTENTION, KEYS = ("q_index", "k_index", "weights"), ("q", "k"), ("k_index", "k", "k_compressed")


def inputs(length, dtype=jnp.float32):
    """(arrays with two rows, arrays that the rows share: one row of keys, and a pool)."""
    rng = np.random.default_rng(0)
    rows = {"q_index": normal(rng, 2, length, HI, DI).astype(dtype), "weights": normal(rng, 2, length, HI)}
    rows |= {"q": normal(rng, 2, length, H, D).astype(dtype), "lse": 3 + normal(rng, 2, length, H)}
    rows |= ranges("random", 2, length, length)._asdict()
    rows["indices"] = jnp.asarray(rng.integers(-1, length, (2, length, K)), jnp.int32)
    rows["unique"] = jnp.asarray(np.argsort(rng.random((2, length, length)), -1)[..., :K], jnp.int32)
    rows["latent_q"] = normal(rng, 2, length, H, 192)
    rows["slots"] = jnp.asarray(rng.integers(-1, ROWS, (2, length, K)), jnp.int32)
    pool = pack_latent_fp8(normal(rng, ROWS, 128), normal(rng, ROWS, 64, dtype=jnp.bfloat16))
    shared = {"k_index": normal(rng, 1, length, DI).astype(dtype), "k": normal(rng, 1, length, G, D).astype(dtype)}
    shared["k_compressed"] = shared["k"][:, : GEOMETRY.n_compressed(length)]
    return rows, shared | {"pool": pool, "sink": normal(rng, H)}


def for_both_rows(shared):
    return {name: jnp.concatenate([x, x]) if name in KEYS else x for name, x in shared.items()}


def visible(x):
    return pk.Visible(x["start"], x["end"])


def index_op(op, x, **options):
    return op(pk.IndexHeads(*(x[name] for name in INDEX)), visible(x), **options)


def attention_op(op, x, *more, **options):
    return op(x["q"], x["k"], *more, softmax_scale=0.3, **options)


def sparse(x, *, has_values=False, has_sink=False, **options):
    v = x["k"][..., : D // 2] if has_values else None
    return attention_op(pk.sparse_attention, x, v, x["indices"], sink=x["sink"] if has_sink else None, **options)


def sparse_fp8(x, **options):
    return pk.sparse_attention_fp8(x["latent_q"], x["pool"], x["slots"], softmax_scale=0.1, latent_dim=128, **options)


def dense(x, *, has_sink=False, **options):
    return attention_op(pk.dense_attention, x, None, visible(x), sink=x["sink"] if has_sink else None, **options)


def blocks(x, **options):
    x, n_keys = x | {"k": x["k_compressed"]}, x["k"].shape[1]
    return attention_op(pk.block_topk, x, x["lse"], visible(x), n_keys=n_keys, geometry=GEOMETRY, **options)


def divergence(x, *, of=None, **options):
    target = {"q": x["q"], "k": x["k"], "lse": x["lse"], "softmax_scale": 0.3}
    return index_op(pk.indexer_kl, x, **target, topk_indices=None if of is None else x[of], **options)


OPS = {  # function of all arrays, and those it is differentiated in
    "index_scores": (functools.partial(index_op, pk.index_scores), INDEX),
    "index_topk": (functools.partial(index_op, pk.index_topk, topk=K), ()),
    "coarse_to_fine": (functools.partial(index_op, pk.index_topk_coarse_to_fine, topk=K, block_size=8, n_blocks=5), ()),
    "sparse_attention": (sparse, ATTENTION),
    "sparse_attention with values": (functools.partial(sparse, has_values=True), ATTENTION),
    "sparse_attention with a sink": (functools.partial(sparse, has_sink=True), (*ATTENTION, "sink")),
    "sparse_attention_fp8": (sparse_fp8, ()),
    "dense_attention": (dense, ATTENTION),
    "dense_attention with a sink": (functools.partial(dense, has_sink=True), (*ATTENTION, "sink")),
    "attention_topk": (lambda x, **rest: attention_op(pk.attention_topk, x, x["lse"], visible(x), topk=K, **rest), ()),
    "block_topk": (blocks, ()),
    "indexer_kl": (divergence, INDEX),
    "indexer_kl of selected": (functools.partial(divergence, of="unique"), INDEX),
}
PALLAS = (
    "index_topk",
    "coarse_to_fine",
    "sparse_attention",
    "sparse_attention with values",
    "sparse_attention with a sink",
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
def test_inside_shard_map_as_outside(name, implementation):
    op, learned = OPS[name]
    rows, shared = inputs(300)
    mesh = jax.make_mesh((2,), ("row",), axis_types=(AxisType.Auto,))
    each = functools.partial(op, implementation=implementation)
    inside = jax.shard_map(lambda rows, shared: each(rows | shared), mesh=mesh, in_specs=(SPLIT, SHARED), out_specs=SPLIT)
    run = jax.jit(results, static_argnums=(0, 1))
    got_gradients, got = run(inside, learned, rows, shared)
    gradients, expected = run(lambda rows, shared: each(rows | for_both_rows(shared)), learned, rows, shared)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert_close(a, b) if a.dtype != jnp.int32 else np.testing.assert_array_equal(a, b)
    for name in learned:
        assert np.abs(gradients[name]).max() > 0.01
        assert_close(got_gradients[name], gradients[name], what=name)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("of", [None, "unique"])
def test_heads_of_the_target_split_over_an_axis(of, implementation):
    rows, shared = inputs(300)
    mesh = jax.make_mesh((2, 2), ("row", "heads"), axis_types=(AxisType.Auto,) * 2)
    by_head = {"q": PartitionSpec("row", None, "heads"), "lse": PartitionSpec("row", None, "heads")}
    each = functools.partial(divergence, of=of, implementation=implementation)
    inside = jax.shard_map(
        lambda rows, shared, k: each(rows | shared | {"k": k}, head_axis="heads"),
        mesh=mesh,
        in_specs=({name: by_head.get(name, SPLIT) for name in rows}, SHARED, PartitionSpec(None, None, "heads")),
        out_specs=SPLIT,  # the check passes only where the result is known not to vary over the heads
    )
    run = jax.jit(results, static_argnums=(0, 1))
    got_gradients, got = run(lambda rows, shared: inside(rows, shared, shared["k"]), INDEX, rows, shared)
    gradients, expected = run(lambda rows, shared: each(rows | for_both_rows(shared)), INDEX, rows, shared)
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
def test_pallas_lowers_inside_shard_map(name):
    """The interpreter of Pallas itself does not keep track of what varies, so there is nothing to run."""
    op, learned = OPS[name]
    text = lowered(functools.partial(op, implementation="pallas"), learned, *inputs(300, jnp.bfloat16))
    assert text.count(TRITON_CALL) >= (3 if learned else 1)


@needs_mosaic
@pytest.mark.parametrize("name", ["index_scores", "index_topk"])
def test_mosaic_lowers_inside_shard_map(name):
    op, learned = OPS[name]
    assert "mosaic_" in lowered(functools.partial(op, implementation="mosaic"), learned, *inputs(300, jnp.bfloat16))


SPLITS = {
    "unsplit": lambda x: PartitionSpec(),
    "positions": lambda x: PartitionSpec(None, "data") if x.ndim > 1 and x.shape[1] % 2 == 0 else PartitionSpec(),
    "rows and heads": lambda x: PartitionSpec("data", None, "tensor") if x.ndim == 4 else PartitionSpec("data"),
}
EXPLICIT = [*((name, "xla") for name in OPS), ("sparse_attention with values", "pallas")]


def whole_rows():
    """All arrays, keys by row, 8 positions."""
    rows, shared = inputs(8)
    return rows | for_both_rows(shared)


def on_explicit_axes(arrays, split):
    mesh = jax.sharding.get_mesh()
    return {name: jax.device_put(x, jax.NamedSharding(mesh, SPLITS[split](x))) for name, x in arrays.items()}


def explicit_mesh():
    return jax.set_mesh(jax.make_mesh((2, 2), ("data", "tensor"), devices=jax.devices()[:4]))


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(("name", "implementation"), EXPLICIT)
def test_results_are_those_of_one_device_and_split_like_the_queries(name, implementation, split):
    op, arrays = functools.partial(OPS[name][0], implementation=implementation), whole_rows()
    expected = jax.tree.leaves(op(arrays))
    with explicit_mesh():
        spread = on_explicit_axes(arrays, split)
        # Step by step, every operation is compiled for itself, which takes long.
        results = jax.tree.leaves((op if name in ("index_topk", "dense_attention") else jax.jit(op))(spread))
    for result, value in zip(results, expected, strict=True):
        np.testing.assert_allclose(result, value, rtol=1e-5, atol=1e-5)
        n_axes = 3 if name.startswith(("sparse", "dense")) else 2  # all queries are split alike
        assert (*result.sharding.spec,)[:n_axes] == (*spread["q"].sharding.spec, None, None, None)[:n_axes]


@pytest.mark.parametrize("split", ["positions", "rows and heads"])
@pytest.mark.parametrize(("name", "implementation"), [case for case in EXPLICIT if OPS[case[0]][1]])
def test_gradients_are_those_of_one_device(name, implementation, split):
    (op, learned), arrays = OPS[name], whole_rows()

    def gradients(arrays):
        def loss(given):
            out = op(arrays | given, implementation=implementation)
            finite = [jnp.where(jnp.isfinite(x), x, 0) for x in jax.tree.leaves(out)]
            return sum(jnp.sum(jnp.sin(x), dtype=jnp.float32) for x in finite)

        return jax.jit(jax.grad(loss))({name: arrays[name] for name in learned})

    expected = gradients(arrays)
    with explicit_mesh():
        spread = on_explicit_axes(arrays, split)
        actual = gradients(spread)
    for name, gradient in actual.items():
        assert_close(gradient, expected[name], what=name)
        assert gradient.sharding.is_equivalent_to(spread[name].sharding, gradient.ndim)
