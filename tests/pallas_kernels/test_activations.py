"""Index scores, selection and KL with another activation than the ReLU: float64 written out, and what refuses them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ops_helpers import IMPLEMENTATIONS, assert_close, clipped, normal, ranges
from shapes import LossShape
from test_index_topk import numpy_selection

import pallas_kernels as pk
from pallas_kernels import IndexHeads

SHAPE = LossShape(batch=2, queries=37, keys=53, index_heads=3, index_dim=8, heads=4, groups=1, dim=6, topk=5)
LONG = LossShape(batch=1, queries=30, keys=1100, index_heads=2, index_dim=4, heads=2, groups=1, dim=4, topk=7)


def inputs(shape, kind):
    rng = np.random.default_rng(0)
    index = IndexHeads(
        normal(rng, shape.batch, shape.queries, shape.index_heads, shape.index_dim),
        normal(rng, shape.batch, shape.keys, shape.index_dim),
        3 * normal(rng, shape.batch, shape.queries, shape.index_heads),
    )
    q = normal(rng, shape.batch, shape.queries, shape.heads, shape.dim)
    k = normal(rng, shape.batch, shape.keys, shape.groups, shape.dim)
    return index, q, k, ranges(kind, shape.batch, shape.queries, shape.keys)


def scores_written_out(q, k, weights, start, end):
    """[B, T, S] in the dtype of the inputs, -inf where invisible."""
    position = jnp.arange(k.shape[1])
    visible = (position >= start[..., None]) & (position < end[..., None])
    products = jnp.einsum("bthd,bsd->bths", q, k, precision="highest")
    return jnp.where(visible, jnp.einsum("bth,bths->bts", weights, products, precision="highest"), -jnp.inf)


def test_scores_and_selection_follow_the_formula():
    for shape, kind in ((SHAPE, "random"), (LONG, "causal")):
        index, _, _, visible = inputs(shape, kind)
        start, end = clipped(visible, shape.keys)
        with jax.enable_x64(True):
            wide = [jnp.asarray(np.asarray(x, np.float64)) for x in index]
            expected = np.asarray(scores_written_out(*wide, start, end))
        picked = {}
        for implementation in IMPLEMENTATIONS:

            @jax.jit
            def both(index, visible, topk=shape.topk, implementation=implementation):
                options = {"activation": "none", "implementation": implementation}
                return pk.index_scores(index, visible, **options), pk.index_topk(index, visible, topk=topk, **options)

            scores, picked[implementation] = both(index, visible)
            assert_close(scores, expected, what=f"{implementation} {kind}")
        np.testing.assert_array_equal(picked["xla"], numpy_selection(expected, start, end, shape.topk))
        np.testing.assert_array_equal(picked["xla"], picked["reference"])


@pytest.mark.parametrize("sparse", [False, True], ids=["visible", "selected"])
def test_kl_and_its_gradients_match_float64(sparse):
    index, q, k, visible = inputs(SHAPE, "random")
    start, end = clipped(visible, SHAPE.keys)
    indices = pk.index_topk(index, visible, topk=SHAPE.topk, activation="none") if sparse else None
    if sparse:
        lse = pk.sparse_attention(q, k, None, indices, softmax_scale=1.0).lse
    else:
        lse = pk.dense_attention(q, k, None, softmax_scale=1.0, visible=visible).lse
    d_kl = normal(np.random.default_rng(9), SHAPE.batch, SHAPE.queries)

    def written_out(index, q, k, d_kl):
        scores = scores_written_out(*index, start, end)
        members = np.isfinite(np.asarray(jax.lax.stop_gradient(scores)))
        if sparse:
            members &= (np.asarray(indices)[..., None] == np.arange(SHAPE.keys)).any(2)
        some = members.any(-1, keepdims=True)
        masked = lambda x, m: jnp.where(some[:, :, None] if x.ndim == 4 else some, jnp.where(m, x, -jnp.inf), 0)
        logits = jnp.einsum("bthd,bsd->bths", q, k[:, :, 0])
        p = jnp.where(members, jax.nn.softmax(masked(logits, members[:, :, None]), axis=-1).mean(2), 0)
        log_softmax = jax.nn.log_softmax(masked(scores, members), axis=-1)
        kl = (p * (jnp.log(jnp.where(p > 0, p, 1)) - jnp.where(members, log_softmax, 0))).sum(-1)
        return (kl * d_kl).sum(), kl

    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), (index, q, k, d_kl))
        gradients, expected = jax.tree.map(np.asarray, jax.grad(written_out, has_aux=True)(*wide))
    for implementation in IMPLEMENTATIONS:

        def loss(index, implementation=implementation):
            kl = pk.indexer_kl(
                index, visible, q, k, lse, softmax_scale=1.0, topk_indices=indices, activation="none",
                implementation=implementation,
            )  # fmt: skip
            return (kl * d_kl).sum(), kl

        actual, kl = jax.jit(jax.grad(loss, has_aux=True))(index)
        assert_close(kl, expected, what=f"{implementation} kl")
        for what, got, want in zip(("q_index", "k_index", "weights"), actual, gradients, strict=True):
            assert_close(got, want, what=f"{implementation} {what}")


def test_without_an_activation_coarse_to_fine_with_every_block_is_exact():
    index, _, _, visible = inputs(SHAPE, "causal")
    options = {"activation": "none", "topk": SHAPE.topk, "visible": visible}
    fine = pk.index_topk(index, **options)
    np.testing.assert_array_equal(pk.index_topk_coarse_to_fine(index, block_size=8, n_blocks=7, **options), fine)
    coarse = np.asarray(pk.index_topk_coarse_to_fine(index, block_size=8, n_blocks=2, **options))
    assert np.mean(coarse == np.asarray(fine)) > 0.5 and ((coarse >= 0).sum(-1) == (np.asarray(fine) >= 0).sum(-1)).all()


def test_what_cannot_be_computed_is_refused():
    index, q, k, visible = inputs(SHAPE, "causal")
    lse = jnp.zeros(q.shape[:3])
    for name in ("pallas", "triton"):
        with pytest.raises(
            NotImplementedError, match=f"implementation '{name}' has activation 'relu' only; got activation='none'"
        ):
            pk.index_topk(index, topk=3, activation="none", implementation=name, visible=visible)
    with pytest.raises(NotImplementedError, match="index_scores: implementation 'pallas' has activation 'relu' only"):
        pk.index_scores(index, visible, activation="none", implementation="pallas")
    with pytest.raises(NotImplementedError, match="indexer_kl: implementation 'pallas' has activation 'relu' only"):
        pk.indexer_kl(index, visible, q, k, lse, softmax_scale=1.0, activation="none", implementation="pallas")
    with pytest.raises(ValueError, match=r"activation is 'gelu'; expected one of relu, none\."):
        pk.index_scores(index, activation="gelu", visible=visible)
