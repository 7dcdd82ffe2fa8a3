"""The GPU check, gone through on CPU at tiny sizes: what it records, what a failure does, and the table it prints."""

import functools
import json
import os
import time

import pytest

from dsa_jax.benchmarks import gpu_check
from dsa_jax.benchmarks.op_checks import CheckError
from dsa_jax.benchmarks.op_shapes import OPS
from dsa_jax.benchmarks.worker import Worker


@pytest.mark.slow
def test_dry_run_end_to_end(tmp_path, capsys):
    output = tmp_path / "new" / "check.json"
    assert gpu_check.main(["--dry_run", "--only=index_scores", f"--output={output}"]) == 0
    record = json.loads(output.read_text())
    assert record["finished"] and record["environment"]["device"]["backend"] == "cpu"
    assert [(entry["kind"], entry["status"]) for entry in record["items"]] == [
        ("check_reduced", "passed"),
        ("check_real", "passed"),
        ("time", "timed"),
    ]
    assert record["items"][-1]["row"]["interpreted"]
    assert [x["tiles"][0]["kernel"] for x in record["items"]] == ["head_sums_visible_scores"] * 3
    assert {x["tiles"][0]["source"] for x in record["items"]} == {"default"}
    assert "3 of 3 done" in capsys.readouterr().out


class FailingWorker:
    """Stands in for the process: one check is wrong, all else is right."""

    environment = {"device": {"kind": "made up"}, "versions": {"jax": "0"}}  # noqa: RUF012

    def __init__(self, task, *, on_cpu):
        self.done = []

    def do(self, item, seconds):
        if item.kind == "check_real" and item.op == "decode":
            return {"status": "failed", "reason": "CheckError: wrong"}
        return {"status": "passed"}

    def stop(self):
        pass


def test_one_failure_stops_only_its_own_timing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "Worker", FailingWorker)
    output = tmp_path / "check.json"
    assert gpu_check.run(output, dry_run=True) == 1
    entries = json.loads(output.read_text())["items"]
    statuses = {(entry["kind"], entry["op"], entry["implementation"]): entry["status"] for entry in entries}
    assert statuses.pop(("check_real", "decode", "pallas")) == "failed"
    assert statuses.pop(("time", "decode", "pallas")) == "left out"
    assert set(statuses.values()) == {"passed"}
    assert gpu_check.run(output, dry_run=True, total_seconds=0.0) == 1
    assert {entry["status"] for entry in json.loads(output.read_text())["items"]} == {"not reached"}
    assert "CheckError: wrong" in capsys.readouterr().out


def describe():
    return {"backend": "gpu", "environment": {"device": {"kind": "made up"}, "versions": {"jax": "0"}}}


def stub(item):
    """Stands in for the kernels: that of one op is wrong, one raises, one kills its process, one hangs, all in that process."""
    if item.kind == "check_reduced" and item.op == "index_scores":
        raise CheckError("wrong")
    if item.kind == "check_reduced" and item.op == "index_topk":
        raise RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS")
    if item.kind == "check_real" and item.op == "sparse_attention":
        os.abort()
    if item.kind == "check_real" and item.op == "decode":
        time.sleep(60)
    return {"status": "passed", "process": os.getpid()}


def test_crash_and_hang_cost_their_own_item(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "Worker", functools.partial(Worker, describe=describe))
    monkeypatch.setattr(gpu_check, "perform", stub)
    monkeypatch.setattr(gpu_check, "ITEM_SECONDS", 2.0)
    output = tmp_path / "check.json"
    assert gpu_check.run(output, dry_run=True, words=["index_scores", "index_topk", "sparse_attention", "decode"]) == 1
    entries = {(x["kind"], x["op"], x["implementation"]): x for x in json.loads(output.read_text())["items"]}
    reasons = {
        ("check_reduced", "index_scores"): "CheckError: wrong",
        ("check_reduced", "index_topk"): "RuntimeError: CUDA_ERROR_ILLEGAL_ADDRESS",
        ("check_real", "sparse_attention"): "its process died with exit code -6",
        ("check_real", "decode"): "took more than 2 s",
    }
    failed = {key[:2]: entry["reason"] for key, entry in entries.items() if entry["status"] == "failed"}
    assert failed == reasons
    # What is broken gets no time, all else goes on, in a new process after each that was lost.
    assert {key[1] for key, entry in entries.items() if entry["status"] == "left out"} == {op for _, op in reasons}
    processes = [entry["process"] for entry in entries.values() if "process" in entry]
    assert len(set(processes)) == 3 and entries["time", "decode_fp8", "pallas"]["status"] == "passed"
    assert "took more than 2 s" in capsys.readouterr().out


