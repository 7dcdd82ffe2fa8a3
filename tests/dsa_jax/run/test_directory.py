import json
import os
import subprocess
import sys

import pytest

from dsa_jax.config import Config, ConfigError, to_dict
from dsa_jax.run import environment as run_environment
from dsa_jax.run import files
from dsa_jax.run.directory import open_run
from dsa_jax.run.environment import git_revision
from dsa_jax.run.files import RunError, atomic_write_text, claimed, read_object


def test_new_run_writes_config_and_environment(tmp_path):
    run = open_run(tmp_path / "a" / "b", Config(name="x"))
    assert not run.resumed
    text = run.config_path.read_text()
    assert json.loads(text) == to_dict(Config(name="x"))
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True) + "\n"
    environment = run.environment()
    assert set(environment["versions"]) == {"jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"}
    assert all(environment["versions"].values())
    assert environment["device"]["backend"] == "cpu" and environment["device"]["count"] >= 1
    assert environment["history"] == [] and environment["implementations"] == {}
    assert run.checkpoint_dir("warmup") == run.path / "checkpoints" / "warmup"


def test_same_config_returns_to_the_run_and_changes_nothing(tmp_path):
    first = open_run(tmp_path, Config())
    first.update_environment(implementations={"index_topk": "xla"})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    second = open_run(tmp_path, Config())
    assert second.resumed
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_other_config_is_refused_with_both_values(tmp_path):
    open_run(tmp_path, Config()).checkpoint_dir("warmup").joinpath("4").mkdir(parents=True)
    other = Config(seed=7)
    other.train.warmup.steps = 30
    with pytest.raises(RunError, match=r"seed is 0 there and 7 here; train\.warmup\.steps is 0 there and 30 here.*--workdir"):
        open_run(tmp_path, other)
    assert json.loads((tmp_path / "config.json").read_text()) == to_dict(Config())


def test_a_run_that_could_not_begin_makes_way(tmp_path):
    run = open_run(tmp_path, Config())
    run.metrics_path.write_text('{"stage": "pretrain", "step": 1}\n')
    assert open_run(tmp_path, Config()).metrics_path.exists()
    assert open_run(tmp_path, Config(seed=7)).config().seed == 7
    assert not run.metrics_path.exists()  # of a run that is none any more


def test_what_changes_no_result_may_change(tmp_path, caplog):
    run = open_run(tmp_path, Config())
    run.checkpoint_dir("warmup").joinpath("4").mkdir(parents=True)
    other = Config()
    other.train.nan_policy, other.train.keep_checkpoints, other.parallel.preset = "skip", 5, "fsdp8"
    other.train.sparse.checkpoint_every = other.train.warmup.log_every = 7
    other.train.gate, other.train.sparse.evaluate_every = "warn", 3
    caplog.set_level("INFO")
    open_run(tmp_path, other)
    assert run.config() == other and 'train.nan_policy is "stop" there and "skip" here' in caplog.text
    other.train.sparse.steps = 7
    with pytest.raises(RunError, match=r"another config: train\.sparse\.steps is 0 there and 7 here\. Choose"):
        open_run(tmp_path, other)


def test_one_process_at_a_time(tmp_path, caplog):
    with claimed(tmp_path / "run"):
        code = f"from dsa_jax.run.files import claimed\nwith claimed({str(tmp_path / 'run')!r}): pass"
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert other.returncode and "RunError: another process is using workdir" in other.stderr
    with claimed(tmp_path / "run"):
        pass
    (tmp_path / "other" / ".lock").mkdir(parents=True)
    with claimed(tmp_path / "other"):
        assert "cannot be locked" in caplog.text


def test_field_unknown_to_the_recorded_config_is_named(tmp_path):
    run = open_run(tmp_path, Config())
    run.report_path.write_text("{}")
    recorded = to_dict(Config())
    del recorded["seed"]
    run.config_path.write_text(json.dumps(recorded))
    with pytest.raises(RunError, match="seed is absent there and 0 here"):
        open_run(tmp_path, Config())


