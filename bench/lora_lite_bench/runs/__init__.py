"""One run: a method put on a base, trained, scored, saved and reloaded; and what it costs."""
