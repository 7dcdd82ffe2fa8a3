"""Regular files, opened without waiting, decompressed and decoded: a FIFO or a device is refused, not read."""

import codecs
import importlib
import os
import stat
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from gzip import GzipFile
from io import BufferedIOBase, BufferedReader, RawIOBase
from pathlib import Path
from typing import Any

from dsa_jax.config import ConfigError
from dsa_jax.extras import import_extra, is_installed

COMPRESSED = (".gz", ".zst")
_BLOCK = 2**20  # bytes that are read at a time
_COMPRESSED_BLOCK = 2**14  # of a .zst file
_BOM = "\N{ZERO WIDTH NO-BREAK SPACE}"
_KINDS = {
    stat.S_IFIFO: "FIFO",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device",
    stat.S_IFDIR: "directory",
}


def special_kind(file: Path) -> str:
    """What `file` is where it is no regular file, in words; "" where it is one. Links are followed.

    Raises:
        ConfigError: where there is nothing of that name.
    """
    try:
        return _kind(os.stat(file))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read: {_words(error)}.") from error


@contextmanager
def opened(file: Path) -> Iterator[BufferedIOBase]:
    """The content of a regular file, that of a .gz or .zst decompressed.

    Reading it raises ConfigError, too, where that fails or where compressed data are damaged or cut off.

    Raises:
        ConfigError: where it is no regular file or cannot be opened.
        MissingExtraError: where no package reads a .zst, with the command that installs one.
    """
    if kind := special_kind(file):
        raise ConfigError(f"{file} is a {kind}; expected a regular file.")
    suffix = file.suffix.lower()
    new_frame = _zstd(file) if suffix == ".zst" else None
    try:
        # Without waiting: a FIFO that took the file's place would block until somebody writes.
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {_words(error)}.") from error
    with open(descriptor, "rb") as raw:
        if kind := _kind(os.fstat(raw.fileno())):
            raise ConfigError(f"{file} is a {kind}; expected a regular file.")
        content = GzipFile(fileobj=raw) if suffix == ".gz" else _Zstd(raw, new_frame) if new_frame else raw
        yield BufferedReader(_Named(content, file), _BLOCK)


def read_regular(file: Path, *, most_bytes: int = -1) -> bytes:
    """The content of a regular file, decompressed as by `opened`.

    Raises:
        ConfigError: where it is none, cannot be read, or has more than `most_bytes` (-1: no limit).
    """
    with opened(file) as stream:
        content = stream.read(most_bytes + 1 if most_bytes >= 0 else -1)
    if 0 <= most_bytes < len(content):
        raise ConfigError(f"{file} has more than {most_bytes} bytes.")
    return content


def read_text(file: Path) -> str:
    """The UTF-8 text of a regular file, without its byte order mark.

    Raises:
        ConfigError: where it is none or cannot be read, and naming the byte that is not UTF-8.
    """
    return decoded(read_regular(file), file)


def text_blocks(stream: BufferedIOBase, file: Path) -> Iterator[str]:
    """The UTF-8 text of `stream` in blocks of about a million characters, without its byte order mark.

    Raises:
        ConfigError: naming `file` and the byte that is not UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    n_bytes, is_first = 0, True
    while True:
        block = stream.read(_BLOCK)
        n_held = len(decoder.getstate()[0])
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise not_utf8(file, error, n_bytes - n_held) from error
        n_bytes += len(block)
        if text:
            yield text.removeprefix(_BOM) if is_first else text
            is_first = False
        if not block:
            return


def decoded(content: bytes, file: Path, first_byte: int = 0) -> str:
    """UTF-8 text that begins at `first_byte` of `file`, at the start of which a byte order mark is left out.

    Raises:
        ConfigError: naming `file` and the byte that is not UTF-8.
    """
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise not_utf8(file, error, first_byte) from error
    return text if first_byte else text.removeprefix(_BOM)


def not_utf8(file: Path, error: UnicodeDecodeError, first_byte: int) -> ConfigError:
    """The error to raise for content that begins at `first_byte` of `file`."""
    place = first_byte + error.start
    mark = " (it begins as UTF-16 does)" if not place and error.object[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else ""
    return ConfigError(f"{file} is not UTF-8{mark}: {error.reason} at byte {place}. Convert it to UTF-8, or leave it out.")


def reads_zstd() -> bool:
    """Whether .zst files can be decompressed here."""
    return sys.version_info >= (3, 14) or is_installed("zstandard")


def _zstd(file: Path) -> Any:
    """A function that makes a decompressor of one frame: Python's own from 3.14 on, else that of the zstandard package."""
    if sys.version_info >= (3, 14):
        return importlib.import_module("compression.zstd").ZstdDecompressor
    return import_extra("zstandard", extra="data", purpose=str(file)).ZstdDecompressor().decompressobj


class _Named(RawIOBase):
    """A stream whose errors name its file."""

    def __init__(self, content: Any, file: Path) -> None:
        self._content, self._file = content, file

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the start of `buffer`; 0 at the end."""
        try:
            return self._content.readinto(buffer)
        except (OSError, EOFError, zlib.error) as error:
            raise ConfigError(f"{self._file} cannot be read: {_words(error)}.") from error


class _Zstd(RawIOBase):
    """The frames of a .zst file; neither package's own reader tells a file that is cut off from one that ends."""

    def __init__(self, raw: BufferedIOBase, new_frame: Any) -> None:
        self._raw, self._new_frame = raw, new_frame
        self._frame: Any = None
        self._compressed = self._content = b""

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the start of `buffer`; 0 at the end."""
        while not self._content and self._decompress():
            pass
        n = min(len(buffer), len(self._content))
        buffer[:n], self._content = self._content[:n], self._content[n:]
        return n

    def _decompress(self) -> bool:
        """Decompress another block; False at the end of the file."""
        self._compressed = self._compressed or self._raw.read(_COMPRESSED_BLOCK)
        if not self._compressed:
            if self._frame is not None:
                raise EOFError("its compressed data are cut off")
            return False
        self._frame = self._frame or self._new_frame()
        try:
            self._content = self._frame.decompress(self._compressed)
        except Exception as error:  # each package has an error of its own
            raise EOFError(f"its compressed data are damaged ({error})") from error
        self._compressed = b""
        if self._frame.eof:
            self._compressed, self._frame = self._frame.unused_data, None
        return True


def _kind(status: os.stat_result) -> str:
    return "" if stat.S_ISREG(status.st_mode) else _KINDS.get(stat.S_IFMT(status.st_mode), "special file")


def _words(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
