"""Adapters on a model: targets, tensors, forward hooks, records, whole modules; attach, detach, disabled, coverage."""
