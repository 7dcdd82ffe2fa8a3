"""The indexer against its formula written out, and its switches."""

import jax
import jax.numpy as jnp
import numpy as np

from dsa_jax.config import AttentionConfig, IndexerConfig, ModelConfig
from dsa_jax.config.fields import frozen
from dsa_jax.model.attention.indexer import Indexer
from pallas_kernels import Visible, index_scores


def indexer(**fields):
    config = IndexerConfig(enabled=True, **({"n_heads": 3, "head_dim": 8, "rope_dim": 4} | fields))
    model = ModelConfig(hidden_dim=12, initializer_range=0.5, attention=AttentionConfig(indexer=config))
    return Indexer(frozen(model), q_input_dim=10)


def setup(**fields):
    keys = jax.random.split(jax.random.key(0), 3)
    x, q_input = jax.random.normal(keys[0], (1, 6, 12)), jax.random.normal(keys[1], (1, 6, 10))
    positions = jnp.arange(6)[None]
    params = indexer().init(keys[2], x, q_input, positions)["params"]
    params["k_norm"] = {"scale": jnp.linspace(0.5, 1.5, 8), "bias": jnp.linspace(-0.3, 0.3, 8)}
    return params, indexer(**fields).apply({"params": params}, x, q_input, positions), (x, q_input)


def scores(index):
    length = index.k.shape[1]
    start = jnp.zeros((1, length), jnp.int32)
    return np.asarray(index_scores(index, Visible(start, start + length), implementation="reference"))


def test_scores_equal_the_formula_written_out_in_numpy():
    params, index, (x, q_input) = setup()
    x, q_input = np.asarray(x[0], np.float64), np.asarray(q_input[0], np.float64)
    kernel = {name: np.asarray(params[name]["kernel"], np.float64) for name in ("wq_b", "wk", "weights_proj")}
    angle = np.arange(6)[:, None] * np.array([1.0, 0.01])

    def turned(v):
        a, b = v[..., 0:2], v[..., 2:4]
        c, s = (f(angle).reshape(6, *[1] * (v.ndim - 2), 2) for f in (np.cos, np.sin))
        return np.concatenate([a * c - b * s, b * c + a * s, v[..., 4:]], axis=-1)

    q = turned((q_input @ kernel["wq_b"]).reshape(6, 3, 8))
    k = x @ kernel["wk"]
    k = (k - k.mean(-1, keepdims=True)) / np.sqrt(k.var(-1, keepdims=True) + 1e-6)
    k = turned(k * np.linspace(0.5, 1.5, 8) + np.linspace(-0.3, 0.3, 8))
    weights = x @ kernel["weights_proj"] * 3**-0.5 * 8**-0.5
    expected = np.einsum("th,ths->ts", weights, np.maximum(np.einsum("thd,sd->ths", q, k), 0))
    np.testing.assert_allclose(scores(index)[0], expected, atol=1e-5)


def test_hadamard_keeps_the_scores_fp8_nearly_and_the_rope_layout_changes_them():
    _, plain, _ = setup()
    _, rotated, _ = setup(hadamard=True)
    _, rounded, _ = setup(hadamard=True, fp8=True)
    _, interleaved, _ = setup(rope_layout="interleaved")
    spread = scores(plain).std()
    np.testing.assert_allclose(scores(rotated), scores(plain), atol=1e-5)
    assert float(jnp.abs(rotated.q - plain.q).max()) > 0.1
    error = np.abs(scores(rounded) - scores(plain)).max()
    assert 1e-4 * spread < error < 0.2 * spread
    assert np.abs(scores(interleaved) - scores(plain)).max() > 0.1 * spread


def test_the_index_weights_are_signed_and_float32():
    _, index, _ = setup()
    assert index.weights.dtype == jnp.float32
    assert (index.weights < 0).any() and (index.weights > 0).any()
