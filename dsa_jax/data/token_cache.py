"""Token ids on disk, found by what they are the ids of: the tokenizer and the text, wherever these lie.

A file is written whole or not at all, holds a checksum of itself, and may be deleted at any time.
"""

import hashlib
import io
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, UInt

from dsa_jax.config import ConfigError
from dsa_jax.config.checks import user_path
from dsa_jax.data.regular_files import read_regular
from dsa_jax.run.files import RunError, atomic_write_bytes

_LOG = logging.getLogger(__name__)
VARIABLE = "DSA_JAX_CACHE"
_VERSION = 1  # of the files and of what is hashed
_DIGEST_BYTES = hashlib.sha256().digest_size
_LEFT_BEHIND_SECONDS = 24 * 3600

Ids = Int[np.ndarray, " _"] | UInt[np.ndarray, " _"]


def default_cache() -> "TokenCache | None":
    """The cache in the directory that DSA_JAX_CACHE names, else in the user's cache directory; None where there is none."""
    if chosen := os.environ.get(VARIABLE):
        return TokenCache(user_path(VARIABLE, chosen) / "tokens")
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return None
    return TokenCache(home / "dsa-jax" / "tokens")


class TokenCache:
    """Lists of arrays of token ids in the files of one directory, which is made when the first is written."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def key(self, tokenizer: str, dtype: Any, texts: Sequence[str]) -> str:
        """The name of the ids of `texts`; `tokenizer` is the digest of all that decides them."""
        digest = hashlib.sha256(f"{_VERSION} {tokenizer} {np.dtype(dtype).str}\n".encode())
        for text in texts:
            content = text.encode()
            digest.update(len(content).to_bytes(8, "little"))
            digest.update(content)
        return digest.hexdigest()

    def read(self, key: str, *, n: int) -> list[Ids] | None:
        """The `n` arrays of ids that were written under `key`; None where there are none, or where they are damaged."""
        file = self._file(key)
        if not file.exists():
            return None
        try:
            content = read_regular(file)
            if hashlib.sha256(content[_DIGEST_BYTES:]).digest() != content[:_DIGEST_BYTES]:
                raise ValueError("its checksum is another")
            stream = io.BytesIO(content[_DIGEST_BYTES:])
            lengths, tokens = (np.lib.format.read_array(stream, allow_pickle=False) for _ in range(2))
            if lengths.size != n or lengths.sum() != tokens.size:
                raise ValueError("it holds another number of tokens")
        except (ConfigError, ValueError) as error:
            _LOG.warning("%s is damaged (%s): the text is tokenized again", file, error)
            return None
        return np.split(tokens, np.cumsum(lengths)[:-1])

    def write(self, key: str, ids: Sequence[Ids]) -> None:
        """Keep `ids`, of one dtype and at least one array; where that fails, one line says so."""
        content = io.BytesIO()
        for array in (np.array([each.size for each in ids], np.int64), np.concatenate(ids)):
            np.lib.format.write_array(content, array, allow_pickle=False)
        body = content.getvalue()
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._remove_left_behind()
            atomic_write_bytes(self._file(key), hashlib.sha256(body).digest() + body)
        except (OSError, RunError) as error:
            reason = error.__cause__ or error
            _LOG.warning("tokens are not kept in %s (%s); %s names another directory", self._directory, reason, VARIABLE)

    def _file(self, key: str) -> Path:
        return self._directory / f"{key}.tokens"

    def _remove_left_behind(self) -> None:
        """Delete what processes that were killed while writing have left."""
        for file in self._directory.glob(".*.tmp"):
            if time.time() - file.stat().st_mtime > _LEFT_BEHIND_SECONDS:
                file.unlink(missing_ok=True)
