"""Which layers an adapter goes on."""
