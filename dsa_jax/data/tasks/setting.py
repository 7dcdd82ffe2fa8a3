"""Vocabulary, sizes and row layout that the tasks share.

Every task but recall uses recall's tokens (keys, values, fillers, records) and starts each row with a token of its own, which
tells a model that trains on several which task it is. Recall's tokens are followed by one that opens an answer and then the
leading tokens, in the order of `dsa_jax.config.TASKS`: a checkpoint keeps its meaning whatever mixture it is trained on next,
and all tasks together add seven tokens to a model that knows recall.

A row is its leading token, a body with the needles, assignments or words among fillers, a gap of fillers, and the
questions. The gap is an eighth of the row (rounded down): at the first question a window of w tokens in n layers reaches
n (w - 1) tokens back, which is inside the gap, so such a window can only guess, unless n (w - 1) is more than the gap.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from dsa_jax.config import TASKS, ConfigError, TaskConfig
from dsa_jax.data.batch import Batch
from dsa_jax.data.tasks.recall import RecallTask


class Setting(NamedTuple):
    """The vocabulary that the tasks share, and their sizes."""

    symbols: RecallTask
    sizes: TaskConfig

    @property
    def question(self) -> int:
        """Id of the token that opens an answer of several tokens."""
        return self.symbols.first_id + self.symbols.n_tokens

    @property
    def end(self) -> int:
        """One past the last id of all tasks: the vocabulary that a model needs to have."""
        return self.question + len(TASKS)

    def leading(self, task: str) -> int:
        """Id of the first token of the rows of `task`, which is any but recall."""
        return self.question + TASKS.index(task)


class Frame(NamedTuple):
    """Layout of a row: the body is [1, body_end), the questions are [first_question, seq_len)."""

    body_end: int
    first_question: int

    @property
    def n_places(self) -> int:
        """Tokens of the body."""
        return self.body_end - 1


class Draw(NamedTuple):
    """A request for `n_rows` independent rows of `seq_len` tokens of a task, drawn from `rng`; all that makes a row."""

    task: str
    setting: Setting
    rng: np.random.Generator
    n_rows: int
    seq_len: int

    @property
    def n_questions(self) -> int:
        """Questions of a row where there are many: `data.task.n_queries`, at most a quarter of the row, at least one."""
        return max(1, min(self.setting.sizes.n_queries, self.seq_len // 4))

    def require_keys(self, needed: int, what: str) -> None:
        """Check that there are enough keys; else a ConfigError says that `what` need them."""
        if needed > self.setting.symbols.n_keys:
            raise ConfigError(
                f"{self.task}: {what} need {needed} distinct keys, but data.recall.n_keys is {self.setting.symbols.n_keys}. "
                "Raise it, or lower the sizes in data.task."
            )

    def frame(self, *, n_questions: int, n_needed: int) -> Frame:
        """The layout of rows with `n_questions` questions.

        Raises:
            ConfigError: if the body has fewer than `n_needed` places.
        """
        first_question = self.seq_len - n_questions
        frame = Frame(first_question - max(self.seq_len, 0) // 8, first_question)
        if frame.n_places < n_needed:
            raise ConfigError(
                f"{self.task}: a row of {self.seq_len} tokens has {max(frame.n_places, 0)} places before its questions; "
                f"expected at least {n_needed}. Use longer rows, or lower the sizes in data.task."
            )
        return frame

    def fillers(self) -> Batch:
        """Rows of fillers after the leading token of the task, each a single segment, without targets."""
        symbols, shape = self.setting.symbols, (self.n_rows, self.seq_len)
        input_ids = self.rng.integers(symbols.n_fillers, size=shape, dtype=np.int32) + np.int32(symbols.first_filler)
        input_ids[:, 0] = self.setting.leading(self.task)
        return Batch(input_ids, np.zeros(shape, np.int32), np.zeros(shape, np.bool_), np.ones(shape, np.int32))

    def subset(self, total: int, n: int) -> Int[np.ndarray, "B N"]:
        """`n` distinct numbers below `total`, in random order, for each row."""
        return self.rng.permuted(np.tile(np.arange(total), (self.n_rows, 1)), axis=1)[:, :n]

    def places(self, frame: Frame, n: int, width: int) -> Int[np.ndarray, "B N"]:
        """Ascending starts of `n` disjoint spans of `width` tokens, uniform over the body."""
        n_slots = frame.n_places - n * (width - 1)
        # The n smallest of uniform draws are a uniform subset.
        slots = np.argpartition(self.rng.random((self.n_rows, n_slots), dtype=np.float32), n - 1, axis=1)[:, :n]
        return 1 + np.sort(slots, axis=1) + np.arange(n) * (width - 1)


def ask(batch: Batch, frame: Frame, questions: Int[np.ndarray, "B Q"], answers: Int[np.ndarray, "B Q"]) -> Batch:
    """`batch` with the tokens of its questions, and their answers as targets; in place."""
    batch.input_ids[:, frame.first_question :] = questions
    batch.targets[:, frame.first_question :] = answers
    batch.target_mask[:, frame.first_question :] = True
    return batch


def first_places(batch: Batch, first_id: int, n: int) -> Int[np.ndarray, "B N"]:
    """First position of each token `first_id`, ..., `first_id + n - 1` in each row; the row's length where it is absent."""
    n_rows, seq_len = batch.input_ids.shape
    found = np.full((n_rows, n), seq_len)
    rows, places = np.nonzero((batch.input_ids >= first_id) & (batch.input_ids < first_id + n))
    np.minimum.at(found, (rows, batch.input_ids[rows, places] - first_id), places)
    return found
