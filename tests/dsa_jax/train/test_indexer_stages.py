"""Stages that train the indexers alone: a warm-up without dense attention, and a sparse stage that leaves the base alone."""

import dataclasses

import jax
import numpy as np
import pytest

from dsa_jax.config import ConfigError
from dsa_jax.dryrun.summary import summarize
from dsa_jax.model import abstract_params, build_model, init_params
from dsa_jax.model.attention import attend
from dsa_jax.params import count_parameters, is_indexer_path, parameter_paths, split_parameters
from dsa_jax.train.loop import rehearsed_steps
from dsa_jax.train.stages import stage_of
from dsa_jax.train.step import init_state, make_train_step
from tests.dsa_jax.train.tiny import padded_batch, tiny_config

KINDS = pytest.mark.parametrize(("kind", "moe"), [("gqa", False), ("mla", True)], ids=["gqa", "mla-moe"])


def one_step(config, name):
    """Parameters before and after an update that follows the gradient, and its metrics."""
    settings = getattr(config.train, name)
    settings.optimizer = dataclasses.replace(
        settings.optimizer, eps=1.0, clip_norm=0.0, warmup_steps=0, learning_rate=1.0, schedule="constant"
    )
    model, stage = build_model(config.model), stage_of(config, name)
    params = init_params(model, jax.random.key(config.seed))
    before = {path: np.array(leaf) for path, leaf in parameter_paths(params).items()}
    state, metrics = make_train_step(model, stage, config)(init_state(params, stage, settings), padded_batch(config))
    return before, jax.device_get(parameter_paths(state.params)), jax.device_get(metrics)


@KINDS
def test_a_sparse_warmup_over_all_keys_is_the_dense_one(kind, moe):
    config = tiny_config(kind, moe=moe)
    config.model.attention.indexer.topk = 16
    before, dense, dense_metrics = one_step(config, "warmup")
    config.train.warmup_attention = "sparse"
    config.validate()
    _, sparse, metrics = one_step(config, "warmup")
    np.testing.assert_allclose(
        metrics["kl_layers"], dense_metrics["kl_layers"], rtol=1e-5, atol=1e-7
    )  # a sum of logarithms near 0
    assert metrics["kl"] > 0 and "loss" not in metrics
    for path, start in before.items():
        if is_indexer_path(path):
            np.testing.assert_allclose(sparse[path] - start, dense[path] - start, atol=2e-6, err_msg=path)
            assert not np.array_equal(sparse[path], start), path
        else:
            np.testing.assert_array_equal(sparse[path], start, err_msg=path)


@KINDS
def test_a_sparse_warmup_computes_no_dense_attention(monkeypatch, kind, moe):
    def refuse(*_, **__):
        raise ImportError("dense attention is asked for.")

    monkeypatch.setattr(attend, "dense_attention", refuse)
    config = tiny_config(kind, moe=moe)
    config.model.attention.indexer.forced_local = 1
    model = build_model(config.model)
    with pytest.raises(ConfigError, match=r"a step of stage warmup .* dense attention is asked for"):
        rehearsed_steps(model, [stage_of(config, "warmup")], config)
    for attention in ("sparse", "coarse_to_fine", "blocks"):
        config.train.warmup_attention = attention
        config.validate()
        assert "warmup" in rehearsed_steps(model, [stage_of(config, "warmup")], config)


@KINDS
def test_a_sparse_stage_can_train_the_indexer_alone(kind, moe):
    """Router biases, which move without a gradient, stay too."""
    config = tiny_config(kind, moe=moe)
    config.train.sparse_trains = "indexer"
    config.validate()
    before, after, metrics = one_step(config, "sparse")
    moved = {path for path in before if not np.array_equal(before[path], after[path])}
    assert moved == {path for path in before if is_indexer_path(path)}
    assert "kl" in metrics and "grad_norm_base" not in metrics and "learning_rate_base" not in metrics
    assert metrics["grad_norm_indexer"] == pytest.approx(metrics["grad_norm"]) and metrics["grad_norm"] > 0


def test_a_frozen_base_has_no_moments_and_is_not_counted_as_trained():
    config = tiny_config()
    every = summarize(config)
    config.train.sparse_trains = "indexer"
    frozen = summarize(config)
    params = abstract_params(build_model(config.model))
    n_indexer = count_parameters(split_parameters(params, is_indexer_path)[0])
    state = jax.eval_shape(lambda p: init_state(p, stage_of(config, "sparse"), config.train.sparse), params)
    assert sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim) == 2 * n_indexer
    assert frozen["parameters"]["trainable"]["sparse"] == n_indexer < every["parameters"]["trainable"]["sparse"]
    for part in ("optimizer", "gradients"):
        assert frozen["stages"]["sparse"][part] == frozen["stages"]["warmup"][part] < every["stages"]["sparse"][part]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warmup_attention": "window"}, "train.warmup_attention is 'window'; expected dense, or .* sparse, coarse_to_fine"),
        ({"warmup_attention": "oracle"}, "train.warmup_attention is 'oracle'; expected dense"),
        ({"warmup_attention": "sprase"}, "train.warmup_attention is 'sprase'; expected one of .* Did you mean 'sparse'"),
        ({"sparse_trains": "indexer", "sparse_attention": "window"}, "train.sparse_trains is 'indexer' with .* 'window'"),
        ({"sparse_trains": "base"}, "train.sparse_trains is 'base'; expected one of all, indexer"),
    ],
)
def test_a_stage_in_which_nothing_would_learn_is_refused(settings, message):
    config = tiny_config()
    for name, value in settings.items():
        setattr(config.train, name, value)
    with pytest.raises(ConfigError, match=message):
        config.validate()


def test_a_loss_against_dense_attention_is_refused_without_one():
    config = tiny_config()
    config.model.attention.indexer.coarse_loss_weight = 0.5
    config.validate()
    config.train.warmup_attention = "sparse"
    with pytest.raises(ConfigError, match=r"coarse_loss_weight is 0\.5 with train\.warmup_attention 'sparse'; expected 0"):
        config.validate()
    config.train.warmup.steps = 0
    config.validate()
