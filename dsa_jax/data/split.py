"""Training and held-out split of documents, by a hash of their content."""

import hashlib
import math
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt

Document = UInt[np.ndarray, " _"]  # lengths differ

MAX_PIECES = 1024


class Split(NamedTuple):
    """The two splits, each in corpus order, neither empty."""

    train: list[Document]
    held_out: list[Document]
    unit: str  # "document", or "piece" where whole documents could not be divided


def digest(document: Document) -> bytes:
    """SHA-256 of the token ids, whatever width they are stored in."""
    return hashlib.sha256(document.astype("<u4").tobytes()).digest()


def is_held_out(digest: bytes, held_out_fraction: float) -> bool:
    """Whether a document's hash, as a fraction of its range, is below `held_out_fraction`."""
    return int.from_bytes(digest[:8], "big") < held_out_fraction * 2.0**64


def split_documents(documents: Sequence[Document], digests: Sequence[bytes], held_out_fraction: float) -> Split:
    """Hold out the documents that `is_held_out` selects.

    The split of a document depends on its content alone: adding or removing others does not move it, and copies stay
    together. Where that leaves a split with less than a quarter of its share of the tokens (few documents, or one), documents
    are cut into pieces of equal length instead, the pieces with the lowest hashes are held out, and neighbours in one split
    are joined again. Equal pieces may then fall into both splits.

    Args:
        documents: each with at least one token, at least two tokens together.
        digests: `digest` of each.
        held_out_fraction: share of the tokens, between 0 and 1, exclusive.
    """
    sides = [is_held_out(d, held_out_fraction) for d in digests]
    n_tokens = sum(document.size for document in documents)
    share = sum(d.size for d, out in zip(documents, sides, strict=True) if out) / n_tokens
    if share > 0.25 * held_out_fraction and 1.0 - share > 0.25 * (1.0 - held_out_fraction):
        return Split(
            train=[d for d, out in zip(documents, sides, strict=True) if not out],
            held_out=[d for d, out in zip(documents, sides, strict=True) if out],
            unit="document",
        )
    return _split_pieces(documents, held_out_fraction, n_tokens)


def _split_pieces(documents: Sequence[Document], held_out_fraction: float, n_tokens: int) -> Split:
    n_pieces = min(MAX_PIECES, math.ceil(4.0 / min(held_out_fraction, 1.0 - held_out_fraction)))
    length = max(1, n_tokens // n_pieces)
    pieces = [(i, d[start : start + length]) for i, d in enumerate(documents) for start in range(0, d.size, length)]
    by_hash = sorted(range(len(pieces)), key=lambda i: (digest(pieces[i][1]), i))
    reached = np.cumsum([pieces[i][1].size for i in by_hash])
    n_held_out = int(np.searchsorted(reached, held_out_fraction * n_tokens)) + 1
    held_out = frozenset(by_hash[: min(n_held_out, len(pieces) - 1)])

    sides: tuple[list[Document], list[Document]] = ([], [])
    for (_, out), run in groupby(range(len(pieces)), key=lambda i: (pieces[i][0], i in held_out)):
        sides[out].append(np.concatenate([pieces[i][1] for i in run]))
    return Split(train=sides[0], held_out=sides[1], unit="piece")
