"""Manifests of checkpoints: shape and dtype of every leaf, size and CRC-32 of every file, by which damage is found."""

import json
import os
import stat
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from dsa_jax.run.files import RunError, atomic_write_text, open_regular, read_object

_NAME = "manifest.json"
_READ_BYTES = 1 << 22


class StageCheckpointError(RunError):
    """A checkpoint of a stage cannot be written or read, or does not fit: the message names the directory and the leaf."""


class LeafSpec(NamedTuple):
    """Shape and dtype, by its numpy name, of one array of a checkpoint."""

    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


def has_manifest(checkpoint: Path) -> bool:
    """Whether the directory was ever completed."""
    return (checkpoint / _NAME).exists()


def write_manifest(directory: Path, step: int, leaves: Mapping[str, LeafSpec]) -> None:
    """Record `leaves` and the files below `directory`, which holds all that belongs to the checkpoint of `step`."""
    # The files of the items only: those at the top Orbax still changes, and it reads without them.
    found = sorted(path for path in directory.glob("*/**/*") if path.is_file() and not path.is_symlink())
    files = {str(path.relative_to(directory)): _fingerprint(path) for path in found}
    manifest = {"step": step, "leaves": {path: spec._asdict() for path, spec in leaves.items()}, "files": files}
    atomic_write_text(directory / _NAME, json.dumps(manifest, indent=1, sort_keys=True) + "\n")


def read_leaves(checkpoint: Path) -> dict[str, LeafSpec]:
    """Shape and dtype of every leaf of the checkpoint in a directory named by its step, by path.

    Raises:
        StageCheckpointError: when it is missing, was never completed, or its manifest is damaged.
    """
    return _read(checkpoint)[0]


def damage(checkpoint: Path) -> str | None:
    """The first difference between a checkpoint's files, read in full, and its manifest; None for a valid checkpoint.

    A link, a FIFO or a device anywhere in it is a difference, too: it would be read from elsewhere, or never end.
    """
    try:
        for folder, folders, files in os.walk(checkpoint):
            for path in (Path(folder, name) for name in (*folders, *files)):
                if not stat.S_ISDIR(mode := path.lstat().st_mode) and not stat.S_ISREG(mode):
                    return f"{path.relative_to(checkpoint)} is a link or no regular file"
        for name, recorded in _read(checkpoint)[1].items():
            path = checkpoint / name
            if not path.is_file():
                return f"{name} is missing"
            size = path.stat().st_size
            if size != recorded["bytes"]:
                return f"{name} has {size} bytes, {recorded['bytes']} were written"
            if _fingerprint(path) != recorded:
                return f"{name} does not hold the bytes that were written"
    except StageCheckpointError as error:
        return str(error)
    except OSError as error:
        return f"cannot be read: {error}"
    return None


def _read(checkpoint: Path) -> tuple[dict[str, LeafSpec], dict[str, dict[str, int]]]:
    """The leaves and the files that a manifest records."""
    path = checkpoint / _NAME
    try:
        manifest = read_object(path)
        leaves = {name: LeafSpec(tuple(spec["shape"]), spec["dtype"]) for name, spec in manifest["leaves"].items()}
        if manifest["step"] != int(checkpoint.name):
            raise ValueError(f"it is that of step {manifest['step']}")
        if not manifest["files"] or not all({"bytes", "crc32"} <= set(entry) for entry in manifest["files"].values()):
            raise ValueError("no file is recorded")
        if outside := [name for name in manifest["files"] if Path(name).is_absolute() or ".." in Path(name).parts]:
            raise ValueError(f"it names {outside[0]}, which lies outside the checkpoint")
    except (RunError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if not os.path.lexists(path):
            raise StageCheckpointError(f"no complete checkpoint: {path} does not exist") from None
        raise StageCheckpointError(f"{path} is damaged: {first_line(error)}") from error
    return leaves, manifest["files"]


def first_line(error: BaseException) -> str:
    """The first line of an error's message, as a sentence; the name of its class where there is none."""
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else type(error).__name__
    return text if text.endswith(".") else f"{text}."


def _fingerprint(path: Path) -> dict[str, int]:
    size = checksum = 0
    with open(open_regular(path), "rb") as file:
        while block := file.read(_READ_BYTES):
            size += len(block)
            checksum = zlib.crc32(block, checksum)
    return {"bytes": size, "crc32": checksum}
