"""A selection rule, an attention kind and a model family that are registered from outside work everywhere."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsa_jax import build_model, generate, load_pretrained, save_pretrained
from dsa_jax.checkpoints.hf.families import registered_family
from dsa_jax.checkpoints.pretrained import Pretrained
from dsa_jax.config import ConfigError, ParallelConfig
from dsa_jax.data import Batch
from dsa_jax.model import init_params
from dsa_jax.model.attention.kinds import register_kind, unregister_kind
from dsa_jax.model.attention.selection import register_rule, unregister_rule
from dsa_jax.parallel.placement import on_mesh, place, place_batch
from dsa_jax.params import parameter_paths
from dsa_jax.retrofit import retrofit
from dsa_jax.train.stages import language_stage
from dsa_jax.train.step import init_state, make_train_step
from tests.dsa_jax.checkpoints.hf.test_families import plain, with_qkv_biases
from tests.dsa_jax.checkpoints.hf.tiny import write_checkpoint
from tests.dsa_jax.toys import family, kind, rule
from tests.dsa_jax.train.tiny import tiny_config


@pytest.fixture
def toys():
    register_rule(rule.ROW, rule.RULE)
    register_kind(kind.KIND)
    yield
    unregister_kind(kind.KIND.name)
    unregister_rule(rule.ROW.name)


def recipe(preset="single", **attention):
    """A model of the toy kind, whose sparse stage trains under the toy rule."""
    config = tiny_config(steps=2)
    config.model.attention.kind, config.parallel.preset = "gated", preset
    for name, value in attention.items():
        setattr(config.model.attention, name, value)
    config.train.pretrain.steps, config.train.sparse_attention = 0, "first"
    config.eval.rows = ("dense", "sparse", "first")
    return config


def test_the_rule_selects_and_trains_on_one_device_and_on_a_mesh_and_the_report_explains_it(toys, tmp_path):
    alone, spread = retrofit(recipe(), tmp_path / "alone"), retrofit(recipe("fsdp4_tp2"), tmp_path / "spread")
    assert [row["name"] for row in alone["rows"]][-1] == rule.ROW.title
    for one, many in zip(alone["rows"], spread["rows"], strict=True):
        np.testing.assert_allclose(many["coverage"], one["coverage"], rtol=1e-5)
    page = (tmp_path / "alone" / "report.html").read_text()
    assert rule.ROW.title in page and rule.ROW.meaning in page


def test_the_kind_runs_in_every_mode_beside_another_kind_and_over_a_cache(toys):
    config = recipe(layer_types=("full", "gqa")).model
    model = build_model(config)
    params = init_params(model, jax.random.key(0))
    gates = [path for path in parameter_paths(params) if path.endswith("head_gate")]
    assert gates == ["dense_layers_0/attention/head_gate"]
    ids = jax.random.randint(jax.random.key(1), (1, 12), 0, config.vocab_size)
    selected = model.apply({"params": params}, ids, attention="first", return_topk_indices=True).topk_indices
    np.testing.assert_array_equal(selected[:, 0, -1], [[0, 1, 2, 3]] * 2)
    written = generate(Pretrained(config, model, params, None), ids.tolist(), max_new_tokens=4, attention="first")
    text = jnp.concatenate([ids, jnp.asarray(written.token_ids)], axis=1)
    best = jnp.argmax(model.apply({"params": params}, text, attention="first").logits[:, 11:-1], axis=-1)
    np.testing.assert_array_equal(best, written.token_ids)


def test_a_checkpoint_of_the_family_is_loaded_trained_on_a_mesh_and_written_back(toys, tmp_path):
    with registered_family("toy", family.TOY):
        content = plain("toy")
        directory = write_checkpoint(tmp_path / "theirs", content, with_qkv_biases(content))
        loaded = load_pretrained(directory, dtype="float32")
        config = tiny_config()
        config.model, ids = loaded.config, np.arange(65, dtype=np.int32).reshape(1, -1) % 48
        rows = lambda x: np.repeat(x, 4, axis=0)
        batch = Batch(rows(ids[:, :-1]), rows(ids[:, 1:]), np.ones((4, 64), bool), np.ones((4, 64), np.int32))
        stage, losses = language_stage("sparse", "first"), []
        step = make_train_step(loaded.model, stage, config)
        for preset in ("single", "fsdp4_tp2"):
            with on_mesh(ParallelConfig(preset=preset)):
                state = init_state(place(jax.tree.map(jnp.copy, loaded.params)), stage, config.train.sparse)
                state, metrics = step(state, place_batch(batch))
                losses.append(float(metrics["loss"]))
        np.testing.assert_allclose(*losses, rtol=1e-5)
        save_pretrained(tmp_path / "ours", loaded.config, jax.device_get(state.params))
        assert json.loads((tmp_path / "ours" / "config.json").read_text())["model_type"] == "toy"
        assert parameter_paths(load_pretrained(tmp_path / "ours").params).keys() == parameter_paths(loaded.params).keys()


def test_names_that_are_taken_are_refused(toys):
    with pytest.raises(ConfigError, match="the name of selection 'first' is 'first'"):
        register_rule(rule.ROW, rule.RULE)
    with pytest.raises(ConfigError, match="the title of selection 'other' is 'oracle top-k'"):
        register_rule(rule.ROW._replace(name="other", title="oracle top-k"), rule.RULE)
    with pytest.raises(ConfigError, match="the meaning of selection 'other' is ''"):
        register_rule(rule.ROW._replace(name="other", title="other", meaning=""), rule.RULE)
    with pytest.raises(ConfigError, match="the attention kind 'gated' exists"):
        register_kind(kind.KIND)
    clash = kind.KIND.parameters[0]._replace(split=(None, "tensor"))
    with pytest.raises(ValueError, match="wq/kernel of attention kind 'other' is split over"):
        register_kind(kind.KIND._replace(fields=kind.FIELDS._replace(name="other"), parameters=(clash,)))
