"""Tasks: what they are (`Task`), those that come with the package, and how others are found."""

from .interface import Batch, Protocol, Recipe, Split, Task, rows
from .lookup import TaskError, make_task, protocol_of, small_task_names, task_class, task_distribution, task_names

__all__ = [
    "Batch",
    "Protocol",
    "Recipe",
    "Split",
    "Task",
    "TaskError",
    "make_task",
    "protocol_of",
    "rows",
    "small_task_names",
    "task_class",
    "task_distribution",
    "task_names",
]
