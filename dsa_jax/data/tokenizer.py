"""Text to token ids and back: UTF-8 bytes, or a Hugging Face `tokenizer.json`."""

import hashlib
import json
import logging
import math
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from dsa_jax.config import ConfigError
from dsa_jax.data.line_ends import safe_cuts
from dsa_jax.data.tokenizer_settings import TokenizerSettings, read_settings
from dsa_jax.extras import import_extra

_LOG = logging.getLogger(__name__)

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
        """Token ids of `text`, with nothing before or after."""
        ...

    def encode_prompt(self, text: str) -> Int[np.ndarray, " N"]:
        """Token ids of `text` as every text begins, prompt or document: after begin-of-text, or what else is the prefix.

        A text that has the prefix already gets no second one.
        """
        ...

    def decode(self, ids: Sequence[int] | Int[np.ndarray, " N"], *, control_tokens: bool = False) -> str:
        """Text of `ids`; control tokens become nothing, or are spelled out."""
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

    def decode(self, ids: Sequence[int] | Int[np.ndarray, " N"], *, control_tokens: bool = False) -> str:
        """Text of `ids`; the end of a document, which has no spelling, becomes nothing, invalid UTF-8 and other ids U+FFFD."""
        del control_tokens
        pieces = (
            bytes((token,)) if 0 <= token < 256 else b"" if token == self.end_of_text_id else _REPLACEMENT
            for token in np.asarray(ids, np.int64).tolist()
        )
        return b"".join(pieces).decode("utf-8", errors="replace")


