"""Training on text that is read as it goes: a stop in the middle of an epoch leaves no trace."""

import json
import os
import signal

import jax
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from dsa_jax.config import TextConfig
from dsa_jax.data import mixture
from dsa_jax.params import parameter_paths
from dsa_jax.retrofit import retrofit
from dsa_jax.run.metrics import read_metrics
from dsa_jax.train.init import load_run
from dsa_jax.train.judge import Judge
from tests.dsa_jax.train.tiny import tiny_config

pytestmark = pytest.mark.usefixtures("traced_once")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Six pretraining steps, half of the rows text; an epoch of it is about four steps."""
    file = tmp_path_factory.mktemp("corpus") / "text.array_record"
    writer = ArrayRecordWriter(str(file), "group_size:1")
    for i in range(12):
        writer.write((f"{i:x}" + "the rain in spain " * 20)[: 5 + 3 * i].encode())
    writer.close()
    config = tiny_config()
    config.train.warmup.steps = config.train.sparse.steps = 0
    config.train.pretrain.checkpoint_every = 100
    config.data.recall_fraction = 0.5
    config.data.text = TextConfig(path=str(file), source="grain", held_out_fraction=0.2, open_documents=3)
    config.eval.rows, config.eval.recall_sequences = ("dense",), 0
    config.eval.text_sequences, config.eval.text_len = 4, 16
    return config


@pytest.fixture
def batches(monkeypatch):
    """Every batch that training asks for."""
    taken = []
    make = mixture.TrainData.batch

    def batch(self, step, **sizes):
        made = make(self, step, **sizes)
        taken.append((step, made))
        return made

    monkeypatch.setattr(mixture.TrainData, "batch", batch)
    monkeypatch.setattr(mixture.TrainData, "check", lambda self, **sizes: None)
    return taken


def test_a_stop_in_mid_epoch_and_its_resumption_change_no_bit(config, tmp_path, monkeypatch, batches):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    retrofit(config, whole)
    expected = list(batches)
    batches.clear()
    take = Judge.take

    def take_and_stop(self, step, values):
        if (self.stage.name, step) == ("pretrain", 1):
            os.kill(os.getpid(), signal.SIGTERM)
        return take(self, step, values)

    with monkeypatch.context() as patch:
        patch.setattr(Judge, "take", take_and_stop)
        assert retrofit(config, parts) is None
    saved = json.loads(next((parts / "checkpoints" / "pretrain").glob("*/meta/metadata")).read_text())["data"]
    assert saved["step"] == 2 and saved["row"] == 4
    assert saved["iterator"]["next_index"] % 12 > 0 and any(used for _, used in saved["open"])
    retrofit(config, parts)
    assert [step for step, _ in batches] == [step for step, _ in expected] == list(range(6))
    for (step, got), (_, want) in zip(batches, expected, strict=True):
        for name, a, b in zip(got._fields, got, want, strict=True):
            np.testing.assert_array_equal(a, b, err_msg=f"step {step}, {name}")
    assert read_metrics(parts / "metrics.jsonl") == read_metrics(whole / "metrics.jsonl")
    got, want = (parameter_paths(jax.device_get(load_run(workdir).params)) for workdir in (parts, whole))
    assert got.keys() == want.keys()
    for path in want:
        np.testing.assert_array_equal(got[path], want[path], err_msg=path)
    reports = [json.loads((workdir / "report.json").read_text()) for workdir in (parts, whole)]
    assert reports[0]["rows"] == reports[1]["rows"] and reports[0]["corpus"]["text"]["reader"] == "grain"
