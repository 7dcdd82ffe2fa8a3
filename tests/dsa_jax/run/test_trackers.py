"""Trackers behind the metrics log, with packages that only record their calls: nothing here opens a connection."""

import json
import sys
import threading
import time
import types

import pytest

from dsa_jax.config import Config, ConfigError
from dsa_jax.extras import MissingExtraError
from dsa_jax.run import trackers
from dsa_jax.run.directory import open_run
from dsa_jax.run.metrics import MetricsLog, read_metrics
from dsa_jax.run.trackers import Tracker, open_trackers, require_trackers


class FakeRun:
    """The runs of wandb and trackio: `calls` is the record."""

    def __init__(self, calls):
        self.calls = calls

    def define_metric(self, name, step_metric):
        self.calls.append(("define_metric", name, step_metric))

    def log(self, values, **options):
        self.calls.append(("log", values, options))

    def finish(self):
        self.calls.append(("finish",))


@pytest.fixture
def packages(monkeypatch):
    """The calls by package."""
    calls = {}
    for name in ("wandb", "trackio"):
        record = calls[name] = []

        def init(record=record, **options):
            record.append(("init", options))
            return FakeRun(record)

        module = types.SimpleNamespace(init=init, Settings=lambda **options: options)
        monkeypatch.setitem(sys.modules, name, module)
    return calls


def tracked_config(*names):
    config = Config(name="mine")
    config.train.trackers, config.train.pretrain.steps, config.train.warmup.steps = names, 100, 10
    return config


def log_steps(directory, config, steps):
    with MetricsLog(directory / "metrics.jsonl", trackers=open_trackers(directory, config)) as log:
        log.truncate_after(("pretrain", "warmup", "sparse"), "warmup", steps[0] - 1)
        for step in steps:
            log.log("warmup", step, {"kl": 1 / step})
        log.log_evaluation("warmup", steps[-1], {"difference": 0.5})


def test_all_get_what_the_log_gets_and_a_resumed_run_continues_its_own(tmp_path, packages):
    config = tracked_config("wandb", "trackio")
    log_steps(tmp_path, config, [1, 2])
    log_steps(tmp_path, config, [2, 3])
    assert [entry["step"] for entry in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    known = json.loads((tmp_path / "trackers.json").read_text())["id"]
    for name, calls in packages.items():
        opened = [options for call, options in (call for call in calls if call[0] == "init")]
        assert len(opened) == 2 and opened[0] == opened[1], name
        assert opened[0]["project"] == "dsa-jax" and opened[0]["resume"] == "allow" and opened[0]["name"] == f"mine-{known}"
        assert opened[0]["config"]["train"]["warmup"]["steps"] == 10
        logged = [call[1] for call in calls if call[0] == "log"]
        assert logged[0] == {"warmup/step": 1, "warmup/kl": 1.0}
        assert [entry["warmup/step"] for entry in logged] == [1, 2, 2, 2, 3, 3]
        assert logged[2] == {"warmup/step": 2, "warmup/held_out/difference": 0.5}
        assert calls[-1] == ("finish",)
    assert packages["wandb"][0][1]["id"] == known
    assert packages["wandb"][0][1]["settings"]["console"] == "off"
    assert ("define_metric", "warmup/*", "warmup/step") in packages["wandb"]
    # Steps of all stages in one count.
    assert [call[2]["step"] for call in packages["trackio"] if call[0] == "log"] == [101, 102, 102, 102, 103, 103]


def test_nothing_is_opened_or_written_without_trackers_or_entries(tmp_path, packages):
    assert open_trackers(tmp_path, tracked_config()) == [] and not (tmp_path / "trackers.json").exists()
    with MetricsLog(tmp_path / "metrics.jsonl", trackers=open_trackers(tmp_path, tracked_config("wandb"))):
        pass
    assert packages == {"wandb": [], "trackio": []}


@pytest.mark.parametrize("place", ["init", "log", "finish"])
@pytest.mark.parametrize("raised", [ConnectionError("no\nroute"), SystemExit(1)])
def test_a_tracker_that_fails_warns_once_and_the_run_goes_on(tmp_path, packages, monkeypatch, caplog, place, raised):
    def fail(*_, **__):
        raise raised

    monkeypatch.setattr(*((sys.modules["wandb"], "init") if place == "init" else (FakeRun, place)), fail)
    log_steps(tmp_path, tracked_config("wandb"), [1, 2, 3])
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("the tracker wandb is left behind, the run goes on: ") and "\n" not in message


def test_a_tracker_that_hangs_slows_neither_steps_nor_the_end(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(trackers, "_MOST_WAITING", 5)
    release = threading.Event()
    tracker = Tracker("slow", release.wait, closing_seconds=0.05)
    start = time.monotonic()
    with MetricsLog(tmp_path / "metrics.jsonl", trackers=[tracker]) as log:
        for step in range(1, 50):
            log.log("warmup", step, {"kl": 0.0})
    assert time.monotonic() - start < 5
    release.set()
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 49
    assert ["more slowly than the run" in record.getMessage() for record in caplog.records] == [True]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"id": 7}', '{"id": "../other"}'])
def test_a_damaged_id_begins_a_new_tracked_run(tmp_path, packages, caplog, content):
    (tmp_path / "trackers.json").write_text(content)
    log_steps(tmp_path, tracked_config("trackio"), [1])
    assert packages["trackio"][0][1]["name"].startswith("mine-")
    assert len(json.loads((tmp_path / "trackers.json").read_text())["id"]) == 8
    assert "new tracked run begins" in caplog.text


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_package_is_one_line_before_anything(name, monkeypatch):
    monkeypatch.setitem(sys.modules, trackers._KINDS[name].package, None)
    with pytest.raises(MissingExtraError, match=rf"train\.trackers needs .* pip install 'dsa-jax\[{name}\]'"):
        require_trackers(tracked_config(name))


def test_the_settings_are_checked_and_change_no_result(tmp_path):
    for field, value, message in (
        ("trackers", ("wandb", "wandb"), "each tracker once"),
        ("trackers", ("wnadb",), "Did you mean"),
        ("tracker_project", "a/b", "expected letters"),
        ("tracker_project", "", "expected letters"),
        ("tracker_project", "x" * 129, "at most 128"),
    ):
        config = Config()
        setattr(config.train, field, value)
        with pytest.raises(ConfigError, match=rf"train\.{field}.*{message}"):
            config.validate()
    open_run(tmp_path, Config())
    (tmp_path / "checkpoints" / "warmup" / "1").mkdir(parents=True)
    config = Config()
    config.train.trackers, config.train.tracker_project = ("tensorboard",), "other"
    assert open_run(tmp_path, config).resumed


def test_another_run_in_the_directory_is_another_tracked_run(tmp_path, packages):
    open_run(tmp_path, Config())
    open_trackers(tmp_path, tracked_config("wandb"))
    open_run(tmp_path, Config(seed=5))
    assert not (tmp_path / "trackers.json").exists()