class JsonTokenizer:
    """A `tokenizer.json`, read by the optional `tokenizers` package, with the tokens that files beside it add."""

    def __init__(self, path: str | Path, *, control_tokens: bool = True) -> None:
        """Read the file `path`, or `path`/tokenizer.json.

        Tokens of `added_tokens_decoder`, added_tokens.json and the lists of special tokens belong to it, as in transformers.
        The end-of-text token is the eos_token of tokenizer_config.json or special_tokens_map.json, else a token of a known
        name, else the eos_token_id of a config.json there. A text begins with what the post-processor puts before it, and with
        the bos_token before that where tokenizer_config.json sets `add_bos_token` and the post-processor adds none.

        Truncation, padding and dropout of merges, settings of somebody's training, are ignored.

        Args:
            path: the file or its directory.
            control_tokens: whether text that spells a special token, such as `<|endoftext|>`, becomes it. Where not, and the
                vocabulary has that spelling as a piece of text, the text is cut within it.

        Raises:
            ConfigError: if a file is missing or unreadable, the eos_token, or a bos_token to be added, is none of the tokens,
                or no token is known to end a document.
            MissingExtraError: if the `tokenizers` package is not installed, with the command that installs it.
        """
        file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
        if not file.is_file():
            raise ConfigError(f"data.text.tokenizer is {str(path)!r}; expected 'bytes' or the path of a tokenizer.json.")
        tokenizers = import_extra("tokenizers", extra="hf", purpose=str(file))
        settings = read_settings(file.parent)
        try:
            self._tokenizer: Any = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the package raises bare Exception
            raise ConfigError(f"{file} is not a tokenizer.json: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        if hasattr(self._tokenizer.model, "dropout"):
            self._tokenizer.model.dropout = None
        _declare(self._tokenizer, tokenizers.AddedToken, settings, file)
        self._tokenizer.encode_special_tokens = not control_tokens
        self._reads_control = control_tokens
        self.file = file
        self.name = file.name if file.name != "tokenizer.json" else f"{file.resolve().parent.name}/tokenizer.json"
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        self._control = {id: each.content for id, each in self._tokenizer.get_added_tokens_decoder().items() if each.special}
        self.end_of_text_id = _end_of_text(ids, settings, file)
        opening = _opening(self._tokenizer, ids, settings, file)
        self.opening = np.asarray(opening, np.int32)
        # Where control tokens are not read, an opening that a text spells at its very start still counts as one.
        is_spelled = not control_tokens and all(token in self._control for token in opening)
        self.spelled_opening = "".join(self._control[token] for token in opening) if is_spelled else ""
        # Control tokens for which the model has no embedding, such as a padding token that was added later, are never used.
        used = {self.end_of_text_id, *opening}
        limit = math.inf if settings.vocab_size is None else settings.vocab_size
        counted = (id for id in ids.values() if id < limit or id not in self._control or id in used)
        self.vocab_size = max(counted, default=-1) + 1

    def encode(self, text: str) -> Int[np.ndarray, " N"]:
        """Token ids of `text`, with nothing before or after.

        Raises:
            ConfigError: for text that spells a control token beyond the vocabulary of the model beside the tokenizer.
        """
        return self._checked(text, self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_pieces(self, pieces: Sequence[str]) -> list[Int[np.ndarray, " _"]]:
        """Token ids of each piece of a text by itself, on all cores; raises as `encode` does."""
        # Unlike encode_batch it computes no offsets, which take most of its memory.
        encodings = self._tokenizer.encode_batch_fast(list(pieces), add_special_tokens=False)
        return [self._checked(piece, encoding.ids) for piece, encoding in zip(pieces, encodings, strict=True)]

    def _checked(self, text: str, ids: Sequence[int]) -> Int[np.ndarray, " N"]:
        tokens = np.asarray(ids, np.int32)
        if not self._reads_control and len(parts := self._apart(text, tokens)) > 1:
            return np.concatenate([self.encode(part) for part in parts])
        if tokens.size and tokens.max() >= self.vocab_size:
            token = int(tokens.max())
            raise ConfigError(
                f"a text holds {self._control[token]!r}, token {token} of {self.file}, for which the model beside it has no "
                f"embedding; expected tokens below {self.vocab_size}. Take it out of the text."
            )
        return tokens

    def _apart(self, text: str, tokens: Int[np.ndarray, " N"]) -> list[str]:
        """`text` cut within each spelling of a control token among its `tokens`.

        The package keeps added tokens out of a text, but a vocabulary may have their spellings as pieces or by merges, too.
        """
        found = np.unique(tokens[np.isin(tokens, [*self._control])]).tolist()
        spelled = [each for id in found if len(each := self._control[id]) > 1 and each in text]
        return re.split("|".join(f"(?<={re.escape(each[0])})(?={re.escape(each[1:])})" for each in spelled) or r"\Z.", text)

    @cached_property
    def cuts(self) -> re.Pattern[str] | None:
        """Places at which a text may be cut, the ids of the pieces being those of the whole; None where none is certain."""
        return safe_cuts(json.loads(self._tokenizer.to_str()))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all that decides the ids that `encode_pieces` gives."""
        version = import_extra("tokenizers", extra="hf", purpose=str(self.file)).__version__
        settings = f"{version} {'all tokens' if self._reads_control else 'no control tokens'}\n{self._tokenizer.to_str()}"
        return hashlib.sha256(settings.encode()).hexdigest()

    def encode_prompt(self, text: str) -> Int[np.ndarray, " N"]:
        """Token ids of `text` after `opening`, such as a begin-of-text token, unless it begins with that already."""
        ids = self.encode(text.removeprefix(self.spelled_opening))
        has_opening = np.array_equal(ids[: self.opening.size], self.opening)
        return ids if has_opening else np.concatenate([self.opening, ids])

    def decode(self, ids: Sequence[int] | Int[np.ndarray, " N"], *, control_tokens: bool = False) -> str:
        """Text of `ids`; control tokens become nothing unless `control_tokens`, ids beyond the vocabulary U+FFFD."""
        text, known = [], []
        for token in np.asarray(ids, np.int64).tolist():
            if 0 <= token < self.vocab_size:
                known.append(token)
            else:
                text += [self._decode(known, control_tokens), "\N{REPLACEMENT CHARACTER}"]
                known = []
        return "".join([*text, self._decode(known, control_tokens)])

    def _decode(self, ids: list[int], control_tokens: bool) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=not control_tokens)


def token_dtype(tokenizer: Tokenizer) -> type[np.unsignedinteger[Any]]:
    """The narrower of uint16 and uint32 that holds every id."""
    return np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32


def load_tokenizer(name: str, *, control_tokens: bool = True) -> Tokenizer:
    """The tokenizer that `data.text.tokenizer` names: `bytes`, or the path of a tokenizer.json or its directory.

    Args:
        name: the value of `data.text.tokenizer`.
        control_tokens: whether text that spells a control token becomes it: `data.text.control_tokens` for a corpus.

    Raises:
        ConfigError: for "none", which marks weights that came without one, and where there is no usable file.
    """
    if name == NO_TOKENIZER:
        raise ConfigError(
            "data.text.tokenizer is 'none': the weights came without a tokenizer, so no text can be read. Name one: 'bytes', "
            "or the path of a tokenizer.json."
        )
    return ByteTokenizer() if name == "bytes" else JsonTokenizer(name, control_tokens=control_tokens)


def _declare(tokenizer: Any, added_token: Any, settings: TokenizerSettings, file: Path) -> None:
    """Add the tokens of `settings` to a tokenizer of the `tokenizers` package, and register begin and end of text as special.

    A token that the model has no embedding for is left out, and so is one whose id the tokenizer cannot give it.
    """
    present = tokenizer.get_added_tokens_decoder()
    # The id that the package gives to the next new token.
    free = max(tokenizer.get_vocab_size(with_added_tokens=False), max(present, default=-1) + 1)
    added = []
    for content, stated, flags in settings.declared:
        token, given = added_token(content, **flags), tokenizer.token_to_id(content)
        if given is None and stated in (None, free):
            if settings.vocab_size is None or free < settings.vocab_size:
                added.append(token)
                free += 1
        elif given is None:
            _LOG.warning("%s: %r is left out: its id would be %d, not %d as a file beside says", file, content, free, stated)
        else:
            if stated not in (None, given):
                _LOG.warning("%s: %r has id %d, not %d as a file beside says", file, content, given, stated)
            added += [token] if present.get(given) != token else []
    tokenizer.add_tokens(added)
    special = {each.content for each in tokenizer.get_added_tokens_decoder().values() if each.special}
    bounds = [settings.roles[role] for role in ("bos_token", "eos_token") if role in settings.roles]
    tokenizer.add_special_tokens([text for text in bounds if text not in special and tokenizer.token_to_id(text) is not None])


def _end_of_text(ids: dict[str, int], settings: TokenizerSettings, file: Path) -> int:
    stated = settings.roles.get("eos_token")
    if stated is not None:
        if stated not in ids:
            raise ConfigError(
                f"the eos_token beside {file} is {stated!r}, which is none of its tokens; expected one of them. Name that in "
                "tokenizer_config.json, or give this one an id in its added_tokens_decoder."
            )
        return ids[stated]
    known = [ids[name] for name in END_OF_TEXT_NAMES if name in ids] + settings.end_ids
    if not known:
        raise ConfigError(
            f"{file} has no token that ends a document; expected one of {', '.join(END_OF_TEXT_NAMES)} or an eos_token in a "
            "tokenizer_config.json beside it."
        )
    return known[0]


def _opening(tokenizer: Any, ids: dict[str, int], settings: TokenizerSettings, file: Path) -> list[int]:
    """The token ids with which a text begins."""
    # The mask marks added tokens; without any text, prefix and suffix would look alike.
    encoding = tokenizer.encode(next((text for text in ("a", *ids) if _is_text(tokenizer, text)), ""), add_special_tokens=True)
    before = encoding.ids[: [*encoding.special_tokens_mask, 0].index(0)]
    if not settings.add_bos:
        return before
    stated = settings.roles.get("bos_token")
    if stated not in ids:
        raise ConfigError(
            f"add_bos_token is true in the tokenizer_config.json beside {file}, but its bos_token is {stated!r}; expected one "
            "of the tokens. Name that, or set add_bos_token to false."
        )
    return before if ids[stated] in before else [ids[stated], *before]


def _is_text(tokenizer: Any, text: str) -> bool:
    """Whether `text` has tokens; the package raises a bare Exception for what a tokenizer without an unknown token lacks."""
    try:
        return bool(tokenizer.encode(text, add_special_tokens=False).ids)
    except Exception:
        return False
