"""Adapters for inference servers: as a plain LoRA, by the served model's names, with a prompt that proves it works."""
