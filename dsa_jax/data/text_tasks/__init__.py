"""Tasks in plain words among the user's own text, through the checkpoint's tokenizer, in the manner of RULER."""

from dsa_jax.data.text_tasks.registry import TEXT_TASKS, TextTask, generated, get_text_task
from dsa_jax.data.text_tasks.rows import Answers, Haystack, TextRows, make_haystack, stack_text_rows

__all__ = [
    "TEXT_TASKS",
    "Answers",
    "Haystack",
    "TextRows",
    "TextTask",
    "generated",
    "get_text_task",
    "make_haystack",
    "stack_text_rows",
]
