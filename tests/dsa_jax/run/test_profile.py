"""Profiler traces of some steps: which steps, what they leave out, and what is refused."""

import gzip
import json
import logging

import jax
import jax.numpy as jnp
import pytest

from dsa_jax.config import Config, ConfigError
from dsa_jax.config.profile_steps import profiled_steps
from dsa_jax.retrofit import retrofit
from dsa_jax.run import profile
from dsa_jax.run.profile import StepProfile
from tests.dsa_jax.train.tiny import tiny_config


@pytest.mark.parametrize("text", ["1:3", "0:2", "5:4", "10", "10-13", "a:b", "2:200", ":3", "2:", " 2:3", "2:3:4", "-2:3"])
def test_what_is_no_range_of_steps_is_refused(text):
    with pytest.raises(ConfigError, match=r"train\.profile_steps is .*; expected FIRST:LAST, such as 10:13"):
        profiled_steps(text)


def test_ranges_that_no_stage_has_or_that_compile_are_refused():
    config = Config()
    config.train.profile_steps = "4:6"
    with pytest.raises(ConfigError, match="the longest has 0"):
        config.train.validate()
    config.train.warmup.steps = 5
    with pytest.raises(ConfigError, match="the longest has 5"):
        config.train.validate()
    config.train.sparse.steps = 6
    config.train.validate()
    config.train.sparse.curriculum = ((4, 32),)
    with pytest.raises(ConfigError, match=r"step 5 of train\.sparse is the first of 256 tokens \(curriculum\) and compiles"):
        config.train.validate()
    config.train.sparse.curriculum = ((3, 32),)
    with pytest.raises(ConfigError, match=r"step 4 of train\.sparse"):
        config.train.validate()
    config.train.sparse.curriculum = ((2, 32),)
    config.train.sparse.evaluate_every = 5
    with pytest.raises(ConfigError, match=r"after step 5 of train\.sparse held-out rows are looked at"):
        config.train.validate()
    config.train.sparse.evaluate_every = 3  # after the last, and between those before
    config.train.validate()


def steps_traced(wanted, compiling, last=9, first=1):
    """The steps inside the trace of a loop from `first` to `last`, with the calls made."""
    traced, is_open = [], False
    for step in range(first, last + 1):
        if wanted.ends_before(compiles=step in compiling):
            wanted.stop()
        elif wanted.starts_at(step, compiles=step in compiling):
            wanted.start()
        with wanted.around(step):
            is_open = wanted._is_tracing
            traced += [step] if is_open else []
        if wanted.ends_after(step):
            wanted.stop()
    wanted.stop()
    return traced


@pytest.mark.parametrize(
    ("compiling", "first", "traced"),
    [({1}, 1, [3, 4, 5]), ({3}, 3, [4, 5]), ({5}, 5, []), ({7}, 7, []), ({1, 4}, 1, [3]), ({1, 5}, 1, [3, 4])],
    ids=["whole", "resumed_at_its_first", "resumed_at_its_last", "resumed_after", "new_length_inside", "new_length_last"],
)
def test_no_step_that_compiles_is_traced(tmp_path, monkeypatch, compiling, first, traced):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda *_, **__: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    assert steps_traced(StepProfile(tmp_path / "p", range(3, 6)), compiling, first=first) == traced
    assert calls == (["start", "stop"] if traced else [])
    assert steps_traced(StepProfile(None, range(3, 6)), compiling, first=first) == []


@pytest.mark.parametrize("place", ["start_trace", "stop_trace"])
def test_a_profiler_that_fails_warns_and_stops_nothing(tmp_path, monkeypatch, caplog, place):
    monkeypatch.setattr(jax.profiler, "start_trace", lambda *_, **__: None)
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: None)

    def fail(*_, **__):
        raise RuntimeError("Only one profile may be run at a time.")

    monkeypatch.setattr(jax.profiler, place, fail)
    steps_traced(StepProfile(tmp_path / "p", range(2, 4)), {1})
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "the run goes on: Only one profile" in record.getMessage()


def test_a_trace_holds_its_steps_and_says_how_to_open_it(tmp_path, caplog):
    step = jax.jit(lambda x: x @ x)
    x = step(jnp.ones((8, 8))).block_until_ready()
    wanted = StepProfile(tmp_path / "profile" / "warmup", range(2, 4))
    wanted.start()
    for number in (2, 3):
        with wanted.around(number):
            step(x).block_until_ready()
    with caplog.at_level(logging.INFO, logger=profile.__name__):
        wanted.stop()
    assert "profiled steps 2 to 3: xprof --logdir=" in caplog.text and "https://ui.perfetto.dev" in caplog.text
    folder = tmp_path / "profile" / "warmup" / "plugins" / "profile"
    assert list(folder.glob("*/*.xplane.pb"))
    (trace,) = folder.glob("*/perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    numbers = [event["args"].get("step_num") for event in events if event.get("name") == "train"]
    assert numbers == ["2", "3"]


@pytest.mark.usefixtures("undrawn")
def test_a_run_traces_its_steps_without_compilation(tmp_path, monkeypatch):
    compiled, tracing = [], []
    real_start, real_stop = jax.profiler.start_trace, jax.profiler.stop_trace
    monkeypatch.setattr(jax.profiler, "start_trace", lambda *a, **k: (tracing.append(True), real_start(*a, **k)))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: (tracing.clear(), real_stop()))
    listen = lambda name, *_, **__: compiled.append(name) if tracing and "compile" in name else None
    jax.monitoring.register_event_duration_secs_listener(listen)
    config = tiny_config(steps=0)
    config.train.warmup.steps, config.train.profile_steps, config.eval.rows = 4, "2:3", ("dense",)
    retrofit(config, tmp_path)
    jax.monitoring.unregister_event_duration_listener(listen)
    assert list((tmp_path / "profile" / "warmup").glob("plugins/profile/*/*.xplane.pb"))
    assert not tracing and compiled == []
