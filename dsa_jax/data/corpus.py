"""A tokenized corpus in memory: training split, held-out split, provenance."""

import hashlib
import platform
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, UInt

from dsa_jax.config import ConfigError, TextConfig
from dsa_jax.data.documents import stdlib_documents, user_documents
from dsa_jax.data.encoding import encode_documents
from dsa_jax.data.packing import TokenStream, make_stream
from dsa_jax.data.split import digest, split_documents
from dsa_jax.data.token_cache import default_cache
from dsa_jax.data.tokenizer import Tokenizer, token_dtype


class Corpus(NamedTuple):
    """Training and held-out split, and their provenance; `train` is None where that is streamed."""

    train: TokenStream | None
    held_out: TokenStream
    provenance: dict[str, Any]

    def require(self, sha256: str | None) -> None:
        """Check that this is the text of that `sha256`, wherever it lies; other text splits differently, in another order.

        Raises:
            ConfigError: where it is not.
        """
        if sha256 != self.provenance["sha256"]:
            raise ConfigError(
                f"the text of {self.provenance['source']} is not the text that the run was trained on so far (data.text.path): "
                "what is held out now may have been trained on. Expected files of the same content, wherever they lie, the "
                "same tokenizer, and of python-stdlib the same version of Python. Name them, or start another run."
            )

    def describe(self) -> dict[str, Any]:
        """Provenance of the text, for result files: JSON values.

        `sha256` covers the token ids of every document in order, before the split; `split_unit` is "piece" where documents
        had to be cut to fill both splits; `python` is there when the text is the standard library, which varies with it.
        """
        splits = {"train": self.train, "held_out": self.held_out}
        n_documents = {name: split.starts.size for name, split in splits.items() if split}
        n_tokens = {name: split.tokens.size for name, split in splits.items() if split}
        return {**self.provenance, "n_documents": n_documents, "n_tokens": n_tokens}


def load_corpus(config: TextConfig, tokenizer: Tokenizer) -> Corpus:
    """Read, tokenize and split the corpus that `config` names; the same files give the same arrays, wherever they lie.

    Token ids are held in memory, in two bytes each where the vocabulary allows it. Those of a tokenizer.json are kept in
    `token_cache.default_cache`, so that the same text is tokenized once.

    Args:
        config: an empty `path` means the source of the running Python's standard library; `max_tokens` keeps that many tokens
            from the start (end-of-text ids counted), cutting the last document short.
        tokenizer: the one `config.tokenizer` names.

    Raises:
        ConfigError: for a corpus without text, and whatever `documents.user_documents` refuses.
    """
    documents = user_documents(config.path, tokenizer, column=config.column) if config.path else stdlib_documents()
    encoded = encode_documents(tokenizer, documents, cache=default_cache(), max_tokens=config.max_tokens)
    limited = _limited(encoded, config.max_tokens, tokenizer.end_of_text_id)
    kept = [document.astype(token_dtype(tokenizer)) for document in limited]
    if not kept:
        limit = f" within data.text.max_tokens ({config.max_tokens})" if config.max_tokens else ""
        raise ConfigError(
            f"data.text.path is {config.path!r} and holds no text{limit}; expected at least one document that is not empty."
        )
    digests = [digest(document) for document in kept]
    split = split_documents(kept, digests, config.held_out_fraction)
    provenance: dict[str, Any] = {
        "source": config.path or "python-stdlib",
        "tokenizer": tokenizer.name,
        "sha256": hashlib.sha256(b"".join(digests)).hexdigest(),
        "split_unit": split.unit,
    }
    if not config.path:
        provenance["python"] = platform.python_version()
    return Corpus(make_stream(split.train), make_stream(split.held_out), provenance)


def _limited(
    documents: Iterable[Int[np.ndarray, " _"] | UInt[np.ndarray, " _"]], max_tokens: int, end_of_text_id: int
) -> Iterator[Int[np.ndarray, " _"] | UInt[np.ndarray, " _"]]:
    """`documents` up to `max_tokens` (0: all); the last is truncated and closed, or left out if one token is left."""
    if not max_tokens:
        yield from documents
        return
    left = max_tokens
    for document in documents:
        if document.size >= left:
            if left > 1:
                yield np.append(document[: left - 1], end_of_text_id)
            return
        yield document
        left -= document.size
