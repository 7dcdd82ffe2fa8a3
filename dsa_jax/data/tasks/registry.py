"""The synthetic tasks by name: one list for training mixtures, evaluation, ablations and notebooks."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from dsa_jax.config import TASKS as TASK_NAMES
from dsa_jax.config.checks import one_of
from dsa_jax.data.batch import Batch
from dsa_jax.data.tasks.needles import N_DEPTHS, mqar_rows, multi_needle_rows, pair_depths, passkey_rows, record_depths
from dsa_jax.data.tasks.recall import recall_rows
from dsa_jax.data.tasks.setting import Draw, Setting
from dsa_jax.data.tasks.variables import variable_hops, variable_tracking_rows
from dsa_jax.data.tasks.words import answer_ranks, common_words_rows, frequent_words_rows


class Task(NamedTuple):
    """One synthetic task.

    Attributes:
        name: as in the config.
        make: draws rows with targets at their answers only, each one segment; ConfigError where rows of that length cannot be
            made, also for no rows.
        groups: group of each target, by which results are split: 0 to `n_groups` - 1; -1 where there is no target.
        grouping: what the groups are: depth (stretch of the row that holds the needle), hops, or rank.
        n_groups: how many there are.
        chance: accuracy of the best constant answer.
        summary: what the accuracy is a share of, for readers of a table.
    """

    name: str
    make: Callable[[Draw], Batch]
    groups: Callable[[Setting, Batch], Int[np.ndarray, "B T"]]
    grouping: str
    n_groups: Callable[[Setting], int]
    chance: Callable[[Setting], float]
    summary: str

    def rows(self, setting: Setting, rng: np.random.Generator, *, n_rows: int, seq_len: int) -> Batch:
        """Rows from `rng`, whose state decides every bit of them."""
        return self.make(Draw(self.name, setting, rng, n_rows, seq_len))


def _one_value(setting: Setting) -> float:
    return 1.0 / setting.symbols.n_values


def _by_depth(name: str, make: Callable[[Draw], Batch], summary: str, groups: Callable[..., Any] = record_depths) -> Task:
    return Task(name, make, groups, "depth", lambda _: N_DEPTHS, _one_value, summary)


def _by_rank(name: str, make: Callable[[Draw], Batch], summary: str) -> Task:
    one_word = lambda setting: 1.0 / setting.symbols.n_keys
    return Task(name, make, answer_ranks, "rank", lambda setting: setting.sizes.n_answers, one_word, summary)


def _recall_rows(draw: Draw) -> Batch:
    return recall_rows(draw.setting.symbols, draw.rng, n_rows=draw.n_rows, seq_len=draw.seq_len)


_TASKS = (
    _by_depth("recall", _recall_rows, "queries answered, every record asked for"),
    _by_depth("mqar", mqar_rows, "keys whose value, the token behind, was found", pair_depths),
    _by_depth("passkey", passkey_rows, "rows whose only record was found"),
    _by_depth("multi_needle", multi_needle_rows, "queries answered, with records that nobody asks for"),
    Task(
        "variable_tracking",
        variable_tracking_rows,
        variable_hops,
        "hops",
        lambda setting: setting.sizes.n_hops + 1,
        _one_value,
        "variables traced back through a chain of assignments to their value",
    ),
    _by_rank(
        "common_words",
        common_words_rows,
        "most frequent words listed right, from counts close together: every token of the row matters",
    ),
    _by_rank("frequent_words", frequent_words_rows, "most frequent words listed right, from counts that fall steeply"),
)
SYNTHETIC_TASKS = {task.name: task for task in _TASKS}
"""By name, in the order of `dsa_jax.config.TASKS`."""
assert tuple(SYNTHETIC_TASKS) == TASK_NAMES


def get_task(name: str) -> Task:
    """The task of that name.

    Raises:
        ConfigError: for an unknown one, with the nearest name.
    """
    one_of("the task", name, TASK_NAMES)
    return SYNTHETIC_TASKS[name]
