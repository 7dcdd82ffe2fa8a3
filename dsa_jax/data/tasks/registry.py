"""The synthetic tasks by name: one list for training mixtures, evaluation, ablations and notebooks."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Int

from dsa_jax.config import TASKS as TASK_NAMES
from dsa_jax.config.checks import one_of
from dsa_jax.data.batch import Batch
from dsa_jax.data.tasks.needles import (
    N_DEPTHS,
    mqar_rows,
    multi_needle_rows,
    pair_depths,
    passkey_rows,
    record_depths,
)
from dsa_jax.data.tasks.recall import recall_rows
from dsa_jax.data.tasks.setting import Setting
from dsa_jax.data.tasks.variables import variable_hops, variable_tracking_rows
from dsa_jax.data.tasks.words import answer_ranks, common_words_rows, frequent_words_rows


class Rows(Protocol):
    """Draws `n_rows` (zero allowed: sizes are checked all the same) independent rows of `seq_len` tokens from `rng`.

    Each row is one segment with targets at its answers only; the same state of `rng` gives the same bits.

    Raises:
        ConfigError: if rows of that length cannot be made.
    """

    def __call__(self, setting: Setting, rng: np.random.Generator, *, n_rows: int, seq_len: int) -> Batch:
        """The rows."""
        ...


class Task(NamedTuple):
    """One synthetic task.

    Attributes:
        rows: draws rows.
        groups: of each target, by which results are told apart: 0 to `n_groups` - 1; -1 where there is no target.
        grouping: what the groups are: depth (stretch of the row that holds the needle), hops, or rank.
        n_groups: how many there are.
        chance: accuracy of the best answer that is always the same.
        summary: what the accuracy is a share of, for readers of a table.
    """

    rows: Rows
    groups: Callable[[Setting, Batch], Int[np.ndarray, "B T"]]
    grouping: str
    n_groups: Callable[[Setting], int]
    chance: Callable[[Setting], float]
    summary: str


def _recall(setting: Setting, rng: np.random.Generator, *, n_rows: int, seq_len: int) -> Batch:
    return recall_rows(setting.symbols, rng, n_rows=n_rows, seq_len=seq_len)


def _one_value(setting: Setting) -> float:
    return 1.0 / setting.symbols.n_values


def _one_word(setting: Setting) -> float:
    return 1.0 / setting.symbols.n_keys


def _n_depths(setting: Setting) -> int:
    del setting
    return N_DEPTHS


TASKS = {
    "recall": Task(_recall, record_depths, "depth", _n_depths, _one_value, "queries answered, every record asked for"),
    "mqar": Task(mqar_rows, pair_depths, "depth", _n_depths, _one_value, "keys whose value, the token behind, was found"),
    "passkey": Task(passkey_rows, record_depths, "depth", _n_depths, _one_value, "rows whose only record was found"),
    "multi_needle": Task(
        multi_needle_rows, record_depths, "depth", _n_depths, _one_value, "queries answered, with records that nobody asks for"
    ),
    "variable_tracking": Task(
        variable_tracking_rows,
        variable_hops,
        "hops",
        lambda setting: setting.sizes.n_hops + 1,
        _one_value,
        "variables traced back through a chain of assignments to their value",
    ),
    "common_words": Task(
        common_words_rows,
        answer_ranks,
        "rank",
        lambda setting: setting.sizes.n_answers,
        _one_word,
        "most frequent words listed right, from counts close together: every token of the row matters",
    ),
    "frequent_words": Task(
        frequent_words_rows,
        answer_ranks,
        "rank",
        lambda setting: setting.sizes.n_answers,
        _one_word,
        "most frequent words listed right, from counts that fall steeply",
    ),
}
assert tuple(TASKS) == TASK_NAMES


def get_task(name: str) -> Task:
    """The task of that name.

    Raises:
        ConfigError: for an unknown one, with the nearest name.
    """
    one_of("the task", name, TASK_NAMES)
    return TASKS[name]
