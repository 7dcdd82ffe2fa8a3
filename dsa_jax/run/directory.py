"""The run directory: who owns it, what it holds, and files that are either whole or absent."""

import dataclasses
import fcntl
import json
import logging
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from dsa_jax.config import Config, ConfigError, from_dict, to_dict
from dsa_jax.config.fields import flatten

_LOG = logging.getLogger(__name__)
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
_MOST_DIFFERENCES_SHOWN = 12
_SECTIONS = {"model", "data", "train", "eval"}  # every version of a run's config.json has them
_FILLED_IN = ("implementations", "source")  # of environment.json, once they are known
_LEFTOVER = re.compile(r"\..+\.\d+\.tmp")  # what `atomic_write_text` leaves where its process is killed
_WITHOUT_EFFECT = re.compile(
    r"parallel\..*|train\.(nan_policy|max_skipped_steps|keep_checkpoints|\w+\.(log_every|checkpoint_every))"
)


class RunError(RuntimeError):
    """A run cannot start or go on: the message says why and what to do. Commands print it as one line, without traceback."""


@dataclasses.dataclass(frozen=True)
class RunDirectory:
    """Where the files of one run lie. `resumed` tells whether the directory held the run already."""

    path: Path
    resumed: bool

    @property
    def config_path(self) -> Path:
        """The resolved config."""
        return self.path / "config.json"

    @property
    def environment_path(self) -> Path:
        """Versions, device, git revision, implementations chosen."""
        return self.path / "environment.json"

    @property
    def metrics_path(self) -> Path:
        """One JSON object per logged step."""
        return self.path / "metrics.jsonl"

    @property
    def report_path(self) -> Path:
        """The parity table and the timings, for programs; `report.html` beside it is for readers."""
        return self.path / "report.json"

    @property
    def has_begun(self) -> bool:
        """Whether the run has saved anything: a checkpoint, whole or not, or its report."""
        return self.report_path.exists() or any(self.path.glob("checkpoints/*/*"))

    def checkpoint_dir(self, stage: str) -> Path:
        """The folder whose subfolders are the steps of `stage`."""
        return self.path / "checkpoints" / stage

    def config(self) -> Config:
        """The resolved config of the run.

        Raises:
            RunError: when config.json is missing, is not JSON, or has fields that this version does not know.
        """
        try:
            return from_dict(Config, _read_object(self.config_path))
        except ConfigError as error:
            raise RunError(f"{self.config_path} does not fit this version: {error}") from error

    def environment(self) -> dict[str, Any]:
        """The content of environment.json.

        Raises:
            RunError: when the file is missing or is not JSON.
        """
        return _read_object(self.environment_path)

    def finished_report(self, config: Config) -> dict[str, Any] | None:
        """The report of a run of `config` that is complete; None where there is none that can be read, or no page for it.

        Raises:
            RunError: when the run is one of another config (naming each differing field).
        """
        if not all(path.exists() for path in (self.config_path, self.report_path, self.report_path.with_suffix(".html"))):
            return None
        _require_same_results(self.path, _differences(_read_object(self.config_path), to_dict(config)))
        try:
            return _read_object(self.report_path)
        except RunError as error:
            _LOG.warning("%s It is made again.", error)
            return None

    def update_environment(self, **values: Any) -> None:
        """Set top-level entries of environment.json, such as `implementations={"index_topk": "xla"}`.

        What an object entry has already stays beside what it is given. When something that was filled in changes, the earlier
        environment moves to `history`.
        """
        current = self.environment()
        given = json.loads(json.dumps(values))
        updated = current | {
            name: {**(current.get(name) or {}), **value} if isinstance(value, dict) else value for name, value in given.items()
        }
        before, after = flatten(current), flatten(updated)
        if any(before[name] and before[name] != after.get(name) for name in before if name.split(".")[0] in given):
            updated["history"] = [*current["history"], _without_history(current)]
        if updated != current:
            _write_object(self.environment_path, updated)


