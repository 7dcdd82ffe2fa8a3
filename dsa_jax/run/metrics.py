"""The metrics of a run: one JSON object per logged step, the same bytes whether or not the run was interrupted."""

import functools
import json
import logging
import math
import numbers
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from dsa_jax.run.files import RunError, atomic_write_text, open_regular, read_regular
from dsa_jax.run.trackers import Tracker

_LOG = logging.getLogger(__name__)
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class MetricsLog:
    """Appends to `metrics.jsonl`, and to `timing.jsonl` and `evaluations.jsonl` beside it.

    A line is `{"stage": ..., "step": ..., <name>: <number>, ...}`. Floats are written so that reading gives the same float64;
    NaN and infinities, which JSON lacks, as the strings "NaN", "Infinity" and "-Infinity". Metrics hold only values that the
    run determines; wall times go to the timing file, so that a resumed and an uninterrupted run write the same bytes. A last
    line cut off by a crash is dropped when the log is opened.
    """

    def __init__(self, path: str | os.PathLike[str] | None, *, trackers: Sequence[Tracker] = ()) -> None:
        """Open for appending; `trackers` get the same steps and evaluations.

        Without a path nothing is logged: for processes beside the one that writes the run's files.

        Raises:
            RunError: when the file cannot be written or holds a damaged line.
        """
        self.path = None if path is None else Path(path)
        self.timing_path = self.path and self.path.with_name("timing.jsonl")
        self.evaluations_path = self.path and self.path.with_name("evaluations.jsonl")
        self._files: dict[Path, BinaryIO] = {}
        self._last: dict[Path, tuple[str, int]] = {}
        self._trackers = tuple(trackers)
        self.n_steps = 0  # that metrics.jsonl holds, of all stages
        if self.timing_path:
            _drop_damaged(self.timing_path)
        self._drop(lambda file, entry: False)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def log(self, stage: str, step: int, values: Mapping[str, Any]) -> None:
        """Append one step. Values are numbers, or arrays holding one.

        Raises:
            ValueError: when the step does not come after the last one of its stage, or a value is no number.
            RunError: when the line cannot be written.
        """
        self._append(self.path, stage, step, values)
        self.n_steps += 1
        self._track(stage, step, values)

    def log_timing(self, stage: str, step: int, values: Mapping[str, Any]) -> None:
        """Append one step's seconds, rates and the like; raises as `log` does."""
        self._append(self.timing_path, stage, step, values)

    def log_evaluation(self, stage: str, step: int, values: Mapping[str, Any]) -> None:
        """Append what held-out rows said after a step; raises as `log` does."""
        self._append(self.evaluations_path, stage, step, values)
        self._track(stage, step, {f"held_out/{name}": value for name, value in values.items()})

    def has_evaluation(self, stage: str, step: int) -> bool:
        """Whether the last logged evaluation is of this step; never where nothing is logged."""
        return self.evaluations_path is not None and self._last.get(self.evaluations_path) == (stage, step)

    def truncate_after(self, stage_order: Sequence[str], stage: str, step: int) -> None:
        """Drop every entry that comes after `step` of `stage`. Call it when a run resumes.

        The rewritten file replaces the old one atomically.

        Raises:
            RunError: for an entry of a stage that is not in `stage_order`.
        """
        last = (stage_order.index(stage), step)

        def comes_later(file: Path, entry: Mapping[str, Any]) -> bool:
            if entry["stage"] not in stage_order and file == self.timing_path:
                return True
            if entry["stage"] not in stage_order:
                raise RunError(f"{file} has an entry of stage {entry['stage']!r}; expected one of {', '.join(stage_order)}.")
            return (stage_order.index(entry["stage"]), entry["step"]) > last

        self._close_files()
        self._drop(comes_later)

    def sync(self) -> None:
        """Force what was logged to the disk; call it before a checkpoint that counts on it.

        Raises:
            RunError: when the file system refuses.
        """
        for path, file in self._files.items():
            try:
                os.fsync(file.fileno())
            except OSError as error:
                raise _refused(path, error) from error

    def close(self) -> None:
        """Close the files and the trackers; the next `log` opens them again."""
        self._close_files()
        for tracker in self._trackers:
            tracker.close()

    def _close_files(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _track(self, stage: str, step: int, values: Mapping[str, Any]) -> None:
        for tracker in self._trackers:
            tracker.write(stage, step, values)

    def _append(self, path: Path | None, stage: str, step: int, values: Mapping[str, Any]) -> None:
        if path is None:
            return
        last_stage, last_step = self._last.get(path, ("", -1))
        if stage == last_stage and step <= last_step:
            raise ValueError(f"step {step} of {stage} is logged after step {last_step}; call truncate_after when resuming.")
        entry = {"stage": stage, "step": step} | {name: _encode(name, value) for name, value in values.items()}
        line = memoryview(json.dumps(entry).encode() + b"\n")
        try:
            if path not in self._files:
                # Unbuffered: on a full disk, closing a buffer would try to write it again.
                descriptor = open_regular(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
                self._files[path] = open(descriptor, "ab", buffering=0)  # noqa: SIM115
            # One write per line, except on a full disk: a reader, or a crash, sees whole lines or a torn last one.
            while line:
                line = line[self._files[path].write(line) :]
        except OSError as error:
            raise _refused(path, error) from error
        self._last[path] = (stage, step)

    def _drop(self, unwanted: Callable[[Path, Mapping[str, Any]], bool]) -> None:
        for file in filter(None, (self.path, self.timing_path, self.evaluations_path)):
            _drop_lines(file, functools.partial(unwanted, file))
            entries = _read(file)
            self._last.pop(file, None)
            if entries:
                self._last[file] = (entries[-1]["stage"], entries[-1]["step"])
            if file == self.path:
                self.n_steps = len(entries)


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The entries of a metrics file in order, NaN and infinities as floats; a torn last line is left out.

    Returns:
        An empty list when the file does not exist.

    Raises:
        RunError: for a damaged line that is not the last, naming the line.
    """
    return [
        {name: value if name == "stage" else _NOT_FINITE.get(value, value) for name, value in entry.items()}
        for entry in _read(Path(path))
    ]


def _refused(path: Path, error: OSError) -> RunError:
    return RunError(f"cannot write {path}: {error.strerror or error}. Free space, then run the same command again.")


def _encode(name: str, value: Any) -> int | float | str:
    number = value.item() if hasattr(value, "item") and getattr(value, "size", 1) == 1 else value
    if isinstance(number, bool) or not isinstance(number, numbers.Real):
        raise ValueError(f"metric {name} is {value!r}; expected a number.")
    if isinstance(number, numbers.Integral):
        return int(number)
    number = float(number)
    if math.isfinite(number):
        return number
    return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"


def _lines(path: Path) -> list[str]:
    """Complete lines, each with its newline; text after the last newline is torn."""
    text = _content(path)
    return text[: text.rfind(b"\n") + 1].decode("utf-8", errors="replace").splitlines(keepends=True)


def _content(path: Path) -> bytes:
    """The bytes of a file; none where there is no file."""
    if not os.path.lexists(path):
        return b""
    try:
        return read_regular(path)
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror or error}. Restore it, or choose another --workdir.") from error


def _read(path: Path) -> list[dict[str, Any]]:
    entries = []
    for number, line in enumerate(_lines(path), start=1):
        try:
            entries.append(_entry(line))
        except ValueError as error:
            raise RunError(
                f"{path}, line {number} is damaged ({error}). Remove the line, or choose another --workdir."
            ) from error
    return entries


def _entry(line: str) -> dict[str, Any]:
    """A line as an object with a stage, a step and numbers; ValueError where it is something else."""
    try:
        entry = json.loads(line)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if not isinstance(entry, dict) or not isinstance(entry.get("stage"), str) or type(entry.get("step")) is not int:
        raise ValueError("it is no object with a stage and a step")
    for name, value in entry.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if name != "stage" and not is_number and not (isinstance(value, str) and value in _NOT_FINITE):
            raise ValueError(f"{name} is no number")
    return entry


def _drop_lines(path: Path, unwanted: Any) -> None:
    """Rewrite without the unwanted entries and the torn last line; leave the file alone when there is nothing to drop."""
    kept = "".join(line for line, entry in zip(_lines(path), _read(path), strict=True) if not unwanted(entry))
    if kept.encode() != _content(path):
        atomic_write_text(path, kept)


def _drop_damaged(path: Path) -> None:
    """Rewrite without damaged lines, which a warning counts: what the clock said decides nothing."""
    lines = _lines(path)
    whole = [line for line in lines if _is_entry(line)]
    if len(whole) < len(lines):
        _LOG.warning("%s: %d damaged lines are left out", path, len(lines) - len(whole))
        atomic_write_text(path, "".join(whole))


def _is_entry(line: str) -> bool:
    try:
        return bool(_entry(line))
    except ValueError:
        return False
