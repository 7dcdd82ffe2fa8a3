"""Compiles every GPU kernel for an H200 on a machine without one: registers, spills, shared memory, time to compile.

    make aot                      # all kernels
    make aot AOT_ARGS=indexer     # those whose name or shape contains a word

Exit status 1 when a kernel spills registers, asks for more shared memory than the device has, or does not compile. What is
compiled is not run: nothing here says how fast or how right a kernel is.
"""

import os

# Read when jax is imported: ptxas' report is a log message, the shared memory is in what XLA dumps.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "0"
os.environ["TF_CPP_VMODULE"] = "subprocess_compilation=5"

import contextlib
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

DUMP = tempfile.mkdtemp(prefix="aot-")
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={DUMP}"

import jax  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding, use_abstract_mesh  # noqa: E402

from benchmarks.kernel_cases import KernelCase, cases  # noqa: E402

TARGET = Path(__file__).with_name("h200.txtpb")
PTXAS = re.compile(
    r"Compiling entry function '(?P<name>[^']+)'.*?(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r".*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)
THUNK = re.compile(r"\]\s+(\S+) grid: \[[^\]]*\] threads: \[(\d+), 1, 1\]\s+shared_memory: (\d+) bytes")


class Compiled(NamedTuple):
    """What the compiler says about one kernel."""

    kernel: str
    registers: int
    spilled_bytes: int
    threads: int
    shared_bytes: int


@contextlib.contextmanager
def captured_stderr() -> Iterator[Path]:
    """Sends what the compiler writes to file descriptor 2 into a file."""
    path = Path(DUMP) / "stderr.txt"
    saved = os.dup(2)
    try:
        with path.open("wb") as file:
            os.dup2(file.fileno(), 2)
            yield path
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def compile_case(case: KernelCase, sharding: SingleDeviceSharding) -> list[Compiled]:
    """Compiles one case.

    Raises:
        RuntimeError: when a kernel of the case is not in the compiler's report.
    """
    for old in Path(DUMP).glob("module_*"):
        old.unlink()
    arrays = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in case.arrays]
    mesh = AbstractMesh((), (), abstract_device=AbstractDevice("NVIDIA H200", 132, "cuda"))
    with captured_stderr() as log, use_abstract_mesh(mesh):
        jax.jit(case.function).lower(*arrays).compile()
    reports = {match["name"]: match for match in PTXAS.finditer(log.read_text(errors="replace"))}
    thunks = "\n".join(path.read_text() for path in Path(DUMP).glob("*thunk_sequence.txt"))
    sizes = {name: (int(threads), int(shared)) for name, threads, shared in THUNK.findall(thunks)}
    missing = [name for name in case.kernels if name not in reports or name not in sizes]
    if missing:
        raise RuntimeError(f"no report on {', '.join(missing)}; reports on {sorted(reports)}, launches of {sorted(sizes)}")
    return [
        Compiled(
            name, int(reports[name]["registers"]), int(reports[name]["stores"]) + int(reports[name]["loads"]), *sizes[name]
        )
        for name in case.kernels
    ]


def main(words: list[str]) -> int:
    """Prints the table, one Markdown row per kernel and shape; the number of failures decides the exit status."""
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="h200", target_config=TARGET.read_text(), topology="1x1x1"
    )
    sharding = SingleDeviceSharding(topology.devices[0])
    print(f"jax {jax.__version__}, sm_90a, compiled and not run\n")
    print("| kernel | shape | registers | spilled bytes | threads | shared memory | seconds to compile |")
    print("|---|---|---|---|---|---|---|")
    failures = 0
    for case in cases():
        if not all(word in f"{case.name} {case.shape} {' '.join(case.kernels)}" for word in words):
            continue
        start = time.monotonic()
        try:
            rows = compile_case(case, sharding)
        except Exception as error:  # the table goes on; what failed is in it
            failures += 1
            print(
                f"| {', '.join(case.kernels)} | {case.shape} | FAILED: {str(error).splitlines()[0][:160]} | | | | |", flush=True
            )
            continue
        seconds = time.monotonic() - start
        for row in rows:
            failures += row.spilled_bytes > 0
            spilled = f"{row.spilled_bytes} SPILLED" if row.spilled_bytes else "0"
            print(
                f"| {row.kernel} | {case.shape} | {row.registers} | {spilled} | {row.threads} | {row.shared_bytes} | "
                f"{seconds:.1f} |",
                flush=True,
            )
    print(f"\n{failures} failures" if failures else "\nall kernels compile without a spill")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
