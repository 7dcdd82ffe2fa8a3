"""The search for block sizes, with made-up times; and once through a real kernel, interpreted."""

import dataclasses
import functools
import json
import os

import pytest

from dsa_jax.benchmarks import tuner
from dsa_jax.benchmarks.op_checks import CheckError
from dsa_jax.benchmarks.worker import Worker
from experiments import tune
from pallas_kernels import tuning
from pallas_kernels.tuning import QueryTiles, Tiles

KERNEL, OTHER = "head_sums_visible_scores", "index_gradients_visible_query"
SHAPE = {"dtype": "bfloat16", "heads": 16, "dim": 64, "groups": 1, "queries": 512, "keys": 512}
DEFAULT = {KERNEL: QueryTiles(16, 32, block_q=32), OTHER: Tiles(16, 32)}
ENVIRONMENT = {"device": {"kind": "made up"}, "versions": {"jax": "0", "torch": None}, "git": None}


def describe():
    return {"backend": "gpu", "environment": ENVIRONMENT}


def task(trial):
    """Larger blocks of keys are faster, except those of 64, which are wrong; three stages crash; nothing runs with one warp."""
    tiles = dict(trial.tiles)
    if trial.kind == "kernels":
        return {"status": "found", "kernels": [(name, SHAPE, default) for name, default in DEFAULT.items()]}
    if trial.kind == "check_real":
        return {"status": "passed"}
    if 64 in [x.block_k for x in tiles.values()]:
        raise CheckError("scores are wrong")
    if 3 in [x.num_stages for x in tiles.values()]:
        os._exit(1)
    seconds = sum(1 / x.block_k for x in tiles.values())
    row = {"seconds": seconds, "p10": 0.99 * seconds, "p90": seconds, "timing": "made up"}
    return {"status": "timed", "row": {**row, "op": trial.op, "shape": trial.shape, "implementation": trial.implementation}}


class InThisProcess(Worker):
    """A worker whose process is this one; `os._exit` is a crash that it survives."""

    done: list = []  # noqa: RUF012

    def __init__(self, task, *, on_cpu):
        self.environment, self._task = ENVIRONMENT, task

    def do(self, trial, seconds):
        self.done.append(trial)
        if trial.kind == "check_and_time" and 3 in [x.num_stages for _, x in trial.tiles]:
            return {"status": "failed", "reason": "its process died with exit code 1"}
        try:
            return self._task(trial)
        except CheckError as error:
            return {"status": "failed", "reason": f"CheckError: {error}"}

    def stop(self):
        pass


@pytest.fixture
def search(monkeypatch, tmp_path):
    monkeypatch.setattr(tuner, "Worker", InThisProcess)
    monkeypatch.setattr(InThisProcess, "done", [])
    lines = []

    def run(**options):
        settings = {"table": tmp_path / "table.json", "log": tmp_path / "log.jsonl", "command": "made up", "task": task}
        settings |= {"report": lines.append, "limit": 40, **options}
        return tuner.run("index_scores", ["prefill_32k"], "pallas", **settings)

    return run, lines, tmp_path


def test_search_keeps_the_fastest_right_candidate(search):
    run, lines, folder = search
    entries = run()
    assert [(x.kernel, x.device, x.shape) for x in entries] == [(KERNEL, "made up", SHAPE), (OTHER, "made up", SHAPE)]
    assert [x.tiles.block_k for x in entries] == [128, 256] and tuning.read(folder / "table.json") == entries
    measured = entries[0].measured
    assert measured["seconds"] == 1 / 128 + 1 / 256 and measured["default_seconds"] == 2 / 32
    assert measured["versions"] == {"jax": "0"} and measured["command"] == "made up"
    assert any("block_k=64" in line and "failed, CheckError: scores are wrong" in line for line in lines)
    assert any("num_stages=3" in line and "its process died" in line for line in lines)


def test_a_second_run_repeats_no_trial_but_a_cut_off_line(search):
    run, _, folder = search
    first = run()
    log = folder / "log.jsonl"
    trials = len(InThisProcess.done)
    log.write_text(log.read_text()[:-20])
    InThisProcess.done.clear()
    assert run() == first
    assert [x.kind for x in InThisProcess.done] == ["kernels", "check_real"] and trials > 20


def test_only_some_kernels_and_without_the_unfit(search):
    run, lines, _ = search
    wide = [x for x in tuning.candidates(KERNEL, DEFAULT[KERNEL], SHAPE, limit=40) if x.block_k == 128]
    unfit = {tuner.unfit_key(KERNEL, {**SHAPE, "keys": 7}, dataclasses.asdict(x)) for x in wide}
    (entry,) = run(kernels=[KERNEL], unfit=unfit)
    assert entry.tiles == DEFAULT[KERNEL] and any("skipped, does not compile" in line for line in lines)
    with pytest.raises(ValueError, match="kernel is 'radix_select'; expected one that index_scores runs: head_sums"):
        run(kernels=["radix_select"])
    with pytest.raises(ValueError, match="kernel is 'sort'"):
        run(kernels=["sort"])


def test_no_entry_where_the_whole_is_wrong_or_nothing_runs(search):
    run, lines, folder = search

    def wrong(trial):
        return {"status": "failed", "reason": "CheckError: out"} if trial.kind == "check_real" else task(trial)

    def broken(trial):
        return {"status": "failed", "reason": "RESOURCE_EXHAUSTED"} if trial.kind == "check_and_time" else task(trial)

    assert run(task=wrong) == [] and tuning.read(folder / "table.json") == [] and "CheckError: out" in lines[-2]
    with pytest.raises(RuntimeError, match="does not run with its default tiles"):
        run(task=broken, log=folder / "other.jsonl")


def test_unfit_file(tmp_path):
    path, tiles = tmp_path / "unfit.jsonl", dataclasses.asdict(DEFAULT[OTHER])
    rows = [
        {"kernel": OTHER, "shape": SHAPE | {"queries": 5}, "tiles": tiles, "unfit": reason}
        for reason in ("8 bytes spilled", None)
    ]
    rows[1]["shape"] = {**SHAPE, "heads": 8}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert tuner.read_unfit(path) == {tuner.unfit_key(OTHER, SHAPE, tiles)}
    assert tuner.unfit_key(OTHER, SHAPE, tiles) != tuner.unfit_key(OTHER, SHAPE | {"queries": 4096}, tiles)


@pytest.mark.slow
def test_through_a_real_kernel(tmp_path):
    table = tmp_path / "table.json"
    options = {"table": table, "log": tmp_path / "log.jsonl", "command": "made up", "limit": 2, "interpreted": True}
    (entry,) = tuner.run("index_scores", ["laptop"], "pallas", **options)
    assert (entry.kernel, entry.device) == (KERNEL, "cpu") and tuning.read(table) == [entry]
    assert sum('"status": "timed"' in line for line in (tmp_path / "log.jsonl").read_text().splitlines()) == 2


@pytest.mark.skipif(os.environ.get("JAX_PLATFORMS") != "cpu", reason="there may be a GPU")
def test_command_refuses_a_cpu(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(tuner, "Worker", functools.partial(Worker, describe=describe_cpu))
    flags = tune.flags.FLAGS
    flags(["tune", "--op=decode", f"--table={tmp_path / 'table.json'}"])
    assert tune.main([]) == 2 and "this is 'cpu', not a GPU" in capsys.readouterr().err
    flags(["tune", "--op=decode", "--interpret", "--table="])
    with pytest.raises(tune.flags.ValidationError, match="needs a --table"):
        tune.main([])


def describe_cpu():
    return {"backend": "cpu", "environment": ENVIRONMENT}
