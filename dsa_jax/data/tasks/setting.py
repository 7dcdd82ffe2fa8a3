"""What the tasks share: one range of tokens, the sizes from the configuration, and the shape of a row.

Every task but recall speaks in recall's tokens (keys, values, fillers, records) and leads each row with a token of its own, by
which a model that trains on several can tell them apart. Behind recall's tokens lie one that opens an answer and then the
leading tokens, in the order of `dsa_jax.config.TASKS`: a checkpoint keeps its meaning whatever mixture it goes on with, and all
tasks together add seven tokens to a model that knows recall.

A row is its leading token, a body in which the needles, assignments or words lie among fillers, a gap of fillers, and the
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
    """The tokens that the tasks share and their sizes."""

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
        """Id of the token that leads the rows of `task`, which is any but recall."""
        return self.question + TASKS.index(task)


class Frame(NamedTuple):
    """A row cut up: the body is [1, body_end), the questions are [first_question, seq_len)."""

    seq_len: int
    body_end: int
    first_question: int

    @property
    def n_places(self) -> int:
        """Tokens of the body."""
        return self.body_end - 1


def make_frame(task: str, seq_len: int, *, n_questions: int, n_needed: int) -> Frame:
    """The frame of rows with `n_questions` questions.

    Raises:
        ConfigError: if the body has fewer than `n_needed` places.
    """
    first_question = seq_len - n_questions
    frame = Frame(seq_len, first_question - max(seq_len, 0) // 8, first_question)
    if frame.n_places < n_needed:
        raise ConfigError(
            f"{task}: a row of {seq_len} tokens has {max(frame.n_places, 0)} places before its questions; expected at least "
            f"{n_needed}. Use longer rows, or lower the sizes in data.task."
        )
    return frame


def n_questions(setting: Setting, seq_len: int) -> int:
    """Questions of the tasks that ask many: `data.task.n_queries`, at most a quarter of the row, at least one."""
    return max(1, min(setting.sizes.n_queries, seq_len // 4))


def require_keys(task: str, setting: Setting, needed: int, what: str) -> None:
    """Make sure that there are enough keys.

    Raises:
        ConfigError: saying `what` needs them.
    """
    if needed > setting.symbols.n_keys:
        raise ConfigError(
            f"{task}: {what} need {needed} distinct keys, but data.recall.n_keys is {setting.symbols.n_keys}. Raise it, or "
            "lower the sizes in data.task."
        )


def blank_rows(task: str, setting: Setting, rng: np.random.Generator, n_rows: int, frame: Frame) -> Batch:
    """Rows of fillers behind the leading token of `task`, every one a single segment, without a target so far."""
    shape = (n_rows, frame.seq_len)
    input_ids = rng.integers(setting.symbols.n_fillers, size=shape, dtype=np.int32) + np.int32(setting.symbols.first_filler)
    input_ids[:, 0] = setting.leading(task)
    return Batch(input_ids, np.zeros(shape, np.int32), np.zeros(shape, np.bool_), np.ones(shape, np.int32))


def draw_keys(setting: Setting, rng: np.random.Generator, n_rows: int, n: int) -> Int[np.ndarray, "B N"]:
    """`n` distinct keys, counted from 0, in random order for each row."""
    return rng.permuted(np.tile(np.arange(setting.symbols.n_keys), (n_rows, 1)), axis=1)[:, :n]


def draw_places(rng: np.random.Generator, frame: Frame, n_rows: int, n: int, width: int) -> Int[np.ndarray, "B N"]:
    """Ascending starts of `n` spans of `width` tokens that do not overlap, uniform over the body."""
    n_slots = frame.n_places - n * (width - 1)
    # The n smallest of uniform draws are a uniform subset.
    slots = np.argpartition(rng.random((n_rows, n_slots), dtype=np.float32), n - 1, axis=1)[:, :n]
    return 1 + np.sort(slots, axis=1) + np.arange(n) * (width - 1)


def first_places(batch: Batch, first_id: int, n: int) -> Int[np.ndarray, "B N"]:
    """Where each of the tokens `first_id`, ..., `first_id + n - 1` first stands in each row; the row's length: nowhere."""
    n_rows, seq_len = batch.input_ids.shape
    found = np.full((n_rows, n), seq_len)
    rows, places = np.nonzero((batch.input_ids >= first_id) & (batch.input_ids < first_id + n))
    np.minimum.at(found, (rows, batch.input_ids[rows, places] - first_id), places)
    return found
