"""Checks every GPU kernel on the GPU at hand, then times it. Results are on disk after every item.

python -m dsa_jax.benchmarks.gpu_check --output=experiments/results/gpu_check.json
python -m dsa_jax.benchmarks.gpu_check --table=experiments/results/gpu_check.json
python -m dsa_jax.benchmarks.gpu_check --dry_run --output=FILE     # on CPU, tiny sizes, kernels interpreted

Items run in a process of their own; one that crashes, or overruns, takes down that process, and the rest go on in a new one.
"""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dsa_jax.benchmarks.op_calls import IMPLEMENTATIONS
from dsa_jax.benchmarks.op_shapes import OPS, SHAPES
from dsa_jax.benchmarks.ops import Item, perform
from dsa_jax.benchmarks.worker import NoGpuError, Worker
from dsa_jax.run.directory import atomic_write_text

OUTPUT, DRY_OUTPUT = Path("experiments/results/gpu_check.json"), Path("runs/gpu_check_dry_run.json")
TOTAL_SECONDS = 415.0
ITEM_SECONDS = 60.0
# The shapes of a run without --all: one or two of each op.
_ATTENTION = ("128_heads", "32_heads_8_groups")
MAIN_SHAPES: dict[str, tuple[str, ...]] = {
    "index_scores": ("prefill_32k", "prefill_32k_fp8", "decode_128k_fp8"),
    "index_topk": ("prefill_128k", "decode_128k"),
    "sparse_attention": _ATTENTION,
    "sparse_attention_backward": _ATTENTION,
    "decode": ("batch_1", "batch_32"),
    "decode_fp8": ("batch_1", "batch_32"),
    "dense_attention": ("decode_128k",),
    "indexer_kl_selected": ("128_heads",),
    "indexer_kl_visible": ("128_heads",),
}


def items(*, dry_run: bool, words: Sequence[str] = (), every_shape: bool = False) -> list[Item]:
    """All checks, the reduced ones first, then all timings.

    XLA, which the CPU tests check, is checked at one reduced shape of each op, as a GPU may multiply in other precisions.

    Args:
        dry_run: one tiny shape per op, Pallas only.
        words: keeps the ops that contain one of them; none keeps all.
        every_shape: all of `SHAPES` rather than `MAIN_SHAPES`.
    """

    def of(kind: str) -> Iterator[Item]:
        for op in OPS:
            if words and not any(word in op for word in words):
                continue
            shapes = [name for name in SHAPES[op] if (name == "laptop" if dry_run else name != "laptop")]
            shapes = [name for name in shapes if dry_run or every_shape or name in MAIN_SHAPES[op]]
            for shape, name in itertools.product(shapes, IMPLEMENTATIONS[op]):
                is_wanted = kind == "time" or name != "xla" or (kind == "check_reduced" and shape == MAIN_SHAPES[op][0])
                if name != "reference" and is_wanted and not (dry_run and name in ("xla", "triton", "mosaic")):
                    yield Item(kind, op, shape, name, small=dry_run)

    kinds = ("check_reduced", "check_real", "time")
    return [item for kind in kinds for item in of(kind)]


