"""`python -m lora_lite_core` is `lora-lite`."""

from .cli.commands import main

if __name__ == "__main__":
    main(prog_name="lora-lite")
