"""Stages under other attentions than a retrofit's own: what learns, what is reported, what the checkpoint is marked as."""

import jax
import numpy as np
import pytest

from dsa_jax.config import ConfigError
from dsa_jax.config.selections import is_by_indexer, selection, selections
from dsa_jax.data import make_eval_data
from dsa_jax.evals.parity import evaluate_parity
from dsa_jax.model import build_model, init_params
from dsa_jax.model.attention.kinds import attention_kind, is_of_own_mode
from dsa_jax.model.attention.selection import rule_of
from dsa_jax.params import is_indexer_path, nested_parameters, parameter_paths
from dsa_jax.retrofit import retrofit
from dsa_jax.train.init import load_run
from dsa_jax.train.stages import stage_of
from dsa_jax.train.step import init_state, make_train_step
from tests.dsa_jax.train.tiny import padded_batch, tiny_config


def test_the_configuration_knows_the_modes_of_the_model():
    for name in selections():
        if selection(name).kind:
            assert selection(name) in attention_kind(selection(name).kind).modes
        elif name != "dense":
            assert callable(rule_of(name).select)


def assert_one_update_moves_what_learns(config, name, attention):
    """And nothing else; the indexer learns, by its KL, just where it chooses the keys."""
    config.model.attention.implementation = "reference"
    setattr(config.train, f"{name}_attention", attention)
    config.validate()
    model, stage = build_model(config.model), stage_of(config, name)
    # A compressor's output layer starts at zero, and as long as it is there what lies before it gets no gradient.
    off_zero = lambda path, leaf: leaf + 0.1 if "w_out" in path else leaf
    leaves = parameter_paths(init_params(model, jax.random.key(0)))
    params = nested_parameters({path: off_zero(path, leaf) for path, leaf in leaves.items()})
    before = {path: np.array(leaf) for path, leaf in parameter_paths(params).items()}
    state = init_state(params, stage, getattr(config.train, name))
    state, metrics = make_train_step(model, stage, config)(state, padded_batch(config))
    moved = {path for path, leaf in parameter_paths(state.params).items() if not np.array_equal(before[path], leaf)}
    other = {is_indexer_path: not is_by_indexer(attention), is_of_own_mode: not selection(attention).kind}
    assert moved == {path for path in before if not any(rests and belongs(path) for belongs, rests in other.items())}
    assert ("kl" in metrics) == (is_by_indexer(attention))
    assert np.isfinite(metrics["loss"])


@pytest.mark.parametrize(
    ("name", "attention"),
    [
        ("pretrain", "sparse"),
        ("sparse", "dense"),
        ("sparse", "window"),
        ("sparse", "blocks"),
        ("sparse", "oracle"),
    ],
)
def test_a_stage_trains_under_the_attention_that_the_recipe_names(name, attention):
    assert_one_update_moves_what_learns(tiny_config(), name, attention)


def test_a_model_without_an_indexer_trains_under_a_window_and_is_marked_so(tmp_path):
    config = tiny_config(steps=2)
    config.model.attention.indexer.enabled = False
    config.train.warmup.steps = config.train.pretrain.steps = 0
    config.train.sparse_attention = "window"
    config.eval.rows = ("dense", "sparse", "window", "sink_window", "blocks")
    report = retrofit(config, tmp_path)
    assert [row["name"] for row in report["rows"]] == ["dense", "window of the same budget"]
    loaded = load_run(tmp_path)
    assert loaded.config.model.attention.mode == loaded.model.config.attention.mode == "window"
    data = make_eval_data(config.data, config.seed, config.model.vocab_size)
    assert evaluate_parity(loaded.model, loaded.params, data, loaded.config).rows == report["rows"]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("pretrain_attention", "sprase", "train.pretrain_attention is 'sprase'; expected one of dense"),
        ("pretrain_attention", "sparse", "train.pretrain_attention is 'sparse' without an indexer"),
        ("sparse_attention", "blocks", "train.sparse_attention is 'blocks' without an indexer"),
        ("sparse_attention", "window", "train.warmup.steps is positive, but the model has no indexer"),
    ],
)
def test_an_attention_that_the_model_cannot_run_is_refused(field, value, message):
    config = tiny_config()
    config.model.attention.indexer.enabled = False
    config.train.sparse_attention = "window"
    setattr(config.train, field, value)
    with pytest.raises(ConfigError, match=message):
        config.validate()
