import json
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsa_jax import retrofit as retrofit_module
from dsa_jax.config import Config, ConfigError, InitConfig, to_dict
from dsa_jax.data import TrainData
from dsa_jax.model import build_model
from dsa_jax.params import parameter_paths
from dsa_jax.retrofit import retrofit
from dsa_jax.run.files import RunError
from dsa_jax.run.metrics import read_metrics
from dsa_jax.train import loop
from dsa_jax.train.init import initial_params, load_run, resolve_run
from dsa_jax.train.judge import Judge, NotFiniteError
from tests.dsa_jax.train.tiny import tiny_config

# In this order, so that the undisturbed run draws its page.
pytestmark = pytest.mark.usefixtures("traced_once", "undisturbed", "undrawn")


def final_params(workdir):
    loaded = load_run(workdir)
    assert loaded.stage == "sparse"
    return parameter_paths(jax.device_get(loaded.params))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    report = retrofit(tiny_config(), workdir)
    return workdir, report


def test_a_run_directory_explains_itself(undisturbed):
    workdir, report = undisturbed
    assert json.loads((workdir / "config.json").read_text()) == to_dict(tiny_config())
    assert json.loads((workdir / "report.json").read_text())["rows"] == report["rows"]
    names = [row["name"] for row in report["rows"]]
    assert names == [
        "dense, before sparse training",
        "dense",
        "sparse",
        "sparse, untrained indexer",
        "window of the same budget",
        "oracle top-k",
    ]
    assert set(report["stages"]) == {"pretrain", "warmup", "sparse", "evaluate"}
    assert "implementations" in json.dumps(json.loads((workdir / "environment.json").read_text()))
    assert "<html" in (workdir / "report.html").read_text()


def test_table_values_are_possible(undisturbed):
    rows = {row["name"]: row for row in undisturbed[1]["rows"]}
    assert rows["dense"]["coverage"] == pytest.approx(1.0, abs=1e-5)
    assert rows["dense"]["keys_per_query"] == pytest.approx(8.5)  # causal, 16 tokens
    for name in ("sparse", "window of the same budget", "oracle top-k"):
        # min(t + 1, 4) keys over 16 queries
        assert rows[name]["keys_per_query"] == pytest.approx((1 + 2 + 3 + 13 * 4) / 16)
        assert rows[name]["coverage"] <= rows["oracle top-k"]["coverage"] + 1e-6 <= 1.0 + 2e-6
        assert rows[name]["text_loss"] is None


def test_metrics_hold_every_step_once(undisturbed):
    steps = [(m["stage"], m["step"]) for m in read_metrics(undisturbed[0] / "metrics.jsonl")]
    assert steps == [(stage, step) for stage in ("pretrain", "warmup", "sparse") for step in range(1, 7)]


