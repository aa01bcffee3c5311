"""Which adapters act, in which order, how strong, and on which rows of a batch."""
