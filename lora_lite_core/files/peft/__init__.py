"""PEFT's folders: their layout, any adapter as a LoRA for servers, PEFT's own formats out and in."""
