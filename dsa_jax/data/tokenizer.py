"""Text to token ids and back: UTF-8 bytes, or a Hugging Face `tokenizer.json`."""

import hashlib
import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from dsa_jax.config import ConfigError
from dsa_jax.data.line_ends import safe_cuts
from dsa_jax.extras import import_extra

# End-of-text tokens of published tokenizers, most specific first.
_DEEPSEEK_END = "<\N{FULLWIDTH VERTICAL LINE}end\u2581of\u2581sentence\N{FULLWIDTH VERTICAL LINE}>"
END_OF_TEXT_NAMES = ("<|endoftext|>", "<|end_of_text|>", _DEEPSEEK_END, "</s>", "<eos>", "[EOS]")
NO_TOKENIZER = "none"
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}".encode()


@runtime_checkable
class Tokenizer(Protocol):
    """The interface of tokenizers for data and generation."""

    name: str  # in result files
    vocab_size: int  # one more than the largest id
    end_of_text_id: int  # closes every document

    def encode(self, text: str) -> Int[np.ndarray, " N"]:
        """Token ids of `text`, without special tokens."""
        ...

    def encode_prompt(self, text: str) -> Int[np.ndarray, " N"]:
        """Token ids of `text` after the tokenizer's prefix, such as a begin-of-text token."""
        ...

    def decode(self, ids: Sequence[int] | Int[np.ndarray, " N"]) -> str:
        """Text of `ids`."""
        ...


class ByteTokenizer:
    """The 256 byte values of UTF-8, and 256 for the end of a document."""

    name = "bytes"
    vocab_size = 257
    end_of_text_id = 256

    def encode(self, text: str) -> Int[np.ndarray, " N"]:
        """The UTF-8 bytes of `text`."""
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)

    def encode_prompt(self, text: str) -> Int[np.ndarray, " N"]:
        """The UTF-8 bytes of `text`: there is no prefix."""
        return self.encode(text)

    def decode(self, ids: Sequence[int] | Int[np.ndarray, " N"]) -> str:
        """Text of `ids`; the end of a document becomes nothing, invalid UTF-8 and ids that are no byte become U+FFFD."""
        pieces = (
            bytes((token,)) if 0 <= token < 256 else b"" if token == self.end_of_text_id else _REPLACEMENT
            for token in np.asarray(ids, np.int64).tolist()
        )
        return b"".join(pieces).decode("utf-8", errors="replace")


