import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from dsa_jax.config import Config
from dsa_jax.run.files import RunError
from dsa_jax.run.metrics import MetricsLog, read_metrics
from dsa_jax.run.trackers import open_trackers

STAGES = ("pretrain", "warmup", "sparse")


def fill(path, entries):
    with MetricsLog(path) as log:
        for stage, step in entries:
            log.log(stage, step, {"loss": 1.0 / (step + 1)})
            log.log_timing(stage, step, {"seconds": 0.5})


def steps(path):
    return [(entry["stage"], entry["step"]) for entry in read_metrics(path)]


def test_values_survive_exactly(tmp_path):
    path = tmp_path / "metrics.jsonl"
    values = {"a": np.float32(0.1), "b": 0.1, "c": jnp.asarray(1e-30), "n": np.int64(2**40), "z": jnp.asarray([3], jnp.int32)}
    with MetricsLog(path) as log:
        log.log("warmup", 10, values)
    (entry,) = read_metrics(path)
    assert entry == {
        "stage": "warmup", "step": 10, "a": float(np.float32(0.1)), "b": 0.1, "c": float(np.float32(1e-30)), "n": 2**40, "z": 3,
    }  # fmt: skip
    assert isinstance(entry["n"], int) and isinstance(entry["a"], float)


def test_not_finite_values_are_valid_json(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.log("sparse", 1, {"a": math.nan, "b": math.inf, "c": -math.inf})

    def refuse(name):
        raise AssertionError(name)

    assert json.loads(path.read_text(), parse_constant=refuse)["a"] == "NaN"
    (entry,) = read_metrics(path)
    assert math.isnan(entry["a"]) and entry["b"] == math.inf and entry["c"] == -math.inf


@pytest.mark.parametrize("value", ["text", None, True, np.zeros(2)], ids=str)
def test_what_is_no_number_is_refused(tmp_path, value):
    with MetricsLog(tmp_path / "m.jsonl") as log, pytest.raises(ValueError, match=r"metric loss is .*expected a number"):
        log.log("sparse", 1, {"loss": value})


def test_interrupted_and_resumed_equals_undisturbed(tmp_path):
    order = [("pretrain", 5), ("pretrain", 10), ("warmup", 5), ("warmup", 10), ("sparse", 5)]
    fill(tmp_path / "a.jsonl", order)
    fill(tmp_path / "b.jsonl", order[:4])
    with open(tmp_path / "b.jsonl", "a") as file:
        file.write('{"stage": "warmup", "step": 1')
    with MetricsLog(tmp_path / "b.jsonl") as log:
        log.truncate_after(STAGES, "warmup", 7)
        for stage, step in order[3:]:
            log.log(stage, step, {"loss": 1.0 / (step + 1)})
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


def test_truncation_covers_later_stages_and_the_timing(tmp_path):
    path = tmp_path / "metrics.jsonl"
    fill(path, [("pretrain", 10), ("pretrain", 20), ("warmup", 10), ("sparse", 10)])
    with MetricsLog(path) as log:
        log.truncate_after(STAGES, "pretrain", 10)
    assert steps(path) == steps(log.timing_path) == [("pretrain", 10)]
    with MetricsLog(path) as log:
        log.truncate_after(STAGES, "pretrain", 0)
        assert steps(path) == []
        log.log("pretrain", 1, {})
    assert steps(path) == [("pretrain", 1)]


def test_truncating_nothing_leaves_the_file_alone(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.truncate_after(STAGES, "sparse", 5)
        assert not path.exists()
    fill(path, [("pretrain", 10)])
    inode = path.stat().st_ino
    with MetricsLog(path) as log:
        log.truncate_after(STAGES, "pretrain", 10)
    assert path.stat().st_ino == inode


def test_a_step_is_never_logged_twice(tmp_path):
    path = tmp_path / "metrics.jsonl"
    fill(path, [("pretrain", 10)])
    with MetricsLog(path) as log, pytest.raises(ValueError, match="truncate_after"):
        log.log("pretrain", 10, {})


def test_torn_last_line_is_dropped_on_opening(tmp_path):
    path = tmp_path / "metrics.jsonl"
    fill(path, [("pretrain", 10)])
    with open(path, "ab") as file:
        file.write('{"stage": "zwölf'.encode()[:-4])
    assert steps(path) == [("pretrain", 10)]
    fill(path, [("pretrain", 20)])
    assert steps(path) == [("pretrain", 10), ("pretrain", 20)]


BAD_LINES = ["{", "[]", '{"stage": "warmup"}', '{"stage": 1, "step": 2}', '{"stage": "warmup", "step": true}',
             '{"stage": "warmup", "step": 2, "loss": [1]}', '{"stage": "warmup", "step": 2, "loss": "low"}',
             "[" * 100_000 + "]" * 100_000]  # fmt: skip


@pytest.mark.parametrize("line", BAD_LINES)
def test_damage_inside_the_file_names_the_line(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"stage": "pretrain", "step": 1}}\n{line}\n{{"stage": "pretrain", "step": 3}}\n')
    with pytest.raises(RunError, match="line 2 is damaged"):
        read_metrics(path)


@pytest.mark.parametrize("line", [*BAD_LINES, "\x00" * 9, '{"stage": "other", "step": 1}'])
def test_a_damaged_timing_stops_nothing(tmp_path, line, caplog):
    fill(tmp_path / "metrics.jsonl", [("pretrain", 1)])
    timing = tmp_path / "timing.jsonl"
    timing.write_text(f'{{"stage": "pretrain", "step": 1, "seconds": 2.5}}\n{line}\n')
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        log.truncate_after(STAGES, "pretrain", 1)
        log.log_timing("pretrain", 2, {"seconds": 3})
    assert [entry["step"] for entry in read_metrics(timing)] == [1, 2]
    assert ("1 damaged lines are left out" in caplog.text) == ("other" not in line)


@pytest.mark.parametrize("name", ["metrics.jsonl", "timing.jsonl"])
def test_nothing_is_appended_through_a_link(tmp_path, name):
    (tmp_path / "outside").write_text("")
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        (tmp_path / name).symlink_to(tmp_path / "outside")
        with pytest.raises(RunError, match=f"cannot write .*{name}: it is a symbolic link"):
            (log.log if name == "metrics.jsonl" else log.log_timing)("pretrain", 1, {"loss": 1.0})
    assert (tmp_path / "outside").read_text() == ""


def test_unknown_stage_is_an_error_on_resume(tmp_path):
    fill(tmp_path / "m.jsonl", [("other", 1)])
    with MetricsLog(tmp_path / "m.jsonl") as log, pytest.raises(RunError, match="stage 'other'; expected one of pretrain"):
        log.truncate_after(STAGES, "sparse", 1)


def test_missing_file_reads_as_empty_and_unwritable_is_an_error(tmp_path):
    assert read_metrics(tmp_path / "none.jsonl") == []
    with MetricsLog(tmp_path / "no" / "folder.jsonl") as log, pytest.raises(RunError, match="cannot write"):
        log.log("sparse", 1, {})


def test_tensorboard_events(tmp_path):
    pytest.importorskip("tensorboardX")
    config = Config()
    config.train.trackers = ("tensorboard",)
    with MetricsLog(tmp_path / "metrics.jsonl", trackers=open_trackers(tmp_path, config)) as log:
        log.log("warmup", 1, {"kl": 0.5})
    (events,) = (tmp_path / "tensorboard" / "warmup").iterdir()
    assert b"kl" in events.read_bytes()


def test_a_full_disk_is_one_clear_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(RunError, match=r"cannot write .*metrics.jsonl: No space left on device. Free space"):  # noqa: SIM117
        with MetricsLog(path) as log:
            log._files[path] = open("/dev/full", "ab", buffering=0)  # noqa: SIM115
            log.log("pretrain", 1, {"loss": 1.0})


def test_steps_are_counted(tmp_path):
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        for step in (1, 2, 3):
            log.log("pretrain", step, {"loss": 1.0})
            log.log_timing("pretrain", step, {"seconds": 1.0})
        assert log.n_steps == 3
        log.truncate_after(("pretrain",), "pretrain", 1)
        assert log.n_steps == 1
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        assert log.n_steps == 1