def open_run(workdir: str | os.PathLike[str], config: Config) -> RunDirectory:
    """Create the run directory of `config`, or return to it; only what changes no result may have changed since.

    That is `parallel`, what is done about losses that are not finite, and how often is logged and saved.

    Writes config.json and environment.json. On return, an environment that differs from the recorded one takes its place and
    the recorded one is appended to `history`, oldest first. A directory with neither a checkpoint nor a report, which a command
    left that could not begin, may become the run of any config.

    Raises:
        RunError: when `workdir` cannot be written, is a file, holds a run of another config (naming each differing field) or
            one without its config.json, or a config.json that is none of a run.
    """
    path = Path(workdir)
    make_writable_directory(path)
    run = RunDirectory(path, resumed=(path / "config.json").exists())
    wanted = to_dict(config)
    if run.resumed:
        recorded = _read_object(run.config_path)
        if absent := sorted(_SECTIONS - recorded.keys()):
            raise RunError(
                f"workdir {path} holds something else than a run: its config.json has no {', '.join(absent)}. Choose another "
                "--workdir."
            )
        differences = _differences(recorded, wanted)
        if run.has_begun:
            _require_same_results(path, differences)
        elif any(not _WITHOUT_EFFECT.fullmatch(name) for name in differences):
            for leftover in (run.metrics_path, run.path / "timing.jsonl"):
                leftover.unlink(missing_ok=True)
            shutil.rmtree(run.path / "tensorboard", ignore_errors=True)
        if differences:
            _LOG.info("%s goes on with other settings: %s", path, "; ".join(differences.values()))
            _write_object(run.config_path, wanted)
    elif run.has_begun:
        raise RunError(
            f"workdir {path} holds checkpoints or a report, but no config.json that says of what run. Restore it, or choose "
            "another --workdir."
        )
    else:
        _write_object(run.config_path, wanted)
    for leftover in path.iterdir():
        if _LEFTOVER.fullmatch(leftover.name):
            leftover.unlink(missing_ok=True)
    _record_environment(run)
    return run


