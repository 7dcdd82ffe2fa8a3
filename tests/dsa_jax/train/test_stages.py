"""Stages under other attentions than a retrofit's own: what learns, what is reported, what the checkpoint is marked as."""

import copy
import dataclasses
import json

import jax
import numpy as np
import pytest

from dsa_jax.checkpoints.hf import CheckpointError, save_pretrained
from dsa_jax.checkpoints.open import open_checkpoint
from dsa_jax.config import ConfigError, NSAConfig, StageConfig
from dsa_jax.config.model import ATTENTIONS, BY_INDEXER
from dsa_jax.data import make_eval_data
from dsa_jax.dryrun import summarize
from dsa_jax.evals.parity import evaluate_parity
from dsa_jax.generation import generate
from dsa_jax.model import build_model, init_params
from dsa_jax.model.attention.selection import SELECTORS, attention_modes
from dsa_jax.params import is_indexer_path, is_nsa_path, nested_parameters, parameter_paths
from dsa_jax.retrofit import retrofit
from dsa_jax.train.init import at_start_of_stage, initial_params, load_run, resolve_run
from dsa_jax.train.stages import stage_of
from dsa_jax.train.step import init_state, make_train_step
from tests.dsa_jax.train.tiny import padded_batch, tiny_config


def test_the_configuration_knows_the_modes_of_the_model():
    assert set(ATTENTIONS) == set(attention_modes())
    assert set(BY_INDEXER) == {name for name, selector in SELECTORS.items() if selector.uses_indexer}


@pytest.mark.parametrize(
    ("name", "attention"),
    [
        ("pretrain", "sparse"),
        ("pretrain", "nsa"),
        ("sparse", "dense"),
        ("sparse", "window"),
        ("sparse", "blocks"),
        ("sparse", "oracle"),
    ],
)
def test_a_stage_trains_under_the_attention_that_the_recipe_names(name, attention):
    """One update moves what learns and nothing else; the indexer learns, by its KL, just where it chooses the keys."""
    config = tiny_config()
    config.model.attention.implementation = "reference"
    config.model.attention.nsa = nsa()
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
    other = {is_indexer_path: attention not in BY_INDEXER, is_nsa_path: attention != "nsa"}
    assert moved == {path for path in before if not any(rests and belongs(path) for belongs, rests in other.items())}
    assert ("kl" in metrics) == (attention in BY_INDEXER)
    assert np.isfinite(metrics["loss"])


def test_a_model_without_an_indexer_trains_under_a_window_and_is_marked_so(tmp_path):
    config = tiny_config(steps=2)
    config.model.attention.indexer.enabled = False
    config.train.warmup.steps = config.train.pretrain.steps = 0
    config.train.sparse_attention = "window"
    config.eval.rows = ("dense", "sparse", "window", "sink_window", "blocks")
    report = retrofit(config, tmp_path)
    assert [row["name"] for row in report["rows"]] == ["dense", "window of the same budget"]
    loaded = load_run(tmp_path)
    assert loaded.config.model.attention.mode == loaded.model.default_attention == "window"
    data = make_eval_data(config.data, config.seed, config.model.vocab_size)
    assert evaluate_parity(loaded.model, loaded.params, data, loaded.config).rows == report["rows"]


@pytest.fixture(scope="module")
def turned(tmp_path_factory):
    """(recipe, parameters of the dense run, directory of the run that went on from it under native sparse attention)."""
    directory = tmp_path_factory.mktemp("nsa")
    config = tiny_config(steps=2)
    config.model.attention.qk_norm, config.model.attention.use_bias = True, True
    config.model.attention.indexer.enabled, config.train.warmup.steps = False, 0
    config.eval.rows = ("dense", "nsa")
    dense = dataclasses.replace(config, train=dataclasses.replace(config.train, sparse=StageConfig()))
    retrofit(dense, directory / "dense")
    config.model.attention.nsa, config.train.sparse_attention = nsa(), "nsa"
    config.train.pretrain, config.init.checkpoint = StageConfig(), str(directory / "dense")
    retrofit(config, directory / "nsa")
    return config, load_run(directory / "dense").params, directory / "nsa"


def test_a_dense_model_turns_to_native_sparse_attention(turned):
    """Branches start as copies of the layer's own projections, everything else as it was."""
    config, dense, directory = turned
    config = copy.deepcopy(config)
    started = parameter_paths(at_start_of_stage(initial_params(config, build_model(config.model)), config, "sparse"))
    for path, leaf in parameter_paths(dense).items():
        np.testing.assert_array_equal(started[path], leaf, err_msg=path)
        folder, _, rest = path.rpartition("/attention/")
        if rest.split("/")[0] in ("wk", "wv", "k_norm"):
            for branch in ("compress", "window"):
                np.testing.assert_array_equal(started[f"{folder}/attention/nsa/{branch}_{rest}"], leaf, err_msg=path)
    report = json.loads((directory / "report.json").read_text())
    assert [row["name"] for row in report["rows"]] == ["dense, before sparse training", "dense", "native sparse attention"]
    assert load_run(directory).model.default_attention == "nsa"


def test_a_run_that_starts_from_native_sparse_attention_keeps_its_branches(turned, tmp_path):
    config, _, directory = turned
    config = copy.deepcopy(config)
    config.init.checkpoint = str(directory)
    with pytest.raises(ConfigError, match=r"model.attention.mode is 'dense', but .* init.checkpoint .* trained under 'nsa'"):
        initial_params(config, build_model(config.model))
    config = resolve_run(config, tmp_path)
    assert config.model.attention.mode == "nsa"
    again = at_start_of_stage(initial_params(config, build_model(config.model)), config, "sparse")
    jax.tree.map(np.testing.assert_array_equal, again, load_run(directory).params)


def test_what_native_sparse_attention_has_no_form_of_is_refused(turned, tmp_path):
    config, _, directory = turned
    pretrained = open_checkpoint(directory)
    with pytest.raises(ConfigError, match="'nsa' cannot run over a cache"):
        generate(pretrained, [[1, 2]], max_new_tokens=2)
    with pytest.raises(CheckpointError, match="no published checkpoint format holds the weights of native sparse attention"):
        save_pretrained(tmp_path / "hf", pretrained.config, pretrained.params)
    summary = summarize(config)
    trainable = summary["parameters"]["trainable"]
    assert trainable["sparse"] == summary["parameters"]["total"] > trainable["pretrain"] > 0
    assert summary["stages"]["sparse"]["activations"]["layer"] > 0


def nsa():
    return NSAConfig(
        enabled=True, compress_block=4, compress_stride=2, select_block=4, n_select_blocks=3, n_local_blocks=1, window=3
    )


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("pretrain_attention", "sprase", "train.pretrain_attention is 'sprase'; expected one of dense"),
        ("pretrain_attention", "sparse", "train.pretrain_attention is 'sparse' without an indexer"),
        ("sparse_attention", "blocks", "train.sparse_attention is 'blocks' without an indexer"),
        ("sparse_attention", "nsa", "train.sparse_attention is 'nsa', whose weights the model lacks"),
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
