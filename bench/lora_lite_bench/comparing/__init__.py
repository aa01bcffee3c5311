"""Methods against each other: which runs are made, side by side, and what the finished ones say."""
