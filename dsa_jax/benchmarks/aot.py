"""Compiles every GPU kernel for an H200 on a machine without one: registers, spills, shared memory, time to compile.

    make aot                      # all kernels
    make aot AOT_ARGS=indexer     # those whose name or shape contains a word
    make aot AOT_ARGS="--candidates=runs/tune/unfit.jsonl decode"    # other block sizes, too: what experiments.tune may skip

Exit status 1 when a kernel spills registers, asks for more shared memory than the device has, does not compile, or when the
assembler serializes its tensor core matmuls (wgmma). The kernels are compiled, not run: nothing here shows their speed or
correctness.
"""

import os

# Read when jax is imported: ptxas' report is a log message, the shared memory is in what XLA dumps.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "0"
os.environ["TF_CPP_VMODULE"] = "subprocess_compilation=5"

import argparse
import atexit
import contextlib
import dataclasses
import functools
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

DUMP = tempfile.mkdtemp(prefix="aot-")
atexit.register(shutil.rmtree, DUMP, ignore_errors=True)
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={DUMP}"
# Mosaic GPU calls the assembler itself, and XLA launches its kernels without knowing their threads and shared memory.
MOSAIC_DUMP = Path(DUMP) / "mosaic"
MOSAIC_DUMP.mkdir()
os.environ["MOSAIC_GPU_DUMP_TO"] = str(MOSAIC_DUMP)

import jax  # noqa: E402
import nvidia.cu13  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding, use_abstract_mesh  # noqa: E402

from dsa_jax.benchmarks.kernel_cases import KernelCase, cases  # noqa: E402
from pallas_kernels import tuning  # noqa: E402

TARGET = Path(__file__).with_name("h200.txtpb")
MESH = AbstractMesh((), (), abstract_device=AbstractDevice("NVIDIA H200", 132, "cuda"))
PTXAS = re.compile(
    r"Compiling entry function '(?P<name>[^']+)'.*?(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r".*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)
SERIALIZED = re.compile(r"wgmma\.mma_async instructions are serialized[^\n]*function '(?P<name>[^']+)'")
THUNK = re.compile(r"\]\s+(\S+) grid: \[[^\]]*\] threads: \[(\d+), 1, 1\]\s+shared_memory: (\d+) bytes")
MOSAIC_THREADS = re.compile(r"\.(?:maxntid|reqntid) (\d+), 1, 1")
MOSAIC_SHARED = re.compile(r"dynamic_shared_memory_size %c(\d+)_i32")


class Compiled(NamedTuple):
    """The compiler's report on one kernel; `temporary_bytes` are those of the whole program it is in.

    `is_serialized`: the assembler put a wait behind each of its wgmma instructions, which are meant to run back to back.
    """

    kernel: str
    registers: int
    spilled_bytes: int
    threads: int
    shared_bytes: int
    is_serialized: bool
    temporary_bytes: int | None = None


@contextlib.contextmanager
def captured_stderr() -> Iterator[Path]:
    """Redirects the compiler's output on file descriptor 2 into a file."""
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
    for old in (*Path(DUMP).glob("module_*"), *MOSAIC_DUMP.iterdir()):
        old.unlink()
    arrays = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), case.arrays)
    with captured_stderr() as log, use_abstract_mesh(MESH):
        memory = jax.jit(case.function).lower(arrays).compile().memory_analysis()
    if memory is None:
        raise RuntimeError(f"{case.name}: the compiler gives no memory analysis; expected one for a GPU.")
    text = log.read_text(errors="replace")
    reports = {match["name"]: match for match in PTXAS.finditer(text)}
    serialized = {match["name"] for match in SERIALIZED.finditer(text)}
    thunks = "\n".join(path.read_text() for path in Path(DUMP).glob("*thunk_sequence.txt"))
    sizes = {name: (int(threads), int(shared)) for name, threads, shared in THUNK.findall(thunks)}
    for name, report, size, is_serialized in mosaic_reports():
        reports[name], sizes[name] = report, size
        serialized |= {name} if is_serialized else set()
    missing = [name for name in case.kernels if name not in reports or name not in sizes]
    if missing:
        raise RuntimeError(f"no report on {', '.join(missing)}; reports on {sorted(reports)}, launches of {sorted(sizes)}")
    return [
        Compiled(name, *_registers_and_spills(reports[name]), *sizes[name], name in serialized, memory.temp_size_in_bytes)
        for name in case.kernels
    ]


def mosaic_reports() -> Iterator[tuple[str, re.Match[str], tuple[int, int], bool]]:
    """(kernel, the assembler's report, (threads, shared bytes), is serialized) of every Mosaic GPU kernel that was compiled."""
    for path in MOSAIC_DUMP.glob("*.ptxas"):
        text = path.read_text()
        report = PTXAS.search(text)
        threads = MOSAIC_THREADS.search(path.with_suffix(".ptx").read_text())
        shared = MOSAIC_SHARED.search(path.with_suffix(".before_layout_inference.txt").read_text())
        if report and threads and shared:
            name = report["name"].removesuffix("_mosaic_gpu_kernel")
            yield name, report, (int(threads[1]), int(shared[1])), SERIALIZED.search(text) is not None


