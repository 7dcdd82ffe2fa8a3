"""Output whose reader goes away stops nothing."""

import io
import os
import subprocess
import sys

import pytest

from experiments.streams import LastingStream

PROGRAM = """
import sys
from experiments.flags import run_main

def main(argv):
    print("one" * 5000, flush=True)
    print("two", file=sys.stderr)
    open(sys.argv[0] + ".done", "w").close()

run_main(main, ["program"])
"""


def test_text_goes_through_with_escapes_for_what_the_encoding_lacks():
    raw = io.BytesIO()
    stream = LastingStream(io.TextIOWrapper(raw, encoding="ascii"))
    print("naïve", file=stream, flush=True)
    assert raw.getvalue() == b"na\\xefve\n"
    assert stream.finish() is None and not stream.isatty()


@pytest.mark.parametrize("pieces", [["a\x1b[2Jb\n"], ["a", "\x1b", "[2", "Jb\n"], ["a\x1b[2J", "b", "\n"]])
def test_escape_sequences_go_out_as_codes_however_they_arrive(pieces):
    stream = LastingStream(out := io.StringIO(), plain=True)
    for piece in pieces:
        print(piece, end="", file=stream, flush=True)
    assert out.getvalue() == "a\\x1b[2Jb\n"


OUTPUTS = """
import logging
from dsa_jax.config import ConfigError
from experiments.flags import run_main

def main(argv):
    print("\\x1b[31mfrom a model\\n\\tand on", flush=True)
    logging.getLogger("dsa_jax").warning("reads %s", "\\x1b[32m.txt")
    raise ConfigError("\\x1b[33m.json is wrong")

run_main(main, ["program"])
"""


def test_neither_output_nor_log_nor_error_of_a_command_acts_on_the_terminal(tmp_path):
    (tmp_path / "program.py").write_text(OUTPUTS)
    command = [sys.executable, tmp_path / "program.py"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": "."})
    assert done.stdout == "\\x1b[31mfrom a model\n\tand on\n" and done.returncode == 2
    assert "reads \\x1b[32m.txt" in done.stderr and "error: \\x1b[33m.json is wrong" in done.stderr
    assert "\x1b" not in done.stderr


def test_a_stream_that_was_closed_from_the_start():
    print("nothing", file=LastingStream(None), flush=True)


@pytest.mark.parametrize(
    ("stdout", "stderr", "status", "message"),
    [
        ("| head -c1 >/dev/null", "", 0, b""),
        (">/dev/full", "", 1, b"error: stdout cannot be written: No space left on device."),
        (">&-", "", 0, b"two"),
        ("", "2>&-", 0, b""),
        ("", "2>/dev/full", 0, b""),
    ],
)
def test_a_command_ends_its_work(tmp_path, stdout, stderr, status, message):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = f"PYTHONPATH=. {sys.executable} {program} {stderr} {stdout}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, timeout=600, check=False)
    assert done.returncode == status, done.stderr
    assert message in done.stderr and b"Traceback" not in done.stderr and b"Exception ignored" not in done.stderr
    assert (tmp_path / "program.py.done").exists()
