"""Base layers: kinds and sizes, reading a weight, its sketch, 4-bit packing. Knows nothing of adapters."""
