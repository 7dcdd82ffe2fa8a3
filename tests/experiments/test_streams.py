"""Output whose reader goes away stops nothing."""

import io
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
