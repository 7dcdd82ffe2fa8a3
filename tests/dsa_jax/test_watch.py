"""Held-out rows watched while training goes on, and the gate after the warm-up."""

import json
import logging
import math
import os
import signal

import numpy as np
import pytest

from dsa_jax.data import make_eval_data
from dsa_jax.evals.held_out import HeldOut, low_layers
from dsa_jax.retrofit import retrofit
from dsa_jax.run.files import RunError
from dsa_jax.run.metrics import read_metrics
from dsa_jax.train.init import load_run
from dsa_jax.train.judge import Judge
from dsa_jax.watch import _or_dense
from tests.dsa_jax.train.tiny import tiny_config


def recipe():
    config = tiny_config(steps=4)
    config.train.pretrain.steps, config.train.sparse.steps = 0, 2
    config.train.warmup.evaluate_every, config.train.sparse.evaluate_every = 2, 1
    config.eval.rows, config.eval.loop_sequences = ("dense", "sparse"), 6
    return config


def test_looks_are_logged_shown_and_equal_the_table(tmp_path):
    config = recipe()
    report = retrofit(config, tmp_path)
    looks = read_metrics(tmp_path / "evaluations.jsonl")
    assert [(look["stage"], look["step"]) for look in looks] == [("warmup", 2), ("warmup", 4), ("sparse", 1), ("sparse", 2)]
    loaded = load_run(tmp_path)
    held_out = HeldOut(loaded.model, make_eval_data(config.data, config.seed, config.model.vocab_size), config, {})
    for name, value in held_out(loaded.params).metrics().items():
        assert looks[-1][name] == pytest.approx(value, rel=1e-6, nan_ok=True), name
    # The same rows as the table's, of which there are six here.
    table = report["coverage_by_layer"]["sparse"]
    np.testing.assert_allclose([looks[-1][f"coverage_layer_{i}"] for i in range(2)], table, rtol=1e-6)
    assert looks[-1]["difference"] == pytest.approx(looks[-1]["sparse_loss"] - looks[-1]["dense_loss"], abs=1e-6)
    assert math.isfinite(looks[-1]["standard_error"])
    for name in ("entropy", "local_share", "overlap"):
        assert 0 <= looks[-1][f"{name}_layer_1"] <= 1
    assert math.isnan(looks[-1]["overlap_layer_0"]) and looks[-1]["n_not_finite_layer_1"] == 0
    assert "Does training close the gap?" in (tmp_path / "report.html").read_text()


@pytest.mark.usefixtures("undrawn")
def test_a_gate_stops_before_the_sparse_stage_and_the_run_goes_on(tmp_path, caplog):
    config = recipe()
    config.train.gate, config.train.gate_coverage = "stop", 1.0
    with pytest.raises(RunError, match=r"hold less than 100% of the attention .* in 2 of 2 layers: .* The warm-up is saved"):
        retrofit(config, tmp_path)
    assert load_run(tmp_path).stage == "warmup"
    page = (tmp_path / "report.html").read_text()
    assert "still training" in page and "Stage warmup, step 4" in page and not (tmp_path / "report.json").exists()
    config.train.gate = "warn"
    with caplog.at_level(logging.WARNING):
        report = retrofit(config, tmp_path)
    assert report["stages"]["sparse"]["steps"] == 2
    entries = [json.loads(line) for line in (tmp_path / "evaluations.jsonl").read_text().splitlines()]
    assert [(entry["stage"], entry["step"]) for entry in entries] == [
        ("warmup", 2),
        ("warmup", 4),
        ("sparse", 1),
        ("sparse", 2),
    ]


def test_low_layers_are_named_lowest_first():
    assert low_layers((0.9, 0.5, 0.79, 0.8), 0.8) == [1, 2]
    assert low_layers((0.9,), 0.8) == []


@pytest.mark.usefixtures("undrawn", "traced_once")
def test_a_gate_extends_the_warmup_and_a_killed_run_goes_on_inside_it(tmp_path, caplog, monkeypatch):
    config = recipe()
    config.train.gate, config.train.gate_coverage = "extend", 1.0
    config.train.gate_extend_steps, config.train.gate_extend_max = 3, 4
    config.train.sparse.steps, config.train.sparse.evaluate_every, config.eval.rows = 1, 0, ("dense",)
    report = retrofit(config, tmp_path / "whole")
    assert report["stages"]["warmup"]["steps"] == 8
    (low,) = [each for each in caplog.messages if "It goes on to step 7, and to 8 at most (train.gate_extend_max)" in each]
    assert low.startswith("after 4 steps of the warm-up") and "in 2 of 2 layers: " in low
    assert any(each.startswith("after 8 steps of the warm-up") and "More warm-up or" in each for each in caplog.messages)
    entries = {
        entry["step"]: entry for entry in read_metrics(tmp_path / "whole" / "metrics.jsonl") if entry["stage"] == "warmup"
    }
    assert [entries[step].get("extended_to") for step in range(1, 9)] == [None] * 4 + [7, 7, 7, 8]
    looks = [look["step"] for look in read_metrics(tmp_path / "whole" / "evaluations.jsonl")]
    assert looks == [2, 4, 6, 7, 8]

    take = Judge.take

    def take_and_stop(self, step, values):
        if (self.stage.name, step) == ("warmup", 5):
            os.kill(os.getpid(), signal.SIGTERM)
        return take(self, step, values)

    with monkeypatch.context() as patch:
        patch.setattr(Judge, "take", take_and_stop)
        assert retrofit(config, tmp_path / "killed") is None
    assert "in stage warmup, step 6 of 7 is saved" in caplog.text
    retrofit(config, tmp_path / "killed")
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(
    ("hf_dir", "low", "said"),
    [
        ("model", [1, 0], "--config.init.dense_layers=2 leaves them dense"),
        ("model", [1], "--config.init.dense_layers=2 leaves them, and all before the last of them, dense"),
        ("model", [2, 0], ""),
        ("", [2, 0], "'dense' for them in model.attention.layer_types leaves them dense"),
        ("", [0, 1, 2], ""),
    ],
)
def test_layers_that_stay_low_are_named_with_the_setting_that_leaves_them_dense(hf_dir, low, said):
    config = tiny_config()
    config.model.n_layers, config.init.hf_dir = 3, hf_dir
    assert _or_dense(config, low).removeprefix("; ") == said
