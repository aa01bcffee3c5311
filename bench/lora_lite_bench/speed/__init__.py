"""`lora-lite speed`: what adapters cost, beside PEFT and the frozen model."""
