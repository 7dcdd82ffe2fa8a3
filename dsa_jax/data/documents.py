"""Documents of a corpus, from the standard library's source or the user's own files: as text, or as token ids.

Nothing is ever unpickled, and no text file is held whole.
"""

import json
import os
import re
import sysconfig
from collections.abc import Iterator
from io import BufferedIOBase
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt

from dsa_jax.config import ConfigError
from dsa_jax.data.found_files import find_files
from dsa_jax.data.regular_files import COMPRESSED, decoded, opened, reads_zstd, special_kind, text_blocks
from dsa_jax.data.tokenizer import Tokenizer

TEXT = (".txt", ".md")
KINDS = (*TEXT, ".jsonl", ".npy")
EXPECTED = ".txt, .md, .jsonl (each perhaps .gz or .zst) or .npy"
# Tests, large vendored trees and installed packages.
STDLIB_LEFT_OUT = frozenset({"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages"})

Document = Iterator[str] | Int[np.ndarray, " _"] | UInt[np.ndarray, " _"]
"""The blocks of a text, to be read before the next document is taken; or token ids, which end in the end-of-text id."""


def stdlib_documents() -> Iterator[Document]:
    """The Python standard library's own source, one document per `.py` file, sorted by relative path."""
    root = Path(sysconfig.get_path("stdlib"))
    found: list[Path] = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in STDLIB_LEFT_OUT and not name.startswith(".")]
        found += [Path(folder, name) for name in names if name.endswith(".py") and not name.startswith(".")]
    for file in sorted(found, key=lambda file: file.relative_to(root).as_posix()):
        with opened(file) as stream:
            yield text_blocks(stream, file)


def user_documents(path: str, tokenizer: Tokenizer, *, column: str = "text") -> Iterator[Document]:
    """Documents of the files that `path` names, by `found_files.find_files`.

    A `.txt` or `.md` file is one document; in a `.jsonl` file each line is an object whose `column` is one, null an empty one;
    a `.npy` file holds token ids, and a document ends after each end-of-text id. Text may be compressed (`.gz`, and `.zst`
    where a package reads it). The case of a suffix does not matter. Other files in a directory are left out.

    Raises:
        ConfigError: for a path that is missing, unreadable, of an unknown kind, or whose content does not match its suffix.
        MissingExtraError: for a path that is a .zst file where no package reads one.
    """
    files = find_files(path, _refusal)
    if not files:
        raise ConfigError(f"data.text.path is {path!r}, where no file is {EXPECTED}.")
    for file in files:
        kind = _kind(file.name)
        if not kind:
            raise ConfigError(f"{file} has suffix {file.suffix!r}; expected {EXPECTED}, or a directory.")
        if kind == ".npy":
            yield from _token_documents(file, tokenizer)
            continue
        with opened(file) as stream:
            if kind == ".jsonl":
                yield from _jsonl_documents(stream, file, column)
            else:
                yield text_blocks(stream, file)


def _kind(name: str) -> str:
    """One of `KINDS`, or "" for a file of another name."""
    path = Path(name.lower())
    inner = Path(path.stem) if path.suffix in COMPRESSED else path
    return inner.suffix if inner.suffix in KINDS and not (inner is not path and inner.suffix == ".npy") else ""


def _refusal(name: str) -> str:
    """Why a file in a directory is not read; "" where it is."""
    if not _kind(name):
        return f"{Path(name).suffix.lower() or 'suffixless'} files"
    return "" if not name.lower().endswith(".zst") or reads_zstd() else ".zst files, which need `pip install zstandard`,"


def unpaired_surrogate(text: str) -> str:
    """The first code point of `text` that UTF-8 cannot hold; empty where there is none."""
    found = re.search(r"[\ud800-\udfff]", text)
    return found[0] if found else ""


def _jsonl_documents(stream: BufferedIOBase, file: Path, column: str) -> Iterator[Document]:
    first_byte = 0
    for number, line in enumerate(stream, start=1):
        text = decoded(line, file, first_byte)
        first_byte += len(line)
        if not text.strip():
            continue
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{file}, line {number} is not JSON: {error}. Expected one object per line.") from error
        if not isinstance(record, dict) or not isinstance(record.get(column, 0), str | None):
            raise ConfigError(
                f'{file}, line {number} has no "{column}" string; expected an object such as {{"{column}": "..."}}. '
                "data.text.column names the field that holds the text."
            )
        if half := unpaired_surrogate(record[column] or ""):
            raise ConfigError(
                f"{file}, line {number} holds {half!r}, half of a surrogate pair, which is no character. Repair or remove it."
            )
        yield iter([record[column] or ""])


def _token_documents(file: Path, tokenizer: Tokenizer) -> Iterator[Document]:
    if kind := special_kind(file):
        raise ConfigError(f"{file} is a {kind}; expected a regular file.")
    # open_memmap never unpickles: it refuses object arrays and files that are not .npy.
    try:
        ids = np.lib.format.open_memmap(file, mode="r")
    except Exception as error:  # a damaged header ends in errors of many kinds, of the tokenizer of Python among them
        raise ConfigError(
            f"{file} is not a plain .npy array ({error}). Save token ids with numpy.save and an integer dtype."
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
