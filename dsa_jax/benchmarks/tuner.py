"""Finds faster block sizes for the kernels of an op on the GPU at hand: each candidate is checked, then timed.

Kernels are tuned one after the other, the others at the best found so far; the whole op is timed. Candidates run in another
process (`worker`): one that does not compile, runs out of memory, crashes or hangs is skipped with its reason.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dsa_jax.benchmarks.op_calls import IMPLEMENTATIONS
from dsa_jax.benchmarks.op_shapes import SHAPES
from dsa_jax.benchmarks.ops import Item, perform, require_known
from dsa_jax.benchmarks.worker import Worker
from pallas_kernels import tuning
from pallas_kernels.tuning import AnyTiles, Entry

TRIAL_SECONDS = 120.0


class Log:
    """Trials done so far, one JSON object a line; those of the same device and versions are not repeated."""

    def __init__(self, path: Path, environment: Mapping[str, Any]) -> None:
        self._path, self._where = path, {"device": environment["device"]["kind"], "versions": environment["versions"]}
        self._known: dict[str, dict[str, Any]] = {}
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    known = json.loads(line)
                except json.JSONDecodeError:
                    continue  # the run was cut off while it wrote this line
                self._known[json.dumps(known["trial"])] = known["result"]

    def _key(self, trial: Item) -> dict[str, Any]:
        tiles = {kernel: dataclasses.asdict(tiles) for kernel, tiles in sorted(trial.tiles)}
        return {**trial._asdict(), "tiles": tiles, "sizes": trial.sizes._asdict(), **self._where}

    def find(self, trial: Item) -> dict[str, Any] | None:
        """The result of an earlier run."""
        return self._known.get(json.dumps(self._key(trial)))

    def add(self, trial: Item, result: Mapping[str, Any]) -> None:
        """Writes a result down."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"trial": self._key(trial), "result": result}) + "\n")


