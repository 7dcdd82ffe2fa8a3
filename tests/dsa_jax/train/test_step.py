import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsa_jax.model import abstract_params, build_model, init_params
from dsa_jax.params import is_indexer_path, parameter_paths
from dsa_jax.train.stages import STAGES
from dsa_jax.train.step import init_state, make_train_step, move_score_biases
from tests.dsa_jax.train.tiny import padded_batch, tiny_config


def one_step(config, stage, batch):
    model = build_model(config.model)
    params = init_params(model, jax.random.key(config.seed))
    state = init_state(params, STAGES[stage], getattr(config.train, stage))
    before = {path: np.array(leaf) for path, leaf in parameter_paths(params).items()}
    state, metrics = make_train_step(model, STAGES[stage], config)(state, batch)
    return before, jax.device_get(parameter_paths(state.params)), jax.device_get(metrics)


@pytest.mark.parametrize("stage", ["pretrain", "warmup", "sparse"])
def test_each_stage_moves_its_own_parameters(stage):
    config = tiny_config()
    before, after, metrics = one_step(config, stage, padded_batch(config))
    moved = {path for path in before if not np.array_equal(before[path], after[path])}
    assert moved == {path for path in before if STAGES[stage].trains(path)}
    assert ("loss" in metrics) == (stage != "warmup")
    assert ("kl" in metrics) == (stage != "pretrain")


def test_warmup_holds_optimizer_state_for_the_indexer_only():
    config = tiny_config()
    params = init_params(build_model(config.model), jax.random.key(0))
    state = init_state(params, STAGES["warmup"], config.train.warmup)
    indexer_size = sum(p.size for path, p in parameter_paths(params).items() if is_indexer_path(path))
    held = sum(x.size for x in jax.tree.leaves(state.opt_state) if x.ndim)
    assert held == 2 * indexer_size


def test_warmup_computes_no_logits():
    config = tiny_config()
    config.model.vocab_size = 331  # a width that nothing else has
    model = build_model(config.model)
    params = abstract_params(model)
    state = jax.eval_shape(lambda p: init_state(p, STAGES["warmup"], config.train.warmup), params)
    batch = jax.tree.map(jnp.asarray, padded_batch(config))
    text = make_train_step(model, STAGES["warmup"], config).lower(state, batch).as_text()
    assert "x331xf32" not in text


@pytest.mark.parametrize("stage", ["pretrain", "warmup", "sparse"])
@pytest.mark.parametrize(("kind", "moe"), [("gqa", False), ("mla", True)], ids=["gqa", "mla-moe"])
def test_accumulation_equals_the_large_batch(stage, kind, moe):
    """Unequal padding in the micro-batches, KL and balance loss included; SGD-like eps makes updates follow gradients.

    The model with experts has a layer without them, too.
    """
    config = tiny_config(kind, moe=moe)
    settings = getattr(config.train, stage)
    settings.optimizer = dataclasses.replace(settings.optimizer, eps=1.0, clip_norm=0.0, warmup_steps=0, learning_rate=1.0)
    batch = padded_batch(config)
    _, whole, whole_metrics = one_step(config, stage, batch)
    settings.accumulation = 4
    before, parts, parts_metrics = one_step(config, stage, batch)
    for path in whole:
        np.testing.assert_allclose(parts[path] - before[path], whole[path] - before[path], atol=2e-6, err_msg=path)
    for name in whole_metrics:
        np.testing.assert_allclose(parts_metrics[name], whole_metrics[name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_padding_never_enters_a_loss():
    """Whatever tokens stand in padding, every metric and every parameter is bitwise the same."""
    config = tiny_config()
    batch = padded_batch(config)
    noise = np.where(batch.segment_ids == 0, 7, batch.input_ids).astype(np.int32)
    _, params, metrics = one_step(config, "sparse", batch)
    _, other, other_metrics = one_step(config, "sparse", batch._replace(input_ids=noise))
    jax.tree.map(np.testing.assert_array_equal, (params, metrics), (other, other_metrics))


def test_an_update_that_is_not_finite_changes_nothing_but_the_counters():
    config = tiny_config()
    model = build_model(config.model)
    params = init_params(model, jax.random.key(0))
    params["final_norm"]["scale"] = params["final_norm"]["scale"].at[0].set(jnp.nan)
    state = init_state(params, STAGES["pretrain"], config.train.pretrain)
    before = jax.tree.map(np.array, (state.params, state.opt_state))
    state, metrics = make_train_step(model, STAGES["pretrain"], config)(state, padded_batch(config))
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get((state.params, state.opt_state)))
    assert not metrics["is_finite"] and int(state.skipped) == 1 and int(state.step) == 1


def test_score_bias_follows_the_load():
    params = {"moe_layers": {"mlp": {"router": {"score_bias": jnp.zeros((2, 3))}}}}
    moved = move_score_biases(params, jnp.array([[9.0, 3.0, 6.0], [0.0, 0.0, 3.0]]), 0.5)
    np.testing.assert_array_equal(moved["moe_layers"]["mlp"]["router"]["score_bias"], [[-0.5, 0.5, 0.0], [0.5, 0.5, -0.5]])


def test_moe_bias_moves_in_training_and_reports_load():
    config = tiny_config(moe=True)
    before, after, metrics = one_step(config, "pretrain", padded_batch(config))
    (path,) = [p for p in before if p.endswith("router/score_bias")]
    change = np.abs(after[path] - before[path])
    np.testing.assert_allclose(change[change > 0], 0.001, rtol=1e-5)
    assert change.max() > 0
    assert 1.0 <= metrics["expert_load_max"] <= 4.0


def test_gradient_norms_and_learning_rates_of_base_and_indexer_are_told_apart():
    """Rates are those of the update: the schedule stands still where one was dropped."""
    config = tiny_config()
    config.train.sparse.optimizer = dataclasses.replace(config.train.sparse.optimizer, indexer_learning_rate=3e-2)
    model, stage = build_model(config.model), STAGES["sparse"]
    state = init_state(init_params(model, jax.random.key(0)), stage, config.train.sparse)
    step, batch = make_train_step(model, stage, config), padded_batch(config)
    for n_updates in (0, 1):
        state, metrics = step(state, batch)
        share = (n_updates + 1) / 2  # of two warm-up steps
        assert float(metrics["learning_rate_base"]) == pytest.approx(1e-2 * share)
        assert float(metrics["learning_rate_indexer"]) == pytest.approx(3e-2 * share)
        parts = [float(metrics[f"grad_norm_{name}"]) for name in ("base", "indexer")]
        assert min(parts) > 0 and np.hypot(*parts) == pytest.approx(float(metrics["grad_norm"]), rel=1e-5)
    _, metrics = step(state._replace(skipped=state.skipped + 1), batch)
    assert float(metrics["learning_rate_base"]) == pytest.approx(1e-2)
