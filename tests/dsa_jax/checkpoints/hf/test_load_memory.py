"""Loading holds the model and little else: measured as the operating system counts it, in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[4]
SCRIPT = Path(__file__).with_name("load_large.py")
LARGE = "DSA_LARGE"


def load_in_own_process(directory, n_layers):
    """The report of `load_large.py` on a checkpoint that it wrote before."""
    command = [sys.executable, str(SCRIPT), str(directory), f"--layers={n_layers}"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    for _ in ("write", "load"):
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_a_tenth_of_a_billion_parameters(tmp_path):
    report = load_in_own_process(tmp_path / "checkpoint", 1)
    print(f"{report['parameters'] / 1e9:.2f}e9 parameters in {report['seconds']} s")
    assert report["parameters"] > 0.15e9
    # The process itself takes 0.2 GB, which would drown a factor on the total at this size.
    grown = report["resident_highest"] - report["resident_before"]
    assert grown < 1.3 * report["bytes"]


@pytest.mark.skipif(LARGE not in os.environ, reason=f"writes 2 GB; set {LARGE}=1")
def test_a_billion_parameters(tmp_path):
    report = load_in_own_process(tmp_path / "checkpoint", 19)
    print(f"{report['parameters'] / 1e9:.2f}e9 parameters in {report['seconds']} s, peak {report['resident_highest']} bytes")
    assert report["parameters"] > 1e9
    assert report["resident_highest"] < 1.5 * report["bytes"]
