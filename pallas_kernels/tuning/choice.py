"""The block sizes of one call: those under trial, else the table's, else the kernel's default."""

import contextlib
import contextvars
from collections.abc import Iterator, Mapping
from typing import NamedTuple, TypeVar

from absl import logging

from pallas_kernels.common.dispatch import traced_device_kind
from pallas_kernels.tuning import table
from pallas_kernels.tuning.kernels import KERNELS, Shape, shape_of
from pallas_kernels.tuning.tiles import AnyTiles

T = TypeVar("T", bound=AnyTiles)


class Choice(NamedTuple):
    """The tiles of a traced kernel; `source` is "default", "table" or "trial", `default` the tiles of the rule alone."""

    kernel: str
    shape: Shape
    tiles: AnyTiles
    source: str
    default: AnyTiles


_trial: contextvars.ContextVar[Mapping[str, AnyTiles] | None] = contextvars.ContextVar("trial", default=None)
_record: contextvars.ContextVar[list[Choice] | None] = contextvars.ContextVar("record", default=None)
_logged: set[tuple[str, AnyTiles]] = set()


def choose(kernel: str, shape: Shape, default: T) -> T:
    """Tiles for a call of `kernel`: of the table's nearest entry for the device that is traced for (`table.nearest`), else
    `default`.

    Args:
        shape: at least what `KERNELS[kernel]` names.

    Raises:
        TuningError: the table is wrong; or tiles of another kind are under trial.
    """
    own = shape_of(kernel, shape)
    tiles, source = (_trial.get() or {}).get(kernel), "trial"
    if tiles is None:
        entry = table.nearest(table.installed(), kernel, traced_device_kind(), own)
        tiles, source = (default, "default") if entry is None else (entry.tiles, "table")
    if not isinstance(tiles, type(default)):
        raise table.TuningError(f"{kernel} got {tiles}; expected {KERNELS[kernel].tiles.__name__}.")
    if source == "table" and (kernel, tiles) not in _logged:
        _logged.add((kernel, tiles))
        logging.info("%s runs with tuned %s", kernel, tiles)
    record = _record.get()
    choice = Choice(kernel, own, tiles, source, default)
    if record is not None and choice not in record:
        record.append(choice)
    return tiles


@contextlib.contextmanager
def trial(tiles: Mapping[str, AnyTiles]) -> Iterator[None]:
    """Kernels that are traced inside take these tiles, by kernel, whatever the table says. A compiled program keeps its own."""
    token = _trial.set(tiles)
    try:
        yield
    finally:
        _trial.reset(token)


@contextlib.contextmanager
def recorded() -> Iterator[list[Choice]]:
    """Collects the distinct choices of what is traced inside."""
    choices: list[Choice] = []
    outer, token = _record.get(), _record.set(choices)
    try:
        yield choices
    finally:
        _record.reset(token)
        if outer is not None:
            outer.extend(x for x in choices if x not in outer)
