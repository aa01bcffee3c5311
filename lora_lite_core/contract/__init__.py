"""What an author sees: hooks and their arguments, ParamSpec, configs, the checked variant, typed errors, their text."""
