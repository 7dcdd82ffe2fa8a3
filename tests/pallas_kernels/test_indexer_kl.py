"""The indexer's KL: numpy written out, the float64 reference with gradients, hostile inputs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ops_helpers import IMPLEMENTATIONS, assert_close, clipped, in_float64, normal, ranges
from shapes import LOSS_SHAPES
from test_sparse_attention import selection

import pallas_kernels as pk
from pallas_kernels import IndexHeads, Visible

SCALE = 0.3


def inputs(shape, seed=0):
    rng = np.random.default_rng(seed)
    batch, queries, keys = shape.batch, shape.queries, shape.keys
    index = IndexHeads(
        normal(rng, batch, queries, shape.index_heads, shape.index_dim),
        normal(rng, batch, keys, shape.index_dim),
        normal(rng, batch, queries, shape.index_heads),
    )
    return index, normal(rng, batch, queries, shape.heads, shape.dim), normal(rng, batch, keys, shape.groups, shape.dim)


def run(implementation, sparse):
    """(kl, gradients in the index heads, q, k and lse) of a weighted sum; the last array is the selection in sparse mode."""

    def loss(index, q, k, lse, d_kl, *indices, visible):
        options = {"topk_indices": indices[0] if sparse else None, "implementation": implementation}
        kl = pk.indexer_kl(index, visible, q, k, lse, softmax_scale=SCALE, **options)
        return (kl * d_kl).sum(), kl

    return jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True)


def case(name, kind, sparse):
    shape = LOSS_SHAPES[name]
    arrays, visible = inputs(shape), ranges(kind, shape.batch, shape.queries, shape.keys)
    indices = selection(shape)
    _, q, k = arrays
    if sparse:
        lse = pk.sparse_attention(q, k, None, indices, softmax_scale=SCALE, implementation="reference").lse
    else:
        lse = pk.dense_attention(q, k, None, softmax_scale=SCALE, implementation="reference", visible=visible).lse
    d_kl = normal(np.random.default_rng(9), shape.batch, shape.queries)
    return shape, (*arrays, lse, d_kl, *((indices,) if sparse else ())), visible


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("sparse", [False, True], ids=["visible", "selected"])
def test_literal_case(implementation, sparse):
    """Two keys attended 1 : 3 against index scores 0 and log 2, so 1/3 : 2/3."""
    k_index, k = jnp.asarray([[[-1.0], [np.log(2.0)], [50.0]]]), jnp.log(jnp.asarray([1.0, 3.0, 9.0])).reshape(1, 3, 1, 1)
    index = IndexHeads(jnp.ones((1, 2, 1, 1)), k_index, jnp.ones((1, 2, 1)))
    target = jnp.ones((1, 2, 1, 1)), k, jnp.log(jnp.full((1, 2, 1), 4.0))
    visible = Visible(jnp.asarray([[0, 1]]), jnp.asarray([[3 if sparse else 2, 1]]))
    indices = jnp.asarray([[[0, 1, -1], [0, 1, 2]]]) if sparse else None

    def kl(index):
        options = {"softmax_scale": 1.0, "topk_indices": indices, "implementation": implementation}
        return pk.indexer_kl(index, visible, *target, **options)

    expected = 0.25 * np.log(0.25 / (1 / 3)) + 0.75 * np.log(0.75 / (2 / 3))
    np.testing.assert_allclose(kl(index), [[expected, 0.0]], rtol=1e-5)
    gradient = jax.grad(lambda index: kl(index).sum())(index)
    # d/dscore = softmax - p = (1/12, -1/12); the ReLU is closed for key 0.
    np.testing.assert_allclose(gradient.k, [[[0.0], [-1 / 12], [0.0]]], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(gradient.weights, [[[-np.log(2.0) / 12], [0.0]]], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("sparse", [False, True], ids=["visible", "selected"])
@pytest.mark.parametrize("name", LOSS_SHAPES)
def test_matches_float64_with_gradients(name, sparse):
    kind = {"latent": "random", "grouped": "packed"}.get(name, "causal")
    _, arrays, visible = case(name, kind, sparse)
    (_, expected), gradients = in_float64(run("reference", sparse), *arrays, visible=visible)
    for implementation in IMPLEMENTATIONS if name == "latent" else IMPLEMENTATIONS[1:]:
        (_, kl), actual = jax.jit(run(implementation, sparse))(*arrays, visible=visible)
        assert kl.dtype == jnp.float32
        assert_close(kl, expected, what=f"{implementation} kl")
        assert np.all(np.asarray(kl) > -1e-5)
        for what, got, want in zip(IndexHeads._fields, actual[0], gradients[0], strict=True):
            assert_close(got, want, what=f"{implementation} index.{what}")
        for what, got in zip(("q", "k", "lse"), actual[1:], strict=True):
            np.testing.assert_array_equal(got, np.zeros(got.shape), err_msg=f"{implementation} {what} is a constant")


def test_reference_matches_numpy():
    shape, arrays, visible = case("latent", "random", True)
    (q_index, k_index, weights), q, k, lse, _, indices = jax.tree.map(lambda x: np.asarray(x, np.float64), arrays)
    start, end = clipped(visible, shape.keys)
    (_, kl), _ = in_float64(run("reference", True), *arrays, visible=visible)
    for b, t in np.ndindex(*start.shape):
        members = [int(s) for s in indices[b, t] if start[b, t] <= s < end[b, t]]
        if not members:
            assert kl[b, t] == 0
            continue
        scores = weights[b, t] @ np.maximum(q_index[b, t] @ k_index[b, members].T, 0)
        p = np.exp(SCALE * q[b, t] @ k[b, members, 0].T - lse[b, t][:, None]).sum(0)
        p, softmax = p / p.sum(), np.exp(scores) / np.exp(scores).sum()
        np.testing.assert_allclose(kl[b, t], (p * np.log(p / softmax)).sum(), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("sparse", [False, True], ids=["visible", "selected"])
def test_what_lies_outside_every_set_may_hold_anything(implementation, sparse):
    shape, arrays, visible = case("latent", "random", sparse)
    visible = jax.tree.map(lambda x: jnp.clip(x, 6, 45), visible)
    index, q, k, lse, *rest = arrays
    empty = jnp.asarray(np.equal(*clipped(visible, shape.keys)))
    lse = jnp.where(empty[..., None], -jnp.inf, jnp.where(lse > -jnp.inf, lse, 0))
    function = jax.jit(run(implementation, sparse))
    (_, clean), clean_gradients = function(index, q, k, lse, *rest, visible=visible)
    assert np.all(np.isfinite(np.asarray(clean))) and all(
        np.all(np.isfinite(np.asarray(g))) for g in jax.tree.leaves(clean_gradients)
    )
    assert bool(empty.any()) and np.all(np.asarray(clean)[np.asarray(empty)] == 0)
    for poison in (np.nan, 3e38):
        rows = [jnp.where(empty.reshape(*empty.shape, *[1] * (x.ndim - 2)), poison, x) for x in (index.q, index.weights, q)]
        keys = [x.at[:, :6].set(poison).at[:, 45:].set(poison) for x in (index.k, k)]
        (_, dirty), gradients = function(IndexHeads(rows[0], keys[0], rows[1]), rows[2], keys[1], lse, *rest, visible=visible)
        jax.tree.map(np.testing.assert_array_equal, (dirty, gradients), (clean, clean_gradients))


@pytest.mark.parametrize(("implementation", "activation"), [*((name, "relu") for name in IMPLEMENTATIONS), ("xla", "none")])
@pytest.mark.parametrize(("n_index_keys", "shared"), [(9, 4), (100, 6), (1, 600)])
def test_keys_that_share_an_index_key(implementation, activation, n_index_keys, shared):
    """As if each had a copy of it; lengths of less and of more than one block of keys, ranges that cut index keys."""
    rng = np.random.default_rng(4)
    keys, queries = n_index_keys * shared, 10
    arrays = [IndexHeads(normal(rng, 2, queries, 3, 8), normal(rng, 2, n_index_keys, 8), normal(rng, 2, queries, 3))]
    arrays += [normal(rng, 2, queries, 2, 4), normal(rng, 2, keys, 1, 4), normal(rng, 2, queries, 2), normal(rng, 2, queries)]
    visible = ranges("random", 2, queries, keys)

    def run(implementation, one_each):
        def loss(index, q, k, lse, d_kl):
            settings = {"softmax_scale": SCALE, "activation": activation, "implementation": implementation}
            if one_each:
                index = index._replace(k=jnp.repeat(index.k, shared, axis=1))
            else:
                settings["keys_per_index_key"] = shared
            return (pk.indexer_kl(index, visible, q, k, lse, **settings) * d_kl).sum()

        return jax.value_and_grad(loss)

    for ours, theirs in zip(
        jax.tree.leaves(jax.jit(run(implementation, False))(*arrays)),
        jax.tree.leaves(in_float64(run("reference", True), *arrays)),
        strict=True,
    ):
        assert_close(ours, theirs, what=implementation)


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, "pallas"])
def test_a_shared_index_key_gets_its_gradient_rounded_once(implementation):
    """In bfloat16 what its keys contribute cancels but for less than the rounding of each."""
    rng = np.random.default_rng(5)
    q_index, k_index = normal(rng, 1, 16, 2, 16, dtype=jnp.bfloat16), normal(rng, 1, 2, 16, dtype=jnp.bfloat16)
    weights = normal(rng, 1, 16, 2)
    target = [normal(rng, 1, 16, 1, 16), normal(rng, 1, 128, 1, 16), normal(rng, 1, 16, 1)]
    visible = Visible(jnp.zeros((1, 16), jnp.int32), jnp.full((1, 16), 128, jnp.int32))

    def gradient(implementation, dtype):
        def loss(k_index):
            settings = {"softmax_scale": SCALE, "keys_per_index_key": 64, "implementation": implementation}
            return pk.indexer_kl(IndexHeads(q_index.astype(dtype), k_index, weights), visible, *target, **settings).sum()

        return np.asarray(jax.grad(loss)(k_index.astype(dtype)), np.float32)

    expected = gradient("reference", jnp.float32)
    assert np.abs(gradient(implementation, jnp.bfloat16) - expected).max() < 0.01 * np.abs(expected).max()


def test_shared_index_keys_that_do_not_fit():
    _, (index, *target, _), visible = case("grouped", "causal", False)
    call = functools.partial(pk.indexer_kl, index, visible, *target, softmax_scale=SCALE)
    with pytest.raises(ValueError, match="S times keys_per_index_key"):
        call(keys_per_index_key=2)
    with pytest.raises(ValueError, match="keys_per_index_key is 0; expected a positive whole number"):
        call(keys_per_index_key=0)
    with pytest.raises(ValueError, match="keys_per_index_key is 2; expected a positive whole number, 1 with"):
        call(keys_per_index_key=2, topk_indices=jnp.zeros((*index.q.shape[:2], 1), jnp.int32))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_selecting_everything_equals_the_visible_form(implementation):
    shape, arrays, visible = case("grouped", "packed", False)
    everything = jnp.broadcast_to(jnp.arange(shape.keys, dtype=jnp.int32), (shape.batch, shape.queries, shape.keys))
    index, *target = arrays[:4]
    call = functools.partial(pk.indexer_kl, index, visible, *target, softmax_scale=SCALE, implementation=implementation)
    assert_close(call(topk_indices=everything), call())


def test_extreme_scores_stay_finite():
    """Index scores of 1e4 and probabilities that underflow: finite KL and gradients, the same in both implementations."""
    _, (index, q, k, _, d_kl), visible = case("grouped", "causal", False)
    index, q = index._replace(q=index.q * 1e4), q * 100
    lse = pk.dense_attention(q, k, None, visible, softmax_scale=SCALE, implementation="reference").lse
    arrays = index, q, k, lse, d_kl
    (_, expected), _ = in_float64(run("reference", False), *arrays, visible=visible)
    for implementation in IMPLEMENTATIONS:
        (_, kl), gradients = jax.jit(run(implementation, False))(*arrays, visible=visible)
        assert_close(kl, expected, what=implementation)
        assert all(np.all(np.isfinite(np.asarray(g))) for g in jax.tree.leaves(gradients))
