"""The command line: `lora-lite` with its commands, and `lora-lite new` with its templates."""

from .commands import config_fields, main, variant_at

__all__ = ["config_fields", "main", "variant_at"]
