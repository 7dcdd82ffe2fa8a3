import importlib.util
import json

import pytest

from tests.experiments.commands import finish, start


@pytest.mark.skipif(importlib.util.find_spec("jax_plugins") is not None, reason="the CUDA compiler is installed here")
def test_summary_and_the_command_that_installs_the_compiler():
    """Everything that needs no compiler is printed before the one line that says how to get it."""
    status, printed, errors = finish(start("dry_run", "--config=configs/quickstart.py", "--target=h200x1"))
    assert status == 2
    assert "embed/embedding" in printed and "GB per device" in printed
    assert errors.splitlines()[-1].startswith("error: ") and "pip install --editable '.[aot]'" in errors


def test_compiled_on_emulated_devices(tmp_path):
    """The recipe's mesh needs no flag to be there."""
    output = tmp_path / "out.json"
    fields = [
        *("parallel.preset=fsdp2", "model.n_layers=1", "model.vocab_size=640", "train.sparse.steps=0", "train.warmup.steps=0"),
        *("train.pretrain.seq_len=32", "train.pretrain.batch_size=2", "train.pretrain.curriculum=()"),
    ]
    options = ["--config=configs/quickstart.py", "--compile", f"--output={output}"]
    status, printed, errors = finish(start("dry_run", *options, *(f"--config.{field}" for field in fields)))
    assert status == 0, errors
    assert "pretrain step compiled for cpu" in printed
    compiled = json.loads(output.read_text())["compiled"]
    assert compiled["peak"] > compiled["arguments"] > 0 and compiled["collectives"]
