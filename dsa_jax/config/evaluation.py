"""What is measured of a trained model."""

from dataclasses import dataclass

from dsa_jax.config.checks import ConfigError, shown
from dsa_jax.config.data import TASKS
from dsa_jax.config.limits import (
    AMOUNT,
    COUNT,
    LENGTH,
    ROWS,
    ROWS_IF_SET,
    Choices,
    limited,
)
from dsa_jax.config.selections import eval_rows

TEXT_TASKS = (
    "needle",
    "needle_multikey",
    "needle_multivalue",
    "needle_multiquery",
    "text_variables",
    "text_common_words",
    "text_frequent_words",
    "text_quote",
)
"""Tasks in plain words among held-out text, for models that know language. The place of a name is part of its rows' seed."""
ARGMAX, GENERATION, BOTH = "argmax", "generation", "both"
"""Scorings of text tasks: every token of an answer, given those before it; the answer in generated text; a column for each."""
GENERATION_ROOM = 64
"""Positions behind a row of a text task that its generated answers may take."""


@dataclass
class EvalConfig:
    """The parity table."""

    recall_len: int = limited(256, LENGTH)  # tokens of the rows of the recall task
    recall_sequences: int = limited(128, AMOUNT)  # rows of the recall task; 0: left out
    text_len: int = limited(128, LENGTH)  # tokens of the rows of held-out text
    text_sequences: int = limited(256, AMOUNT)  # rows of held-out text; 0: left out
    tasks: tuple[str, ...] = limited((), Choices(TASKS))  # synthetic tasks, a column each; they need not be in data.tasks
    task_len: int = limited(256, LENGTH)  # tokens of the rows of the synthetic tasks
    task_sequences: int = limited(128, COUNT)  # of each task
    loop_sequences: int = limited(16, COUNT)  # held-out rows of a look while training (train.STAGE.evaluate_every, train.gate)
    text_tasks: tuple[str, ...] = limited((), Choices(TEXT_TASKS))  # tasks in plain words among held-out text, a column each
    text_task_lens: tuple[int, ...] = limited((512,), LENGTH)  # tokens of their rows; every task is evaluated at each length
    text_task_sequences: int = limited(32, COUNT)  # rows of each text task at each length
    text_task_scoring: str = limited(
        ARGMAX, Choices((ARGMAX, GENERATION, BOTH))
    )  # argmax of the answer's tokens, each after the right ones; greedy generation that contains the answer; or both
    samples: int = limited(2, AMOUNT)  # held-out rows continued greedily, dense and sparse, for the report; 0: none
    batch_size: int = limited(16, ROWS_IF_SET)  # rows evaluated at a time; 0: one on each device, whatever the layout
    rows: tuple[str, ...] = limited(
        ("dense", "sparse", "untrained", "window", "sink_window", "oracle"), Choices(lambda: tuple(eval_rows()))
    )  # of {eval_rows}
    position_buckets: int = limited(8, ROWS)  # parts of a row that losses by position are means over

    def validate(self) -> None:
        if not self.rows:
            raise ConfigError("eval.rows is empty; expected a row of the parity table at least, such as ('dense', 'sparse').")
        if self.text_tasks and not self.text_task_lens:
            raise ConfigError(
                "eval.text_task_lens is empty, and eval.text_tasks is not; expected a length, such as (512, 2048)."
            )
        for name, chosen in (("task", self.tasks), ("text_task", self.text_tasks), ("row", self.rows)):
            if len(set(chosen)) != len(chosen):
                raise ConfigError(f"eval.{name}s names {shown(', '.join(chosen))}; expected each {name.split('_')[-1]} once.")
