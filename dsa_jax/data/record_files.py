"""Documents in .parquet or .array_record files, read on demand; no file is ever held whole.

Both kinds of file have the same interface: the number of documents, and an endless shuffled order of them with random access.
Grain reads and shuffles .array_record files, and prefetches both kinds.
"""

import hashlib
import re
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int64

from dsa_jax.config import ConfigError
from dsa_jax.data.found_files import find_files
from dsa_jax.extras import import_extra

KINDS = (".array_record", ".parquet")
WINDOW_BYTES = 2**27
"""Text of the .parquet row groups that are read, and shuffled, together; two such windows are held."""

# First word of the entropy of each random order: no two orders share one.
_GROUPS, _ROWS = 1, 2


@runtime_checkable
class RecordFiles(Protocol):
    """Files of one kind as a sequence of documents."""

    files: list[Path]
    counts: list[int]  # documents of each file

    def ordered(self, seed: int) -> Any:
        """An endless `grain.MapDataset` of texts: the documents of one epoch after another, each epoch in its own order."""
        ...


def open_records(path: str, column: str) -> RecordFiles:
    """The .parquet or .array_record files that `path` names: a file, a directory with all below it, or a glob pattern.

    Metadata and the first record of every file are read. `column` holds the text in .parquet files.

    Raises:
        ConfigError: naming the file that is missing, of another kind, empty, unreadable, without the column, or not UTF-8.
        MissingExtraError: if a package that reads them is not installed, with the command that installs it.
    """
    files = _find(path)
    kinds = {file.suffix for file in files}
    if len(kinds) > 1:
        raise ConfigError(f"data.text.path is {path!r} and has both {' and '.join(KINDS)} files; expected one kind.")
    import_grain()
    return ArrayRecordFiles(files) if kinds == {".array_record"} else ParquetFiles(files, column)


def import_grain() -> Any:
    """The optional `grain` package; MissingExtraError where it is not installed."""
    return import_extra("grain", extra="data", purpose="data.text.source=grain")


def fingerprint(records: RecordFiles) -> str:
    """SHA-256 of the files' names, sizes and numbers of documents, in order; not of their content."""
    entries = [f"{file.name} {file.stat().st_size} {n}" for file, n in zip(records.files, records.counts, strict=True)]
    return hashlib.sha256("\n".join(entries).encode()).hexdigest()


def _find(path: str) -> list[Path]:
    files = find_files(path, lambda name: "" if name.endswith(KINDS) else f"{Path(name).suffix or 'suffixless'} files")
    if not files:
        raise ConfigError(f"data.text.path is {path!r}, a directory without a {' or '.join(KINDS)} file.")
    for file in files:
        if file.suffix not in KINDS:
            raise ConfigError(
                f"{file} is no {' or '.join(KINDS)} file; expected one, since data.text.source is 'grain'. Use "
                "data.text.source=memory for other files."
            )
    return files


def _require_documents(file: Path, count: int) -> int:
    if not count:
        raise ConfigError(f"{file} is empty; expected at least one record. Write it again, or remove it from the corpus.")
    return count


def _unreadable(file: Path, error: Exception) -> ConfigError:
    lines = str(error).strip().splitlines() or ["it is cut off or damaged"]
    return ConfigError(f"{file} cannot be read as {file.suffix}: {lines[0]}. Write it again, or remove it from the corpus.")


@contextmanager
def _reading(file: Path) -> Iterator[Any]:
    """A `pyarrow.parquet.ParquetFile`; a failure to read it inside becomes a ConfigError that names it."""
    parquet, pyarrow = (import_extra(name, extra="data", purpose=str(file)) for name in ("pyarrow.parquet", "pyarrow"))
    try:
        with parquet.ParquetFile(file) as opened:
            yield opened
    except (pyarrow.ArrowException, OSError) as error:
        raise _unreadable(file, error) from error


def _utf8(read: Callable[[], str], file: Path, record: int) -> str:
    try:
        return read()
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{file}, record {record} is not UTF-8: {error.reason} at byte {error.start}. Convert it, or remove the file."
        ) from error


class ArrayRecordFiles:
    """Files whose records are UTF-8 texts. A whole record group is read for one record: best written with group_size:1."""

    def __init__(self, files: list[Path]) -> None:
        sources = import_grain().sources
        self.files = files
        self.counts: list[int] = []
        for file in files:
            try:
                self.counts.append(_require_documents(file, len(sources.ArrayRecordDataSource([str(file)]))))
            except RuntimeError as error:
                raise _unreadable(file, error) from error
        self._ends = np.cumsum(self.counts)
        self._source: Any = sources.ArrayRecordDataSource([str(file) for file in files])
        for end, count in zip(self._ends.tolist(), self.counts, strict=True):
            self[end - count]

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> str:
        number = int(np.searchsorted(self._ends, index, side="right"))
        file, record = self.files[number], index - int(self._ends[number]) + self.counts[number]
        try:
            content = self._source[index]
        except RuntimeError as error:
            raise _unreadable(file, error) from error
        return _utf8(lambda: content.decode("utf-8"), file, record)

    def ordered(self, seed: int) -> Any:
        """Grain's shuffle of the whole epoch, which holds no table."""
        return import_grain().MapDataset.source(self).seed(seed % 2**32).shuffle().repeat()


