"""The synthetic tasks on a checkpoint from disk."""

import numpy as np
import pytest

from dsa_jax import save_pretrained
from dsa_jax.checkpoints.hf import CheckpointError
from dsa_jax.checkpoints.hf.save import TEXT_RECORD
from dsa_jax.checkpoints.text_record import read_text_record, write_text_record
from dsa_jax.config import Config, ConfigError, DataConfig, RecallConfig, TextConfig
from dsa_jax.data import make_eval_data
from dsa_jax.data.tokenizer import ByteTokenizer
from dsa_jax.evals import checkpoint as checkpoint_module
from dsa_jax.evals.checkpoint import data_of_report, evaluate_checkpoint, unlike_report
from dsa_jax.run.directory import open_run
from dsa_jax.run.files import RunError
from tests.dsa_jax.model.small import built, small_config


def checkpoint(directory, vocab_size, **fields):
    config = small_config("gqa", vocab_size=vocab_size, implementation="auto", **fields)
    save_pretrained(directory, config, built("gqa", vocab_size=vocab_size)[1])
    return directory


def recipe():
    """18 tokens of recall behind the 257 of the bytes, and 7 of the tasks: 282."""
    config = Config(data=DataConfig(recall_fraction=1.0, recall=RecallConfig(4, 2, 4, 8)))
    config.eval.recall_sequences, config.eval.batch_size = 0, 4
    return config


def test_tasks_of_the_command_line_are_evaluated_at_their_length(tmp_path):
    directory = checkpoint(tmp_path, 282)
    _, table = evaluate_checkpoint(directory, recipe(), ("dense",), tasks=("passkey",), task_len=24, task_sequences=8)
    (row,) = table.rows
    assert list(row["tasks"]) == ["passkey"] and row["recall_accuracy"] is None
    assert row["keys_per_query"] == row["tasks"]["passkey"]["keys_per_query"] == pytest.approx(12.5)
    by_depth = np.asarray(row["tasks"]["passkey"]["by_depth"])
    assert by_depth.shape == (4,) and np.isfinite(by_depth).any()


def test_text_is_no_longer_than_the_model_has_positions(tmp_path, caplog):
    limit = 256
    directory, asks = checkpoint(tmp_path, 282, max_positions=limit), recipe()
    asks.data, asks.eval.text_sequences, asks.eval.text_len = DataConfig(recall_fraction=0.0), 4, 8192
    _, table = evaluate_checkpoint(directory, asks, ("dense",))
    assert table.position_ends[-1] <= limit and f"eval.text_len is {limit} instead of 8192" in caplog.text
    with pytest.raises(ConfigError, match=rf"max_positions is {limit}; expected .*\(8192\): eval\.text_len is 8192\. Shorten"):
        evaluate_checkpoint(directory, asks, ("dense",), overrides=("config.eval.text_len",))


def test_rows_that_the_model_lacks_the_weights_for_are_refused_before_any_is_read(tmp_path):
    directory = checkpoint(tmp_path, 282)
    for file in directory.glob("*.safetensors*"):
        file.unlink()
    with pytest.raises(ConfigError, match=r"the model cannot run nsa: .* Expected rows among dense, sparse"):
        evaluate_checkpoint(directory, recipe(), ("dense", "nsa"), tasks=("passkey",), task_len=24)


def test_the_tokenizer_that_a_checkpoint_names_is_used(tmp_path):
    config = small_config("gqa", vocab_size=282, implementation="auto")
    save_pretrained(tmp_path, config, built("gqa", vocab_size=282)[1], tokenizer=ByteTokenizer())
    asks = recipe()
    asks.data.text.tokenizer = "checkpoint"
    _, table = evaluate_checkpoint(tmp_path, asks, ("dense",), tasks=("passkey",), task_len=24, task_sequences=4)
    assert table.rows[0]["tasks"]["passkey"]["loss"] > 0


def exported_by(path, config, text):
    run = open_run(path, config)
    run.update_environment(text=text)
    return run.export_path


