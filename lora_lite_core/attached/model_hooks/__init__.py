"""Hooks of the whole model, where an adapter needs more than its layers: weights, steps, calls."""
