"""The tasks in words, and the language model that comes with the package."""