def test_what_differs_from_the_report_of_the_run_that_exported_is_named(tmp_path):
    theirs, asks = recipe(), recipe()
    theirs.data.recall_fraction = asks.data.recall_fraction = 0.5
    theirs.data.text.path, asks.data.text.path = "old/place", "new/place"
    directory = exported_by(tmp_path / "run", theirs, "abc")
    assert unlike_report(directory, asks, "abc") == []
    assert unlike_report(directory, asks, "other") == unlike_report(directory, asks, None) == ["data.text.path"]
    asks.eval.text_len, asks.seed, asks.data.text.held_out_fraction = 4096, 3, 0.2
    assert unlike_report(directory, asks, "abc") == ["data.text.held_out_fraction", "eval.text_len", "seed"]
    assert unlike_report(tmp_path / "run" / "other", asks, "other") == []
    (tmp_path / "link").symlink_to(directory)
    directory.mkdir()
    assert unlike_report(tmp_path / "link", asks, "abc") != []
    (tmp_path / "run" / "environment.json").write_text("3")
    assert unlike_report(directory, asks, "abc") == []


def test_an_export_that_is_evaluated_otherwise_is_said(tmp_path, caplog):
    theirs = recipe()
    theirs.eval.task_len = 48
    directory = checkpoint(exported_by(tmp_path, theirs, None), 282)
    evaluate_checkpoint(directory, recipe(), ("dense",), tasks=("passkey",), task_len=24, task_sequences=4)
    assert "whose report is of another evaluation" in caplog.text and "eval.task_len" in caplog.text
    assert f"Evaluate --checkpoint={tmp_path}" in caplog.text


def test_settings_that_a_run_would_not_follow_are_refused(tmp_path):
    config = recipe()
    config.eval.recall_sequences, config.eval.recall_len = 4, 32
    open_run(tmp_path, config)
    with pytest.raises(ConfigError, match=r"config\.eval\.text_len is set, but .* is a run"):
        evaluate_checkpoint(tmp_path, recipe(), overrides=("config.parallel.preset", "config.eval.text_len"))
    with pytest.raises(RunError, match="checkpoint"):
        evaluate_checkpoint(tmp_path, recipe(), overrides=("config.parallel.preset",))


def test_a_checkpoint_without_the_tokens_of_a_task_is_refused(tmp_path, monkeypatch):
    directory = checkpoint(tmp_path, 281)
    monkeypatch.setattr(checkpoint_module, "load_for_evaluation", lambda _: pytest.fail("none of this needs the weights"))
    with pytest.raises(ConfigError, match=r"vocab_size is 281, too small for the task passkey, whose tokens end at 282"):
        evaluate_checkpoint(directory, recipe(), tasks=("passkey",), task_len=24)
    with pytest.raises(ConfigError, match=r"eval\.tasks is 'paskey'.*Did you mean 'passkey'"):
        evaluate_checkpoint(directory, recipe(), tasks=("paskey",))
    with pytest.raises(ConfigError, match="max_positions is"):
        evaluate_checkpoint(directory, recipe(), tasks=("passkey",), task_len=10**6)
    asks = recipe()
    asks.eval.recall_sequences = 4
    with pytest.raises(ConfigError, match="recall: a row of 256 tokens holds 32 records with distinct keys"):
        evaluate_checkpoint(directory, asks)
    nothing = recipe()
    nothing.data.recall_fraction, nothing.eval.text_sequences = 0.0, 0
    with pytest.raises(ConfigError, match="nothing to evaluate"):
        evaluate_checkpoint(directory, nothing)


def test_a_run_says_so_before_its_checkpoint_is_looked_for(tmp_path):
    config = recipe()
    config.model.vocab_size = 281
    open_run(tmp_path, config)
    with pytest.raises(ConfigError, match=r"vocab_size is 281, too small for the task passkey"):
        evaluate_checkpoint(tmp_path, recipe(), tasks=("passkey",), task_len=24)


