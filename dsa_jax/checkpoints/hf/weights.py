"""The weight files of a checkpoint directory as one set of named tensors."""

import logging
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Shaped

from dsa_jax.checkpoints.hf import CheckpointError
from dsa_jax.checkpoints.hf.safetensors_file import DTYPES, TensorInfo, read_header, read_tensor
from dsa_jax.foreign import printable, read_object, shown

_LOG = logging.getLogger(__name__)
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_COMPARED_ROWS = 1024
_MOST_FILE_NAME = 200


class Weights:
    """The tensors of one checkpoint, read on demand; a context manager that closes the files.

    Attributes:
        directory: of the checkpoint.
        tensors: every tensor by name; where several files hold it, in the one that the index assigns it to.
        unlisted: names of tensors that lie in a file of the index, which lists them nowhere.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.tensors, self.unlisted = _find_tensors(directory)
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
        infos = self.tensors[one], self.tensors[other]
        shape = infos[0].shape
        if shape != infos[1].shape or any(info.dtype not in DTYPES for info in infos):
            return True
        parts = [slice(first, first + _COMPARED_ROWS) for first in range(0, shape[0], _COMPARED_ROWS)]
        return not all(np.array_equal(self.read(one, rows=part), self.read(other, rows=part)) for part in parts)


def has_weights(directory: Path) -> bool:
    """Whether a directory holds weights, or an index of them, under the names that are looked for."""
    return any((directory / name).is_file() for name in (SINGLE_FILE, INDEX_FILE))


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object, by `read_object`.

    Raises:
        CheckpointError: when the file is missing or holds something else.
    """
    return read_object(file, CheckpointError)


def _find_tensors(directory: Path) -> tuple[dict[str, TensorInfo], frozenset[str]]:
    """The tensors by name, and the names that an index leaves out; a single file counts for more than an index, as in
    transformers."""
    index, single = directory / INDEX_FILE, directory / SINGLE_FILE
    if single.is_file():
        if index.is_file():
            _LOG.warning("%s holds %s and %s: the first is read, as transformers does", directory, SINGLE_FILE, INDEX_FILE)
        return read_header(single), frozenset()
    if not index.is_file():
        raise CheckpointError(f"{directory} holds neither {SINGLE_FILE} nor {INDEX_FILE}. Convert the weights to safetensors.")
    file_of = _weight_map(index)
    listed: dict[str, list[str]] = {}
    for name, file in file_of.items():
        listed.setdefault(file, []).append(name)
    tensors: dict[str, TensorInfo] = {}
    unlisted: dict[str, TensorInfo] = {}
    stale: list[str] = []
    for file, names in sorted(listed.items()):
        present = read_header(directory / file)
        if absent := sorted(set(names) - present.keys()):
            raise CheckpointError(
                f"{directory / file} does not hold {printable(absent[0])}{_and_more(absent)}, which {INDEX_FILE} says is "
                "there. Get the index and the files it names from one revision."
            )
        tensors |= {name: info for name, info in present.items() if file_of.get(name) == file}
        unlisted |= {name: info for name, info in present.items() if name not in file_of}
        stale += [name for name in present if file_of.get(name, file) != file]
    if stale:
        _LOG.warning(
            "%s: other files hold tensors too that %s assigns to one, which counts: %s%s",
            directory, INDEX_FILE, printable(min(stale)), _and_more(stale),
        )  # fmt: skip
    return tensors | unlisted, frozenset(unlisted)


def _weight_map(index: Path) -> dict[str, str]:
    """The file of each tensor, all of them files of that directory."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map from tensor names to file names. Download it again.")
    first_of = {file: name for name, file in sorted(weight_map.items(), reverse=True)}
    for file, name in sorted(first_of.items()):
        if Path(file).name != file or file in ("", ".", "..") or len(file) > _MOST_FILE_NAME or "\0" in file:
            raise CheckpointError(
                f"{index} names the file {shown(file)} for {printable(name)}; expected a file in that directory. The index is "
                "not to be trusted: get the checkpoint from its source."
            )
        if not (index.parent / file).is_file():
            raise CheckpointError(
                f"{index} names {printable(file)} for {printable(name)}, but {index.parent} holds no such file. Download it."
            )
    return weight_map


def _and_more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
