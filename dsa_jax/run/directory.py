"""The run directory: its files, and whether a config may continue the run in it."""

import dataclasses
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsa_jax.config import Config, ConfigError, from_dict, to_dict
from dsa_jax.config.fields import flatten
from dsa_jax.run.environment import describe_environment
from dsa_jax.run.files import RunError, make_writable_directory, read_object, write_object

_LOG = logging.getLogger(__name__)
_MOST_DIFFERENCES_SHOWN = 12
_SECTIONS = {"model", "data", "train", "eval"}  # every version of a run's config.json has them
_FILLED_IN = ("implementations", "source")  # entries of environment.json that are added when they are known
_LEFTOVER = re.compile(r"\..+\.\d+\.tmp")  # left by `atomic_write_text` when its process is killed
_WITHOUT_EFFECT = re.compile(
    r"parallel\..*|train\.(nan_policy|max_skipped_steps|keep_checkpoints|\w+\.(log_every|checkpoint_every))"
)


@dataclasses.dataclass(frozen=True)
class RunDirectory:
    """Paths of the files of one run. `resumed` tells whether the directory held the run already."""

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
            return from_dict(Config, read_object(self.config_path), prefix="")
        except ConfigError as error:
            raise RunError(f"{self.config_path} does not fit this version: {error}") from error

    def environment(self) -> dict[str, Any]:
        """The content of environment.json.

        Raises:
            RunError: when the file is missing or is not JSON.
        """
        return read_object(self.environment_path)

    def finished_report(self, config: Config) -> dict[str, Any] | None:
        """The report of a run of `config` that is complete; None where there is none that can be read, or no page for it.

        Raises:
            RunError: when the run is one of another config (naming each differing field).
        """
        if not all(path.exists() for path in (self.config_path, self.report_path, self.report_path.with_suffix(".html"))):
            return None
        _require_same_results(self.path, _differences(read_object(self.config_path), to_dict(config)))
        try:
            return read_object(self.report_path)
        except RunError as error:
            _LOG.warning("%s It is made again.", error)
            return None

    def update_environment(self, **values: Any) -> None:
        """Set top-level entries of environment.json, such as `implementations={"index_topk": "xla"}`; objects are merged.

        When a value that was filled in changes, the earlier environment is appended to `history`.
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
            write_object(self.environment_path, updated)


def open_run(workdir: str | os.PathLike[str], config: Config) -> RunDirectory:
    """Create the run directory of `config`, or continue the run in it; only fields that change no result may differ.

    Those are `parallel`, the policy on non-finite losses, and how often is logged and saved.

    Writes config.json and environment.json. Where the run continues in another environment, the recorded one is appended to
    `history`, oldest first. A directory with neither a checkpoint nor a report, left by a command that could not begin, may
    become the run of any config.

    Raises:
        RunError: when `workdir` cannot be written, is a file, holds a run of another config (naming each differing field) or
            one without its config.json, or a config.json that is not of a run.
    """
    path = Path(workdir)
    make_writable_directory(path)
    run = RunDirectory(path, resumed=(path / "config.json").exists())
    wanted = to_dict(config)
    if run.resumed:
        recorded = read_object(run.config_path)
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
            _LOG.info("%s continues with other settings: %s", path, "; ".join(differences.values()))
            write_object(run.config_path, wanted)
    elif run.has_begun:
        raise RunError(
            f"workdir {path} holds checkpoints or a report, but no config.json that says of what run. Restore it, or choose "
            "another --workdir."
        )
    else:
        write_object(run.config_path, wanted)
    for leftover in path.iterdir():
        if _LEFTOVER.fullmatch(leftover.name):
            leftover.unlink(missing_ok=True)
    _record_environment(run)
    return run


def find_run(directory: str | os.PathLike[str]) -> RunDirectory:
    """The run in `directory`; nothing is written.

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


def _differences(recorded: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, str]:
    """The differing fields by name, each with both values in words."""
    there, here = flatten(recorded), flatten(wanted)
    names = sorted(name for name in there.keys() | here.keys() if there.get(name, "absent") != here.get(name, "absent"))
    return {
        name: f"{name} is {json.dumps(there[name]) if name in there else 'absent'} there and "
        f"{json.dumps(here[name]) if name in here else 'absent'} here"
        for name in names
    }


def _require_same_results(path: Path, differences: Mapping[str, str]) -> None:
    shown = [text for name, text in differences.items() if not _WITHOUT_EFFECT.fullmatch(name)]
    if len(shown) > _MOST_DIFFERENCES_SHOWN:
        shown[_MOST_DIFFERENCES_SHOWN:] = [f"{len(shown) - _MOST_DIFFERENCES_SHOWN} more fields differ"]
    if shown:
        raise RunError(
            f"workdir {path} holds a run of another config: {'; '.join(shown)}. Choose another --workdir, or delete {path} to "
            "start over."
        )


def _record_environment(run: RunDirectory) -> None:
    current, recorded = describe_environment(), None
    if run.environment_path.exists():
        try:
            recorded = run.environment()
        except RunError as error:
            _LOG.warning("%s The environment of this process is recorded anew.", error)
    if recorded is None:
        write_object(run.environment_path, {**current, "history": []})
        return
    earlier = _without_history(recorded)
    if changed := [name for name in current if name not in _FILLED_IN and earlier.get(name) != current[name]]:
        _LOG.warning(
            "%s continues in another environment (%s differ from environment.json); bits may differ from an uninterrupted run",
            *(run.path, ", ".join(changed)),
        )
        source = {"source": earlier["source"]} if "source" in earlier else {}
        write_object(run.environment_path, {**current, **source, "history": [*recorded.get("history", []), earlier]})


def _without_history(environment: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in environment.items() if name != "history"}
