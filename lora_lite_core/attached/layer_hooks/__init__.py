"""The hooks of an adapted layer, and what stands on it."""
