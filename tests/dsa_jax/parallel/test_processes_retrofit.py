"""One retrofit by two processes of four devices each: stopped, killed and continued, against one process of eight."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from dsa_jax.params import parameter_paths
from dsa_jax.run.metrics import read_metrics
from dsa_jax.train.init import load_run

ROOT = Path(__file__).parents[3]
MAIN = Path(__file__).with_name("process_main.py")
RECIPE = Path(__file__).with_name("process_recipe.py")
SECONDS = 1200
UNFINISHED_PROGRAM = "ignore:Error reading persistent compilation cache entry:UserWarning"
"""One process reads the program that the other is still writing, and compiles it itself."""


@pytest.fixture(scope="module", autouse=True)
def text(tmp_path_factory):
    """Documents that are read as training goes: fewer than it needs, so that it is in a later epoch when it stops."""
    file = tmp_path_factory.mktemp("text") / "text.array_record"
    writer = ArrayRecordWriter(str(file), "group_size:1")
    for i in range(20):
        writer.write((f"{i:02d}" + "the rain in spain stays " * 2)[: 6 + 2 * i].encode())
    writer.close()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSA_TEST_TEXT", str(file))
        yield


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def launch(workdir, *, n_processes=1, when=("never",), number="SIGTERM", by_slurm=False):
    """Start the processes of a run; `when[i]` is when process i sends itself the signal."""
    port = free_port()
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={8 // n_processes}",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-W", "error", "-W", UNFINISHED_PROGRAM, MAIN]
    processes = []
    for i in range(n_processes):
        flags = [f"--config={RECIPE}:{os.environ['DSA_TEST_TEXT']}", f"--workdir={workdir}"]
        own = {}
        if by_slurm:
            own = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_TASKS": f"{n_processes}"}
            own |= {"SLURM_PROCID": f"{i}", "SLURM_LOCALID": f"{i}", "JAX_COORDINATOR_PORT": f"{port}"}
        elif n_processes > 1:
            flags += [f"--coordinator=localhost:{port}", f"--num_processes={n_processes}", f"--process_id={i}"]
        processes.append(
            subprocess.Popen(
                [*command, when[i], number, *flags],
                cwd=ROOT,
                env=environment | own,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return processes


def finish(processes):
    """(exit status, stdout, stderr) of each."""
    outputs = []
    for process in processes:
        try:
            outputs.append((*process.communicate(timeout=SECONDS),))
        except subprocess.TimeoutExpired:
            for each in processes:
                each.kill()
            pytest.fail(f"a process did not end:\n{process.communicate()[1]}")
    return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]


def final_params(workdir):
    loaded = load_run(workdir)
    assert loaded.stage == "sparse"
    return parameter_paths(jax.device_get(loaded.params))


def same_run(workdir, undisturbed):
    """Every step was logged once, and parameters, metrics and table are those of the undisturbed run."""
    found, expected = read_metrics(workdir / "metrics.jsonl"), read_metrics(undisturbed / "metrics.jsonl")
    assert [(entry["stage"], entry["step"]) for entry in found] == [(entry["stage"], entry["step"]) for entry in expected]
    for got, want in zip(found, expected, strict=True):
        for name in ("loss", "kl"):
            if name in want:
                where = f"{want['stage']} {want['step']} {name}"
                np.testing.assert_allclose(got[name], want[name], rtol=1e-4, atol=1e-7, err_msg=where)
    got, want = final_params(workdir), final_params(undisturbed)
    assert got.keys() == want.keys()
    for path, value in want.items():
        # Not the same bits: sums over processes add in another order. Training moves each by some 0.05.
        np.testing.assert_allclose(got[path], value, rtol=1e-5, atol=5e-6, err_msg=path)
    tables = [json.loads((path / "report.json").read_text())["rows"] for path in (workdir, undisturbed)]
    for got, want in zip(*tables, strict=True):
        assert got["name"] == want["name"]
        np.testing.assert_allclose(got["coverage"], want["coverage"], rtol=1e-4)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    ((status, _, stderr),) = finish(launch(workdir))
    assert status == 0, stderr
    return workdir


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """What two processes left when one of them got a SIGTERM."""
    workdir = tmp_path_factory.mktemp("stopped")
    (status0, _, err0), (status1, out1, err1) = finish(
        launch(workdir, n_processes=2, when=("never", "sparse:3"), number="SIGTERM")
    )
    assert (status0, status1) == (0, 0), err0 + err1
    assert "stopped by a signal to another process in stage sparse" in err0
    assert "stopped by SIGTERM in stage sparse" in err1
    # The second process says nothing else: metrics, progress and report are the first one's. Gloo's threads cut into each
    # other's lines.
    assert re.fullmatch(r"(\[Gloo\]|Rank|is|connected|to|peer|ranks|Expected|number|of|[\s\d.:])*", out1), out1
    assert "tokens/s" in err0 and "tokens/s" not in err1
    assert not (workdir / "report.json").exists()
    return workdir


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_and_one_process_continues(stopped, undisturbed, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(stopped, workdir)
    ((status, _, stderr),) = finish(launch(workdir))
    assert status == 0, stderr
    assert "stage sparse continues at step 5 of 8" in stderr
    assert json.loads((workdir / "environment.json").read_text())["history"][0]["device"]["processes"] == 2
    same_run(workdir, undisturbed)


@pytest.mark.slow
def test_both_killed_while_saving_continue_from_the_last_whole_checkpoint(stopped, undisturbed, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(stopped, workdir)
    first, second = launch(workdir, n_processes=2, when=("seal:8", "never"), number="SIGKILL")
    assert first.wait(SECONDS) == -signal.SIGKILL
    second.kill()
    finish([first, second])
    unfinished = list((workdir / "checkpoints" / "sparse").glob("8*"))
    assert unfinished and not (workdir / "checkpoints" / "sparse" / "8").exists()

    (status0, out0, err0), (status1, _, err1) = finish(launch(workdir, n_processes=2, when=("never", "never"), by_slurm=True))
    assert (status0, status1) == (0, 0), err0 + err1
    assert "ignoring the half-written checkpoint" in err0 and "stage sparse continues at step 6 of 8" in err0
    assert "report.html" in out0
    same_run(workdir, undisturbed)
