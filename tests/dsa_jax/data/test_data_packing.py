"""Packing: rows against a literal example and against a token-by-token definition."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsa_jax.data.batch import pad_to, padding_rows, stack_rows
from dsa_jax.data.packing import epoch_order, make_stream, pack_rows


def stream_of(lengths):
    """Documents of the given lengths; token i of the stream is i + 1."""
    ends = np.cumsum(lengths)
    return make_stream([np.arange(end - n + 1, end + 1, dtype=np.uint16) for n, end in zip(lengths, ends, strict=True)])


def test_rows_of_four_documents():
    batch = pack_rows(stream_of([3, 1, 5, 2]), np.arange(3), 4)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 0]]
    assert batch.segment_ids.tolist() == [[1, 1, 1, 2], [1, 1, 1, 1], [1, 2, 2, 0]]
    assert batch.targets.tolist() == [[2, 3, 0, 0], [6, 7, 8, 9], [0, 11, 0, 0]]
    assert batch.target_mask.astype(int).tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [0, 1, 0, 0]]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=12), st.integers(1, 9))
def test_packing_matches_its_definition(lengths, seq_len):
    stream = stream_of(lengths)
    owner = np.repeat(np.arange(len(lengths)), lengths)
    n_rows = stream.n_rows(seq_len)
    batch = pack_rows(stream, np.arange(n_rows), seq_len)
    n = owner.size
    assert (n_rows - 1) * seq_len < n <= n_rows * seq_len

    flat = [array.reshape(-1) for array in batch]
    for position in range(n_rows * seq_len):
        ids, target, masked_in, segment = (array[position] for array in flat)
        if position >= n:
            assert (ids, target, masked_in, segment) == (0, 0, False, 0)
            continue
        row_start = position - position % seq_len
        has_target = position + 1 < n and owner[position + 1] == owner[position]
        assert ids == position + 1
        assert masked_in == has_target
        assert target == (position + 2 if has_target else 0)
        assert segment == owner[position] - owner[row_start] + 1
    # Every token but the last of each document is predicted from, wherever rows are cut.
    assert batch.target_mask.sum() == n - len(lengths)


def test_rows_are_random_access():
    stream = stream_of([30, 7, 64, 1, 1, 20])
    every = pack_rows(stream, np.arange(stream.n_rows(8)), 8)
    some = pack_rows(stream, np.array([9, 2, 2, 15]), 8)
    for whole, part in zip(every, some, strict=True):
        np.testing.assert_array_equal(part, whole[[9, 2, 2, 15]])


def test_epoch_order_visits_every_row_once_and_differs_by_entropy():
    orders = [epoch_order((2, seed, epoch), 100) for seed in (0, 1) for epoch in (0, 1)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(100))
    assert len({order.tobytes() for order in orders}) == 4
    with pytest.raises(ValueError, match="read-only"):
        orders[0][0] = 1


def test_padding_and_stacking():
    batch = pack_rows(stream_of([5, 4]), np.arange(3), 3)
    padded = pad_to(batch, 5)
    assert [array.shape for array in padded] == [(5, 3)] * 4
    assert [array.dtype for array in padded] == [array.dtype for array in batch]
    assert not padded.segment_ids[3:].any() and not padded.target_mask[3:].any()
    np.testing.assert_array_equal(padded.input_ids[:3], batch.input_ids)
    assert pad_to(batch, 3) is batch
    both = stack_rows([padding_rows(1, 3), batch])
    np.testing.assert_array_equal(both.input_ids[1:], batch.input_ids)
