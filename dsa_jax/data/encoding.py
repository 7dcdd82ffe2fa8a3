"""Documents to token ids: cut into pieces at line ends, tokenized on all cores, and read from the cache where possible."""

import logging
import os
import re
import time
from collections.abc import Iterable, Iterator

import numpy as np
from jaxtyping import Int, UInt

from dsa_jax.data.documents import Document
from dsa_jax.data.token_cache import TokenCache
from dsa_jax.data.tokenizer import JsonTokenizer, Tokenizer, token_dtype

_LOG = logging.getLogger(__name__)
PIECE = 2**15
"""Characters of a piece: up to the first cut after so many. The tokenizers package takes some 170 bytes for each of them."""
_BATCH = 2**24  # characters of the pieces that are cached together
_AT_ONCE = 2**17  # characters that a core tokenizes before their memory is free again
_WORTH_KEEPING = 2**18  # characters; fewer are tokenized faster than they are found
_LONG = 2**20
_SECONDS_BETWEEN_LINES = 10.0

Ids = Int[np.ndarray, " _"] | UInt[np.ndarray, " _"]


def encode_documents(
    tokenizer: Tokenizer, documents: Iterable[Document], *, cache: TokenCache | None = None, max_tokens: int = 0
) -> Iterator[Ids]:
    """Ids of each document that has any text, closed by the end-of-text id: `encode_prompt` of the whole text.

    Args:
        tokenizer: a `JsonTokenizer` reads text piece by piece where it surely gives the same ids so; others read it whole.
        documents: those that are token ids already are given on.
        cache: where ids of earlier calls are found, and kept; None: nowhere.
        max_tokens: what is wanted (0: everything); a longer text is not read to its end, and its document not closed.
    """
    if not isinstance(tokenizer, JsonTokenizer):
        for document in documents:
            if isinstance(document, np.ndarray):
                yield document
            elif text := "".join(document):
                yield np.append(tokenizer.encode_prompt(text), tokenizer.end_of_text_id)
        return
    encoder, parts, n_tokens = _Encoder(tokenizer, cache), list[Ids](), 0
    # A token is seldom longer than eight characters, so that one batch has what is wanted, and little more.
    batch = min(_BATCH, 8 * max_tokens) if max_tokens else _BATCH
    for some in _batches(_pieces(documents, tokenizer), batch):
        if isinstance(some, np.ndarray):
            n_tokens += some.size
            yield some
            continue
        for ids, (_, is_last) in zip(encoder.encode([text for text, _ in some]), some, strict=True):
            if not parts and not np.array_equal(ids[: tokenizer.opening.size], tokenizer.opening):
                parts.append(tokenizer.opening)
            parts.append(ids)
            n_tokens += ids.size
            is_enough = bool(max_tokens) and n_tokens >= max_tokens
            if is_last or is_enough:
                end = [tokenizer.end_of_text_id] if is_last else []
                yield np.concatenate([*parts, np.array(end, np.int32)]).astype(np.int32)
                parts = []
            if is_enough:
                return


def encode_document(tokenizer: Tokenizer, text: str) -> Ids:
    """Ids of one document as by `encode_documents`; none for an empty text."""
    return next(encode_documents(tokenizer, [iter([text])]), np.zeros(0, np.int32))


def cut_at(cuts: re.Pattern[str] | None, blocks: Iterable[str], size: int) -> Iterator[str]:
    """The text of `blocks` in pieces: each up to the first of `cuts` after `size` characters; None: as one piece.

    `cuts` matches places, by at most two characters before and after. No piece is empty.
    """
    held: list[str] = []
    n_held, seam = 0, ""
    for block in blocks:
        window, start = seam + block, len(seam)
        position = max(start + size - n_held, 0)
        while cuts and position <= len(window) and (found := cuts.search(window, position)):
            # A place in the seam belongs to what is held already.
            if found.start() < start:
                text = "".join(held)
                back = start - found.start()
                yield text[:-back]
                held, start = [text[-back:]], start
                n_held = back
            else:
                yield "".join([*held, window[start : found.start()]])
                held, n_held, start = [], 0, found.start()
            position = start + size - n_held
        if start < len(window):
            held.append(window[start:])
            n_held += len(window) - start
        seam = window[-2:]
    if held:
        yield "".join(held)


def _pieces(documents: Iterable[Document], tokenizer: JsonTokenizer) -> Iterator[tuple[str, bool] | Ids]:
    """(piece, whether it is the last of its document), or the ids of a document."""
    for document in documents:
        if isinstance(document, np.ndarray):
            yield document
            continue
        before = ""
        for number, piece in enumerate(cut_at(tokenizer.cuts, document, PIECE)):
            if before:
                yield before, False
            before = piece if number else piece.removeprefix(tokenizer.spelled_opening)
            if len(piece) > _LONG:
                _LOG.warning(
                    "a document has %.1f million characters that are tokenized at once, at some 170 bytes of memory each: %s",
                    *(len(piece) / 1e6, _why_whole(tokenizer.cuts)),
                )
        if before:
            yield before, True


def _why_whole(cuts: re.Pattern[str] | None) -> str:
    if cuts:
        return "it has no line end where the tokenizer surely begins anew"
    return "this tokenizer may give other ids to text that is cut at line ends"


def _batches(items: Iterable[tuple[str, bool] | Ids], size: int) -> Iterator[list[tuple[str, bool]] | Ids]:
    """Pieces of at least `size` characters together; ids stay alone."""
    pending: list[tuple[str, bool]] = []
    n_pending = 0
    for item in items:
        if isinstance(item, np.ndarray):
            if pending:
                yield pending
            yield item
            pending, n_pending = [], 0
            continue
        pending.append(item)
        n_pending += len(item[0])
        if n_pending >= size:
            yield pending
            pending, n_pending = [], 0
    if pending:
        yield pending


class _Encoder:
    """Tokenizes pieces, or finds them in the cache, and says now and then how far it is."""

    def __init__(self, tokenizer: JsonTokenizer, cache: TokenCache | None) -> None:
        self._tokenizer, self._cache, self._dtype = tokenizer, cache, token_dtype(tokenizer)
        self._n_characters = self._n_tokens = 0
        self._started = self._said = time.monotonic()

    def encode(self, texts: list[str]) -> list[Ids]:
        """Ids of each of `texts`."""
        if not self._cache or sum(map(len, texts)) < _WORTH_KEEPING:
            return self._computed(texts)
        key = self._cache.key(self._tokenizer.digest, self._dtype, texts)
        found = self._cache.read(key, n=len(texts))
        if found is None:
            found = self._computed(texts)
            self._cache.write(key, found)
        return found

    def _computed(self, texts: list[str]) -> list[Ids]:
        found: list[Ids] = []
        for some in _batches(((text, True) for text in texts), _AT_ONCE * min(os.cpu_count() or 1, 16)):
            pieces = [text for text, _ in some]
            found += [ids.astype(self._dtype) for ids in self._tokenizer.encode_pieces(pieces)]
            self._tell(sum(map(len, pieces)), sum(ids.size for ids in found[-len(pieces) :]))
        return found

    def _tell(self, n_characters: int, n_tokens: int) -> None:
        self._n_characters += n_characters
        self._n_tokens += n_tokens
        now = time.monotonic()
        if now - self._said >= _SECONDS_BETWEEN_LINES:
            rate = self._n_characters / (now - self._started) / 1e6
            _LOG.info(
                "tokenized %.1f million characters of text, %.2f million tokens, %.2f million characters per second",
                *(self._n_characters / 1e6, self._n_tokens / 1e6, rate),
            )
            self._said = now
