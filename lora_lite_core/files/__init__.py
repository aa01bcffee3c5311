"""Adapters on disk: the file format, save, load, the check of the base; PEFT's folders in files/peft."""
