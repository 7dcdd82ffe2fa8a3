"""The recall task: every row is solvable, labelled right, and drawn as described."""

import numpy as np
import pytest

from dsa_jax.config import ConfigError, RecallConfig
from dsa_jax.data import RecallTask, recall_rows

TASK = RecallTask.from_config(RecallConfig(), first_id=257)


def draw(task=TASK, seed=0, n_rows=16, seq_len=256):
    return recall_rows(task, np.random.default_rng(seed), n_rows=n_rows, seq_len=seq_len)


def test_the_vocabulary_is_keys_values_fillers_records_after_the_text():
    small = RecallTask(first_id=10, n_keys=2, n_values=3, n_fillers=4, tokens_per_record=4)
    assert (small.first_key, small.first_value, small.first_filler, small.first_record) == (10, 12, 15, 19)
    assert small.n_tokens == 2 + 3 + 4 + 6
    assert TASK.n_tokens == 360


@pytest.mark.parametrize("seq_len", [4, 15, 64, 250, 256])
def test_every_query_is_answered_by_a_record_of_its_row(seq_len):
    batch = draw(seq_len=seq_len)
    n_queries, n_records = seq_len // 4, max(1, seq_len // 16)
    for ids, targets, mask in zip(batch.input_ids, batch.targets, batch.target_mask, strict=True):
        body, queries = ids[: seq_len - n_queries], ids[seq_len - n_queries :]
        records = body[body >= TASK.first_record] - TASK.first_record
        value_of = dict(zip((records // TASK.n_values).tolist(), (records % TASK.n_values).tolist(), strict=True))
        assert len(records) == len(value_of) == n_records  # distinct keys
        assert np.all((body >= TASK.first_filler) & (body < TASK.first_id + TASK.n_tokens))
        expected = [TASK.first_value + value_of[query - TASK.first_key] for query in queries.tolist()]
        assert targets[seq_len - n_queries :].tolist() == expected
        assert mask.tolist() == [False] * (seq_len - n_queries) + [True] * n_queries
        assert not targets[: seq_len - n_queries].any()
    assert np.all(batch.segment_ids == 1)


def test_records_keys_values_and_places_are_spread_evenly():
    batch = draw(n_rows=2000, seq_len=64)
    is_record = batch.input_ids[:, :48] >= TASK.first_record
    records = batch.input_ids[:, :48][is_record] - TASK.first_record
    # 8000 records over 48 places, 32 keys, 8 values: five standard deviations of a binomial count.
    for counts, share in [
        (is_record.sum(0), 1 / 48),
        (np.bincount(records // 8, minlength=32), 1 / 32),
        (np.bincount(records % 8, minlength=8), 1 / 8),
    ]:
        assert np.all(np.abs(counts - 8000 * share) < 5 * np.sqrt(8000 * share))


def test_all_keys_can_be_asked_for_in_one_row():
    batch = draw(RecallTask(0, 16, 4, 8, 4), seq_len=64)
    assert batch.input_ids.shape == (16, 64)


def test_no_rows():
    assert draw(n_rows=0).input_ids.shape == (0, 256)


@pytest.mark.parametrize(
    ("task", "seq_len", "message"),
    [
        (TASK, 3, "seq_len is 3"),
        (TASK, 1024, r"holds 64 records .* data\.recall\.n_keys is 32"),
        (RecallTask(0, 32, 4, 8, 1), 8, "only 6 places"),
    ],
    ids=["no_query", "too_few_keys", "too_few_places"],
)
def test_a_row_that_cannot_be_made_is_refused(task, seq_len, message):
    with pytest.raises(ConfigError, match=message):
        draw(task, seq_len=seq_len)
