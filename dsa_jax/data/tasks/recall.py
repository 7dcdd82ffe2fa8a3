"""Record-token recall: a task that only attention over the whole context can solve.

A record is one token that stands for a (key, value) pair. Records are scattered over the first three quarters of a row
among filler tokens; the last quarter is key queries, and the label at a query is the value of that key's record. Guessing
scores 1 / n_values. Accuracy is the argmax over the whole vocabulary against the target where `target_mask` is set.
"""

from typing import NamedTuple

import numpy as np

from dsa_jax.config import ConfigError, RecallConfig
from dsa_jax.data.batch import Batch


class RecallTask(NamedTuple):
    """The task with its vocabulary placed at `first_id`: keys, values, fillers, then records (key-major)."""

    first_id: int
    n_keys: int
    n_values: int
    n_fillers: int
    tokens_per_record: int

    @classmethod
    def from_config(cls, config: RecallConfig, first_id: int) -> "RecallTask":
        """The task that `config` describes, its vocabulary after the `first_id` tokens of the text tokenizer."""
        return cls(first_id, config.n_keys, config.n_values, config.n_fillers, config.tokens_per_record)

    @property
    def n_tokens(self) -> int:
        """Size of the task's own vocabulary."""
        return self.n_keys + self.n_values + self.n_fillers + self.n_keys * self.n_values

    @property
    def first_key(self) -> int:
        """Id of key 0."""
        return self.first_id

    @property
    def first_value(self) -> int:
        """Id of value 0."""
        return self.first_id + self.n_keys

    @property
    def first_filler(self) -> int:
        """Id of filler 0."""
        return self.first_value + self.n_values

    @property
    def first_record(self) -> int:
        """Id of the record (key 0, value 0); the record (k, v) is `first_record + k * n_values + v`."""
        return self.first_filler + self.n_fillers

    def n_records(self, seq_len: int) -> int:
        """Records in a row of `seq_len` tokens: `seq_len // tokens_per_record`, at least one.

        Raises:
            ConfigError: if the row has no room for a query, or needs more records than there are keys or places.
        """
        n = max(1, seq_len // self.tokens_per_record)
        if seq_len < 4:
            raise ConfigError(f"recall: seq_len is {seq_len}; expected at least 4, one query and three places for records.")
        if n > self.n_keys:
            raise ConfigError(
                f"recall: a row of {seq_len} tokens holds {n} records with distinct keys, but data.recall.n_keys is "
                f"{self.n_keys}. Raise data.recall.n_keys or data.recall.tokens_per_record ({self.tokens_per_record})."
            )
        if n > seq_len - seq_len // 4:
            raise ConfigError(
                f"recall: a row of {seq_len} tokens holds {n} records, but only {seq_len - seq_len // 4} places come before "
                f"the queries. Raise data.recall.tokens_per_record ({self.tokens_per_record}) to 2 or more."
            )
        return n


def recall_rows(task: RecallTask, rng: np.random.Generator, *, n_rows: int, seq_len: int) -> Batch:
    """Draw `n_rows` independent rows from `rng`; each is one segment.

    Args:
        task: the vocabulary and the density of records.
        rng: consumed; the same state gives the same bits.
        n_rows: rows to draw, zero allowed.
        seq_len: tokens per row; the last `seq_len // 4` are queries.

    Returns:
        A batch whose `target_mask` is set at the queries only and whose target there is a value token.

    Raises:
        ConfigError: if a row of that length cannot be made, see `RecallTask.n_records`.
    """
    n_records = task.n_records(seq_len)
    n_queries = seq_len // 4
    n_places = seq_len - n_queries

    keys = rng.permuted(np.tile(np.arange(task.n_keys), (n_rows, 1)), axis=1)[:, :n_records]
    values = rng.integers(task.n_values, size=(n_rows, n_records))
    # The n smallest of uniform draws are a uniform subset; sorting makes their order independent of the partition algorithm.
    places = np.argpartition(rng.random((n_rows, n_places)), n_records - 1, axis=1)[:, :n_records]
    places = np.sort(places, axis=1)
    asked = rng.integers(n_records, size=(n_rows, n_queries))

    row = np.arange(n_rows)[:, None]
    input_ids = np.empty((n_rows, seq_len), np.int32)
    input_ids[:, :n_places] = task.first_filler + rng.integers(task.n_fillers, size=(n_rows, n_places))
    input_ids[row, places] = task.first_record + keys * task.n_values + values
    input_ids[:, n_places:] = task.first_key + keys[row, asked]
    targets = np.zeros((n_rows, seq_len), np.int32)
    targets[:, n_places:] = task.first_value + values[row, asked]
    target_mask = np.zeros((n_rows, seq_len), np.bool_)
    target_mask[:, n_places:] = True
    return Batch(input_ids, targets, target_mask, np.ones((n_rows, seq_len), np.int32))