def test_each_budget_gives_rows_of_its_own_against_the_same_dense_one(tmp_path):
    """On text tasks at two lengths; a budget beyond them reads what dense reads."""
    directory, asks = checkpoint(tmp_path, 282, max_positions=512), recipe()
    asks.data, asks.eval.text_sequences, asks.eval.text_task_sequences = DataConfig(recall_fraction=0.0), 0, 4
    asks.data.text.max_tokens = 60_000
    seen = []
    _, table = evaluate_checkpoint(
        *(directory, asks, ("sparse",)), text_tasks=("needle",), lengths=(200, 300), topk=(8, 300, 8), on_row=seen.append
    )
    names = [row["name"] for row in table.rows]
    # Dense attention, which has no budget, is computed once.
    assert names == ["dense", "sparse, topk 8", "sparse, topk 300"] and seen == table.rows
    assert table.setup["topk"] == [8, 300] and table.setup["sizes"] == {"needle@200": [4, 200], "needle@300": [4, 300]}
    assert ["topk is 300" in remark for remark in table.remarks] == [True] and table.costs is None and table.samples == []
    dense, few, everything = (row["tasks"]["needle"] for row in table.rows)
    assert list(dense["by_length"]) == ["200", "300"] and "difference" not in dense["by_length"]["200"]
    for length in (200, 300):
        assert few["by_length"][str(length)]["keys_per_query"] == pytest.approx((36 + (length - 8) * 8) / length)
        entry = everything["by_length"][str(length)]
        assert entry["keys_per_query"] == pytest.approx((length + 1) / 2) and entry["coverage"] == pytest.approx(1.0, abs=1e-4)
        assert entry["difference"] == {"mean": 0.0, "standard_error": 0.0}
        assert entry["loss"] == pytest.approx(dense["by_length"][str(length)]["loss"], rel=1e-4)
    assert few["loss"] == pytest.approx(np.mean([each["loss"] for each in few["by_length"].values()]))
    with pytest.raises(ConfigError, match="--topk is 0"):
        evaluate_checkpoint(directory, asks, ("dense",), topk=(0,))


def exported(directory, text, settings):
    """A checkpoint whose report is of the text of `settings`, which `text` describes."""
    checkpoint(directory, 282)
    write_text_record(directory, text, settings)
    return directory


def test_the_text_of_the_report_is_used_where_none_is_named(tmp_path, caplog):
    theirs, own = DataConfig(recall_fraction=0.0), Config(data=DataConfig(recall_fraction=0.0))
    (tmp_path / "theirs.txt").write_text("A line of the text that the run was trained on.\n" * 40)
    theirs.text.path, own.model.vocab_size = str(tmp_path / "theirs.txt"), 282
    text = make_eval_data(theirs, 0, 282).text.describe()
    theirs.text.tokenizer = "elsewhere"  # where the checkpoint was made; the tokenizer is the one that came along
    record = read_text_record(exported(tmp_path / "hf", text, theirs.text))
    assert (record.source, record.sha256, record.settings) == (theirs.text.path, text["sha256"], theirs.text)
    data = data_of_report(record, own)
    assert data.text.describe() == text
    assert own.data.text.path == theirs.text.path and own.data.text.tokenizer == "bytes"

    other = Config(data=DataConfig(recall_fraction=0.0))
    (tmp_path / "theirs.txt").write_text("Another line.\n" * 40)
    assert data_of_report(record, other) is None and other.data.text.path == ""
    (tmp_path / "theirs.txt").unlink()
    assert data_of_report(record, other) is None
    assert f"the text of the report, {theirs.text.path}, is not found" in caplog.text
    assert read_text_record(tmp_path) is None


@pytest.mark.parametrize(
    "content", ["3", "{}", '{"source": "a", "sha256": 1, "settings": {}}', '{"source": "a", "settings": {"pth": 1}}']
)
def test_a_record_that_no_run_wrote_is_refused(content, tmp_path):
    (tmp_path / TEXT_RECORD).write_text(content)
    with pytest.raises(CheckpointError, match=rf"{TEXT_RECORD}.*Delete it, and name the text\."):
        read_text_record(tmp_path)


def test_a_text_that_is_not_that_of_the_report_is_named_beside_it(tmp_path, caplog):
    asks = recipe()
    asks.data, asks.eval.text_sequences, asks.eval.text_len, asks.eval.samples = DataConfig(recall_fraction=0.0), 2, 16, 0
    asks.data.text.path = str(tmp_path / "mine.txt")
    (tmp_path / "mine.txt").write_text("A line that somebody names.\n" * 60)
    directory = exported(tmp_path / "hf", {"source": "theirs\x1b", "sha256": "0123456789abcdef"}, TextConfig(path="theirs"))
    _, table = evaluate_checkpoint(directory, asks, ("dense",))
    (line,) = [record.getMessage() for record in caplog.records if "the report of" in record.getMessage()]
    assert "is of the text theirs\\x1b (sha256 0123456789ab)" in line and f"evaluation of {asks.data.text.path}" in line
    assert table.setup["checkpoint"] == str(directory) and table.setup["text"]["source"] == asks.data.text.path
