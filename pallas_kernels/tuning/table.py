"""The table of measured block sizes: read whole and checked, looked up by nearest shape, written in one piece."""

import dataclasses
import functools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pallas_kernels.tuning.kernels import KERNELS, Shape, misfit, shape_of
from pallas_kernels.tuning.tiles import AnyTiles

TABLE = Path(__file__).with_name("table.json")
"""The table that kernels look into."""

FARTHEST = 4
"""An entry serves calls of which no size is more than so many times larger or smaller than its own."""

MEASURED = {"seconds": float, "default_seconds": float, "command": str, "versions": dict}
"""Required fields on the run that measured an entry, with the type of each."""


class TuningError(ValueError):
    """An invalid tuning table; the message names the entry, the expectation and the remedy."""


class Entry(NamedTuple):
    """Tiles that were measured on `device` (as JAX calls it) for calls of `kernel` like `shape`; `measured` says by what."""

    kernel: str
    device: str
    shape: Shape
    tiles: AnyTiles
    measured: Mapping[str, Any]

    @property
    def key(self) -> tuple[Any, ...]:
        """Unique among the entries of a table."""
        return self.kernel, self.device, tuple(sorted(self.shape.items()))


def read(path: Path = TABLE) -> list[Entry]:
    """All entries of the table at `path`.

    Raises:
        TuningError: no JSON, an unknown kernel, a missing, unknown or wrong field, tiles that cannot run, an entry twice.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise TuningError(f"{path} is no JSON: {error}. Restore it, or write it anew with experiments.tune.") from error
    if not isinstance(content, dict) or content.keys() != {"entries"} or not isinstance(content["entries"], list):
        raise TuningError(f'{path}: expected {{"entries": [...]}}. Restore it, or write it anew with experiments.tune.')
    entries: dict[tuple[Any, ...], Entry] = {}
    for number, fields in enumerate(content["entries"]):
        try:
            entry = _parse(fields)
            if entry.key in entries:
                raise TuningError(f"kernel {entry.kernel!r} has this device and shape twice; expected once")
        except TuningError as error:
            raise TuningError(f"{path}, entry {number}: {error}. Correct or remove it.") from None
        entries[entry.key] = entry
    return list(entries.values())


def _parse(fields: Any) -> Entry:
    _check_fields("entry", fields, {"kernel": str, "device": str, "shape": dict, "tiles": dict, "measured": dict})
    kernel, shape, sizes = fields["kernel"], fields["shape"], fields["tiles"]
    if kernel not in KERNELS:
        raise TuningError(f"kernel is {kernel!r}; expected one of {', '.join(KERNELS)}")
    spec = KERNELS[kernel]
    kinds = {"dtype": str, "shared": bool}
    _check_fields("shape", shape, {name: kinds.get(name, int) for name in (*spec.exact, *spec.sizes)})
    smaller = [name for name in spec.sizes if shape[name] < 1]
    if smaller:
        raise TuningError(f"{smaller[0]} of shape is {shape[smaller[0]]}; expected at least 1")
    _check_fields("tiles", sizes, {field.name: int for field in dataclasses.fields(spec.tiles)})
    _check_fields("measured", fields["measured"], MEASURED, others=True)
    try:
        tiles = spec.tiles(**sizes)
    except ValueError as error:
        raise TuningError(str(error).rstrip(".")) from None
    if reason := misfit(kernel, tiles, shape):
        raise TuningError(f"tiles do not fit: {reason}")
    return Entry(kernel, fields["device"], shape_of(kernel, shape), tiles, fields["measured"])


def _check_fields(what: str, given: Any, kinds: Mapping[str, type], *, others: bool = False) -> None:
    if not isinstance(given, dict):
        raise TuningError(f"{what} is {given!r}; expected an object")
    missing, unknown = [name for name in kinds if name not in given], [name for name in given if name not in kinds]
    if missing or (unknown and not others):
        problem = f"lacks {missing[0]!r}" if missing else f"has the unknown field {unknown[0]!r}"
        raise TuningError(f"{what} {problem}; expected {', '.join(kinds)}")
    for name, kind in kinds.items():
        if type(given[name]) is not kind:
            raise TuningError(f"{name} of {what} is {given[name]!r}; expected {kind.__name__}")


def write(path: Path, entries: Iterable[Entry]) -> None:
    """Replaces the table at `path` in one step: whoever reads it sees the old one or the new one."""
    content = {"entries": [{**entry._asdict(), "tiles": dataclasses.asdict(entry.tiles)} for entry in entries]}
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)


def merge(old: Sequence[Entry], new: Sequence[Entry]) -> list[Entry]:
    """Both, sorted; of two for one kernel, device and shape the new one."""
    entries = {entry.key: entry for entry in (*old, *new)}
    return [entries[key] for key in sorted(entries, key=repr)]


def nearest(entries: Iterable[Entry], kernel: str, device: str, shape: Shape) -> Entry | None:
    """The entry that a call of `kernel` on `device` takes its tiles from; None: it takes its own default.

    It is of the same kernel and device, and what decides whether tiles fit (dtype, heads, channels) is exactly the call's.
    Sizes may differ, each by a factor of `FARTHEST` at most; nearest is the smallest sum of their ratios' logarithms, the
    first of several.
    """
    spec = KERNELS[kernel]

    def distance(entry: Entry) -> float:
        ratios = [abs(math.log2(int(entry.shape[name]) / max(1, int(shape[name])))) for name in spec.sizes]
        return sum(ratios) if max(ratios) <= math.log2(FARTHEST) else math.inf

    same = [x for x in entries if (x.kernel, x.device) == (kernel, device) and all(x.shape[n] == shape[n] for n in spec.exact)]
    best = min(same, key=distance, default=None)
    return None if best is None or distance(best) == math.inf else best


@functools.cache
def installed() -> tuple[Entry, ...]:
    """The entries of `TABLE`, read once in a process."""
    return tuple(read(TABLE))
