"""The loss that teaches mean index keys to choose blocks, against the KL between blocks written out in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsa_jax.config import IndexerConfig
from dsa_jax.model.attention.coarse_loss import coarse_kl
from dsa_jax.model.attention.visibility import causal_visibility
from pallas_kernels import IndexHeads, dense_attention, pool_blocks
from tests.dsa_jax.model.small import built, forward, random_ids, small_config

T, SIZE, SCALE = 22, 4, 0.5
SEGMENTS = jnp.asarray([[1] * 22, [1] * 9 + [2] * 11 + [0] * 2], jnp.int32)


def arrays(dtype):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
    return IndexHeads(draw(2, T, 3, 8), draw(2, T, 8), draw(2, T, 3)), draw(2, T, 2, 4), draw(2, T, 1, 4), draw(2, T)


def between_blocks(index, q, k, visibility, pooling):
    """KL per query [B, T] from whole arrays: attention summed over heads and blocks, softmax over the blocks' pooled keys."""
    place, n_blocks = jnp.arange(T), T // SIZE
    visible = (place >= visibility.start[..., None]) & (place < visibility.end[..., None])
    logits = jnp.where(visible[:, :, None], SCALE * jnp.einsum("bthd,bsd->bths", q, k[:, :, 0]), -1e30)
    attention = jnp.where(visible, jax.nn.softmax(logits, axis=-1).sum(2), 0)[..., : n_blocks * SIZE]
    first = jnp.arange(n_blocks) * SIZE
    sees = (first >= visibility.start[..., None]) & (first + SIZE <= visibility.end[..., None])
    target = jnp.where(sees, attention.reshape(2, T, n_blocks, SIZE).sum(-1), 0)
    target = target / jnp.maximum(target.sum(-1, keepdims=True), 1e-300)
    pooled = pool_blocks(index.k, SIZE, pooling)
    scores = jnp.einsum("bth,bths->bts", index.weights, jax.nn.relu(jnp.einsum("bthd,bsd->bths", index.q, pooled)))
    log_softmax = jax.nn.log_softmax(jnp.where(sees, scores, -1e30), axis=-1)
    return jnp.where(sees, target * (jnp.log(jnp.where(target > 0, target, 1)) - log_softmax), 0).sum(-1)


@pytest.mark.parametrize("pooling", ["mean", "salient"])
def test_its_gradient_is_that_of_the_kl_between_blocks(pooling):
    visibility = causal_visibility(SEGMENTS)

    def ours(index, q, k):
        settings = {"softmax_scale": SCALE, "implementation": "xla"}
        lse = dense_attention(q, k, k, visibility, **settings).lse
        indexer = IndexerConfig(coarse_block_size=SIZE, coarse_pooling=pooling)
        return coarse_kl(indexer, index, visibility, q, k, lse, **settings)

    index, q, k, d_kl = arrays(jnp.float32)
    values = ours(index, q, k)
    grads = jax.grad(lambda index: (ours(index, q, k) * d_kl).sum())(index)
    with jax.enable_x64(True):
        index, q, k, d_kl = arrays(jnp.float64)
        expected = jax.grad(lambda index: (between_blocks(index, q, k, visibility, pooling) * d_kl).sum())(index)
    for ours_, theirs in zip(grads, expected, strict=True):
        np.testing.assert_allclose(ours_, theirs, rtol=2e-5, atol=2e-6)
    start, end = np.asarray(visibility.start), np.asarray(visibility.end)
    sees_none = end // SIZE * SIZE <= -(-start // SIZE) * SIZE
    assert sees_none.any() and not np.asarray(values)[sees_none].any() and (np.asarray(values)[~sees_none] > 0).all()


def test_the_warm_up_learns_it_where_the_config_asks():
    ids = random_ids()
    variants = ((("coarse_block_size", 4), ("coarse_loss_weight", weight)) for weight in (0.0, 1.0))
    (model, params), (with_blocks, _) = (built(variant=variant) for variant in variants)
    run = lambda model, loss, attention: forward(model, params, ids, attention=attention, indexer_loss=loss).indexer_kl
    assert (run(with_blocks, "dense", "dense") > run(model, "dense", "dense")).all()
    np.testing.assert_array_equal(run(with_blocks, "sparse", "sparse"), run(model, "sparse", "sparse"))


def test_a_negative_weight_is_refused():
    config = small_config(variant=(("coarse_loss_weight", -1.0),))
    with pytest.raises(ValueError, match="coarse_loss_weight is -1"):
        config.validate()