def test_another_environment_is_appended_to_the_history(tmp_path, monkeypatch, caplog):
    run = open_run(tmp_path, Config())
    run.update_environment(implementations={"index_topk": "xla"})
    old = run.environment()["versions"]
    monkeypatch.setattr(run_environment, "_version", lambda package: "9.9")
    open_run(tmp_path, Config())
    environment = run.environment()
    assert environment["versions"]["jax"] == "9.9" and environment["implementations"] == {}
    assert [past["versions"] for past in environment["history"]] == [old]
    assert environment["history"][0]["implementations"] == {"index_topk": "xla"}
    assert "versions" in caplog.text


def test_changed_implementation_keeps_the_former_one(tmp_path):
    run = open_run(tmp_path, Config())
    run.update_environment(implementations={"index_topk": "xla"})
    assert run.environment()["history"] == []
    run.update_environment(implementations={"index_topk": "pallas"})
    assert run.environment()["implementations"] == {"index_topk": "pallas"}
    assert run.environment()["history"][0]["implementations"] == {"index_topk": "xla"}


def test_another_op_is_no_other_environment(tmp_path):
    run = open_run(tmp_path, Config())
    run.update_environment(implementations={"dense_attention": "xla"})
    run.update_environment(implementations={"index_topk": "xla"})
    run.update_environment(implementations={"dense_attention": "xla"})
    environment = run.environment()
    assert environment["implementations"] == {"dense_attention": "xla", "index_topk": "xla"}
    assert environment["history"] == []


def test_workdir_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="is a file; expected a directory"):
        open_run(tmp_path / "file", Config())
    with pytest.raises(RunError, match="cannot be written: Not a directory"):
        open_run(tmp_path / "file" / "below", Config())


def test_read_only_workdir(tmp_path, monkeypatch):
    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files.tempfile, "TemporaryFile", refuse)
    with pytest.raises(RunError, match=r"cannot be written: Permission denied.*--workdir"):
        open_run(tmp_path / "run", Config())


@pytest.mark.parametrize("text", ["{", "[1]"], ids=["cut", "list"])
def test_damaged_config_is_an_error(tmp_path, text):
    run = open_run(tmp_path, Config())
    run.config_path.write_text(text)
    with pytest.raises(RunError, match=r"config\.json"):
        open_run(tmp_path, Config())


