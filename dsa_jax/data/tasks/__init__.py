"""Synthetic long-context tasks over one small vocabulary, from one needle to counting words."""

from dsa_jax.data.tasks.registry import SYNTHETIC_TASKS, Task, get_task
from dsa_jax.data.tasks.setting import Setting

__all__ = ["SYNTHETIC_TASKS", "Setting", "Task", "get_task"]
