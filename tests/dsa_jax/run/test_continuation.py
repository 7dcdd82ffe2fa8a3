"""What may differ between a command and the run that it continues; runs and their inputs are built by hand."""

import copy
import json
import shutil

import jax.numpy as jnp
import pytest

from dsa_jax.config import Config
from dsa_jax.run.checkpoints import CheckpointStore
from dsa_jax.run.continuation import accepted_fields, set_report_aside, tokenizer_fingerprint
from dsa_jax.run.directory import RunDirectory, check_run, open_run
from dsa_jax.run.environment import source_fingerprint
from dsa_jax.run.files import RunError


def config(**steps):
    made = Config()
    for name, n in (steps or {"pretrain": 4, "sparse": 2}).items():
        getattr(made.train, name).steps = n
    return made


def begun(path, of, *, stage="sparse", step=2, report=False, **inputs):
    run = open_run(path, of)
    run.update_environment(**inputs)
    with CheckpointStore(run.checkpoint_dir(stage), keep=1) as store:
        store.save(step, {"w": jnp.ones(2)}, {})
    if report:
        run.report_path.write_text("{}")
        run.report_path.with_suffix(".html").write_text("page")
    return RunDirectory(path, resumed=True)


def accepted(run, other, text=None):
    return accepted_fields(run, other, lambda: text)


def hf_directory(path, text="weights"):
    path.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (path / name).write_text(json.dumps([name, text]))
    return path


def test_a_source_that_moved_is_known_by_its_content(tmp_path):
    ours, moved = config(), config()
    ours.init.hf_dir = ours.data.text.tokenizer = str(hf_directory(tmp_path / "a" / "llama"))
    run = begun(tmp_path / "run", ours, source=source_fingerprint(ours.init))
    (tmp_path / "a" / "llama").rename(tmp_path / "b")
    moved.init.hf_dir = moved.data.text.tokenizer = str(tmp_path / "b")
    assert accepted(run, moved) == {"init.hf_dir", "data.text.tokenizer"}
    open_run(run.path, moved, accepted=accepted(run, moved))
    assert run.config() == moved
    for other in (tmp_path / "nowhere", hf_directory(tmp_path / "trained", "others")):
        moved.init.hf_dir = str(other)
        assert not accepted(run, moved)
        with pytest.raises(RunError, match=r"init\.hf_dir is .* there and .* here"):
            check_run(run, moved, accepted=accepted(run, moved))


def test_a_swept_directory_can_move(tmp_path):
    dense = begun(tmp_path / "sweep" / "dense", config(pretrain=3), stage="pretrain", step=3).path
    ours = config(sparse=5)
    ours.init.checkpoint = str(dense)
    begun(tmp_path / "sweep" / "sparse", ours, source=source_fingerprint(ours.init))
    (tmp_path / "sweep").rename(tmp_path / "moved")
    ours.init.checkpoint = str(tmp_path / "moved" / "dense")
    run = RunDirectory(tmp_path / "moved" / "sparse", resumed=True)
    assert accepted(run, ours) == {"init.checkpoint"}
    ours.init.stage = "pretrain"
    assert not accepted(run, ours)


def test_text_and_tokenizer_that_moved_are_known_by_their_content(tmp_path):
    ours, moved = config(), config()
    ours.data.text.path, ours.data.text.tokenizer = "old/text", str(hf_directory(tmp_path / "a") / "tokenizer.json")
    run = begun(tmp_path / "run", ours, text="abc", tokenizer=tokenizer_fingerprint(ours.data.text.tokenizer))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    moved.data.text.path, moved.data.text.tokenizer = "new/text", str(tmp_path / "b" / "tokenizer.json")
    assert accepted(run, moved, "abc") == {"data.text.path", "data.text.tokenizer"}
    assert accepted(run, moved, "other") == {"data.text.tokenizer"}
    assert accepted(run, moved, None) == {"data.text.tokenizer"}
    (tmp_path / "b" / "tokenizer.json").write_text("another")
    assert accepted(run, moved, "abc") == {"data.text.path"}
    moved.data.text.max_tokens = 7
    assert "data.text.max_tokens" not in accepted(run, moved, "abc")


