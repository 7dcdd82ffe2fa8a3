"""The whole retrofit on eight devices, against one, and continued on another layout."""

import copy

import jax
import numpy as np
import pytest

from dsa_jax.config import ConfigError
from dsa_jax.parallel.check import check_layout
from dsa_jax.params import parameter_paths
from dsa_jax.retrofit import retrofit
from dsa_jax.run.metrics import read_metrics
from dsa_jax.train.init import load_run
from tests.dsa_jax.train.tiny import tiny_config


def recipe(preset):
    config = tiny_config("mla", moe=True, steps=2)
    config.model.n_layers, config.model.moe.n_dense_layers = 1, 0
    config.train.sparse.accumulation = 2
    config.eval.rows = ("sparse",)
    for name in ("pretrain", "warmup", "sparse"):
        getattr(config.train, name).batch_size = 8
    config.parallel.preset = preset
    return config


@pytest.mark.usefixtures("undrawn")
def test_training_on_eight_devices_equals_one(tmp_path):
    alone, spread = tmp_path / "alone", tmp_path / "spread"
    retrofit(recipe("single"), alone)
    report = retrofit(recipe("fsdp2_ep2_tp2"), spread)
    expected, found = read_metrics(alone / "metrics.jsonl"), read_metrics(spread / "metrics.jsonl")
    assert [entry.keys() for entry in found] == [entry.keys() for entry in expected]
    for one, many in zip(expected, found, strict=True):
        for name in ("loss", "kl", "grad_norm"):
            if name in one:
                # Of the KL, a difference of logarithms, only the last bits of these are left where it is near 0.
                where = f"{one['stage']} {one['step']} {name}"
                np.testing.assert_allclose(many[name], one[name], rtol=1e-4, atol=1e-7, err_msg=where)
    one, many = (parameter_paths(jax.device_get(load_run(path).params)) for path in (alone, spread))
    for path, value in one.items():
        np.testing.assert_allclose(many[path], value, atol=2e-4, err_msg=path)

    # The same run again on another layout: the checkpoint of the first is restored, nothing is left to train.
    again = retrofit(recipe("dp2_tp2_cp2"), spread)
    assert again["stages"]["sparse"]["steps"] == 2
    for before, after in zip(report["rows"], again["rows"], strict=True):
        np.testing.assert_allclose(after["coverage"], before["coverage"], rtol=1e-5)


@pytest.mark.parametrize(
    ("preset", "change", "message"),
    [
        ("tp8", {}, r"model\.attention\.n_heads is 4; expected a multiple of 8"),
        ("ep8", {}, r"n_routed_experts is 4; expected a multiple of 8"),
        ("fsdp8", {"train.warmup.batch_size": 4}, r"train\.warmup\.batch_size / accumulation is 4"),
        ("cp8", {"train.sparse.seq_len": 24}, r"train\.sparse\.seq_len is 24; expected a multiple of 16"),
        ("fsdp8", {"eval.batch_size": 4}, r"eval\.batch_size is 4"),
        ("tp4", {"model.vocab_size": 322}, r"embed/embedding with shape \(322, 32\)"),
        ("dp4_tp4", {}, "needs 16 devices"),
    ],
)
def test_what_does_not_divide_is_named_before_anything_runs(preset, change, message, tmp_path):
    config = copy.deepcopy(recipe(preset))
    config.eval.batch_size = config.train.sparse.batch_size = 16
    config.train.sparse.accumulation = 1
    for name, value in change.items():
        *parents, field = name.split(".")
        node = config
        for parent in parents:
            node = getattr(node, parent)
        setattr(node, field, value)
    with pytest.raises(ConfigError, match=message):
        retrofit(config, tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_experts_are_needed_for_expert_parallelism():
    config = tiny_config("gqa")
    config.parallel.preset = "ep2"
    with pytest.raises(ConfigError, match="has no experts"):
        check_layout(config)