@pytest.mark.parametrize(
    "stop_at", [("pretrain", 3), ("pretrain", 6), ("warmup", 5), ("sparse", 6)], ids=lambda s: f"{s[0]}-{s[1]}"
)
def test_interrupted_and_resumed_equals_undisturbed(undisturbed, tmp_path, monkeypatch, caplog, stop_at):
    """A stop request during a step: the step is finished and saved, and the next call ends with the same bits."""
    take = Judge.take

    def take_and_stop(self, step, values):
        if (self.stage.name, step) == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return take(self, step, values)

    monkeypatch.setattr(Judge, "take", take_and_stop)
    config = tiny_config()
    config.eval.rows = ("dense",)
    assert retrofit(config, tmp_path) is None or stop_at == ("sparse", 6)
    assert ("in stage warmup, before its first step" in caplog.text) == (stop_at == ("pretrain", 6))
    monkeypatch.undo()
    retrofit(config, tmp_path)
    want, got = final_params(undisturbed[0]), final_params(tmp_path)
    assert want.keys() == got.keys()
    for path in want:
        np.testing.assert_array_equal(got[path], want[path], err_msg=path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == (undisturbed[0] / "metrics.jsonl").read_bytes()


def test_a_signal_during_the_evaluation_stops_after_a_row(undisturbed, tmp_path, monkeypatch, caplog):
    workdir = shutil.copytree(undisturbed[0], tmp_path / "run")
    (workdir / "report.json").unlink()
    evaluate = retrofit_module.evaluate_parity

    def signalled(*args, on_row, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*args, on_row=on_row, **kwargs)

    monkeypatch.setattr(retrofit_module, "evaluate_parity", signalled)
    assert retrofit(tiny_config(), workdir) is None and not (workdir / "report.json").exists()
    assert "stopped by SIGTERM while evaluating" in caplog.text
    monkeypatch.undo()
    assert retrofit(tiny_config(), workdir)["rows"] == undisturbed[1]["rows"]


def test_damaged_checkpoint_is_skipped_and_retrained(undisturbed, tmp_path, caplog):
    workdir = shutil.copytree(undisturbed[0], tmp_path / "run")
    newest = max((workdir / "checkpoints" / "sparse").glob("[0-9]*"), key=lambda p: int(p.name))
    for file in newest.rglob("*"):
        if file.is_file() and file.stat().st_size > 200:
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    retrofit(tiny_config(), workdir)
    assert newest.name in caplog.text and "sparse" in caplog.text
    want, got = final_params(undisturbed[0]), final_params(workdir)
    for path in want:
        np.testing.assert_array_equal(got[path], want[path], err_msg=path)
    assert (workdir / "metrics.jsonl").read_bytes() == (undisturbed[0] / "metrics.jsonl").read_bytes()


def poisoned(monkeypatch, bad_steps, *, bad_stage="pretrain"):
    """Make the update of the given 1-based steps of a stage see a NaN learning signal."""
    make = loop.make_train_step

    def wrapped(model, stage, config):
        step_fn = make(model, stage, config)

        def run(state, batch):
            is_traced = isinstance(state.step, jax.core.Tracer)
            if is_traced or stage.name != bad_stage or int(state.step) + 1 not in bad_steps:
                return step_fn(state, batch)
            good = jax.tree.map(np.array, state)
            bad = state._replace(params=jax.tree.map(lambda x: x * np.nan, state.params))
            dropped, metrics = step_fn(bad, batch)
            return dropped._replace(params=jax.tree.map(jnp.array, good.params)), metrics

        return run

    monkeypatch.setattr(loop, "make_train_step", wrapped)


def test_nan_stops_with_stage_step_and_checkpoint(tmp_path, monkeypatch):
    poisoned(monkeypatch, {5})
    with pytest.raises(NotFiniteError, match=r"stage pretrain, step 5; the last checkpoint is step 4"):
        retrofit(tiny_config(), tmp_path)


def test_nan_before_the_first_checkpoint_of_a_stage_names_that_of_the_stage_before(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        poisoned(patch, {2}, bad_stage="warmup")
        with pytest.raises(NotFiniteError, match=r"stage warmup, step 2; the last checkpoint is step 6 of stage pretrain \("):
            retrofit(tiny_config(), tmp_path)
    poisoned(monkeypatch, {2})
    with pytest.raises(NotFiniteError, match="stage pretrain, step 2; there is no checkpoint yet"):
        retrofit(tiny_config(), tmp_path / "other")


def test_nan_can_be_skipped_and_counted(tmp_path, monkeypatch):
    config = tiny_config()
    config.train.nan_policy = "skip"
    config.train.warmup.steps = config.train.sparse.steps = 0
    config.eval.rows = ("dense",)
    poisoned(monkeypatch, {2, 3})
    report = retrofit(config, tmp_path)
    assert report["stages"]["pretrain"]["final"]["skipped"] == 2


def test_too_many_skips_in_a_row_stop(tmp_path, monkeypatch):
    config = tiny_config()
    config.train.nan_policy, config.train.max_skipped_steps = "skip", 2
    poisoned(monkeypatch, {2, 3, 4})
    with pytest.raises(NotFiniteError, match="2 updates in a row"):
        retrofit(config, tmp_path)


def test_a_run_can_start_from_a_stage_of_another(undisturbed, tmp_path):
    config = tiny_config()
    config.init.checkpoint, config.init.stage = str(undisturbed[0]), "pretrain"
    config.train.pretrain.steps = 0
    rows, before = retrofit(config, tmp_path)["rows"], undisturbed[1]["rows"]
    assert rows[0] == before[0] and rows[0]["name"] == "dense, before sparse training"

    config.init.stage = ""
    config = resolve_run(config, tmp_path / "new")
    assert config.model.attention.mode == "sparse"
    furthest = parameter_paths(jax.device_get(initial_params(config, build_model(config.model))))
    for path, value in final_params(undisturbed[0]).items():
        np.testing.assert_array_equal(furthest[path], value, err_msg=path)


def test_a_stage_of_another_run_says_how_it_was_trained(undisturbed, tmp_path):
    """A warm-up alone changes nothing about it, nor does a source that is gone when the run goes on."""
    config = tiny_config()
    shutil.copytree(undisturbed[0], tmp_path / "source")
    config.init.checkpoint, config.train.warmup.steps = str(tmp_path / "source"), 1
    config.train.pretrain.steps = config.train.sparse.steps = 0
    config.eval.rows = ("dense",)
    report = retrofit(config, tmp_path / "run")
    assert [row["name"] for row in report["rows"]] == ["dense"]
    assert load_run(tmp_path / "run").model.config.attention.mode == "sparse"
    shutil.rmtree(tmp_path / "source")
    assert retrofit(config, tmp_path / "run")["rows"] == report["rows"]


def test_a_run_outlives_its_source_and_a_half_written_stage_counts_for_nothing(undisturbed, tmp_path, caplog):
    source = shutil.copytree(undisturbed[0], tmp_path / "source")
    for stage in ("warmup", "sparse"):
        shutil.rmtree(source / "checkpoints" / stage)
    (source / "checkpoints" / "sparse" / "2.orbax-checkpoint-tmp").mkdir(parents=True)
    config = tiny_config()
    config.init.checkpoint, config.train.warmup.steps, config.train.sparse.steps = str(source), 0, 1
    config.train.pretrain.steps, config.eval.rows = 0, ("dense",)
    rows = retrofit(config, tmp_path / "run")["rows"]
    assert [row["name"] for row in rows] == ["dense, before sparse training", "dense"]
    shutil.rmtree(source)
    assert retrofit(config, tmp_path / "run")["rows"] == rows  # a report that is there already
    (tmp_path / "run" / "report.json").unlink()
    assert retrofit(config, tmp_path / "run")["rows"] == rows[1:]
    assert "before sparse training is left out" in caplog.text


def test_a_source_that_changed_gives_no_row_of_the_dense_model_before(undisturbed, tmp_path, caplog):
    source = shutil.copytree(undisturbed[0], tmp_path / "source")
    config = tiny_config()
    config.init.checkpoint, config.init.stage = str(source), "pretrain"
    config.train.pretrain.steps, config.train.warmup.steps, config.train.sparse.steps = 0, 0, 1
    config.eval.rows = ("dense",)
    rows = retrofit(config, tmp_path / "run")["rows"]
    (tmp_path / "run" / "report.json").unlink()
    assert retrofit(config, tmp_path / "run")["rows"] == rows
    shutil.rmtree(source / "checkpoints" / "pretrain" / "6")
    (tmp_path / "run" / "report.json").unlink()
    assert retrofit(config, tmp_path / "run")["rows"] == rows[1:]
    assert "is not what it was when this run started from it" in caplog.text


def test_a_batch_that_cannot_be_made_costs_no_step(undisturbed, tmp_path, monkeypatch):
    batch = TrainData.batch

    def failing(self, step, **sizes):
        if step == 9:
            raise ConfigError("the file is gone.")
        return batch(self, step, **sizes)

    monkeypatch.setattr(TrainData, "batch", failing)
    config = tiny_config()
    config.eval.rows = ("dense",)
    message = r"no batch for step 4 of stage warmup: the file is gone\. The steps before it are saved"
    with pytest.raises(RunError, match=message):
        retrofit(config, tmp_path)
    assert (tmp_path / "checkpoints" / "warmup" / "3" / "manifest.json").exists()
    monkeypatch.undo()
    retrofit(config, tmp_path)
    for path, value in final_params(tmp_path).items():
        np.testing.assert_array_equal(value, final_params(undisturbed[0])[path], err_msg=path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == (undisturbed[0] / "metrics.jsonl").read_bytes()


def test_lost_metrics_are_noticed(undisturbed, tmp_path, caplog):
    workdir = shutil.copytree(undisturbed[0], tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints" / "sparse" / "6")
    (workdir / "report.json").unlink()
    lines = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (workdir / "metrics.jsonl").write_text("".join(lines[5:]))
    retrofit(tiny_config(), workdir)
    assert "metrics.jsonl holds 11 steps up to here, and 16 were logged" in caplog.text


def test_the_row_before_sparse_training_is_of_the_last_step(undisturbed, tmp_path, caplog):
    workdir = shutil.copytree(undisturbed[0], tmp_path / "run")
    (workdir / "checkpoints/pretrain/6/manifest.json").unlink()
    (workdir / "report.json").unlink()
    names = [row["name"] for row in retrofit(tiny_config(), workdir)["rows"]]
    assert names == [row["name"] for row in undisturbed[1]["rows"]][1:]
    assert "of stage pretrain only step 4 is left" in caplog.text


def test_an_update_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    config = tiny_config()
    monkeypatch.setattr(Config, "validate", lambda self: None)  # no rate within its limits does it in one step
    optimizer = config.train.pretrain.optimizer
    optimizer.learning_rate, optimizer.weight_decay = 1e38, 1e4
    with pytest.raises(NotFiniteError, match=r"not finite in stage pretrain, step 1; there is no checkpoint yet\. Lower"):
        retrofit(config, tmp_path)


def test_what_is_seldom_meant_is_said(tmp_path, caplog):
    config = tiny_config()
    config.model.param_dtype, config.train.warmup.optimizer.warmup_steps = "bfloat16", 7
    config.train.sparse.optimizer.learning_rate = 1e-6
    (tmp_path / "run").write_text("")
    with pytest.raises(RunError, match="is a file"):
        retrofit(config, tmp_path / "run")
    assert "train.warmup.optimizer.warmup_steps is 7, of 6 steps in all" in caplog.text
    assert "as most are at a learning rate of 1e-06" in caplog.text
    # Two index heads of 8 channels cost a model of 32 more than they save in rows of 16.
    (cost,) = retrofit_module._remarks(tiny_config())
    assert "sparse attention costs more than dense at train.sparse.seq_len 16" in cost
    assert "0.00 GFLOP" not in cost
    config = tiny_config()
    config.train.sparse.steps = 0
    assert not retrofit_module._remarks(config)


def test_a_stage_without_a_run_is_refused():
    with pytest.raises(ConfigError, match=r"init\.stage is 'warmup' without init\.checkpoint"):
        InitConfig(stage="warmup").validate()


def test_an_unusable_source_says_what_is_missing(tmp_path):
    config = tiny_config()
    config.init.checkpoint = str(tmp_path / "nowhere")
    with pytest.raises(RunError, match="nowhere"):
        retrofit(config, tmp_path / "run")


def test_a_source_of_another_shape_names_both(undisturbed, tmp_path):
    config = tiny_config()
    config.init.checkpoint = str(undisturbed[0])
    config.model.mlp_dim = 40
    with pytest.raises(ValueError, match=r"mlp/.*kernel: here \(2, 32, 40\), there \(2, 32, 48\)"):
        retrofit(config, tmp_path)
