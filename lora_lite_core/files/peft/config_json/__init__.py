"""PEFT's adapter_config.json: its fields and patterns, the modules that it selects, what is written of ours."""