class _RowGroup(NamedTuple):
    file: int
    number: int  # within the file
    first: int  # its first row, within the file
    n_rows: int
    n_bytes: int  # of the text column, uncompressed


class _Window(NamedTuple):
    """Row groups in memory, their rows concatenated."""

    groups: list[_RowGroup]
    ends: Int64[np.ndarray, " G"]
    columns: list[Any]  # the text column of each, in Arrow's memory
    order: Int64[np.ndarray, " N"]


class ParquetFiles:
    """Files with a text column; a null is an empty document.

    Only whole row groups can be read, so an epoch is shuffled in two steps: the order of the row groups, then the documents
    of as many consecutive ones as hold `window_bytes` of text (one at least).
    """

    def __init__(self, files: list[Path], column: str, *, window_bytes: int = WINDOW_BYTES) -> None:
        self.files = files
        self.counts: list[int] = []
        self._column = column
        self._window_bytes = window_bytes
        self._groups: list[_RowGroup] = []
        for number, file in enumerate(files):
            groups = self._row_groups(number, file)
            self.counts.append(_require_documents(file, sum(group.n_rows for group in groups)))
            self._groups += groups
        self._windows: OrderedDict[tuple[int, int, int], _Window] = OrderedDict()
        self._lock = threading.Lock()
        self._plan = lru_cache(maxsize=4)(self._plan_epoch)

    def __len__(self) -> int:
        return sum(self.counts)

    def ordered(self, seed: int) -> Any:
        """Shuffled within windows of a few row groups, which are drawn anew in every epoch."""
        return import_grain().MapDataset.range(sys.maxsize).map(lambda place: self.text(seed, place))

    def text(self, seed: int, place: int) -> str:
        """The document at `place` of the endless order."""
        epoch, place = divmod(place, len(self))
        _, ends = self._plan(seed, epoch)
        number = int(np.searchsorted(ends, place, side="right"))
        window = self._window(seed, epoch, number)
        row = int(window.order[place - int(ends[number]) + window.order.size])
        part = int(np.searchsorted(window.ends, row, side="right"))
        group = window.groups[part]
        inside = row - int(window.ends[part]) + group.n_rows
        return _utf8(lambda: window.columns[part][inside].as_py() or "", self.files[group.file], group.first + inside)

    def _row_groups(self, number: int, file: Path) -> list[_RowGroup]:
        groups: list[_RowGroup] = []
        with _reading(file) as opened:
            schema, metadata = opened.schema_arrow, opened.metadata
            if self._column not in schema.names:
                raise ConfigError(
                    f"{file} has no column {self._column!r} but {', '.join(schema.names)}. Name the text in data.text.column."
                )
            kind = str(schema.field(self._column).type)
            if not re.fullmatch(r"(dictionary<values=)?(string|large_string|string_view)(,.*>)?", kind):
                raise ConfigError(f"{file} has a column {self._column!r} of {kind}; expected string. See data.text.column.")
            first = 0
            for i in range(metadata.num_row_groups):
                described = metadata.row_group(i)
                columns = (described.column(j) for j in range(described.num_columns))
                n_bytes = sum(column.total_uncompressed_size for column in columns if column.path_in_schema == self._column)
                groups.append(_RowGroup(number, i, first, described.num_rows, n_bytes))
                first += described.num_rows
            for batch in opened.iter_batches(batch_size=1, columns=[self._column]):
                _utf8(batch.column(0)[0].as_py, file, 0)
                break
        return groups

    def _plan_epoch(self, seed: int, epoch: int) -> tuple[list[list[_RowGroup]], Int64[np.ndarray, " W"]]:
        """The windows of an epoch, and the end of each in the order of documents."""
        windows: list[list[_RowGroup]] = []
        n_bytes = 0
        for i in np.random.default_rng((_GROUPS, seed, epoch)).permutation(len(self._groups)).tolist():
            group = self._groups[i]
            if not windows or n_bytes + group.n_bytes > self._window_bytes:
                windows.append([])
                n_bytes = 0
            windows[-1].append(group)
            n_bytes += group.n_bytes
        return windows, np.cumsum([sum(group.n_rows for group in window) for window in windows])

    def _window(self, seed: int, epoch: int, number: int) -> _Window:
        key = (seed, epoch, number)
        # Held while reading: other threads most likely want the same window, or the one that would be evicted.
        with self._lock:
            if key not in self._windows:
                while len(self._windows) > 1:
                    self._windows.popitem(last=False)
                self._windows[key] = self._read_window(key)
            self._windows.move_to_end(key)
            return self._windows[key]

    def _read_window(self, key: tuple[int, int, int]) -> _Window:
        seed, epoch, number = key
        groups = self._plan(seed, epoch)[0][number]
        columns = []
        for group in groups:
            file = self.files[group.file]
            with _reading(file) as opened:
                columns.append(opened.read_row_group(group.number, columns=[self._column]).column(0))
        ends = np.cumsum([group.n_rows for group in groups])
        return _Window(groups, ends, columns, np.random.default_rng((_ROWS, *key)).permutation(int(ends[-1])))
