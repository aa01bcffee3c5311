"""What runs and timings need of the machine: its processes, its memory, an end on request."""
