"""Documents of a corpus as arrays of token ids, from the standard library's source or the user's own files.

Every document begins as the tokenizer begins a text and ends in its end-of-text id. Nothing is ever unpickled.
"""

import json
import os
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Int

from dsa_jax.config import ConfigError
from dsa_jax.data.tokenizer import Tokenizer

SUFFIXES = (".txt", ".jsonl", ".npy")
# Tests, large vendored trees and installed packages.
STDLIB_LEFT_OUT = frozenset({"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages"})


def stdlib_documents(tokenizer: Tokenizer) -> Iterator[Int[np.ndarray, " N"]]:
    """The Python standard library's own source, one document per `.py` file, sorted by relative path."""
    root = Path(sysconfig.get_path("stdlib"))
    for file in files_below(root, (".py",), STDLIB_LEFT_OUT):
        yield from _text_document(_decode(_read(file), file, 0), tokenizer)


def user_documents(path: str, tokenizer: Tokenizer, *, column: str = "text") -> Iterator[Int[np.ndarray, " N"]]:
    """Documents of a `.txt`, `.jsonl` or `.npy` file, or of all such files below a directory, sorted by relative path.

    A `.txt` file is one document; in a `.jsonl` file each line is an object whose `column` is one; a `.npy` file holds token
    ids, and a document ends after each end-of-text id. Empty documents, blank lines, and other or hidden files in a directory
    are skipped.

    Raises:
        ConfigError: for a path that is missing, unreadable, of an unknown kind, or whose content does not match its suffix.
    """
    root = Path(path)
    if root.is_dir():
        files = files_below(root, SUFFIXES, frozenset())
        if not files:
            raise ConfigError(f"data.text.path is {path!r}, a directory without a {', '.join(SUFFIXES)} file.")
    elif root.is_file():
        files = [root]
    else:
        raise ConfigError(f"data.text.path is {path!r}, which does not exist. Expected a file or a directory.")
    for file in files:
        if file.suffix == ".txt":
            yield from _text_document(_decode(_read(file), file, 0), tokenizer)
        elif file.suffix == ".jsonl":
            yield from _jsonl_documents(file, tokenizer, column)
        elif file.suffix == ".npy":
            yield from _token_documents(file, tokenizer)
        else:
            raise ConfigError(f"{file} has suffix {file.suffix!r}; expected one of {', '.join(SUFFIXES)}, or a directory.")


def files_below(root: Path, suffixes: tuple[str, ...], left_out: frozenset[str]) -> list[Path]:
    """Files below `root` with one of `suffixes`, by relative path; neither hidden ones nor folders `left_out`."""
    found: list[Path] = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in left_out and not name.startswith(".")]
        found += [Path(folder, name) for name in names if name.endswith(suffixes) and not name.startswith(".")]
    return sorted(found, key=lambda file: file.relative_to(root).as_posix())


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}.") from error


def _decode(content: bytes, file: Path, first_byte: int) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{file} is not UTF-8: {error.reason} at byte {first_byte + error.start}. Convert it, or remove it from the corpus."
        ) from error


def unpaired_surrogate(text: str) -> str:
    """The first code point of `text` that UTF-8 cannot hold; empty where there is none."""
    found = re.search(r"[\ud800-\udfff]", text)
    return found[0] if found else ""


def _text_document(text: str, tokenizer: Tokenizer) -> Iterator[Int[np.ndarray, " N"]]:
    if text:
        yield np.append(tokenizer.encode_prompt(text), tokenizer.end_of_text_id)


def _jsonl_documents(file: Path, tokenizer: Tokenizer, column: str) -> Iterator[Int[np.ndarray, " N"]]:
    first_byte = 0
    for number, line in enumerate(_read(file).split(b"\n"), start=1):
        text = _decode(line, file, first_byte)
        first_byte += len(line) + 1
        if not text.strip():
            continue
        try:
            record = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"{file}, line {number} is not JSON: {error}. Expected one object per line.") from error
        if not isinstance(record, dict) or not isinstance(record.get(column), str):
            raise ConfigError(
                f'{file}, line {number} has no "{column}" string; expected an object such as {{"{column}": "..."}}. '
                "data.text.column names the field that holds the text."
            )
        if half := unpaired_surrogate(record[column]):
            raise ConfigError(
                f"{file}, line {number} holds {half!r}, half of a surrogate pair, which is no character. Repair or remove it."
            )
        yield from _text_document(record[column], tokenizer)


def _token_documents(file: Path, tokenizer: Tokenizer) -> Iterator[Int[np.ndarray, " N"]]:
    # open_memmap never unpickles: it refuses object arrays and files that are not .npy.
    try:
        ids = np.lib.format.open_memmap(file, mode="r")
    except (ValueError, OSError, EOFError) as error:
        raise ConfigError(
            f"{file} is not a plain .npy array: {error} Save token ids with numpy.save and an integer dtype."
        ) from error
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ConfigError(f"{file} has shape {ids.shape} and dtype {ids.dtype}; expected 1-D integer token ids.")
    if not ids.size:
        return
    lowest, highest = int(ids.min()), int(ids.max())
    if lowest < 0 or highest >= tokenizer.vocab_size:
        raise ConfigError(
            f"{file} holds token ids from {lowest} to {highest}; expected 0 to {tokenizer.vocab_size - 1}, the vocabulary of "
            f"tokenizer {tokenizer.name!r}. Set data.text.tokenizer to the one that made the file."
        )
    ends = np.flatnonzero(ids == tokenizer.end_of_text_id) + 1
    for document in np.split(ids, ends):
        if document.size and document[-1] != tokenizer.end_of_text_id:
            yield np.append(document, tokenizer.end_of_text_id)
        elif document.size > 1:
            yield np.asarray(document)
