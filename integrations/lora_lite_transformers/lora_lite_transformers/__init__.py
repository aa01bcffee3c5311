"""lora-lite adapters in transformers' Trainer, in TRL's, and on the Hugging Face hub, without PEFT.

class MyTrainer(AdapterTrainer, SFTTrainer): ...
"""

from .hub import load_from_hub, push_to_hub
from .trainer import AdapterTrainer, adapter_trainer

__all__ = ["AdapterTrainer", "adapter_trainer", "load_from_hub", "push_to_hub"]
