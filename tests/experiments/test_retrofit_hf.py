"""Hugging Face directory in, Hugging Face directory out, through the real commands."""

import json
import re

import jax
import numpy as np
import pytest

from dsa_jax import build_model, init_params, load_pretrained, save_pretrained
from dsa_jax.checkpoints.convert import to_hf, to_run
from dsa_jax.checkpoints.from_hf import export_checkpoint, resolve_checkpoint
from dsa_jax.config import Config, ConfigError
from dsa_jax.params import is_indexer_path, parameter_paths
from dsa_jax.run.files import RunError
from tests.dsa_jax.model.small import small_config
from tests.experiments.commands import finish, start

VOCAB = 264
SETTINGS = {
    "data.text.tokenizer": "bytes",
    "data.text.max_tokens": 20000,
    "model.remat": "none",
    "model.attention.indexer.n_heads": 2,
    "model.attention.indexer.head_dim": 8,
    "model.attention.indexer.rope_dim": 8,
    "model.attention.indexer.topk": 6,
    **{
        f"train.{stage}.{name}": value
        for stage in ("warmup", "sparse")
        for name, value in {
            "steps": 3,
            "batch_size": 2,
            "seq_len": 24,
            "accumulation": 1,
            "log_every": 1,
            "optimizer.learning_rate": 1e-3,
            "optimizer.warmup_steps": 1,
        }.items()
    },
    "eval.text_len": 24,
    "eval.text_sequences": 4,
    "eval.batch_size": 2,
    "eval.rows": "('dense', 'sparse')",
}


def command(name, *arguments):
    """Run `python -m experiments.NAME`; returns what it printed."""
    status, output, errors = finish(start(name, *arguments), timeout=1500)
    assert status == 0, errors
    return output


def table_row(printed, name):
    """The cells of a printed parity table's row, by the titles of their columns."""
    lines = [re.split(r"  +", line.strip()) for line in printed.splitlines()]
    (row,) = [line for line in lines if line[0] == name]
    return dict(zip(next(line for line in lines if line[0] == "row"), row, strict=True))


def dense_directory(kind, path):
    """A random checkpoint without an indexer."""
    config = small_config(kind, vocab_size=VOCAB, hidden_dim=32, implementation="auto")
    config.attention.indexer.enabled = False
    params = init_params(build_model(config), jax.random.key(0))
    save_pretrained(path, config, params)
    return config, parameter_paths(jax.device_get(params))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "written"), [("gqa_plain", "llama"), ("mla", "deepseek_v32")])
def test_dense_checkpoint_in_sparse_checkpoint_out(kind, written, tmp_path):
    source, workdir = tmp_path / "dense", tmp_path / "run"
    _, before = dense_directory("gqa" if kind == "gqa_plain" else kind, source)
    overrides = [f"--config.{name}={value}" for name, value in SETTINGS.items()]
    output = command(
        "retrofit", "--config=configs/retrofit_hf.py", f"--config.init.hf_dir={source}", f"--workdir={workdir}", *overrides
    )
    assert "Hugging Face checkpoint" in output

    rows = {row["name"]: row for row in json.loads((workdir / "report.json").read_text())["rows"]}
    assert list(rows) == ["dense, before sparse training", "dense", "sparse"]
    assert all(np.isfinite(row["text_loss"]) for row in rows.values())
    # 6 of up to 24 keys: min(t + 1, 6) on average.
    assert rows["sparse"]["keys_per_query"] < 6 < rows["dense"]["keys_per_query"]

    result = load_pretrained(workdir / "hf")
    assert json.loads((workdir / "hf" / "config.json").read_text())["model_type"] == written
    assert result.config.attention.mode == "sparse" and result.config.attention.indexer.topk == 6
    after = parameter_paths(jax.device_get(result.params))
    assert {path for path in after if not is_indexer_path(path)} == set(before)
    moved = {path for path in before if not np.array_equal(before[path], after[path])}
    assert moved and all(np.abs(before[path] - after[path]).max() < 0.1 for path in before)

    if kind == "mla":
        return
    printed = command(
        "evaluate", f"--checkpoint={workdir / 'hf'}", "--rows=sparse", *(o for o in overrides if "eval" in o or "data" in o)
    )
    assert float(table_row(printed, "sparse")["text loss"]) == pytest.approx(rows["sparse"]["text_loss"], abs=6e-4)


def test_conversion_to_a_run_and_back_keeps_every_bit(tmp_path):
    config, before = dense_directory("gqa", tmp_path / "dense")
    to_run(tmp_path / "dense", tmp_path / "run")
    with pytest.raises(RunError, match="holds a run already"):
        to_run(tmp_path / "dense", tmp_path / "run")
    assert "again" in to_hf(tmp_path / "run", tmp_path / "again")
    again = load_pretrained(tmp_path / "again")
    assert again.tokenizer is None  # as in the directory that it came from
    config.attention.indexer = again.config.attention.indexer  # disabled: its sizes are not stored
    assert again.config.attention == config.attention
    after = parameter_paths(jax.device_get(again.params))
    assert set(after) == set(before)
    for path, value in before.items():
        np.testing.assert_array_equal(after[path], value, err_msg=path)


def test_files_of_a_tokenizer_that_is_not_read_come_along(tmp_path):
    dense_directory("gqa", tmp_path / "dense")
    for name in ("tokenizer.model", "generation_config.json"):
        (tmp_path / "dense" / name).write_text("{}")
    to_hf(tmp_path / "dense", tmp_path / "again")
    assert {"tokenizer.model", "generation_config.json"} <= {file.name for file in (tmp_path / "again").iterdir()}


def test_text_is_read_with_the_tokenizer_that_the_model_knows(tmp_path):
    """Where no text is trained on, the tokenizer that is not needed still goes along."""
    dense_directory("gqa", tmp_path / "dense")
    (tmp_path / "dense" / "tokenizer.json").write_text("{}")
    config = Config()
    config.init.hf_dir = str(tmp_path / "dense")
    with pytest.raises(ConfigError, match=r"tokenizer is 'bytes', but the model of .* Set data.text.tokenizer=checkpoint"):
        resolve_checkpoint(config)
    config.data.recall_fraction = 1.0
    config = resolve_checkpoint(config)
    params = init_params(build_model(config.model), jax.random.key(0))
    export_checkpoint(tmp_path / "again", config, params, attention="dense")
    assert (tmp_path / "again" / "tokenizer.json").read_text() == "{}"


def test_only_a_hugging_face_directory_becomes_a_run(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RunError, match="names no model_type"):
        to_run(tmp_path, tmp_path / "run")
