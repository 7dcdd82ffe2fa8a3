"""A batch of token rows with their targets, stacked and padded."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32


class Batch(NamedTuple):
    """Rows of tokens and the target of each position.

    A position outside `target_mask` has target 0 and counts in no loss. A target always lies in the same segment as its
    position; the last position of a row may have one, because targets are not made by shifting the row.
    """

    input_ids: Int32[np.ndarray, "B T"]
    targets: Int32[np.ndarray, "B T"]
    target_mask: Bool[np.ndarray, "B T"]
    segment_ids: Int32[np.ndarray, "B T"]  # 0: padding; 1, 2, ...: the packed segments in order within the row


def padding_rows(n_rows: int, seq_len: int) -> Batch:
    """Padding rows: token 0, no target, segment 0. A fresh, writable batch."""
    shape = (n_rows, seq_len)
    return Batch(*(np.zeros(shape, dtype) for dtype in (np.int32, np.int32, np.bool_, np.int32)))


def stack_rows(batches: Sequence[Batch]) -> Batch:
    """The rows of `batches` in order, as one batch."""
    if len(batches) == 1:
        return batches[0]
    return Batch(*(np.concatenate(arrays) for arrays in zip(*batches, strict=True)))


def pad_to(batch: Batch, n_rows: int) -> Batch:
    """`batch` with padding rows appended until it has `n_rows`."""
    missing = n_rows - batch.input_ids.shape[0]
    return stack_rows([batch, padding_rows(missing, batch.input_ids.shape[1])]) if missing else batch
