"""A run beside its text: it goes on wherever both are moved, and on no other text."""

import json
import os
import shutil
import signal

import pytest

from dsa_jax.config import DataConfig, TextConfig
from dsa_jax.retrofit import retrofit
from dsa_jax.run.files import RunError
from dsa_jax.run.metrics import read_metrics
from dsa_jax.train.judge import Judge
from tests.dsa_jax.train.tiny import tiny_config

pytestmark = pytest.mark.usefixtures("traced_once", "undrawn")


def recipe(folder):
    config = tiny_config(steps=0)
    config.train.pretrain.steps = 4
    config.data = DataConfig(recall_fraction=0.0, text=TextConfig(path=str(folder), held_out_fraction=0.3))
    config.eval.rows, config.eval.recall_sequences = ("dense",), 0
    config.eval.text_len, config.eval.text_sequences = 16, 4
    return config


def test_a_run_within_its_text_goes_on_where_both_have_moved(tmp_path, monkeypatch):
    take, text, moved = Judge.take, tmp_path / "text", tmp_path / "moved"

    def take_and_stop(self, step, values):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return take(self, step, values)

    text.mkdir()
    words = ["the", "rain", "in", "spain", "stays", "mainly", "in", "the", "plain"]
    lines = (json.dumps({"text": " ".join([str(i), *words[i % 5 :]])}) + "\n" for i in range(60))
    (text / "corpus.jsonl").write_text("".join(lines))
    with monkeypatch.context() as patch:
        patch.setattr(Judge, "take", take_and_stop)
        assert retrofit(recipe(text), text / "run") is None
    assert (text / "run" / "metrics.jsonl").exists()
    text.rename(moved)
    report = retrofit(recipe(moved), moved / "run")
    assert [entry["step"] for entry in read_metrics(moved / "run" / "metrics.jsonl")] == [1, 2, 3, 4]
    assert json.loads((moved / "run" / "config.json").read_text())["data"]["text"]["path"] == str(moved)

    shutil.copytree(moved, tmp_path / "copy")
    assert retrofit(recipe(tmp_path / "copy"), moved / "run") == report
    (tmp_path / "copy" / "corpus.jsonl").write_text('{"text": "something else, and long enough to be a row of sixteen"}\n')
    with pytest.raises(RunError, match=r"holds a run of another config: data\.text\.path is"):
        retrofit(recipe(tmp_path / "copy"), moved / "run")
