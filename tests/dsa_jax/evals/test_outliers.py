"""Outlier channels, e4m3 and the Hadamard rotation: when it helps, when it does nothing, and when it harms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsa_jax.config import AttentionConfig, ConfigError, IndexerConfig, ModelConfig
from dsa_jax.config.fields import frozen
from dsa_jax.evals.outliers import with_outlier_channels
from dsa_jax.model import build_model, init_params
from dsa_jax.model.attention.indexer import Indexer
from dsa_jax.params import is_indexer_path, nested_parameters, parameter_paths
from pallas_kernels import Visible, index_scores, index_topk

T, HIDDEN = 48, 32
RANGE = Visible(jnp.zeros((1, T), jnp.int32), jnp.arange(1, T + 1, dtype=jnp.int32)[None])


def model_config(**fields):
    indexer = IndexerConfig(enabled=True, n_heads=4, head_dim=64, rope_dim=16, topk=8, **fields)
    attention = AttentionConfig(n_heads=2, n_kv_heads=1, head_dim=16, indexer=indexer)
    return ModelConfig(vocab_size=32, hidden_dim=HIDDEN, n_layers=1, mlp_dim=16, initializer_range=0.2, attention=attention)


@pytest.fixture(scope="module")
def params():
    drawn = parameter_paths(init_params(build_model(model_config()), jax.random.key(0)))
    drawn["dense_layers/attention/indexer/k_norm/bias"] += 0.1
    return nested_parameters(drawn)


@functools.cache
def apply_indexer(**fields):
    return jax.jit(Indexer(frozen(model_config(**fields)), HIDDEN).apply)


def index_heads(params, **fields):
    """Queries, keys and weights of the only layer for normal hidden states."""
    mine = jax.tree.map(lambda leaf: leaf[0], params["dense_layers"]["attention"]["indexer"])
    x = jax.random.normal(jax.random.key(1), (1, T, HIDDEN))
    return apply_indexer(**fields)({"params": mine}, x, x, jnp.arange(T)[None])


def score_error(params, **fields):
    """Root mean square error of the fp8 scores over that of the scores."""
    score = lambda **more: np.asarray(index_scores(index_heads(params, **more), RANGE))
    exact, rounded = score(), score(fp8=True, **fields)
    seen = np.isfinite(exact)
    return np.sqrt(np.mean((rounded[seen] - exact[seen]) ** 2) / np.mean(exact[seen] ** 2))


def errors(params):
    """(plain, with the rotation)."""
    return score_error(params), score_error(params, hadamard=True)


def test_the_rotation_is_neutral_without_outliers_and_helps_against_shared_ones(params):
    plain, rotated = errors(params)
    assert 0.8 < rotated / plain < 1.25 and 0.003 < plain < 0.1
    shared = with_outlier_channels(params, model_config(), n_channels=3, factor=16.0, key_factor=16.0)
    unrotated, repaired = errors(shared)
    # Scores grow with the outliers, and so do the errors of those few channels, which no longer average out.
    assert unrotated > 0.8 * plain and repaired < 0.4 * unrotated


def test_opposite_outliers_change_no_score_and_harm_only_the_rotated_indexer(params):
    opposite = with_outlier_channels(params, model_config(), n_channels=3, factor=32.0)
    before, after = index_heads(params), index_heads(opposite)
    np.testing.assert_allclose(index_scores(after, RANGE), index_scores(before, RANGE), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(index_topk(after, RANGE, topk=8), index_topk(before, RANGE, topk=8))
    assert float(jnp.abs(after.q).max()) > 10 * float(jnp.abs(before.q).max())
    (plain, rotated), (spoilt, worse) = errors(params), errors(opposite)
    np.testing.assert_allclose(spoilt, plain, rtol=0.05)
    assert worse > 2 * rotated


def test_only_the_chosen_channels_of_the_indexer_change(params):
    changed = parameter_paths(with_outlier_channels(params, model_config(), n_channels=1, factor=4.0))
    for path, leaf in parameter_paths(params).items():
        ratio = np.asarray(changed[path]) / np.where(leaf == 0, 1, leaf)
        if path.endswith("wq_b/kernel"):
            heads = ratio.reshape(1, HIDDEN, 4, 64)
            assert (heads[..., 16] == 4).all() and (np.delete(heads, 16, axis=-1) == 1).all()
        elif "k_norm" in path:
            assert is_indexer_path(path) and (ratio[0] == np.where(np.arange(64) == 16, 0.25, 1)).all()
        else:
            np.testing.assert_array_equal(changed[path], leaf)


def test_what_the_indexer_does_not_have_is_refused(params):
    for n_channels in (0, 49):
        with pytest.raises(ConfigError, match=f"n_channels is {n_channels}; expected 1 to the 48 channels"):
            with_outlier_channels(params, model_config(), n_channels=n_channels, factor=2.0)
    with pytest.raises(ValueError, match=r"factor is -1.0 and key_factor None; expected positive numbers"):
        with_outlier_channels(params, model_config(), n_channels=1, factor=-1.0)