def run(
    output: Path,
    *,
    dry_run: bool = False,
    words: Sequence[str] = (),
    every_shape: bool = False,
    total_seconds: float = TOTAL_SECONDS,
) -> int:
    """Does the `items` and keeps `output` up to date; 1 if any failed or was not reached, else 0.

    An op whose check failed at a shape, with an implementation, is not timed there.

    Raises:
        NoGpuError: no GPU that JAX can use, and no `dry_run`; nothing is written.
        RuntimeError: no process to work in could be started; `output` says why.
    """
    started = time.monotonic()
    record: dict[str, Any] = {"dry_run": dry_run, "environment": None, "items": []}
    try:
        worker = Worker(perform, on_cpu=dry_run)
    except NoGpuError:
        raise
    except RuntimeError as error:
        _write(output, {**record, "failed": str(error)})
        raise
    record["environment"] = worker.environment
    todo = items(dry_run=dry_run, words=words, every_shape=every_shape)
    wrong: set[Item] = set()
    try:
        for number, item in enumerate(todo, 1):
            began = time.monotonic()
            if item._replace(kind="") in wrong:
                result = {"status": "left out", "reason": "a check of it failed"}
            elif began - started >= total_seconds:
                result = {"status": "not reached", "reason": f"{total_seconds:.0f} s were over"}
            else:
                result = worker.do(item, ITEM_SECONDS)
            if result["status"] == "failed" and item.kind != "time":
                wrong.add(item._replace(kind=""))
            name = {"kind": item.kind, "op": item.op, "shape": item.shape, "implementation": item.implementation}
            entry = {**name, **result, "wall_seconds": time.monotonic() - began}
            record["items"].append(entry)
            _write(output, record)
            note = result.get("reason", "")
            print(f"{number}/{len(todo)} {' '.join(name.values())}: {result['status']} {note}".rstrip(), flush=True)
    finally:
        worker.stop()
    bad = [entry for entry in record["items"] if entry["status"] in ("failed", "not reached")]
    record["finished"] = True
    _write(output, record)
    print(f"{len(todo) - len(bad)} of {len(todo)} done, {len(bad)} failed or not reached: {output}")
    return 1 if bad else 0


def _write(output: Path, record: dict[str, Any]) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(output, json.dumps(record, indent=1) + "\n")


def table(record: dict[str, Any]) -> str:
    """The Markdown of a result file: what failed, then the timings."""
    if "failed" in record:
        return f"Nothing was checked: {record['failed']}"
    entries, where = record["items"], record["environment"]
    checks = [entry for entry in entries if entry["kind"].startswith("check")]
    passed = sum(entry["status"] == "passed" for entry in checks)
    kind = "Dry run on CPU, no measurement of a GPU" if record["dry_run"] else where["device"]["kind"]
    lines = [f"{kind}, jax {where['versions']['jax']}: {passed} of {len(checks)} checks passed.", ""]
    if not record.get("finished"):
        lines[0] += " The run was cut off."
    for entry in entries:
        if entry["status"] not in ("passed", "timed"):
            name = f"{entry['kind']} {entry['op']}, {entry['shape']}, {entry['implementation']}"
            lines.append(f"- {name}: {entry['status']}, {entry['reason']}")
    lines += [
        "",
        "| op | shape | implementation | ms | p10 | p90 | TFLOP/s | TB/s | share of floor | timing |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in (entry["row"] for entry in entries if entry["status"] == "timed"):
        times = " | ".join(f"{row[name] * 1e3:.3f}" for name in ("seconds", "p10", "p90"))
        share = "" if row["share_of_floor"] is None else f"{row['share_of_floor']:.0%}"
        lines.append(
            f"| {row['op']} | {row['shape']} | {row['implementation']} | {times} | {row['tflops_per_second']:.1f} | "
            f"{row['terabytes_per_second']:.2f} | {share} | {row['timing']} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help=f"default: {OUTPUT}, with --dry_run {DRY_OUTPUT}")
    parser.add_argument("--dry_run", action="store_true", help="on CPU, at tiny sizes, kernels interpreted")
    parser.add_argument("--only", default="", help="words, with commas: only ops that contain one")
    parser.add_argument("--all", action="store_true", help="every shape; give it more --seconds")
    parser.add_argument("--seconds", type=float, default=TOTAL_SECONDS, help="no item starts later than this")
    parser.add_argument("--table", type=Path, help="print the Markdown of a result file, and do nothing else")
    given = parser.parse_args(arguments)
    if given.table:
        try:
            content = json.loads(given.table.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            parser.error(f"--table={given.table} cannot be read: {error}")
        print(table(content))
        return 0
    output = given.output or (DRY_OUTPUT if given.dry_run else OUTPUT)
    try:
        words = [word for word in given.only.split(",") if word]
        options = {"dry_run": given.dry_run, "every_shape": given.all, "total_seconds": given.seconds}
        return run(output, words=words, **options)
    except NoGpuError as error:
        print(f"error: {error} Or pass --dry_run to go through everything on CPU at tiny sizes.", file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