def read_unfit(path: Path) -> set[tuple[str, str]]:
    """Tiles that `dsa_jax.benchmarks.aot --candidates` found not to compile, or to spill, as `unfit_key` gives them."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return {unfit_key(x["kernel"], x["shape"], x["tiles"]) for x in map(json.loads, lines) if x["unfit"]}


def unfit_key(kernel: str, shape: tuning.Shape, tiles: Mapping[str, int]) -> tuple[str, str]:
    """A kernel with all that decides whether it fits: not the number of keys, nor of queries unless they are few."""
    exact = {name: shape[name] for name in tuning.KERNELS[kernel].exact}
    is_few = "queries" in shape and tuning.has_few_queries(shape)
    return kernel, json.dumps([exact, is_few, dict(tiles)], sort_keys=True)


def run(
    op: str,
    shapes: Sequence[str],
    implementation: str,
    *,
    table: Path,
    log: Path,
    command: str,
    kernels: Sequence[str] = (),
    limit: int = 24,
    interpreted: bool = False,
    unfit: frozenset[tuple[str, str]] | set[tuple[str, str]] = frozenset(),
    seconds: float = TRIAL_SECONDS,
    task: Callable[[Item], dict[str, Any]] = perform,
    report: Callable[[str], None] = print,
) -> list[Entry]:
    """Tunes the kernels of `op` at the given shapes and writes the fastest tiles into `table`, after each shape.

    An entry is written for every kernel whose shape was tuned, also where its default was fastest; not for one where the whole
    op, with all fastest tiles, fails its check at the full shape.

    Args:
        shapes: names out of `SHAPES[op]`; with `interpreted` they stand for a tiny one.
        log: JSON Lines file of all trials; those in it are not repeated.
        command: how this was called, for the entries.
        kernels: only these; none: all that the op runs.
        limit: candidates of each kernel.
        interpreted: on CPU, tiny sizes: to go through everything, not to measure.
        unfit: candidates that are not tried, see `read_unfit`.
        seconds: that one trial may take.
        task: does the trials, in a process of its own.

    Returns:
        The new entries.

    Raises:
        ValueError: an op, shape, implementation or kernel that does not exist.
        NoGpuError: no GPU, and not `interpreted`.
        TuningError: the table that is there is wrong.
        RuntimeError: the op does not run with its default tiles.
    """
    require_known("op", [op], SHAPES)
    require_known("shape", shapes, SHAPES[op])
    with_kernels = [name for name in IMPLEMENTATIONS[op] if name not in ("reference", "xla")]
    require_known("implementation", [implementation], with_kernels)
    require_known("kernel", kernels, tuning.KERNELS)
    old = tuning.read(table) if table.exists() else []
    worker = Worker(task, on_cpu=interpreted)
    try:
        tried = Log(log, worker.environment)
        found: list[Entry] = []
        for shape in shapes:
            base = Item("check_and_time", op, shape, implementation, interpreted)
            search = _Search(worker, tried, base, limit, seconds, set(unfit), report)
            found += search.entries(kernels, worker.environment, command)
            tuning.write(table, tuning.merge(old, found))
            report(f"{op}, {shape}: {len(found)} entries in {table}")
        return found
    finally:
        worker.stop()


@dataclasses.dataclass
class _Search:
    """The search at one shape of an op."""

    worker: Worker
    log: Log
    base: Item
    limit: int
    seconds: float
    unfit: set[tuple[str, str]]
    report: Callable[[str], None]

    def _result(self, trial: Item) -> dict[str, Any]:
        known = self.log.find(trial)
        if known is None:
            known = self.worker.do(trial, self.seconds)
            self.log.add(trial, known)
        return known

    def _kernels(self, wanted: Sequence[str]) -> dict[str, list[tuple[tuning.Shape, AnyTiles]]]:
        # Cheap, and its result holds tiles: not through the log.
        result = self.worker.do(self.base._replace(kind="kernels"), self.seconds)
        if result["status"] != "found":
            raise RuntimeError(f"{self.base.op}, {self.base.shape}, {self.base.implementation}: {result['reason']}")
        calls: dict[str, list[tuple[tuning.Shape, AnyTiles]]] = {}
        for kernel, shape, default in result["kernels"]:
            calls.setdefault(kernel, []).append((shape, default))
        missing = [kernel for kernel in wanted if kernel not in calls]
        if missing:
            raise ValueError(f"kernel is {missing[0]!r}; expected one that {self.base.op} runs: {', '.join(calls)}.")
        return calls

    def _candidates(self, kernel: str, shape: tuning.Shape, default: AnyTiles) -> Iterator[AnyTiles]:
        for tiles in tuning.candidates(kernel, default, shape, limit=self.limit)[1:]:
            if unfit_key(kernel, shape, dataclasses.asdict(tiles)) in self.unfit:
                self.report(f"  {kernel} {_words(tiles)}: skipped, does not compile or spills")
            else:
                yield tiles

    def entries(self, wanted: Sequence[str], environment: Mapping[str, Any], command: str) -> list[Entry]:
        """Entries of the kernels `wanted` (none: all)."""
        calls = self._kernels(wanted)
        # All defaults are given, lest the table already has others.
        best = {kernel: shapes[0][1] for kernel, shapes in calls.items()}
        first = self._time(best)
        if first is None:
            raise RuntimeError(f"{self.base.op}, {self.base.shape}: it does not run with its default tiles; see above.")
        fastest = first
        tuned = list(wanted or calls)
        for kernel in tuned:
            shape, default = calls[kernel][0]
            for tiles in self._candidates(kernel, shape, default):
                row = self._time({**best, kernel: tiles}, kernel)
                # Clearly faster: not within the spread of what it would replace.
                if row is not None and row["seconds"] < fastest["p10"]:
                    best, fastest = {**best, kernel: tiles}, row
        result = self._result(self.base._replace(kind="check_real", tiles=tuple(sorted(best.items()))))
        if result["status"] != "passed":
            self.report(f"  no entry: the check at the full shape says {result['status']}, {result.get('reason')}")
            return []
        measured = {
            **{name: fastest[name] for name in ("op", "shape", "implementation", "seconds", "p10", "p90", "timing")},
            "default_seconds": first["seconds"],
            "command": command,
            "versions": {name: version for name, version in environment["versions"].items() if version is not None},
            "git": environment["git"],
        }
        kind = environment["device"]["kind"]
        return [Entry(kernel, kind, shape, best[kernel], measured) for kernel in tuned for shape, _ in calls[kernel]]

    def _time(self, tiles: Mapping[str, AnyTiles], kernel: str | None = None) -> dict[str, Any] | None:
        result = self._result(self.base._replace(tiles=tuple(sorted(tiles.items()))))
        what = "default" if kernel is None else f"{kernel} {_words(tiles[kernel])}"
        if result["status"] != "timed":
            self.report(f"  {what}: {result['status']}, {result['reason'].splitlines()[0][:200]}")
            return None
        self.report(f"  {what}: {result['row']['seconds'] * 1e3:.3f} ms")
        return result["row"]


def _words(tiles: AnyTiles) -> str:
    return " ".join(f"{name}={size}" for name, size in dataclasses.asdict(tiles).items())
