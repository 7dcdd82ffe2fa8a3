"""The safetensors format: a JSON header, then the bytes of every tensor; read and written one tensor at a time.

The `safetensors` package maps whole files, and every page it touches counts as memory of the process. Here only the tensor that
is read or written is in memory.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np
from jaxtyping import Shaped

from dsa_jax.checkpoints.hf import CheckpointError
from dsa_jax.foreign import parse_json, printable, shown

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MOST_HEADER_BYTES = 100_000_000  # the limit of the format's own reader
_MOST_NAME = 500


class TensorInfo(NamedTuple):
    """Place of a tensor: its file, dtype by the header's name (not always one of `DTYPES`), shape, first byte counted from the
    start of the file, and size in bytes.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    n_bytes: int


class TensorToWrite(NamedTuple):
    """A tensor that `write_file` fetches when its turn comes."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    fetch: Callable[[], Shaped[np.ndarray, "..."]]

    @property
    def n_bytes(self) -> int:
        """Size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Every tensor of a file by name; together they fill it from the header to its last byte, none over another.

    Raises:
        CheckpointError: when the file is missing, cut off, or no safetensors file.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or not 2 <= length <= min(size - 8, _MOST_HEADER_BYTES):
                raise CheckpointError(
                    f"{file} is cut off or no safetensors file: its first 8 bytes give a header of {length} bytes, the file "
                    f"has {size} bytes. Download it again."
                )
            header = parse_json(stream.read(length))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{file} has a header that is not JSON as the format has it ({printable(error)}). Download it again."
        ) from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file} has a header that is no JSON object. Download it again.")
    header.pop("__metadata__", None)
    tensors = {name: _tensor_info(file, name, entry, 8 + length, size) for name, entry in header.items()}
    _check_ranges(file, tensors, 8 + length, size)
    return tensors


def _check_ranges(file: Path, tensors: Mapping[str, TensorInfo], data_start: int, file_size: int) -> None:
    end, before = data_start, "the header"
    for tensor, info in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].n_bytes)):
        name = printable(tensor)
        if info.offset != end:
            raise CheckpointError(
                f"{file}: {name} begins at byte {info.offset}; expected {end}, where {before} ends. Download it again."
            )
        end, before = end + info.n_bytes, name
    if end != file_size:
        raise CheckpointError(f"{file} has {file_size} bytes; expected {end}, where {before} ends. Download it again.")


def _tensor_info(file: Path, name: str, entry: Any, data_start: int, file_size: int) -> TensorInfo:
    if len(name) > _MOST_NAME:
        raise CheckpointError(f"{file} names a tensor {shown(name)}, in {len(name)} characters; expected at most {_MOST_NAME}.")
    name = printable(name)
    try:
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        well_formed = all(type(n) is int and n >= 0 for n in (*shape, begin, end)) and begin <= end and isinstance(dtype, str)
    except (KeyError, TypeError, ValueError):
        well_formed = False
    if not well_formed:
        raise CheckpointError(
            f"{file}: the header entry of {name} is {shown(entry)}; expected dtype, shape and data_offsets. Download it again."
        )
    n_bytes = math.prod(shape) * DTYPES[dtype].itemsize if dtype in DTYPES else end - begin
    if end - begin != n_bytes:
        raise CheckpointError(
            f"{file}: {name} takes {end - begin} bytes; expected {n_bytes} for shape {shown(list(shape))} of {dtype}. "
            "Download it again."
        )
    if data_start + end > file_size:
        raise CheckpointError(
            f"{file} is cut off: {name} ends at byte {data_start + end}, the file has {file_size} bytes. Download it again."
        )
    return TensorInfo(file, dtype, shape, data_start + begin, n_bytes)


def read_tensor(
    stream: BinaryIO, name: str, info: TensorInfo, *, lead: tuple[int, ...] = (), rows: slice | None = None
) -> Shaped[np.ndarray, "..."]:
    """A tensor, or the contiguous part `[*lead, rows]` of it, as an array of its own.

    Raises:
        CheckpointError: when the file ends before the tensor does.
    """
    shape, first = info.shape, 0
    for index in lead:
        first += index * math.prod(shape[1:])
        shape = shape[1:]
    if rows is not None:
        start, stop, _ = rows.indices(shape[0])
        first += start * math.prod(shape[1:])
        shape = (stop - start, *shape[1:])
    dtype = DTYPES[info.dtype]
    content = np.empty(math.prod(shape) * dtype.itemsize, np.uint8)
    stream.seek(info.offset + first * dtype.itemsize)
    filled, view = 0, content.data
    while filled < len(content):
        count = stream.readinto(view[filled:])  # type: ignore[attr-defined]
        if not count:
            raise CheckpointError(f"{info.file} ended while {name} was read: it was cut off meanwhile. Load it again.")
        filled += count
    return content.view(dtype).reshape(shape)


def write_file(file: Path, tensors: Iterable[TensorToWrite], metadata: Mapping[str, str]) -> None:
    """Write `tensors`, holding one at a time, and return once the bytes are on disk.

    The widest types come first, so that every tensor is aligned to its type, as the format's own writer does.
    """
    ordered = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for tensor in ordered:
        end = offset + tensor.n_bytes
        header[tensor.name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode("utf-8")
    encoded += b" " * (-len(encoded) % 8)
    with file.open("wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in ordered:
            value = np.ascontiguousarray(tensor.fetch())
            if value.shape != tensor.shape or value.dtype != tensor.dtype:
                raise AssertionError(f"{tensor.name}: announced {tensor.shape} {tensor.dtype}, got {value.shape} {value.dtype}")
            stream.write(value.reshape(-1).view(np.uint8).data)
        stream.flush()
        os.fsync(stream.fileno())
