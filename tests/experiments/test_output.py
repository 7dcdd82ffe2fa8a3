"""What commands do with `--output`, and with flags that would change nothing: said before any work is done."""

import json

import pytest
from absl import flags

from dsa_jax.run.files import RunError
from experiments.output import OutputFlag
from tests.experiments.commands import finish, start


def output(path):
    values = flags.FlagValues()
    flag = OutputFlag("Where to.", flag_values=values)
    values(["command", f"--output={path}"])
    return flag


def test_the_directory_is_made_and_the_file_written_whole(tmp_path):
    flag = output(tmp_path / "new" / "x.json")
    flag.check()
    assert (tmp_path / "new").is_dir() and not list((tmp_path / "new").iterdir())
    flag.write({"a": 1})
    assert json.loads((tmp_path / "new" / "x.json").read_text()) == {"a": 1}


def test_what_is_not_finite_is_null(tmp_path):
    flag = output(tmp_path / "x.json")
    flag.write({"a": float("nan"), "b": [float("inf"), 1.5]})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": None, "b": [None, 1.5]}


def test_rows_are_added_to_what_is_there(tmp_path):
    flag = output(tmp_path / "x.jsonl")
    flag.append([{"a": 1}])
    flag.append([{"a": 2}, {"a": 3}])
    assert [json.loads(line)["a"] for line in (tmp_path / "x.jsonl").read_text().splitlines()] == [1, 2, 3]


def test_a_place_that_cannot_be_written_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="file is a file; expected a directory"):
        output(tmp_path / "file" / "x.json").check()
    (tmp_path / "image").write_bytes(b"\xff\xfe")
    with pytest.raises(flags.ValidationError, match="image cannot be added to, as it is no text"):
        output(tmp_path / "image").check()
    with pytest.raises(flags.ValidationError, match="is a directory; expected the name of a file"):
        output(tmp_path).check()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["dry_run", "--config=configs/quickstart.py", "--rows=7"], "--rows says what to compile"),
        (["dry_run", "--config=configs/quickstart.py", "--weak_scaling=fsdp2", "--target=h200x8"], "expected no --target"),
        (["dry_run", "--config=configs/quickstart.py", "--cache_dtype=int4"], "cache_dtype"),
        (["convert", "--checkpoint=x", "--to_run=y", "--weight_format=fp8_blocks"], "it goes with --to_hf"),
        (["benchmark", "--op=layer", "--lengths=0"], "expected positive integers"),
    ],
    ids=["nothing-compiled", "two-devices", "dtype", "run-in-fp8", "length"],
)
def test_a_flag_that_would_change_nothing_is_refused(command, message):
    status, _, errors = finish(start(*command))
    assert status == 2 and message in errors and "Traceback" not in errors
