"""Sequence packing: rows of equal length cut from the stream of documents, with segment ids.

Row `r` of length L holds the tokens [r L, (r + 1) L) of the stream; the last row is padded. Row numbers are random access, so
a batch needs no state.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Int64, UInt, UInt32

from dsa_jax.data.batch import Batch, padding_rows


class TokenStream(NamedTuple):
    """Concatenated documents."""

    tokens: UInt[np.ndarray, " N"]
    starts: Int64[np.ndarray, " D"]  # position of the first token of each document, ascending from 0

    def n_rows(self, seq_len: int) -> int:
        """Number of rows of `seq_len`, the last one perhaps padded."""
        return -(-self.tokens.size // seq_len)


def make_stream(documents: Sequence[UInt[np.ndarray, " _"]]) -> TokenStream:
    """Concatenate `documents` (at least one)."""
    lengths = np.array([document.size for document in documents], np.int64)
    return TokenStream(tokens=np.concatenate(documents), starts=np.cumsum(lengths) - lengths)


def pack_rows(stream: TokenStream, row_numbers: Int[np.ndarray, " B"] | UInt[np.ndarray, " B"], seq_len: int) -> Batch:
    """The rows `row_numbers` of the stream.

    The target of a token is the next token of its own document, also where that token opens the next row; the last token of
    a document has none. Segments count from 1 in each row, and a document that began in an earlier row is segment 1.
    """
    batch = padding_rows(row_numbers.size, seq_len)
    for row, number in enumerate(row_numbers.tolist()):
        start = number * seq_len
        tokens = stream.tokens[start : start + seq_len]
        following = stream.tokens[start + 1 : start + seq_len + 1]
        first, last = np.searchsorted(stream.starts, (start + 1, start + seq_len + 1))
        boundaries = stream.starts[first:last] - start  # in 1 .. seq_len: where the row changes document

        batch.input_ids[row, : tokens.size] = tokens
        batch.targets[row, : following.size] = following
        batch.target_mask[row, : following.size] = True
        batch.targets[row, boundaries - 1] = 0
        batch.target_mask[row, boundaries - 1] = False
        changes = np.zeros(tokens.size, np.int32)
        changes[0] = 1
        changes[boundaries[boundaries < tokens.size]] = 1
        np.cumsum(changes, out=batch.segment_ids[row, : tokens.size])
    return batch


@lru_cache(maxsize=4)
def epoch_order(entropy: tuple[int, ...], n_rows: int) -> UInt32[np.ndarray, " n_rows"]:
    """A permutation of `n_rows` rows for one epoch, read-only; `entropy` names the seed and the epoch."""
    order = np.random.default_rng(entropy).permutation(np.arange(n_rows, dtype=np.uint32))
    order.setflags(write=False)
    return order
