"""Every lora-lite variant as a method of Hugging Face PEFT.

    from lora_lite_peft import LoraLiteConfig
    model = get_peft_model(model, LoraLiteConfig(variant="hra", r=8))

Importing this package enters the method "LORA_LITE" into PEFT's tables of methods; nothing of PEFT is replaced.
"""

from peft import mapping

from .config import LORA_LITE, LoraLiteConfig
from .tuner import LoraLiteModel

__all__ = ["LoraLiteConfig", "LoraLiteModel"]

mapping.PEFT_TYPE_TO_CONFIG_MAPPING[LORA_LITE] = LoraLiteConfig
mapping.PEFT_TYPE_TO_TUNER_MAPPING[LORA_LITE] = LoraLiteModel
mapping.PEFT_TYPE_TO_PREFIX_MAPPING[LORA_LITE] = LoraLiteModel.prefix
