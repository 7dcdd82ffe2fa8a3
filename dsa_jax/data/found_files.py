"""Files of a corpus, found by a path, a directory or a glob pattern; what is left out is named in one line of the log."""

import glob
import json
import logging
import os
from collections import defaultdict, deque
from collections.abc import Callable
from pathlib import Path

from dsa_jax.config import ConfigError
from dsa_jax.config.checks import user_path
from dsa_jax.data.regular_files import read_regular, special_kind

_LOG = logging.getLogger(__name__)
# What a run writes into its directory, which may lie inside that of its text.
_RUN_FILES = frozenset({"metrics.jsonl", "timing.jsonl", "evaluations.jsonl"})
_RUN_FOLDERS = frozenset({"checkpoints", "hf", "hf_source", "profile", "tensorboard", "wandb"})
_RUN_NAMES = _RUN_FILES | _RUN_FOLDERS
_RUN_SECTIONS = frozenset({"model", "data", "train", "eval"})  # of its config.json
_MOST_REASONS_SHOWN = 12

LeftOut = dict[str, list[Path]]  # by reason


def find_files(path: str, refusal: Callable[[str], str]) -> list[Path]:
    """The regular files that `path` names, in order: a file, all files below a directory, or what a glob pattern matches.

    Links are followed, and every directory is read once, however many links lead to it. Left out are hidden files and folders,
    names that `refusal` refuses, FIFOs and devices, and what a run wrote into its own directory.

    Args:
        path: `~` is the user's home; a pattern is one only where nothing has that very name.
        refusal: why a file of that name is not wanted, "" where it is; not asked of a file that `path` names itself.

    Raises:
        ConfigError: for a path that is missing or neither a regular file nor a directory, a directory that cannot be listed,
            and a link that leads nowhere.
    """
    root = user_path("data.text.path", path)
    if root.exists() and not root.is_dir():
        if kind := special_kind(root):
            raise ConfigError(f"data.text.path is {path!r}, which is a {kind}; expected a regular file or a directory.")
        return [root]
    tops = [root] if root.exists() else sorted(Path(name) for name in glob.glob(str(root), recursive=True))
    if not tops:
        raise ConfigError(f"data.text.path is {path!r}, which does not exist. Expected a file, a directory or a glob pattern.")
    left_out: LeftOut = defaultdict(list)
    if not root.exists():
        left_out["of a run"] = [top for top in tops if _is_of_run(top)]
        tops = [top for top in tops if top not in left_out["of a run"]]
    found = [top for top in tops if not top.is_dir()] + _below([top for top in tops if top.is_dir()], left_out)
    wanted = []
    for file in found:
        reason = refusal(file.name) or special_kind(file)
        if reason:
            left_out[reason].append(file)
        else:
            wanted.append(file)
    if any(left_out.values()):
        _LOG.warning("data.text.path %r: %d files are read, left out are %s", path, len(wanted), _in_words(left_out))
    base = root if root.is_dir() else Path(root.anchor)
    return sorted(set(wanted), key=lambda file: file.relative_to(base).as_posix())


def _below(tops: list[Path], left_out: LeftOut) -> list[Path]:
    """All files below `tops` but hidden ones and those of runs; links are followed after everything that is really there."""
    found: list[Path] = []
    waiting, seen = deque(tops), set()
    while waiting:
        for name, folders, names in os.walk(waiting.popleft(), onerror=_cannot_list):
            folder, status = Path(name), os.stat(name)
            if (status.st_dev, status.st_ino) in seen:
                left_out.setdefault("of a directory that is read already", []).append(folder)
                folders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            of_run = _written_by_run(folder)
            entered = []
            for entry in sorted([*folders, *names]):
                if entry.startswith("."):
                    left_out.setdefault("hidden", []).append(folder / entry)
                elif entry in of_run:
                    left_out.setdefault("of a run", []).append(folder / entry)
                elif entry not in folders:
                    found.append(folder / entry)
                elif (folder / entry).is_symlink():
                    waiting.append(folder / entry)
                else:
                    entered.append(entry)
            folders[:] = entered
    return found


def _cannot_list(error: OSError) -> None:
    raise ConfigError(f"the directory {error.filename} cannot be read: {error.strerror}.") from error


def _is_of_run(match: Path) -> bool:
    """Whether what a pattern matches is a run's, or lies in a folder of one."""
    return any(path.name in _RUN_NAMES and path.name in _written_by_run(path.parent) for path in (match, *match.parents))


def _written_by_run(folder: Path) -> frozenset[str]:
    """The names that a run writes into a folder; none where its config.json is not that of a run."""
    try:
        values = json.loads(read_regular(folder / "config.json", most_bytes=2**20))
    except (ConfigError, ValueError, RecursionError):
        return frozenset()
    return _RUN_NAMES if isinstance(values, dict) and values.keys() >= _RUN_SECTIONS else frozenset()


def _in_words(left_out: LeftOut) -> str:
    parts = [f"{len(files)} {reason} ({min(files).name})" for reason, files in sorted(left_out.items()) if files]
    if len(parts) > _MOST_REASONS_SHOWN:
        rest = sum(len(files) for _, files in sorted(left_out.items())[_MOST_REASONS_SHOWN:])
        parts[_MOST_REASONS_SHOWN:] = [f"{rest} others"]
    return ", ".join(parts)