@contextmanager
def claimed(workdir: str | os.PathLike[str], name: str = ".lock", *, flag: str = "workdir") -> Iterator[None]:
    """Keep other processes of this host, and of others where the file system passes locks on, from writing to `workdir`.

    The lock is the file `name`; it ends with the process, however that ends.

    Raises:
        RunError: when `workdir` cannot be written, or another process is using it; `flag` is the option that chose it.
    """
    make_writable_directory(Path(workdir), flag=flag)
    with ExitStack() as stack:
        try:
            file = stack.enter_context(open(Path(workdir) / name, "w", encoding="utf-8"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(
                f"another process is using {flag} {workdir}. Wait until it has ended, or choose another --{flag}."
            ) from None
        except OSError as error:
            _LOG.warning("%s cannot be locked (%s): nothing stops a second process from writing there", workdir, error.strerror)
        yield


def find_run(directory: str | os.PathLike[str]) -> RunDirectory:
    """The run that `directory` holds; nothing is written.

    Raises:
        RunError: when it holds none.
    """
    run = RunDirectory(Path(directory), resumed=True)
    if not run.path.is_dir():
        raise RunError(f"there is no directory {directory}; expected that of a run, the --workdir of experiments.retrofit.")
    if not run.config_path.is_file():
        raise RunError(
            f"{directory} is not a run directory: it has no config.json. Give the --workdir of experiments.retrofit."
        )
    return run


def describe_environment() -> dict[str, Any]:
    """Versions, device and source revision of this process; `implementations` is filled in once they are chosen."""
    import jax

    devices = jax.devices()
    return {
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "platform": platform.platform(),
        "device": {
            "backend": jax.default_backend(),
            "kind": devices[0].device_kind,
            "count": len(devices),
            "processes": jax.process_count(),
        },
        "git": git_revision(Path(__file__)),
        "implementations": {},
    }


def git_revision(source_file: Path) -> dict[str, Any] | None:
    """`{"revision", "dirty"}` of the checkout that tracks `source_file`; None when no git checkout does."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(source_file.parent), *arguments], capture_output=True, text=True, timeout=20, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An installed copy may lie inside some other project's checkout; only a tracked file tells us about our own source.
    if git("ls-files", "--error-unmatch", source_file.name) is None:
        return None
    revision, status = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    if revision is None or status is None:
        return None
    return {"revision": revision, "dirty": bool(status)}


def atomic_write_text(path: str | os.PathLike[str], text: str) -> None:
    """`atomic_write_bytes` of `text` in UTF-8."""
    atomic_write_bytes(path, text.encode())


def atomic_write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Write `content` so that `path` holds, whatever happens, either its former content or all of the new one.

    Raises:
        RunError: when the file system refuses (full, read-only, no permission); `path` is untouched then.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        _sync_directory(path.parent)
    except OSError as error:
        raise RunError(
            f"cannot write {path}: {error.strerror or error}. Its former content is intact; free space or fix permissions, "
            "then run the same command again."
        ) from error


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_writable_directory(path: Path, *, flag: str = "workdir") -> None:
    """Create `path` where it is missing, and write a file there to see whether one can; it is gone afterwards.

    Raises:
        RunError: when it is a file, or the file system refuses; `flag` is the option that chose it.
    """
    probe = path / f".probe.{os.getpid()}"
    try:
        if path.exists() and not path.is_dir():
            raise RunError(f"{flag} {path} is a file; expected a directory. Choose another --{flag}.")
        path.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise RunError(
            f"{flag} {path} cannot be written: {error.strerror or error}. Choose another --{flag}, or make it writable."
        ) from error


def _differences(recorded: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, str]:
    """What is different about each field that is."""
    there, here = flatten(recorded), flatten(wanted)
    names = sorted(name for name in there.keys() | here.keys() if there.get(name, "absent") != here.get(name, "absent"))
    return {
        name: f"{name} is {json.dumps(there[name]) if name in there else 'absent'} there and "
        f"{json.dumps(here[name]) if name in here else 'absent'} here"
        for name in names
    }


def _require_same_results(path: Path, differences: Mapping[str, str]) -> None:
    shown = [text for name, text in differences.items() if not _WITHOUT_EFFECT.fullmatch(name)]
    if not shown:
        return
    if len(shown) > _MOST_DIFFERENCES_SHOWN:
        shown[_MOST_DIFFERENCES_SHOWN:] = [f"{len(shown) - _MOST_DIFFERENCES_SHOWN} more fields differ"]
    raise RunError(
        f"workdir {path} holds a run of another config: {'; '.join(shown)}. Choose another --workdir, or delete {path} to "
        "start over."
    )


def _record_environment(run: RunDirectory) -> None:
    current = describe_environment()
    if not run.environment_path.exists():
        _write_object(run.environment_path, {**current, "history": []})
        return
    try:
        recorded = run.environment()
    except RunError as error:
        _LOG.warning("%s What this process runs in is recorded anew.", error)
        _write_object(run.environment_path, {**current, "history": []})
        return
    earlier = _without_history(recorded)
    changed = [name for name in current if name not in _FILLED_IN and earlier.get(name) != current[name]]
    if not changed:
        return
    _LOG.warning(
        "%s continues in another environment (%s differ from environment.json); the bits may differ from an undisturbed run",
        run.path,
        ", ".join(changed),
    )
    source = {name: earlier[name] for name in ("source",) if name in earlier}
    _write_object(run.environment_path, {**current, **source, "history": [*recorded.get("history", []), earlier]})


def _without_history(environment: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in environment.items() if name != "history"}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _read_object(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror or error}.") from error
    except ValueError as error:
        raise RunError(f"{path} is not valid JSON ({error}). Restore it, or choose another --workdir.") from error
    if not isinstance(values, dict):
        raise RunError(
            f"{path} holds a JSON {type(values).__name__}; expected an object. Restore it, or choose another --workdir."
        )
    return values


def _write_object(path: Path, values: Mapping[str, Any]) -> None:
    atomic_write_text(path, json.dumps(values, indent=2, sort_keys=True) + "\n")
