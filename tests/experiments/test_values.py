"""What the flags of every command refuse when they are parsed: one line, the flag's full name, within two seconds."""

import json
import os
import subprocess
import sys

import pytest
from absl import flags

from dsa_jax.config import Config, ConfigError
from experiments.flags import ConfigFlag, parse_flags
from experiments.recipes import recipe_fields
from tests.experiments.commands import ROOT

LONG = "a" * 5000
DIGITS = "9" * 5000
WRONG = {
    int: ["-1e3", str(-(2**63)), str(2**63), "nan", "1.5", "x", "", DIGITS, f"-{DIGITS}"],
    float: ["-1e300", "1e300", "1e400", "nan", "inf", "-inf", "x", "", DIGITS],
    bool: ["2", "maybe", "", LONG],
    str: [LONG, "d/" + "é" * 4000],
}
TUPLES = ["7", "x", "(" * 5000, f"('{LONG}',)", f"({DIGITS},)", "(None,)", "{}", "((nan,),)", f"({'1,' * 20_000})"]

# Every value of every flag of one command, in one process, without running it.
SCRIPT = """
import contextlib, importlib, io, json, sys, time
from absl import flags
module = importlib.import_module(f"experiments.{sys.argv[1]}")
from experiments.flags import parse_flags
found = {}
for name, flag in flags.FLAGS.flags_by_module_dict().items():
    if name in ("__main__", sys.argv[0]) or name.startswith("experiments") :
        for each in flag:
            found[each.name] = (each.flag_type(), each.default)
outcomes = []
for name in found:
    if name.startswith("config."):
        continue
    for text in json.loads(sys.argv[2]).get(name, json.loads(sys.argv[2])["*"]):
        flags.FLAGS.unparse_flags()
        error, started = io.StringIO(), time.perf_counter()
        with contextlib.redirect_stderr(error):
            try:
                parse_flags(["command", f"--{name}={text}"])
                status = 0
            except SystemExit as stop:
                status = stop.code
        outcomes.append((name, text[:50], status, error.getvalue(), time.perf_counter() - started))
print(json.dumps(outcomes))
"""
COMMANDS = [path.stem for path in sorted((ROOT / "experiments").glob("*.py")) if "run_main(main)" in path.read_text()]
NUMBERS = {
    "retrofit": ["num_processes", "process_id"],
    "evaluate": ["num_processes", "process_id", "task_len", "task_sequences"],
    "generate": ["max_new_tokens", "temperature", "top_p", "seed", "page_size", "prefill_chunk"],
    "costs": ["dollars_per_hour", "speed", "max_length"],
    "dry_run": ["rows", "context", "device_gb"],
    "benchmark": ["lengths"],
    "tune": ["limit"],
}
ANY_TEXT = {"prompt"}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_of_every_command(command):
    numbers = ("-1e300", "-5", "1e300", "nan", "inf", "x", LONG, DIGITS)
    bad = {"*": (LONG,)} | dict.fromkeys(NUMBERS.get(command, ()), numbers)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, command, json.dumps(bad)],
        capture_output=True, text=True, check=False, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout)
    assert {name for name, *_ in outcomes} >= set(NUMBERS.get(command, ()))
    for name, text, status, error, seconds in outcomes:
        if name in ANY_TEXT:
            continue
        assert status == 2 and name in error and seconds < 2, (name, text, status, error)
        assert error.startswith("error: ") and error.count("\n") == 1 and len(error) < 1000, error


def checked(*arguments):
    values = flags.FlagValues()
    holder = ConfigFlag("configs/quickstart.py", flag_values=values)
    parse_flags(["command", *arguments], values)
    return holder.checked


def test_every_field_by_its_flag(monkeypatch):
    monkeypatch.setattr("experiments.flags.load_config", lambda *_: Config())
    values = flags.FlagValues()
    holder = ConfigFlag("configs/quickstart.py", flag_values=values)
    parse_flags(["command"], values)
    for name, kind, *_ in recipe_fields(Config):
        for text in WRONG.get(kind, TUPLES):
            values[f"config.{name}"].value = text
            with pytest.raises(ConfigError) as error:
                _ = holder.checked
            values[f"config.{name}"].value = None
            message = str(error.value)
            assert message.startswith(f"config.{name} ") and "\n" not in message and len(message) < 500, message


@pytest.mark.parametrize("argument", [f"--config={'x' * 300}", f"--config.{LONG}=3", f"--{LONG}=3", f"--config.seed{LONG}=3"])
def test_long_names_end_in_a_line(capsys, argument):
    with pytest.raises(SystemExit) as stopped:
        checked(argument)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and len(error) < 1000


def test_a_section_names_what_is_one_step_below(capsys):
    with pytest.raises(SystemExit):
        checked("--config.model=3")
    error = capsys.readouterr().err
    assert "config.model.attention, " in error and "config.model.attention.n_heads" not in error and len(error) < 1500


def test_help_says_the_limits():
    values = flags.FlagValues()
    ConfigFlag("configs/quickstart.py", flag_values=values)
    text = values["config.train.sparse.optimizer.clip_norm"].help
    assert text.endswith("global gradient norm; 0: no clipping; 0 or a positive number from 1e-09 to 1e+09")
    assert "none | yarn | llama3" in values["config.model.attention.rope.scaling"].help
    assert "native sparse attention (grouped-query with branches)" in values["config.model.attention.kind"].help
