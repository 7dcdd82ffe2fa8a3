"""The run directory: its files, and whether a config may continue the run in it."""

import dataclasses
import json
import logging
import os
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from dsa_jax.config import STAGES, Config, ConfigError, from_dict, to_dict
from dsa_jax.config.fields import flatten
from dsa_jax.run.environment import describe_environment
from dsa_jax.run.files import RunError, make_writable_directory, read_object, write_object
from dsa_jax.run.trackers import TRACKED_FILE

_LOG = logging.getLogger(__name__)
_MOST_DIFFERENCES_SHOWN = 12
_SECTIONS = {"model", "data", "train", "eval"}  # every version of a run's config.json has them
_KEPT = ("source", "tokenizer", "text", "exports")  # entries of environment.json about the run, not about a process
_FILLED_IN = ("implementations", *_KEPT)  # entries of environment.json that are added when they are known
_LOGS = ("metrics.jsonl", "timing.jsonl", "evaluations.jsonl", TRACKED_FILE)
_FILES = ("config.json", "environment.json", *_LOGS, "report.json", "report.html")
_LEFTOVER = re.compile(rf"\.({'|'.join(map(re.escape, _FILES))})\.\d+\.tmp|\.probe\.(\d+|[a-z0-9_]{{8}})")
"""Left by `atomic_write_text`, and by a probe, of a killed process."""

_REMOVED = ("tensorboard", "profile", "hf_source")
"""Folders of a run that could not begin, which go with its logs; other runs may share wandb's, which keeps each by its id."""

_WRITTEN = {"python", "versions", "platform", "device"}  # entries that environment.json has from the first
_FOLDERS = ("checkpoints", *(f"{folder}/{stage}" for folder in ("checkpoints", "tensorboard", "profile") for stage in STAGES))
_FOLDERS += ("tensorboard", "wandb", "profile", "hf_source")
_OF_A_STAGE = r"(accumulation|log_every|checkpoint_every|evaluate_every)"
_WITHOUT_EFFECT = re.compile(
    r"parallel\..*|eval\.batch_size|train\.(nan_policy|max_skipped_steps|keep_checkpoints|profile_steps|trackers|tracker_project"
    rf"|gate|gate_coverage|gate_extend_steps|gate_extend_max|\w+\.{_OF_A_STAGE})"
)

