"""Tasks: what they are (`Task`), those that come with the package, and how others are found."""

from .interface import Batch, Split, Task
from .lookup import TaskError, make_task, task_distribution, task_names

__all__ = ["Batch", "Split", "Task", "TaskError", "make_task", "task_distribution", "task_names"]