def test_a_finished_run_can_be_given_more_steps(tmp_path):
    ours = config(pretrain=4, sparse=2)
    run, more = begun(tmp_path, ours, report=True), config(pretrain=4, sparse=9)
    more.eval.text_len = 64
    assert accepted(run, more) == {"train.sparse.steps", "eval.text_len"}
    set_report_aside(run)
    assert not run.report_path.exists()
    assert {path.name for path in tmp_path.glob("report*")} == {"report_sparse_2.json", "report_sparse_2.html"}
    assert accepted(run, more) == {"train.sparse.steps", "eval.text_len"}  # killed before config.json was replaced
    for refused in (config(pretrain=5, sparse=2), config(pretrain=4, sparse=1), config(pretrain=5, sparse=9)):
        assert "train.pretrain.steps" not in accepted(run, refused)
        with pytest.raises(RunError, match=r"train\.\w+\.steps is \d there"):
            check_run(run, refused, accepted=accepted(run, refused))


def test_a_finished_run_can_be_given_a_later_stage(tmp_path):
    run, more = begun(tmp_path, config(pretrain=4), stage="pretrain", step=4), config(pretrain=4, sparse=9)
    more.train.sparse.batch_size = 2
    assert accepted(run, more) == {"train.sparse.steps", "train.sparse.batch_size"}


def test_a_run_that_is_not_finished_takes_the_steps_that_it_began_with(tmp_path):
    run = begun(tmp_path, config(pretrain=4, sparse=3), step=2)
    assert not accepted(run, config(pretrain=4, sparse=9))


def test_evaluation_and_name_may_change_until_there_is_a_report(tmp_path):
    run, other = begun(tmp_path, config()), config()
    other.name, other.eval.batch_size, other.eval.rows = "other", 2, ("dense",)
    assert accepted(run, other) == {"name", "eval.batch_size", "eval.rows"}
    run.report_path.write_text("{}")
    assert not accepted(run, other)
    other = copy.deepcopy(other)
    other.seed = 5
    assert "seed" not in accepted(run, other)


def test_nothing_is_accepted_where_there_is_no_run(tmp_path):
    assert not accepted(RunDirectory(tmp_path, resumed=True), config())
    (tmp_path / "config.json").write_text("{")
    assert not accepted(RunDirectory(tmp_path, resumed=True), config())


def by_tokens(tokens, **others):
    made = config(pretrain=4, sparse=0)
    made.train.sparse.tokens = tokens
    for name, value in others.items():
        setattr(made.train.sparse, name, value)
    return made


def test_a_finished_run_can_be_given_more_tokens(tmp_path):
    step = 16 * 256
    run = begun(tmp_path, by_tokens(2 * step), report=True)
    assert accepted(run, by_tokens(3 * step)) == {"train.sparse.tokens"}
    assert accepted(run, config(pretrain=4, sparse=9)) == {"train.sparse.tokens", "train.sparse.steps"}
    assert not accepted(run, by_tokens(step))
    # More steps, since a step has become smaller: not the run that this one is.
    assert "train.sparse.batch_size" not in accepted(run, by_tokens(2 * step, batch_size=4))


def test_a_run_begun_by_steps_goes_on_by_as_many_tokens(tmp_path):
    step = 16 * 256
    run = begun(tmp_path, config(pretrain=4, sparse=3), step=1)
    for tokens in (3 * step, 3 * step - 1, 2 * step + 1):
        assert accepted(run, by_tokens(tokens)) == {"train.sparse.steps", "train.sparse.tokens"}
        check_run(run, by_tokens(tokens), accepted=accepted(run, by_tokens(tokens)))
    for tokens in (3 * step + 1, 2 * step):
        assert not accepted(run, by_tokens(tokens))


def test_a_run_of_an_earlier_version_goes_on(tmp_path):
    ours = config()
    run = begun(tmp_path, ours)
    recorded = json.loads(run.config_path.read_text())
    train = recorded["train"]
    for name in ("warmup_attention", "sparse_trains", "gate_extend_steps", "gate_extend_max"):
        del train[name]
    for stage in ("pretrain", "warmup", "sparse"):
        del train[stage]["tokens"]
    run.config_path.write_text(json.dumps(recorded))
    assert not check_run(run, ours, accepted=accepted(run, ours))
    more = config(pretrain=4, sparse=9)
    assert accepted(run, more) == {"train.sparse.steps"}
    ours.train.sparse_trains = "indexer"
    with pytest.raises(RunError, match=r'train\.sparse_trains is "all" there and "indexer" here'):
        check_run(run, ours, accepted=accepted(run, ours))