class JsonTokenizer:
    """A `tokenizer.json`, read by the optional `tokenizers` package."""

    def __init__(self, path: str | Path) -> None:
        """Read the file `path`, or `path`/tokenizer.json.

        The end-of-text token is the eos_token of a tokenizer_config.json in the same directory, else a token of a known name,
        else the eos_token_id of a config.json there.

        Raises:
            ConfigError: if the file is missing or unreadable, or no token is known to end a document.
            MissingExtraError: if the `tokenizers` package is not installed, with the command that installs it.
        """
        file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
        if not file.is_file():
            raise ConfigError(f"data.text.tokenizer is {str(path)!r}; expected 'bytes' or the path of a tokenizer.json.")
        tokenizers = import_extra("tokenizers", extra="hf", purpose=str(file))
        try:
            self._tokenizer: Any = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the package raises bare Exception
            raise ConfigError(f"{file} is not a tokenizer.json: {error}") from error
        self.file = file
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        self.name = file.name if file.name != "tokenizer.json" else f"{file.resolve().parent.name}/tokenizer.json"
        self.vocab_size = max(ids.values(), default=-1) + 1
        names = [*_configured_end_of_text(file.with_name("tokenizer_config.json")), *END_OF_TEXT_NAMES]
        known = [ids[name] for name in names if name in ids]
        known += _model_end_ids(file.with_name("config.json"))
        if not known:
            raise ConfigError(
                f"{file} has no token that ends a document; expected one of {', '.join(END_OF_TEXT_NAMES)} or an eos_token in "
                "a tokenizer_config.json beside it."
            )
        self.end_of_text_id = int(known[0])

    def encode(self, text: str) -> Int[np.ndarray, " N"]:
        """Token ids of `text`, without special tokens."""
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_pieces(self, pieces: Sequence[str]) -> list[Int[np.ndarray, " _"]]:
        """Token ids of each piece of a text by itself, without special tokens, on all cores."""
        # Unlike encode_batch it computes no offsets, which take most of its memory.
        encodings = self._tokenizer.encode_batch_fast(list(pieces), add_special_tokens=False)
        return [np.asarray(encoding.ids, np.int32) for encoding in encodings]

    @cached_property
    def cuts(self) -> re.Pattern[str] | None:
        """Places at which a text may be cut, the ids of the pieces being those of the whole; None where none is certain."""
        return safe_cuts(json.loads(self._tokenizer.to_str()))

    @cached_property
    def opening(self) -> Int[np.ndarray, " N"]:
        """What `encode` puts before the ids of the text itself, such as a begin-of-text token."""
        ids = self.encode("a")
        return ids[: ids.size - self.encode_pieces(["a"])[0].size]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all that decides the ids that `encode_pieces` gives."""
        version = import_extra("tokenizers", extra="hf", purpose=str(self.file)).__version__
        settings = f"{version} {self._tokenizer.encode_special_tokens}\n{self._tokenizer.to_str()}"
        return hashlib.sha256(settings.encode()).hexdigest()

    def encode_prompt(self, text: str) -> Int[np.ndarray, " N"]:
        """Token ids of `text` after the prefix of the file's post-processor; its suffix is left out."""
        # The mask marks added tokens; without any text, prefix and suffix would look alike.
        encoding = self._tokenizer.encode(text or "a", add_special_tokens=True)
        added = np.append(np.asarray(encoding.special_tokens_mask, np.int32), 0)
        before = encoding.ids[: int(np.argmin(added))]
        return np.concatenate([np.asarray(before, np.int32), self.encode(text)])

    def decode(self, ids: Sequence[int] | Int[np.ndarray, " N"]) -> str:
        """Text of `ids`; special tokens become nothing, ids beyond the vocabulary become U+FFFD."""
        text, known = [], []
        for token in np.asarray(ids, np.int64).tolist():
            if 0 <= token < self.vocab_size:
                known.append(token)
            else:
                text += [self._tokenizer.decode(known, skip_special_tokens=True), "\N{REPLACEMENT CHARACTER}"]
                known = []
        return "".join([*text, self._tokenizer.decode(known, skip_special_tokens=True)])


def token_dtype(tokenizer: Tokenizer) -> type[np.unsignedinteger[Any]]:
    """The narrower of uint16 and uint32 that holds every id."""
    return np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer that `data.text.tokenizer` names: `bytes`, or the path of a tokenizer.json or its directory.

    Raises:
        ConfigError: for "none", which marks weights that came without one, and where there is no usable file.
    """
    if name == NO_TOKENIZER:
        raise ConfigError(
            "data.text.tokenizer is 'none': the weights came without a tokenizer, so no text can be read. Name one: 'bytes', "
            "or the path of a tokenizer.json."
        )
    return ByteTokenizer() if name == "bytes" else JsonTokenizer(name)


def _configured_end_of_text(file: Path) -> list[str]:
    """The `eos_token` of a tokenizer_config.json, written there as a string or as an object with `content`."""
    if not file.is_file():
        return []
    try:
        token = json.loads(file.read_text(encoding="utf-8")).get("eos_token")
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"{file} is not a JSON object: {error}") from error
    if isinstance(token, dict):
        token = token.get("content")
    return [token] if isinstance(token, str) else []


def _model_end_ids(file: Path) -> list[int]:
    """`eos_token_id` of a model's config.json; empty where that cannot be read, which its own reader reports."""
    try:
        ids = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
    except (OSError, ValueError, AttributeError):
        return []
    return [token for token in (ids if isinstance(ids, list) else [ids]) if type(token) is int]
