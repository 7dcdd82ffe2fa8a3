import importlib.util
import json
import os
import subprocess
import sys

import pytest


@pytest.mark.skipif(importlib.util.find_spec("jax_plugins") is not None, reason="the CUDA compiler is installed here")
def test_summary_and_the_command_that_installs_the_compiler():
    """Everything that needs no compiler is printed before the one line that says how to get it."""
    command = [sys.executable, "-m", "experiments.dry_run", "--config=configs/quickstart.py", "--target=h200x1"]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), check=False)
    assert done.returncode == 2
    assert "embed/embedding" in done.stdout and "GB per device" in done.stdout
    assert done.stderr.splitlines()[-1].startswith("error: ") and "pip install --editable '.[aot]'" in done.stderr


def test_compiled_on_emulated_devices(tmp_path):
    """The recipe's mesh needs no flag to be there."""
    output = tmp_path / "out.json"
    fields = [
        *("parallel.preset=fsdp2", "model.n_layers=1", "model.vocab_size=640", "train.sparse.steps=0", "train.warmup.steps=0"),
        *("train.pretrain.seq_len=32", "train.pretrain.batch_size=2", "train.pretrain.curriculum=()"),
    ]
    command = [sys.executable, "-m", "experiments.dry_run", "--config=configs/quickstart.py", "--compile", f"--output={output}"]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(
        [*command, *(f"--config.{field}" for field in fields)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "pretrain step compiled for cpu" in done.stdout
    compiled = json.loads(output.read_text())["compiled"]
    assert compiled["peak"] > compiled["arguments"] > 0 and compiled["collectives"]