def test_atomic_write_leaves_the_old_content_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    atomic_write_text(path, "old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        with pytest.raises(RunError, match="No space left on device"):
            atomic_write_text(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    atomic_write_text(path, "zwölf\n")
    assert path.read_bytes() == "zwölf\n".encode()


def test_git_revision_needs_a_tracked_file(tmp_path):
    def git(*arguments):
        subprocess.run(
            ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e", *arguments], check=True, capture_output=True
        )

    git("init")
    source = tmp_path / "source.py"
    source.write_text("1")
    assert git_revision(source) is None
    git("add", "source.py")
    git("commit", "-m", "x")
    clean = git_revision(source)
    assert clean is not None and len(clean["revision"]) == 40 and clean["dirty"] is False
    source.write_text("2")
    assert git_revision(source) == {**clean, "dirty": True}


def test_what_is_no_run_is_left_alone(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tensorboard").mkdir()
    with pytest.raises(RunError, match=r"holds something else than a run: its config.json has no data, eval, model, train"):
        open_run(tmp_path, Config())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "tensorboard"]
    assert (tmp_path / "config.json").read_text() == '{"model_type": "llama"}'


FOREIGN = {
    "sections": {"model": {"name": "gpt"}, "data": {}, "train": {"lr": 0.1}, "eval": {}},
    "empty sections": {"model": {}, "data": {}, "train": {}, "eval": {}},
    "other kinds": {"model": [1], "data": None, "train": "fast", "eval": 3},
    "a config of ours": to_dict(Config(seed=4)),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_directory_of_another_project_is_left_alone(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps(FOREIGN[name]))
    (tmp_path / "metrics.jsonl").write_text('{"stage": "pretrain", "step": 1, "loss": 2.0}\n')
    (tmp_path / "timing.jsonl").write_text("seconds")
    (tmp_path / "tensorboard" / "a").mkdir(parents=True)
    (tmp_path / "environment.json").write_text('{"history": "long", "implementations": {}}')
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    with (
        pytest.raises(RunError, match=r"(?s)holds something else than a run: .*\. Choose another --workdir"),
        claimed(tmp_path),
    ):
        open_run(tmp_path, Config())
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


OTHERS = ("wandb/run-1/logs", "profile/trace", "evaluations.jsonl", "hf_source/config.json", "trackers.json", "src/main.py")


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("environment", ["", '{"history": [], "implementations": {}}'], ids=["none", "theirs"])
def test_sections_of_our_names_make_no_run(tmp_path, name, environment):
    (tmp_path / "config.json").write_text(json.dumps(FOREIGN["empty sections"]))
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("mine")
    if environment:
        (tmp_path / "environment.json").write_text(environment)
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    with pytest.raises(RunError, match="holds something else than a run"):
        open_run(tmp_path, Config())
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


def test_a_process_killed_before_it_wrote_its_environment_makes_way(tmp_path):
    open_run(tmp_path, Config()).environment_path.unlink()
    assert open_run(tmp_path, Config(seed=7)).config().seed == 7


def test_what_others_keep_beside_a_run_stays(tmp_path):
    kept = [tmp_path / "wandb" / "of another run", tmp_path / ".notes.5.tmp", tmp_path / ".probe.mine"]
    kept[0].parent.mkdir()
    for path in kept:
        path.write_text("mine")
    for seed in range(2):
        open_run(tmp_path, Config(seed=seed))
    assert [path.read_text() for path in kept] == ["mine"] * 3


@pytest.mark.parametrize("name", ["metrics.jsonl", "timing.jsonl", "environment.json", "tensorboard", "profile", "hf_source"])
def test_files_of_no_run_are_left_alone(tmp_path, name):
    (tmp_path / name).write_text("{}") if "." in name else (tmp_path / name).mkdir()
    if "." not in name:
        (tmp_path / name / "events").write_text("mine")
    with pytest.raises(RunError, match=rf"holds {name}, but no config\.json that says of what run"):
        open_run(tmp_path, Config())
    assert not (tmp_path / "config.json").exists()


LINKS = ("config.json", "metrics.jsonl", "timing.jsonl", "environment.json", "report.json", "checkpoints", "checkpoints/sparse",
         "tensorboard", "tensorboard/warmup", "hf_source")  # fmt: skip


@pytest.mark.parametrize("name", LINKS)
def test_nothing_is_written_through_a_link(tmp_path, name):
    run, outside = open_run(tmp_path / "run", Config()).path, tmp_path / "outside"
    if "." in name:
        outside.write_text((run / name).read_text() if (run / name).exists() else "mine")
    else:
        outside.mkdir()
    before = outside.read_bytes() if outside.is_file() else []
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(outside)
    with pytest.raises(RunError, match=rf"{name} is a symbolic link; expected a .* of the run's own"):
        open_run(run, Config(seed=7))
    assert (outside.read_bytes() if outside.is_file() else list(outside.iterdir())) == before


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "report.json"])
def test_a_fifo_is_refused_and_never_waited_for(tmp_path, name):
    run = open_run(tmp_path, Config())
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(RunError, match=f"{name} is no regular file; expected a regular file of the run's own"):
        open_run(tmp_path, Config())
    with pytest.raises(RunError, match=r"it is no regular file|no config\.json"):
        run.config() if name == "config.json" else read_object(tmp_path / name)


def test_a_lock_is_no_way_out_of_the_directory(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    for lock in ("link", "fifo", "device"):
        (tmp_path / lock).mkdir()
    (tmp_path / "link" / ".lock").symlink_to(tmp_path / "thesis.tex")
    os.mkfifo(tmp_path / "fifo" / ".lock")
    (tmp_path / "device" / ".lock").symlink_to("/dev/zero")
    for lock in ("link", "fifo", "device"):
        with pytest.raises(RunError, match=r"\.lock is a link or no regular file"), claimed(tmp_path / lock):
            pass
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_an_atomic_write_goes_through_no_link(tmp_path):
    (tmp_path / "outside").write_text("mine")
    (tmp_path / f".a.json.{os.getpid()}.tmp").symlink_to(tmp_path / "outside")
    (tmp_path / "a.json").symlink_to(tmp_path / "outside")
    atomic_write_text(tmp_path / "a.json", "ours")
    assert (tmp_path / "outside").read_text() == "mine" and not (tmp_path / "a.json").is_symlink()


def test_names_that_are_no_utf8_are_refused(tmp_path):
    named, placed = Config(name="caf\udce9"), Config()
    placed.data.text.path = "/data/\udcff"
    for config, field in ((named, "name"), (placed, "data.text.path")):
        with pytest.raises(ConfigError, match=rf"{field} is .*; expected text in UTF-8"):
            config.validate()


def test_a_directory_that_is_refused_keeps_no_lock_and_a_killed_process_no_probe(tmp_path):
    with pytest.raises(RunError, match="no"), claimed(tmp_path):
        raise RunError("no")
    assert not list(tmp_path.iterdir())
    with claimed(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    with pytest.raises(RunError, match="no"), claimed(tmp_path):
        raise RunError("no")
    assert (tmp_path / ".lock").exists()  # of an earlier run
    (tmp_path / ".probe.123").write_bytes(b"")
    open_run(tmp_path, Config())
    assert not (tmp_path / ".probe.123").exists()


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    "text", [DEEP, f'{{"a": {"[" * 100}{"]" * 100}}}', '{"history": [1], "implementations": {}}', '{"history": []}', "3", "nul"]
)
def test_files_of_other_kinds_are_one_line(tmp_path, text, caplog):
    run = open_run(tmp_path, Config())
    run.environment_path.write_text(text)
    run.report_path.write_text(text)
    run.report_path.with_suffix(".html").write_text("")
    for read in (run.environment, run.report):
        with pytest.raises(RunError, match=r"report|environment"):
            read()
    assert run.finished_report(Config()) is None and "It is made again" in caplog.text
    open_run(tmp_path, Config())
    assert run.environment()["history"] == []
    run.config_path.write_text(text)
    with pytest.raises(RunError, match=r"config\.json"):
        open_run(tmp_path, Config())


@pytest.mark.parametrize(
    "report", [{"rows": 3}, {"rows": [1]}, {"rows": [{"name": "a", "text_loss": "low"}]}, {"rows": [], "stages": 2}, {}]
)
def test_a_report_of_other_kinds_is_made_again(tmp_path, report):
    run = open_run(tmp_path, Config())
    run.report_path.write_text(json.dumps(report))
    run.report_path.with_suffix(".html").write_text("")
    assert run.finished_report(Config()) is None


def test_checkpoints_without_a_config_are_of_no_run(tmp_path):
    run = open_run(tmp_path, Config())
    run.checkpoint_dir("warmup").joinpath("4").mkdir(parents=True)
    run.config_path.unlink()
    with pytest.raises(RunError, match=r"no config\.json that says of what run"):
        open_run(tmp_path, Config(seed=7))
    assert not run.config_path.exists()


def test_a_damaged_environment_is_recorded_anew_and_what_a_killed_process_left_goes(tmp_path, caplog):
    run = open_run(tmp_path, Config())
    run.environment_path.write_text("")
    (tmp_path / ".report.json.123.tmp").write_text("half")
    (tmp_path / ".mine.tmp").write_text("whole")
    open_run(tmp_path, Config())
    assert "recorded anew" in caplog.text and run.environment()["history"] == []
    assert (tmp_path / ".mine.tmp").exists() and not (tmp_path / ".report.json.123.tmp").exists()


def test_the_source_of_a_run_is_no_other_environment(tmp_path, caplog):
    open_run(tmp_path, Config()).update_environment(source="abc")
    run = open_run(tmp_path, Config())
    assert run.environment()["source"] == "abc" and not caplog.text