def die():
    os._exit(3)


def die_from_the_second(counter):
    if counter.exists():
        os._exit(3)
    counter.touch()
    return describe()


def test_a_process_that_cannot_be_replaced_costs_items_and_not_the_record(tmp_path, monkeypatch):
    describe = functools.partial(die_from_the_second, tmp_path / "counter")
    monkeypatch.setattr(gpu_check, "Worker", functools.partial(Worker, describe=describe))
    monkeypatch.setattr(gpu_check, "perform", stub)
    output = tmp_path / "check.json"
    assert gpu_check.run(output, dry_run=True, words=["index"]) == 1
    record = json.loads(output.read_text())
    statuses = [(x["status"], x.get("reason")) for x in record["items"] if x["kind"] == "check_reduced"]
    assert statuses[:2] == [("failed", "CheckError: wrong"), ("failed", "RuntimeError: CUDA_ERROR_ILLEGAL_ADDRESS")]
    assert statuses[2] == ("failed", "the process that does the items died with exit code 3.") and record["finished"]


def test_the_end_of_the_time_cuts_no_item_short(tmp_path, monkeypatch):
    seconds = []
    monkeypatch.setattr(FailingWorker, "do", lambda self, item, given: seconds.append(given) or {"status": "passed"})
    monkeypatch.setattr(gpu_check, "Worker", FailingWorker)
    gpu_check.run(tmp_path / "check.json", dry_run=True, total_seconds=5.0)
    assert set(seconds) == {gpu_check.ITEM_SECONDS}


def test_worker_that_does_not_start(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "Worker", functools.partial(Worker, describe=die))
    output = tmp_path / "check.json"
    assert gpu_check.main(["--dry_run", f"--output={output}"]) == 2
    assert "died with exit code 3" in capsys.readouterr().err
    assert "died with exit code 3" in gpu_check.table(json.loads(output.read_text()))
    with pytest.raises(RuntimeError, match="did not start within 1 s"):
        Worker(stub, describe=functools.partial(time.sleep, 60), start_seconds=1.0)


def test_every_op_and_kernel_implementation_is_an_item():
    todo = gpu_check.items(dry_run=False)
    every = gpu_check.items(dry_run=False, every_shape=True)
    assert set(todo) < set(every)
    # A shape that was renamed would be left out silently.
    assert {(op, shape) for op, shapes in gpu_check.MAIN_SHAPES.items() for shape in shapes} == {x[1:3] for x in todo}
    assert {item.op for item in todo} == set(OPS)
    kinds = [item.kind for item in todo]
    assert kinds == sorted(kinds, key=("check_reduced", "check_real", "time").index)
    checked = [item.op for item in todo if item.implementation == "xla" and item.kind != "time"]
    assert sorted(checked) == sorted(OPS)  # each once
    assert {item.implementation for item in todo if item.op == "index_topk"} == {"xla", "pallas", "triton", "mosaic"}
    assert {item.implementation for item in todo if item.op == "index_scores"} == {"xla", "pallas", "mosaic"}


def test_table():
    row = {"op": "decode", "shape": "batch_1", "implementation": "pallas", "seconds": 2e-3, "p10": 1e-3, "p90": 3e-3}
    row |= {"tflops_per_second": 4.0, "terabytes_per_second": 0.5, "share_of_floor": 0.25, "timing": "chain of 9"}
    common = {"op": "decode", "shape": "batch_1", "implementation": "pallas"}
    record = {
        "dry_run": False,
        "environment": {"device": {"kind": "Made-up GPU"}, "versions": {"jax": "9.9"}},
        "items": [
            {"kind": "check_real", "status": "passed", **common},
            {"kind": "check_real", "status": "failed", "reason": "wrong", **common},
            {"kind": "time", "status": "timed", "row": row, **common},
        ],
    }
    lines = gpu_check.table(record).splitlines()
    assert lines[0] == "Made-up GPU, jax 9.9: 1 of 2 checks passed. The run was cut off."
    assert "- check_real decode, batch_1, pallas: failed, wrong" in lines
    assert lines[-1] == "| decode | batch_1 | pallas | 2.000 | 1.000 | 3.000 | 4.0 | 0.50 | 25% | chain of 9 |"


@pytest.mark.skipif(os.environ.get("JAX_PLATFORMS") != "cpu", reason="there may be a GPU")
def test_without_a_gpu(tmp_path, capsys):
    assert gpu_check.main([f"--output={tmp_path / 'check.json'}"]) == 2
    assert "pass --dry_run" in capsys.readouterr().err and not (tmp_path / "check.json").exists()
