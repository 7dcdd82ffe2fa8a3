"""The weight files of a checkpoint directory as one set of named tensors."""

import logging
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import Shaped

from dsa_jax.checkpoints.hf import CheckpointError
from dsa_jax.checkpoints.hf.safetensors_file import TensorInfo, read_header, read_tensor
from dsa_jax.foreign import read_object

_LOG = logging.getLogger(__name__)
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_COMPARED_ROWS = 1024


class Weights:
    """The tensors of one checkpoint, read on demand; a context manager that closes the files."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.tensors: dict[str, TensorInfo] = _find_tensors(directory)
        self._streams: dict[Path, BinaryIO] = {}

    def __enter__(self) -> "Weights":
        return self

    def __exit__(self, *_: object) -> None:
        for stream in self._streams.values():
            stream.close()

    def read(self, name: str, *, lead: tuple[int, ...] = (), rows: slice | None = None) -> Shaped[np.ndarray, "..."]:
        """The tensor `name`, or the contiguous part `[*lead, rows]` of it."""
        info = self.tensors[name]
        if info.file not in self._streams:
            self._streams[info.file] = info.file.open("rb", buffering=0)  # type: ignore[assignment]
        return read_tensor(self._streams[info.file], name, info, lead=lead, rows=rows)

    def differ(self, one: str, other: str) -> bool:
        """Whether two tensors hold other values; read in parts, to the first that differs."""
        shape = self.tensors[one].shape
        if shape != self.tensors[other].shape:
            return True
        parts = [slice(first, first + _COMPARED_ROWS) for first in range(0, shape[0], _COMPARED_ROWS)]
        return not all(np.array_equal(self.read(one, rows=part), self.read(other, rows=part)) for part in parts)


def has_weights(directory: Path) -> bool:
    """Whether a directory holds weights, or an index of them, under the names that are looked for."""
    return any((directory / name).is_file() for name in (SINGLE_FILE, INDEX_FILE))


def _find_tensors(directory: Path) -> dict[str, TensorInfo]:
    """The tensors by name; a single file counts for more than an index, as in transformers."""
    index, single = directory / INDEX_FILE, directory / SINGLE_FILE
    if single.is_file():
        if index.is_file():
            _LOG.warning("%s holds %s and %s: the first is read, as transformers does", directory, SINGLE_FILE, INDEX_FILE)
        return read_header(single)
    if not index.is_file():
        raise CheckpointError(f"{directory} holds neither {SINGLE_FILE} nor {INDEX_FILE}. Convert the weights to safetensors.")
    weight_map = read_object(index, CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map from tensor names to file names. Download it again.")
    listed: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        listed.setdefault(file, set()).add(name)
    for file, names in sorted(listed.items()):
        if Path(file).name != file or file in ("", ".", ".."):
            raise CheckpointError(
                f"{index} names the file {file!r} for {min(names)}; expected a file in that directory. The index is not to be "
                "trusted: get the checkpoint from its source."
            )
        if not (directory / file).is_file():
            raise CheckpointError(f"{index} names {file} for {min(names)}, but {directory} holds no such file. Download it.")
    tensors: dict[str, TensorInfo] = {}
    for file, names in sorted(listed.items()):
        present = read_header(directory / file)
        if absent := sorted(names - present.keys()):
            raise CheckpointError(
                f"{directory / file} does not hold {absent[0]}{_and_more(absent)}, which {INDEX_FILE} says is there. "
                "Download both again."
            )
        if unlisted := sorted(present.keys() - names):
            raise CheckpointError(
                f"{directory / file} holds {unlisted[0]}{_and_more(unlisted)}, which {INDEX_FILE} does not list there. "
                "Download both again."
            )
        tensors.update(present)
    return tensors


def _and_more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
