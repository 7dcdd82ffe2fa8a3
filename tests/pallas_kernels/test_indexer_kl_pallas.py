"""The indexer's KL in Pallas, interpreted: the float64 reference with gradients, hostile inputs, repeated bits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ops_helpers import assert_close, clipped, in_float64, normal, ranges
from shapes import LOSS_SHAPES, LossShape
from test_indexer_kl import SCALE, case, inputs
from test_indexer_kl import run as run_public

import pallas_kernels as pk
from pallas_kernels import IndexHeads
from pallas_kernels.indexer_loss import pallas_gpu
from pallas_kernels.tuning import QueryTiles, Tiles

# Several tiles of keys, blocks of heads and queries, and chunks of queries even at test sizes.
SMALL = {
    "sum_tiles": QueryTiles(16, 16, block_q=8),
    "gradient_tiles": Tiles(32, 16),
    "score_budget": 1500,
    "budget_bytes": 20_000,
}


def run(sparse, **settings):
    """(kl, gradient in the index heads) of a weighted sum, as `test_indexer_kl.run`."""

    def loss(index, q, k, lse, d_kl, *indices, visible):
        options = {"softmax_scale": SCALE, "topk_indices": indices[0] if sparse else None, **settings}
        kl = pallas_gpu.indexer_kl(index, visible, q, k, lse, **options)
        return jnp.where(kl != 0, kl * d_kl, 0).sum(), kl

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def assert_gradients_close(actual, expected, dtype="float32"):
    for what, got, want in zip(IndexHeads._fields, actual, expected, strict=True):
        assert_close(got, want, dtype, f"index.{what}")


@pytest.mark.parametrize(
    ("name", "sparse", "deterministic"),
    [
        ("one_query", True, False),
        ("latent", True, True),
        ("grouped", False, False),
        ("grouped", True, False),
    ],
)
def test_matches_float64_with_gradients(name, sparse, deterministic):
    _, arrays, visible = case(name, {"latent": "random", "grouped": "packed"}.get(name, "causal"), sparse)
    (_, expected), gradients = in_float64(run_public("reference", sparse), *arrays, visible=visible)
    (_, kl), actual = run(sparse, deterministic=deterministic, **SMALL)(*arrays, visible=visible)
    assert kl.dtype == jnp.float32
    assert_close(kl, expected, what="kl")
    assert_gradients_close(actual, gradients[0])


@pytest.mark.parametrize("sparse", [False, True], ids=["visible", "selected"])
def test_more_heads_and_keys_than_fit_a_tile(sparse):
    shape = LossShape(1, 13, 213, 20, 24, 40, 2, 20, 62)
    arrays, visible = inputs(shape), ranges("causal", 1, shape.queries, shape.keys)
    _, q, k = arrays
    rng = np.random.default_rng(3)
    indices = np.stack([rng.permutation(shape.keys)[: shape.topk] for _ in range(shape.queries)])[None].astype(np.int32)
    indices[0, :, ::5] = rng.choice((-1, shape.keys, np.iinfo(np.int32).min, np.iinfo(np.int32).max), indices[0, :, ::5].shape)
    indices[0, 3:5, 16:48] = -1  # whole tiles without a valid slot
    indices = jnp.asarray(indices)
    if sparse:
        lse = pk.sparse_attention(q, k, None, indices, softmax_scale=SCALE, implementation="reference").lse
    else:
        lse = pk.dense_attention(q, k, None, softmax_scale=SCALE, implementation="reference", visible=visible).lse
    arrays = (*arrays, lse, normal(rng, 1, shape.queries), *((indices,) if sparse else ()))
    (_, expected), gradients = in_float64(run_public("reference", sparse), *arrays, visible=visible)
    (_, kl), actual = run(sparse, **SMALL)(*arrays, visible=visible)
    assert_close(kl, expected, what="kl")
    assert_gradients_close(actual, gradients[0])


@pytest.mark.parametrize("sparse", [False, True], ids=["visible", "selected"])
def test_what_lies_outside_every_set_may_hold_anything(sparse):
    shape, arrays, visible = case("latent", "random", sparse)
    visible = jax.tree.map(lambda x: jnp.clip(x, 6, 45), visible)
    index, q, k, lse, d_kl, *rest = arrays
    empty = jnp.asarray(np.equal(*clipped(visible, shape.keys)))
    lse = jnp.where(empty[..., None], -jnp.inf, jnp.where(lse > -jnp.inf, lse, 0))
    function = run(sparse, **SMALL)
    (_, clean), clean_gradients = function(index, q, k, lse, d_kl, *rest, visible=visible)
    assert all(np.all(np.isfinite(np.asarray(x))) for x in jax.tree.leaves((clean, clean_gradients)))
    assert bool(empty.any()) and np.all(np.asarray(clean)[np.asarray(empty)] == 0)
    for poison in (np.nan, 3e38):
        rows = [
            jnp.where(empty.reshape(*empty.shape, *[1] * (x.ndim - 2)), poison, x)
            for x in (index.q, index.weights, q, lse, d_kl)
        ]
        keys = [x.at[:, :6].set(poison).at[:, 45:].set(poison) for x in (index.k, k)]
        (_, dirty), gradients = function(
            IndexHeads(rows[0], keys[0], rows[1]), rows[2], keys[1], *rows[3:], *rest, visible=visible
        )
        jax.tree.map(np.testing.assert_array_equal, (dirty, gradients), (clean, clean_gradients))


@pytest.mark.parametrize("sparse", [False, True], ids=["visible", "selected"])
def test_runs_where_64_bit_types_are_enabled(sparse):
    _, arrays, visible = case("grouped", "packed", sparse)
    expected = run(sparse, deterministic=True, **SMALL)(*arrays, visible=visible)
    with jax.enable_x64(True):
        jax.tree.map(assert_close, run(sparse, deterministic=True, **SMALL)(*arrays, visible=visible), expected)


def test_ordered_sums_repeat_their_bits():
    _, arrays, visible = case("grouped", "packed", True)
    function = run(True, deterministic=True, **SMALL)
    first, second = (function(*arrays, visible=visible) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.parametrize("sparse", [False, True], ids=["visible", "selected"])
def test_bfloat16_and_default_tiles_through_the_public_op(sparse):
    _, arrays, visible = case("latent", "causal", sparse)
    (q_index, k_index, weights), *rest = arrays
    q_index, k_index, q, k = (x.astype(jnp.bfloat16) for x in (q_index, k_index, *rest[:2]))
    arrays = IndexHeads(q_index, k_index, weights), q, k, *rest[2:]
    (_, expected), gradients = in_float64(run_public("reference", sparse), *arrays, visible=visible)
    (_, kl), actual = jax.jit(run_public("pallas", sparse))(*arrays, visible=visible)
    assert [x.dtype.name for x in actual[0]] == ["bfloat16", "bfloat16", "float32"]
    # Scores are sums over few channels here, and exact in float32; only the gradients are rounded.
    assert_close(kl, expected, what="kl")
    assert_gradients_close(actual[0], gradients[0], "bfloat16")
    for what, got in zip(("q", "k", "lse"), actual[1:], strict=True):
        np.testing.assert_array_equal(got, np.zeros(got.shape), err_msg=f"{what} is a constant")
    assert "pallas" in pk.implementations_chosen()["indexer_kl"].split(",")


def test_heads_split_over_a_mesh_axis_give_the_same():
    """`vmap` stands in for the devices: it names an axis and sums over it as `shard_map` does."""
    _, arrays, visible = case("latent", "causal", True)
    index, q, k, lse, _, indices = arrays

    def kl(q, lse, head_axis=None):
        call = functools.partial(pallas_gpu.indexer_kl, softmax_scale=SCALE, topk_indices=indices, head_axis=head_axis)
        return call(index, visible, q, k, lse)

    halves = (jnp.moveaxis(x.reshape(*x.shape[:2], 2, 2, *x.shape[3:]), 2, 0) for x in (q, lse))
    split = jax.jit(jax.vmap(functools.partial(kl, head_axis="heads"), axis_name="heads"))(*halves)
    for got in split:
        assert_close(got, jax.jit(kl)(q, lse))


def test_without_queries_keys_or_slots_and_what_is_not_covered():
    for name in ("no_queries", "no_keys"):
        shape = LOSS_SHAPES[name]
        (index, q, k), visible = inputs(shape), ranges("causal", 1, shape.queries, shape.keys)
        lse = jnp.zeros((1, shape.queries, shape.heads))
        kl = pk.indexer_kl(index, visible, q, k, lse, softmax_scale=SCALE, implementation="pallas")
        np.testing.assert_array_equal(kl, np.zeros((1, shape.queries)))
    _, arrays, visible = case("latent", "random", True)
    (_, kl), gradients = run(True)(*arrays[:-1], arrays[-1][..., :0], visible=visible)
    assert np.all(np.asarray(kl) == 0) and all(np.all(np.asarray(x) == 0) for x in gradients)
    _, (index, q, *rest, _), visible = case("latent", "causal", False)
    with pytest.raises(NotImplementedError, match="pallas got bfloat16, float32; it needs q and k of one dtype"):
        pk.indexer_kl(index, visible, q.astype(jnp.bfloat16), *rest, softmax_scale=SCALE, implementation="pallas")
