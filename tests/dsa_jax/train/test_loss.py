import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsa_jax.train import loss as loss_module
from dsa_jax.train.loss import token_loss


def test_literal_case():
    """Two classes with logits (0, log 3): the target's probability is 1/4 or 3/4."""
    hidden = jnp.array([[[0.0, jnp.log(3.0)]] * 3])
    result = token_loss(lambda h: h, hidden, jnp.array([[0, 1, 1]]), jnp.array([[True, True, False]]), vocab_size=2)
    np.testing.assert_allclose(result.nll[0], [np.log(4), np.log(4 / 3), 0.0], rtol=1e-6)
    np.testing.assert_array_equal(result.correct[0], [0.0, 1.0, 0.0])


@pytest.mark.parametrize("logits_per_chunk", [7 * 11, 3 * 11, 10**9], ids=["many-chunks", "uneven", "one-chunk"])
def test_chunking_changes_nothing(monkeypatch, logits_per_chunk):
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(2, 17, 5)), jnp.float32)
    head = jnp.asarray(rng.normal(size=(5, 11)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, 11, (2, 17)), jnp.int32)
    mask = jnp.asarray(rng.random((2, 17)) < 0.6)

    def total(hidden, head):
        return token_loss(lambda h: h @ head, hidden, targets, mask, vocab_size=11).nll.sum()

    def plain(hidden, head):
        nll = -jnp.take_along_axis(jax.nn.log_softmax(hidden @ head), targets[..., None], -1)[..., 0]
        return jnp.where(mask, nll, 0).sum()

    monkeypatch.setattr(loss_module, "LOGITS_PER_CHUNK", logits_per_chunk)
    value, grads = jax.value_and_grad(total, (0, 1))(hidden, head)
    want, want_grads = jax.value_and_grad(plain, (0, 1))(hidden, head)
    np.testing.assert_allclose(value, want, rtol=1e-6)
    for got, expected in zip(grads, want_grads, strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5)


def test_targets_outside_the_mask_may_be_anything():
    hidden = jnp.ones((1, 3, 4))
    mask = jnp.array([[True, False, False]])
    run = lambda targets: token_loss(lambda h: h, hidden, jnp.array([targets]), mask, vocab_size=4).nll
    np.testing.assert_array_equal(run([1, -5, 10**6]), run([1, 0, 0]))