def try_candidates(case: KernelCase, sharding: SingleDeviceSharding, limit: int) -> Iterator[dict[str, Any]]:
    """Compiles a case with other block sizes, a kernel at a time: {kernel, shape, tiles, unfit}, `unfit` None where it fits."""
    arrays = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), case.arrays)
    with tuning.recorded() as choices, use_abstract_mesh(MESH):
        jax.eval_shape(case.function, arrays)
    for choice in {choice.kernel: choice for choice in choices if choice.kernel in case.kernels}.values():
        for tiles in tuning.candidates(choice.kernel, choice.default, choice.shape, limit=limit)[1:]:
            jax.clear_caches()
            unfit = None
            try:
                with tuning.trial({choice.kernel: tiles}):
                    compiled = {x.kernel: x for x in compile_case(case, sharding)}
                if compiled[choice.kernel].spilled_bytes:
                    unfit = f"{compiled[choice.kernel].spilled_bytes} bytes spilled"
                elif compiled[choice.kernel].is_serialized:
                    unfit = "its wgmma matmuls are serialized"
            except Exception as error:  # candidates that do not compile are the purpose
                unfit = str(error).splitlines()[0][:200]
            yield {"kernel": choice.kernel, "shape": choice.shape, "tiles": dataclasses.asdict(tiles), "unfit": unfit}


def write_candidates(path: Path, words: list[str], limit: int) -> int:
    """Appends each candidate, and whether it fits, to a JSON Lines file for `experiments.tune --unfit`; returns how many."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tried = 0
    sharding = h200()
    for case in cases():
        if not all(word in f"{', '.join(case.kernels)} {case.name}: {case.shape}" for word in words):
            continue
        for row in try_candidates(case, sharding, limit):
            tried += 1
            sizes = " ".join(f"{name}={size}" for name, size in row["tiles"].items())
            print(f"{case.name}: {case.shape}: {row['kernel']} {sizes}: {row['unfit'] or 'fits'}", flush=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**row, "jax": jax.__version__}) + "\n")
    return tried


def _registers_and_spills(report: re.Match[str]) -> tuple[int, int]:
    return int(report["registers"]), int(report["stores"]) + int(report["loads"])


def h200() -> SingleDeviceSharding:
    """An H200 to compile for."""
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="h200", target_config=TARGET.read_text(), topology="1x1x1"
    )
    return SingleDeviceSharding(topology.devices[0])


def rows() -> Iterator[tuple[str, str, Callable[[], list[Compiled]]]]:
    """(kernels, shape, a function that compiles them) of every case."""
    sharding = h200()
    for case in cases():
        yield ", ".join(case.kernels), f"{case.name}: {case.shape}", functools.partial(compile_case, case, sharding)
    for width in (32768, 131072):
        yield "radix_select", f"index_topk: {width} keys, topk 2048", functools.partial(compile_radix_select, width)


def compile_radix_select(width: int) -> list[Compiled]:
    """The Triton kernel, compiled by Triton for sm_90a and assembled by the ptxas that XLA uses.

    Raises:
        RuntimeError: when the assembler does not report on it.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from pallas_kernels.index_topk.triton_kernels import radix_select
    from pallas_kernels.tuning import ScanTiles

    tiles = ScanTiles()
    os.environ["TRITON_CACHE_DIR"] = DUMP  # jax-triton empties it
    constants = {"WIDTH": width, "TOPK": 2048, "BLOCK": tiles.block}
    signature = {"ranked": "*fp32", "positions": "*i32", **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(fn=radix_select, signature=signature, constexprs=constants)
    compiled = triton.compile(
        source, target=GPUTarget("cuda", 90, 32), options={"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    )
    ptx = Path(DUMP) / "radix_select.ptx"
    ptx.write_text(compiled.asm["ptx"])
    command = [str(Path(nvidia.cu13.__path__[0]) / "bin" / "ptxas"), "-arch=sm_90a", "-v", str(ptx), "-o", os.devnull]
    report = PTXAS.search(subprocess.run(command, check=True, capture_output=True, text=True).stderr)
    if report is None:
        raise RuntimeError("no report of the assembler")
    return [Compiled("radix_select", *_registers_and_spills(report), 32 * tiles.num_warps, compiled.metadata.shared, False)]


def main(words: list[str]) -> int:
    """Prints the table, one Markdown row per kernel and shape; the number of failures decides the exit status."""
    print(f"jax {jax.__version__}, sm_90a, compiled and not run\n")
    print("| kernel | case | registers | spilled bytes | threads | shared memory | seconds to compile | temporary MiB |")
    print("|---|---|---|---|---|---|---|---|")
    failures = 0
    for kernels, shape, compile_kernels in rows():
        if not all(word in f"{kernels} {shape}" for word in words):
            continue
        start = time.monotonic()
        try:
            compiled = compile_kernels()
        except Exception as error:  # the table goes on, with the failure in it
            failures += 1
            print(f"| {kernels} | {shape} | FAILED: {str(error).splitlines()[0][:160]} | | | | | |", flush=True)
            continue
        seconds = time.monotonic() - start
        for row in compiled:
            failures += row.spilled_bytes > 0 or row.is_serialized
            name = f"{row.kernel} SERIALIZED" if row.is_serialized else row.kernel
            spilled = f"{row.spilled_bytes} SPILLED" if row.spilled_bytes else "0"
            numbers = f"{row.registers} | {spilled} | {row.threads} | {row.shared_bytes} | {seconds:.1f}"
            numbers += " | " if row.temporary_bytes is None else f" | {row.temporary_bytes / 2**20:.1f}"
            print(f"| {name} | {shape} | {numbers} |", flush=True)
    print(
        f"\n{failures} failures" if failures else "\nall kernels compile without a spill, and none has its matmuls serialized"
    )
    return 1 if failures else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="only cases whose kernels or name contain all of them")
    parser.add_argument("--candidates", type=Path, help="compile other block sizes instead; append results to this file")
    parser.add_argument("--limit", type=int, default=24, help="candidates of each kernel")
    given = parser.parse_args()
    if given.candidates is not None:
        print(f"{write_candidates(given.candidates, given.words, given.limit)} tried: {given.candidates}")
        sys.exit(0)
    sys.exit(main(given.words))
