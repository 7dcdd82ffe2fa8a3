"""Trackers behind the metrics log: TensorBoard, Weights & Biases and Trackio, none of which can stop or slow a run."""

import logging
import queue
import secrets
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from dsa_jax.config import STAGES, Config, to_dict
from dsa_jax.extras import import_extra
from dsa_jax.foreign import printable
from dsa_jax.run.files import RunError, read_object, write_object

_LOG = logging.getLogger(__name__)
_MOST_WAITING = 10_000
_CLOSING_SECONDS = 30.0
TRACKED_FILE = "trackers.json"
"""In the run directory: the name under which a resumed run continues the same tracked run."""


class Sink(Protocol):
    """An open tracked run."""

    def write(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Add the values of one step of a stage."""

    def close(self) -> None:
        """Deliver what is left."""


class TrackedRun(NamedTuple):
    """What a tracker knows of a run: its directory, its id for all its processes, its config."""

    directory: Path
    id: str
    config: Config

    @property
    def name(self) -> str:
        """The name shown, which the id makes unique."""
        return f"{self.config.name}-{self.id}"


class Tracker:
    """A sink in a thread of its own: what it does wrong is said once, and the run goes on without it.

    Entries wait in a queue; where it is full, they are left out.
    """

    def __init__(self, name: str, connect: Callable[[], Sink], *, closing_seconds: float | int = _CLOSING_SECONDS) -> None:
        """`connect` opens the sink, in the thread, before its first entry; `closing_seconds` bounds the wait in `close`."""
        self._name, self._connect, self._closing_seconds = name, connect, closing_seconds
        self._queue: queue.Queue[tuple[str, int, dict[str, float]] | None] = queue.Queue(_MOST_WAITING)
        self._thread: threading.Thread | None = None
        self._has_failed = self._has_warned = False

    def write(self, stage: str, step: int, values: Mapping[str, Any]) -> None:
        """Hand over one step; returns at once."""
        if self._has_failed:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._deliver, name=f"tracker {self._name}", daemon=True)
            self._thread.start()
        try:
            self._queue.put_nowait((stage, step, {name: float(value) for name, value in values.items()}))
        except queue.Full:
            self._warn("it takes entries more slowly than the run makes them, and some are left out")

    def close(self) -> None:
        """Wait a while for what is still to be delivered; a later `write` connects again."""
        thread, self._thread = self._thread, None
        if thread is None or not thread.is_alive():
            return
        try:
            self._queue.put(None, timeout=self._closing_seconds)
            thread.join(self._closing_seconds)
        except queue.Full:
            pass
        if thread.is_alive():
            self._has_failed = True
            self._warn(f"it has not taken all entries {self._closing_seconds:g} s after the last")

    def _deliver(self) -> None:
        try:
            sink = self._connect()
            for entry in iter(self._queue.get, None):
                sink.write(*entry)
            sink.close()
        # Whatever a tracker raises, SystemExit of a failed login among it, is no reason to stop.
        except BaseException as error:
            self._has_failed = True
            self._warn(f"{type(error).__name__}: {printable(error)}")

    def _warn(self, reason: str) -> None:
        if not self._has_warned:
            self._has_warned = True
            _LOG.warning("the tracker %s is left behind, the run goes on: %s", self._name, reason)


class EventFiles:
    """TensorBoard events, one folder per stage, each with its own step count."""

    def __init__(self, tensorboard: Any, run: TrackedRun) -> None:
        """`tensorboard` is the package tensorboardX."""
        self._tensorboard, self._directory = tensorboard, run.directory / "tensorboard"
        self._writers: dict[str, Any] = {}

    def write(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Add scalars. The first of a stage hides later steps that an interrupted run had written."""
        if stage not in self._writers:
            self._writers[stage] = self._tensorboard.SummaryWriter(str(self._directory / stage), purge_step=step)
        for name, value in values.items():
            self._writers[stage].add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close."""
        for writer in self._writers.values():
            writer.close()


class WandbRun:
    """A run of Weights & Biases, where every stage has a step of its own; WANDB_MODE, WANDB_ENTITY and the like apply."""

    def __init__(self, wandb: Any, run: TrackedRun) -> None:
        """Resume the run of this id, or make it; `wandb` is the package."""
        self._run = wandb.init(
            project=run.config.train.tracker_project,
            id=run.id,
            name=run.name,
            dir=str(run.directory),
            config=to_dict(run.config),
            resume="allow",
            reinit="create_new",
            # A question on the terminal would wait for an answer, and captured output would lose the progress line.
            settings=wandb.Settings(console="off", login_timeout=1, finish_timeout=_CLOSING_SECONDS),
        )
        for stage in STAGES:
            self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")

    def write(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Add one entry; its own count of entries is left to the package, since a resumed run takes some steps again."""
        self._run.log(_with_step(stage, step, values))

    def close(self) -> None:
        """Upload what is left."""
        self._run.finish()


class TrackioRun:
    """A run of Trackio, on this machine or, with TRACKIO_SPACE_ID, in a Space; steps count through all stages."""

    def __init__(self, trackio: Any, run: TrackedRun) -> None:
        """Resume the run of this name, or make it; `trackio` is the package."""
        train = run.config.train
        most = {"warmup": train.gate_extend_max if train.gate == "extend" else 0}
        steps = [getattr(train, stage).n_steps + most.get(stage, 0) for stage in STAGES]
        self._before = {stage: sum(steps[:place]) for place, stage in enumerate(STAGES)}
        config = to_dict(run.config)
        self._run = trackio.init(project=run.config.train.tracker_project, name=run.name, config=config, resume="allow")

    def write(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Add one entry."""
        self._run.log(_with_step(stage, step, values), step=self._before[stage] + step)

    def close(self) -> None:
        """Write what is left."""
        self._run.finish()


class _Kind(NamedTuple):
    package: str
    sink: Callable[[Any, TrackedRun], Sink]


_KINDS: dict[str, _Kind] = {
    "tensorboard": _Kind("tensorboardX", EventFiles),
    "wandb": _Kind("wandb", WandbRun),
    "trackio": _Kind("trackio", TrackioRun),
}


def require_trackers(config: Config) -> None:
    """Check that the packages of `train.trackers` are installed.

    Raises:
        MissingExtraError: naming the first that is missing, and the command that installs it.
    """
    for name in config.train.trackers:
        _package(name)


def open_trackers(directory: Path, config: Config) -> list[Tracker]:
    """The trackers of `train.trackers` for the run in `directory`; nothing is sent before their first entry.

    Raises:
        MissingExtraError: where a package is not installed.
    """
    if not config.train.trackers:
        return []
    run = TrackedRun(directory, _tracked_id(directory / TRACKED_FILE), config)
    packages = {name: _package(name) for name in config.train.trackers}

    def connect(name: str) -> Callable[[], Sink]:
        return lambda: _KINDS[name].sink(packages[name], run)

    return [Tracker(name, connect(name)) for name in packages]


def _package(name: str) -> Any:
    return import_extra(_KINDS[name].package, extra=name, purpose=f"the tracker {name} of train.trackers")


def _tracked_id(path: Path) -> str:
    """The id that the file holds; where there is none, a new one that it holds from now on."""
    if path.exists():
        try:
            found = read_object(path).get("id")
            if isinstance(found, str) and found.isalnum() and len(found) <= 64:
                return found
            _LOG.warning("%s holds no id: a new tracked run begins", path)
        except RunError as error:
            _LOG.warning("%s A new tracked run begins.", error)
    made = secrets.token_hex(4)
    write_object(path, {"id": made})
    return made


def _with_step(stage: str, step: int, values: Mapping[str, float]) -> dict[str, int | float]:
    return {f"{stage}/step": step} | {f"{stage}/{name}": value for name, value in values.items()}
