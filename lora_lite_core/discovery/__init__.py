"""Which variants there are: lookup by name, registration, the listing. Imports neither torch nor a plugin."""
