"""The command as a user runs it: in a process of its own, with signals and with wrong inputs."""

import json
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from absl import flags

from dsa_jax import retrofit as retrofit_module
from dsa_jax.run.directory import open_run
from experiments.flags import ConfigFlag, run_main
from experiments.recipes import load_config
from tests.experiments.commands import finish, start

RECIPE = """
from tests.dsa_jax.train.tiny import tiny_config

def get_config(arg=""):
    config = tiny_config(steps=40)
    config.eval.rows = ("dense", "sparse")
    for name in ("pretrain", "warmup", "sparse"):
        getattr(config.train, name).checkpoint_every = 1000
    return config
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "tiny.py"
    path.write_text(RECIPE)
    return path


def retrofit(recipe, workdir, *overrides):
    return start("retrofit", f"--config={recipe}", f"--workdir={workdir}", *overrides)


def lines(path):
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.slow
def test_sigterm_in_every_stage_then_the_same_command_gives_the_same_bits(recipe, tmp_path):
    status, _, errors = finish(retrofit(recipe, tmp_path / "undisturbed"))
    assert status == 0, errors

    interrupted = tmp_path / "interrupted"
    for stage in ("pretrain", "warmup", "sparse"):
        process = retrofit(recipe, interrupted)
        deadline = time.monotonic() + 240
        while not any(json.loads(line)["stage"] == stage for line in lines(interrupted / "metrics.jsonl")[:-1]):
            assert process.poll() is None and time.monotonic() < deadline, finish(process)
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        status, _, errors = finish(process)
        assert status == 0 and f"stopped by SIGTERM in stage {stage}" in errors, errors
    status, output, errors = finish(retrofit(recipe, interrupted))
    assert status == 0, errors
    assert "report.html" in output

    assert lines(interrupted / "metrics.jsonl") == lines(tmp_path / "undisturbed" / "metrics.jsonl")
    rows = [json.loads((tmp_path / run / "report.json").read_text())["rows"] for run in ("undisturbed", "interrupted")]
    assert rows[0] == rows[1]


WRONG = {
    "misspelt-field": (["--config.train.warmpu.steps=3"], 2, "config.train.warmup.steps"),
    "topk-zero": (["--config.model.attention.indexer.topk=0"], 2, "model.attention.indexer.topk is 0"),
    "topk-negative": (["--config.model.attention.indexer.topk=-4"], 2, "topk is -4"),
    "heads-not-divisible": (["--config.model.attention.n_kv_heads=3"], 2, "expected a multiple of n_kv_heads (3)"),
    "empty-corpus": (["--config.data.recall_fraction=0", "--config.data.text.path={empty}"], 2, "empty"),
    "not-utf8": (["--config.data.recall_fraction=0", "--config.data.text.path={latin}"], 2, "UTF-8"),
    "not-tokens": (["--config.data.recall_fraction=0", "--config.data.text.path={floats}"], 2, "floats.npy"),
    "vocabulary-too-small": (["--config.model.vocab_size=100"], 2, "model.vocab_size is 100"),
    "another-config": (["--config.seed=9", "--workdir={other}"], 1, "seed is 3 there and 9 here"),
    "workdir-is-a-file": (["--workdir={latin}"], 1, "is a file"),
}
OWN_PROCESS = ("topk-zero", "another-config")  # one for each exit status


@pytest.fixture
def in_this_process(monkeypatch, capsys):
    """The command without the start of a process; returns exit status, standard output and standard error."""

    def run(*arguments):
        values = flags.FlagValues()
        config = ConfigFlag(flag_values=values)
        workdir = flags.DEFINE_string("workdir", "", "", flag_values=values)
        start = lambda main, argv, flags_parser: sys.exit(main(flags_parser(argv, values)))
        monkeypatch.setattr("experiments.flags.app.run", start)
        with pytest.raises(SystemExit) as stopped:
            run_main(lambda _: retrofit_module.retrofit(config.value, Path(workdir.value)), ["command", *arguments])
        return stopped.value.code, *capsys.readouterr()

    return run


@pytest.mark.parametrize("name", WRONG)
def test_wrong_inputs_end_in_one_clear_line(recipe, tmp_path, in_this_process, name):
    arguments, status, message = WRONG[name]
    places = {"empty": tmp_path / "empty", "latin": tmp_path / "latin.txt", "floats": tmp_path / "floats.npy"}
    places["other"] = tmp_path / "other"
    places["empty"].mkdir()
    places["latin"].write_bytes(b"caf\xe9 " * 100)
    np.save(places["floats"], np.ones(100))
    if name == "another-config":
        open_run(places["other"], load_config(str(recipe))).checkpoint_dir("pretrain").joinpath("2").mkdir(parents=True)
    given = [f"--config={recipe}", f"--workdir={tmp_path / 'run'}", *(argument.format(**places) for argument in arguments)]
    got, _, errors = finish(start("retrofit", *given)) if name in OWN_PROCESS else in_this_process(*given)
    assert got == status, errors
    final = errors.strip().splitlines()[-1]
    assert final.startswith("error: ") and message in final, errors
    assert "Traceback" not in errors
    assert not (tmp_path / "run" / "checkpoints").exists()