_ADDED = re.compile(
    r"train\.(\w+\.tokens|warmup_attention|sparse_trains|gate_extend_steps|gate_extend_max)|eval\.(text_task_scoring|samples)"
)
"""Fields that runs of earlier versions did not record: at their defaults they compute what those versions did."""


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
    def export_path(self) -> Path:
        """The Hugging Face checkpoint that a run from such a checkpoint writes."""
        return self.path / "hf"

    @property
    def source_path(self) -> Path:
        """Config and tokenizer of the Hugging Face directory that the run began from, with which it continues without it."""
        return self.path / "hf_source"

    @property
    def has_begun(self) -> bool:
        """Whether the run has saved anything: a checkpoint, whole or not, or its report."""
        return self.report_path.exists() or any(self.path.glob("checkpoints/*/*"))

    def profile_dir(self, stage: str) -> Path:
        """The folder of the profiler traces of `stage`."""
        return self.path / "profile" / stage

    def words_for(self, stage: str) -> str:
        """The parameters at the end of `stage`, for readers; those that a run began with where it has no stage."""
        return f"{self.path}, stage {stage}" if stage else str(self.path)

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
            RunError: when the file is missing or holds something else.
        """
        values = read_object(self.environment_path)
        lists_of_objects = isinstance(values.get("history"), list) and all(isinstance(v, dict) for v in values["history"])
        exports = values.get("exports", [])
        if not (lists_of_objects and isinstance(values.get("implementations"), dict) and isinstance(exports, list)):
            raise RunError(f"{self.environment_path} is not what a run writes. Restore it, or choose another --workdir.")
        return values

    @property
    def exports(self) -> list[str]:
        """The fingerprints of the checkpoints that this run has written to `export_path`, oldest first."""
        try:
            return self.environment().get("exports", [])
        except RunError:
            return []

    def record_export(self, fingerprint: str) -> None:
        """Add a fingerprint to `exports`."""
        if fingerprint not in self.exports:
            write_object(self.environment_path, self.environment() | {"exports": [*self.exports, fingerprint]})

    def finished_report(self, config: Config, accepted: Collection[str] = ()) -> dict[str, Any] | None:
        """The report of a run of `config` that is complete; None where there is none that can be read, or no page for it.

        Args:
            config: of the run.
            accepted: the fields in which it may differ from the recorded one.

        Raises:
            RunError: when the run is one of another config (naming each differing field).
        """
        if not all(path.exists() for path in (self.config_path, self.report_path, self.report_path.with_suffix(".html"))):
            return None
        _require_same_results(self.path, _differences(read_object(self.config_path), to_dict(config)), accepted)
        try:
            return self.report()
        except RunError as error:
            _LOG.warning("%s It is made again.", error)
            return None

    def report(self) -> dict[str, Any]:
        """The content of report.json.

        Raises:
            RunError: when the file is missing or holds something else.
        """
        report = read_object(self.report_path)
        rows, stages = report.get("rows"), report.get("stages", {})
        if not isinstance(rows, list) or not all(map(_is_row, rows)) or not isinstance(stages, dict):
            raise RunError(f"{self.report_path} is not what a run writes.")
        return report

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


def open_run(workdir: str | os.PathLike[str], config: Config, *, accepted: Collection[str] = ()) -> RunDirectory:
    """Create the run directory of `config`, or continue the run in it; only fields that change no result may differ.

    Those are `parallel` and the rows computed at a time, the policy on non-finite losses, how often is logged and saved, and
    the fields `accepted`.

    Writes config.json and environment.json. Where the run continues in another environment, the recorded one is appended to
    `history`, oldest first. A directory with neither a checkpoint nor a report, left by a command that could not begin, may
    become the run of any config.

    Raises:
        RunError: when `workdir` cannot be written, is a file, holds a run of another config (naming each differing field) or
            one without its config.json, files that are not of a run, or a link where a run writes. Nothing is changed then.
    """
    path = Path(workdir)
    make_writable_directory(path)
    run = RunDirectory(path, resumed=(path / "config.json").exists())
    differences, wanted = check_run(run, config, accepted=accepted), to_dict(config)
    if not run.resumed:
        write_object(run.config_path, wanted)
    elif differences:
        if not run.has_begun and any(not _WITHOUT_EFFECT.fullmatch(name) for name in differences):
            for name in _LOGS:
                (run.path / name).unlink(missing_ok=True)
            for name in _REMOVED:
                shutil.rmtree(run.path / name, ignore_errors=True)
        _LOG.info("%s continues with other settings: %s", path, "; ".join(differences.values()))
        write_object(run.config_path, wanted)
    for leftover in path.iterdir():
        if _LEFTOVER.fullmatch(leftover.name):
            leftover.unlink(missing_ok=True)
    _record_environment(run)
    return run


def check_run(run: RunDirectory, config: Config, *, accepted: Collection[str] = ()) -> dict[str, str]:
    """Check that the directory of `run` may become, or continue, the run of `config`; nothing is written.

    Returns:
        The fields that differ from config.json, by name, each with both values in words.

    Raises:
        RunError: as `open_run`.
    """
    _require_own_entries(run.path)
    if run.config_path.exists():
        recorded = read_object(run.config_path)
        differences = _differences(recorded, to_dict(config))
        if differences:
            _require_run(run, recorded)
        if run.has_begun:
            _require_same_results(run.path, differences, accepted)
        return differences
    if found := [name for name in (*_FILES, "checkpoints", *_REMOVED) if _holds(run.path / name)]:
        raise RunError(
            f"workdir {run.path} holds {found[0]}, but no config.json that says of what run. Restore it, or choose another "
            "--workdir."
        )
    return {}


def _holds(path: Path) -> bool:
    """Whether there is a file, or a folder with anything in it."""
    return any(path.iterdir()) if path.is_dir() else path.exists()


def _require_own_entries(path: Path) -> None:
    """Require files and folders to be the run's own: through a link it would write elsewhere, and a FIFO hangs.

    Raises:
        RunError: naming the first that is something else.
    """
    for names, kind, is_own in ((_FILES, "regular file", Path.is_file), (_FOLDERS, "directory", Path.is_dir)):
        for entry in (path / name for name in names):
            if entry.is_symlink() or (entry.exists() and not is_own(entry)):
                what = "a symbolic link" if entry.is_symlink() else f"no {kind}"
                raise RunError(
                    f"{entry} is {what}; expected a {kind} of the run's own, since the run writes there. Move it away, or "
                    "choose another --workdir."
                )


def _require_run(run: RunDirectory, recorded: Mapping[str, Any]) -> None:
    """Require config.json and environment.json to be those of a run, before anything is replaced or removed.

    Raises:
        RunError: where they are somebody else's.
    """
    reason = ""
    if absent := sorted(_SECTIONS - recorded.keys()):
        reason = f"its config.json has no {', '.join(absent)}"
    else:
        try:
            from_dict(Config, recorded)
        except (ValueError, TypeError, AttributeError) as error:
            reason = f"its config.json does not fit this version ({error})"
    if not reason and not run.has_begun:
        reason = _why_never_opened(run, recorded)
    if reason:
        raise RunError(f"workdir {run.path} holds something else than a run: {reason.rstrip('.')}. Choose another --workdir.")


def _why_never_opened(run: RunDirectory, recorded: Mapping[str, Any]) -> str:
    """Why a directory without a checkpoint is none that `open_run` left; empty where it is one.

    Its environment.json says so. A process that was killed before it wrote that has left a whole config.json and nothing else.
    """
    try:
        absent = _WRITTEN - run.environment().keys()
        return f"its environment.json has no {', '.join(sorted(absent))}" if absent else ""
    except RunError as error:
        others = [name for name in (*_FILES[1:], *_FOLDERS) if _holds(run.path / name)]
        missing = flatten(to_dict(Config())).keys() - flatten(recorded).keys()
        return str(error) if others or any(not _ADDED.fullmatch(name) for name in missing) else ""


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
    added = {name: value for name, value in flatten(to_dict(Config())).items() if _ADDED.fullmatch(name)}
    there, here = added | flatten(recorded), flatten(wanted)
    names = sorted(name for name in there.keys() | here.keys() if there.get(name, "absent") != here.get(name, "absent"))
    return {
        name: f"{name} is {json.dumps(there[name]) if name in there else 'absent'} there and "
        f"{json.dumps(here[name]) if name in here else 'absent'} here"
        for name in names
    }


def _require_same_results(path: Path, differences: Mapping[str, str], accepted: Collection[str]) -> None:
    shown = [text for name, text in differences.items() if not _WITHOUT_EFFECT.fullmatch(name) and name not in accepted]
    if len(shown) > _MOST_DIFFERENCES_SHOWN:
        shown[_MOST_DIFFERENCES_SHOWN:] = [f"{len(shown) - _MOST_DIFFERENCES_SHOWN} more fields differ"]
    if shown:
        raise RunError(
            f"workdir {path} holds a run of another config: {'; '.join(shown)}. Choose another --workdir, or delete {path} to "
            "start over."
        )


def _is_row(row: Any) -> bool:
    """Whether `row` is one of the parity table as report.json has it."""
    number = lambda value: value is None or (isinstance(value, int | float) and not isinstance(value, bool))
    if not isinstance(row, dict) or not isinstance(row.get("name"), str):
        return False
    tasks = row.get("tasks") or {}
    if not isinstance(tasks, dict) or not all(
        isinstance(task, dict) and number(task.get("accuracy")) for task in tasks.values()
    ):
        return False
    return all(number(value) for name, value in row.items() if name not in ("name", "tasks"))


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
        kept = {name: earlier[name] for name in _KEPT if name in earlier}
        write_object(run.environment_path, {**current, **kept, "history": [*recorded["history"], earlier]})


def _without_history(environment: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in environment.items() if name != "history"}
